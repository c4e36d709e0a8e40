"""Convolutions whose weights' gradient is fast on a CPU as well."""

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
    shifted = x.device.type == "cpu" and x.dtype == torch.float32 and weight.requires_grad
    shape = conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups, conv.padding_mode
    if (
        not shifted
        or shape != ((3, 3), UNIT, UNIT, UNIT, 1, "zeros")
        or not torch.is_grad_enabled()
        or torch.is_autocast_enabled("cpu")
        or torch.compiler.is_compiling()
    ):
        return conv._conv_forward(x, weight, bias)
    return _Convolution3x3.apply(x, weight, bias)


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
