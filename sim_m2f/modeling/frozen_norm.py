"""Frozen batch norms computed by the convolutions before them: one pass over a map instead of three."""

import itertools

from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d


class _NormedConv(nn.Conv2d):
    """A convolution and the frozen norm behind it, which multiplies its weight and sets its bias."""

    norm: tuple[FrozenBatchNorm2d]  # in a tuple, so that it is no submodule of this one

    def forward(self, x: Tensor) -> Tensor:
        norm = self.norm[0]
        scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
        weight = self.weight * scale[:, None, None, None]
        return self._conv_forward(x, weight, norm.bias - norm.running_mean * scale)


class _AppliedNorm(FrozenBatchNorm2d):
    """A norm that the convolution before has applied."""

    def forward(self, x: Tensor) -> Tensor:
        return x


def fold_frozen_norms(body: nn.Module) -> None:
    """Let every convolution without bias apply the FrozenBatchNorm2d that follows it in its parent, in place.

    Parameters, buffers and their names stay as they are.
    """
    for parent in body.modules():
        for conv, norm in itertools.pairwise(parent.children()):
            if type(conv) is nn.Conv2d and type(norm) is FrozenBatchNorm2d and conv.bias is None:
                conv.__class__, norm.__class__ = _NormedConv, _AppliedNorm
                conv.norm = (norm,)  # type: ignore[assignment]
