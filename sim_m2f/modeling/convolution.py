"""Products and convolutions that a CPU computes faster than PyTorch's own, as exactly."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

UNIT = (1, 1)


def convolution(conv: nn.Conv2d, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """What ``conv`` computes of x with this weight and bias.

    On a CPU PyTorch's gradient of a 3 x 3 weight takes several times the forward pass where maps are channels
    last; here it is nine matrix products of shifted maps.
    """
    shape = conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups, conv.padding_mode
    shifted = shape == ((3, 3), UNIT, UNIT, UNIT, 1, "zeros") and x.dtype == torch.float32
    if shifted and weight.requires_grad and _learns_on_cpu(x):
        return _Convolution3x3.apply(x, weight, bias)
    return conv._conv_forward(x, weight, bias)


def _learns_on_cpu(x: Tensor) -> bool:
    """Whether a CPU computes with x what gradients are wanted of, in its own precision."""
    own = x.device.type == "cpu" and torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")
    return own and not torch.compiler.is_compiling()


class _Convolution3x3(torch.autograd.Function):
    """3 x 3, stride and padding 1."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.conv2d(x, weight, bias, padding=1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (x, weight), (of_x, of_weight, of_bias) = ctx.saved_tensors, ctx.needs_input_grad
        options = UNIT, UNIT, UNIT, False, (0, 0), 1, (True, False, False)
        return (
            torch.ops.aten.convolution_backward(gradient, x, weight, None, *options)[0] if of_x else None,
            _of_weight(gradient, x, weight) if of_weight else None,
            gradient.sum((0, 2, 3)) if of_bias else None,
        )


def _of_weight(gradient: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """The gradient of a 3 x 3 weight, from that of the result.

    Both maps get a border of zeros, and their pixels are rows: a neighbour is then a fixed number of rows on.
    """
    result = torch.empty_like(weight, memory_format=torch.channels_last)
    rows, line = _bordered(x), x.shape[3] + 2
    inner = slice(line + 1, len(rows) - line - 1)
    own = _bordered(gradient)[inner].T
    for y in range(3):
        for x_shift in range(3):
            there = (y - 1) * line + x_shift - 1
            shifted = rows[inner.start + there : inner.stop + there]
            torch.mm(own, shifted, out=result[:, :, y, x_shift])
    return result


def _bordered(maps: Tensor) -> Tensor:
    """(B, C, H, W) to (B * (H + 2) * (W + 2), C), zeros on the border."""
    return F.pad(maps.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1)).flatten(0, 2)


def mask_product(embedding: Tensor, features: Tensor) -> Tensor:
    """(B, N, D) times (B, D, P), the mask logits (B, N, P) of N queries at P pixels.

    On a CPU the backward pass leaves out queries whose masks have no gradient, most of them: losses read the
    masks that an object has claimed.
    """
    return _MaskProduct.apply(embedding, features) if _learns_on_cpu(embedding) else embedding @ features


class _MaskProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, embedding: Tensor, features: Tensor) -> Tensor:
        ctx.save_for_backward(embedding, features)
        return embedding @ features

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        embedding, features = ctx.saved_tensors
        of_embedding, of_features = torch.zeros_like(embedding), torch.empty_like(features)
        for image, own in enumerate(gradient):
            rows = own.abs().amax(-1).nonzero().flatten()
            read = own[rows]
            of_embedding[image, rows] = read @ features[image].T
            torch.mm(embedding[image, rows].T, read, out=of_features[image])
        return of_embedding, of_features


class PixelLinear(nn.Linear):
    """nn.Linear for (B, S, width), S being pixels.

    In inference on a CPU it is computed as the 1 x 1 convolution that it is: PyTorch's convolutions reach
    more of the processor's speed than its matrix products.
    """

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu" or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return super().forward(x)
        maps = x[:, :, None].permute(0, 3, 1, 2)
        return F.conv2d(maps, self.weight[:, :, None, None], self.bias).permute(0, 2, 3, 1).flatten(1, 2)
