"""Activation checkpointing: a block keeps its input for the backward pass; the rest is computed again."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

State = list[tuple[nn.Module, dict[str, Any], Any]]  # modules, their parameters, and ``NormedConv.given``


class RecomputedBlocks(nn.Sequential):
    """Blocks that keep their inputs alone."""

    def forward(self, x: Tensor) -> Tensor:
        for block in self:
            x = recomputed(block, x)
        return x


def recompute_blocks(body: nn.Module) -> None:
    """Let a network's blocks, the parts of its innermost sequences of modules, keep their inputs alone."""
    sequences = [module for module in body.modules() if _is_sequence_of_blocks(module)]
    for sequence in sequences:
        if not any(_is_sequence_of_blocks(inner) for inner in sequence.modules() if inner is not sequence):
            sequence.__class__ = RecomputedBlocks


def _is_sequence_of_blocks(module: nn.Module) -> bool:
    parts = list(module.children())
    return isinstance(module, nn.Sequential) and bool(parts) and all(any(part.children()) for part in parts)


def recomputed(block: nn.Module, *inputs: Any) -> Any:
    """``block(*inputs)``; in training what it computes inside is not kept for the backward pass.

    The second time it has the same random state and the same weights (``low_precision`` lends it others for
    the first), and batch norms do not count the batch again.
    """
    if not (block.training and torch.is_grad_enabled()):
        return block(*inputs)
    state = _state(*block.modules())
    return checkpoint(
        block, *inputs, use_reentrant=False, context_fn=lambda: (nullcontext(), _second_time(state))
    )


def _state(*parts: nn.Module) -> State:
    return [(part, dict(part._parameters), getattr(part, "given", None)) for part in parts]


def _set(state: State) -> None:
    for part, parameters, given in state:
        part._parameters.update(parameters)
        if hasattr(part, "given"):
            part.given = given


@contextmanager
def _second_time(state: State) -> Iterator[None]:
    now = _state(*(part for part, _, _ in state))
    momenta = [(part, part.momentum) for part, _, _ in state if isinstance(part, _BatchNorm)]
    try:
        _set(state)
        for norm, _ in momenta:
            norm.momentum = 0.0
        yield
    finally:
        _set(now)
        for norm, momentum in momenta:
            norm.momentum = momentum
