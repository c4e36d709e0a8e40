"""Frozen batch norms computed by the convolutions before them: one pass over a map instead of three."""

import itertools
from collections.abc import Callable
from typing import Any

import torch
from timm.layers.norm_act import FrozenBatchNormAct2d
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d


class NormedConv(nn.Conv2d):
    """A convolution and the frozen norm behind it, which multiplies its weight and sets its bias.

    ``scale`` (C, 1, 1, 1) and ``shift`` (C,) of the norm are computed when its numbers come, not at every
    call. Without a scale, the weight has it already.
    """

    scale: Tensor | None
    shift: Tensor

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight if self.scale is None else self.weight * self.scale
        return self._conv_forward(x, weight, self.shift)


class _Applied:
    """A norm that the convolution before applies, which learns of its numbers."""

    conv: tuple[NormedConv]  # in a tuple, so that it is no submodule

    def fold(self: Any) -> None:
        conv = self.conv[0]
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        conv.register_buffer("scale", scale[:, None, None, None], persistent=False)
        conv.register_buffer("shift", self.bias - self.running_mean * scale, persistent=False)

    def _load_from_state_dict(self: Any, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)  # type: ignore[misc]
        with torch.no_grad():
            self.fold()


class _AppliedNorm(_Applied, FrozenBatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return x


class _AppliedNormAct(_Applied, FrozenBatchNormAct2d):
    """With an activation, which is left to do."""

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(x))


APPLIED: dict[type[nn.Module], Callable[..., Any]] = {
    FrozenBatchNorm2d: _AppliedNorm,
    FrozenBatchNormAct2d: _AppliedNormAct,
}


def fold_frozen_norms(body: nn.Module) -> None:
    """Let every convolution without bias apply the frozen batch norm that follows it in its parent, in place.

    Parameters, buffers in ``state_dict`` and their names stay as they are.
    """
    for parent in list(body.modules()):
        for conv, norm in itertools.pairwise(parent.children()):
            if type(conv) is nn.Conv2d and type(norm) in APPLIED and conv.bias is None:
                conv.__class__, norm.__class__ = NormedConv, APPLIED[type(norm)]  # type: ignore[assignment]
                norm.conv = (conv,)  # type: ignore[assignment]
                norm.fold()  # type: ignore[operator]
