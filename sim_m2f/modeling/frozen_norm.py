"""Frozen batch norms computed by the convolutions before them: one pass over a map instead of three."""

import itertools
from typing import Any

from timm.layers.norm_act import FrozenBatchNormAct2d
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d


class NormedConv(nn.Conv2d):
    """A convolution and the frozen norm behind it, which multiplies its weight and sets its bias."""

    norm: tuple[Any]  # in a tuple, so that it is no submodule
    lowered: tuple[Tensor, Tensor] | None  # weight and bias in another precision, see ``low_precision``

    def folded(self) -> tuple[Tensor, Tensor]:
        """Weight and bias of both."""
        (norm,) = self.norm
        scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
        return self.weight * scale[:, None, None, None], norm.bias - norm.running_mean * scale

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, *(self.lowered or self.folded()))


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
                conv.norm, conv.lowered = (norm,), None  # type: ignore[assignment]
