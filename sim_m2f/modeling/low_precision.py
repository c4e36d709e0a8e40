"""Weights in autocast's precision, cast all together; autocast itself casts each one where it is used."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sim_m2f.modeling.frozen_norm import NormedConv, folded

Place = tuple[dict[str, Any], str]  # parameters or buffers of a module, and the name of one
LOWERED = nn.Linear, nn.Conv2d, nn.MultiheadAttention  # what autocast computes in low precision


def lowered(x: Tensor) -> Tensor:
    """In autocast's precision where autocast is on."""
    dtype = _autocast_dtype(x.device)
    return x.to(dtype) if dtype else x


@contextmanager
def lowered_weights(network: nn.Module) -> Iterator[None]:
    """The weights of the network's linear layers and convolutions are in autocast's precision meanwhile.

    Those of a convolution with a frozen norm are multiplied by it first, also where autocast is off.
    Gradients reach the weights themselves.
    """
    if torch.compiler.is_compiling():  # what is traced has them as they are, and is fused by the compiler
        yield
        return
    dtype = _autocast_dtype(next(network.parameters()).device)
    normed = [module for module in network.modules() if isinstance(module, NormedConv)]
    places = _places(network) if dtype else []
    kept = [own[name] for own, name in places]
    weights, biases = folded(normed) if normed else ([], [])
    values = [*kept, *weights, *biases]
    copies = iter(_lower(values, dtype) if dtype else values)
    del weights, biases, values  # which the network does not need in float32 beside their copies
    try:
        for (own, name), copy in zip(places, copies, strict=False):
            own[name] = copy
        given = list(copies)
        for conv, weight, bias in zip(normed, given[: len(normed)], given[len(normed) :], strict=True):
            conv.given = weight, bias
        yield
    finally:
        for (own, name), value in zip(places, kept, strict=True):
            own[name] = value
        for conv in normed:
            conv.given = None


def _places(network: nn.Module) -> list[Place]:
    """Where the parameters are that autocast would cast."""
    modules = [module for module in network.modules() if isinstance(module, LOWERED)]
    others = [module._parameters for module in modules if not isinstance(module, NormedConv)]
    return [(own, name) for own in others for name in own if own[name] is not None]


def _lower(values: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """The same tensors in another precision, those with and those without a gradient by a call each."""
    result: dict[int, Tensor] = {}
    for learning in (True, False):
        some = [index for index, value in enumerate(values) if value.requires_grad == learning]
        copies = _Lower.apply(dtype, *(values[index] for index in some))
        result |= zip(some, copies, strict=True)
    return [result[index] for index in range(len(values))]


class _Lower(torch.autograd.Function):
    """Tensors in another precision, and their gradients in float32, by one fused call each way."""

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        return tuple(_copies(tensors, dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        copies = iter(_copies([g for g in gradients if g is not None], torch.float32))
        return None, *(None if gradient is None else next(copies) for gradient in gradients)


def _copies(tensors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    copies = [torch.empty_like(tensor, dtype=dtype) for tensor in tensors]
    if copies:
        torch._foreach_copy_(copies, list(tensors))
    return copies


def _autocast_dtype(device: torch.device) -> torch.dtype | None:
    on = torch.is_autocast_enabled(device.type)
    return torch.get_autocast_dtype(device.type) if on else None
