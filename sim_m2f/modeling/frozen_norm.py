"""Frozen batch norms computed by the convolutions before them: one pass over a map instead of three."""

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from timm.layers.norm_act import FrozenBatchNormAct2d
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from sim_m2f.modeling.convolution import convolution


class NormedConv(nn.Conv2d):
    """A convolution and the frozen norm behind it, which multiplies its weight and sets its bias."""

    norm: tuple[Any]  # in a tuple, so that it is no submodule
    given: tuple[Tensor, Tensor] | None  # weight and bias of both, see ``low_precision``

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.given or (both[0] for both in folded([self]))
        return convolution(self, x, weight, bias)


def folded(convs: Sequence[NormedConv]) -> tuple[list[Tensor], list[Tensor]]:
    """Weights and biases of convolutions with their norms, of all of them in a few calls."""
    norms = [conv.norm[0] for conv in convs]
    deviations = torch._foreach_add([norm.running_var for norm in norms], [norm.eps for norm in norms])
    scales = torch._foreach_mul(torch._foreach_rsqrt(deviations), [norm.weight for norm in norms])
    moved = torch._foreach_mul([norm.running_mean for norm in norms], scales)
    biases = torch._foreach_sub([norm.bias for norm in norms], moved)
    factors = [scale.view(-1, 1, 1, 1) for scale in scales]
    return scaled([conv.weight for conv in convs], factors), list(biases)


def scaled(weights: Sequence[Tensor], factors: Sequence[Tensor]) -> list[Tensor]:
    """The products of pairs; those whose weight learns, and the others, by a call each."""
    result: dict[int, Tensor] = {}
    for learning in (True, False):
        some = [index for index, weight in enumerate(weights) if weight.requires_grad == learning]
        if some:
            own = [factors[index] for index in some]
            products = _Scaled.apply(own, *(weights[index] for index in some))
            result |= zip(some, products, strict=True)
    return [result[index] for index in range(len(weights))]


class _Scaled(torch.autograd.Function):
    """Products of tensors with factors that do not learn, and their gradients, by one fused call each way."""

    @staticmethod
    def forward(ctx: Any, factors: Sequence[Tensor], *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.factors = factors
        ctx.set_materialize_grads(False)
        return tuple(torch._foreach_mul(list(tensors), list(factors)))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        pairs = [pair for pair in zip(gradients, ctx.factors, strict=True) if pair[0] is not None]
        products = iter(torch._foreach_mul(*map(list, zip(*pairs, strict=True))))
        return None, *(None if gradient is None else next(products) for gradient in gradients)


class _AppliedNorm(FrozenBatchNorm2d):
    """A norm that the convolution before has applied."""

    def forward(self, x: Tensor) -> Tensor:
        return x


class _AppliedNormAct(FrozenBatchNormAct2d):
    """A norm with an activation, of which the convolution before has applied the norm."""

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(x))


APPLIED: dict[type[nn.Module], type[nn.Module]] = {
    FrozenBatchNorm2d: _AppliedNorm,
    FrozenBatchNormAct2d: _AppliedNormAct,
}


def fold_frozen_norms(body: nn.Module) -> None:
    """Let every convolution without bias apply the frozen batch norm that follows it in its parent, in place.

    Parameters, buffers and their names stay as they are.
    """
    for parent in body.modules():
        for conv, norm in itertools.pairwise(parent.children()):
            if type(conv) is nn.Conv2d and type(norm) in APPLIED and conv.bias is None:
                conv.__class__, norm.__class__ = NormedConv, APPLIED[type(norm)]
                conv.norm, conv.given = (norm,), None  # type: ignore[assignment]
