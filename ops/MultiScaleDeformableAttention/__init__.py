# ruff: noqa: N999 (the name is the original extension's)
"""Multi-scale deformable attention (Deformable DETR, https://arxiv.org/abs/2010.04159) for CPU and CUDA.

`ms_deform_attn` and `ms_deform_attn_fused` are differentiable and run on every device: through the compiled
operators `torch.ops.msda.*` where there is a kernel, in plain PyTorch elsewhere. `ms_deform_attn_forward` and
`ms_deform_attn_backward` are those of the original extension of this name, for code that imports it.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from itertools import accumulate

import torch
from torch import Tensor
from torch._guards import detect_fake_mode

from MultiScaleDeformableAttention import plain
from MultiScaleDeformableAttention.operators import LOAD_ERROR, check_shapes, has_kernel

__all__ = [
    "LOAD_ERROR",
    "has_kernel",
    "ms_deform_attn",
    "ms_deform_attn_backward",
    "ms_deform_attn_forward",
    "ms_deform_attn_fused",
]

Shapes = Tensor | Sequence[Sequence[int]]


def _levels(
    spatial_shapes: Shapes, level_start_index: Tensor | None, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Shapes and first positions of the levels on ``device``."""
    if not isinstance(spatial_shapes, Tensor):
        pairs = tuple((height, width) for height, width in spatial_shapes)
        passing = torch.compiler.is_compiling() or detect_fake_mode()  # sizes may be symbols, tensors fakes
        numbers = _numbers_on if passing else _kept_numbers_on
        spatial_shapes, starts = numbers(pairs, device)
        return spatial_shapes, starts if level_start_index is None else level_start_index
    if level_start_index is None:
        sizes = spatial_shapes.prod(1)
        level_start_index = sizes.cumsum(0) - sizes
    return spatial_shapes, level_start_index


def _numbers_on(pairs: tuple[tuple[int, int], ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """(L, 2) and (L,) int64 of levels that follow each other; they travel without a wait."""
    starts = [start for start, _, _ in _level_numbers(pairs, None)]
    numbers = torch.tensor([[*pair, start] for pair, start in zip(pairs, starts, strict=True)])
    numbers = numbers.view(-1, 3).to(device, torch.int64, non_blocking=True)
    return numbers[:, :2].contiguous(), numbers[:, 2].contiguous()


@lru_cache(maxsize=64)
def _kept_numbers_on(pairs: tuple[tuple[int, int], ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """The same, kept: what runs once more, or is captured as a CUDA graph, copies nothing from the host."""
    with torch.inference_mode(False):  # else no gradient could use them
        return _numbers_on(pairs, device)


def _level_numbers(spatial_shapes: Shapes, level_start_index: Tensor | None) -> list[tuple[int, int, int]]:
    """First position, height and width of the levels."""
    shapes = spatial_shapes.tolist() if isinstance(spatial_shapes, Tensor) else spatial_shapes
    if level_start_index is None:
        starts = [0, *accumulate(height * width for height, width in shapes)][: len(shapes)]
    else:
        starts = level_start_index.tolist()
    return [(start, height, width) for start, (height, width) in zip(starts, shapes, strict=True)]


def ms_deform_attn(
    value: Tensor,
    spatial_shapes: Shapes,
    level_start_index: Tensor | None,
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    """out[n, q, m] = sum over l, p of weight[n, q, m, l, p] * value[l, m] at location[n, q, m, l, p].

    Between pixels the value is bilinear; outside a level it is zero, and where a location is not finite.

    Args:
        value: (N, S, M, D), the levels one after the other; float32, float64, float16 or bfloat16.
        spatial_shapes: (L, 2) int64, height and width; or the same as numbers.
        level_start_index: (L,) int64, where each level begins in S; None: one after the other.
        sampling_locations: (N, Q, M, L, P, 2), x and y, 0 to 1, border to border; value's type or float32.
        attention_weights: (N, Q, M, L, P); value's type or float32.

    Returns:
        (N, Q, M * D) in the type of value. Sums are taken in float32 (float64 for float64).

    Raises:
        RuntimeError: an argument of the wrong shape, type or device, by its name.

    Examples:
        >>> value = torch.randn(1, 6 * 8 + 3 * 4, 2, 16)
        >>> locations, weights = torch.rand(1, 5, 2, 2, 4, 2), torch.rand(1, 5, 2, 2, 4)
        >>> ms_deform_attn(value, [(6, 8), (3, 4)], None, locations, weights).shape
        torch.Size([1, 5, 32])
    """
    if has_kernel(value.device):
        shapes, starts = _levels(spatial_shapes, level_start_index, value.device)
        return torch.ops.msda.ms_deform_attn(value, shapes, starts, sampling_locations, attention_weights)
    levels = _level_numbers(spatial_shapes, level_start_index)
    check_shapes(
        value, len(levels), sampling_locations=sampling_locations, attention_weights=attention_weights
    )
    return plain.ms_deform_attn(value, levels, sampling_locations, attention_weights)


def ms_deform_attn_fused(
    value: Tensor,
    spatial_shapes: Shapes,
    level_start_index: Tensor | None,
    reference_points: Tensor,
    sampling_offsets: Tensor,
    attention_logits: Tensor,
) -> Tensor:
    """`ms_deform_attn` at reference + offsets / (width, height) with the softmax of logits.

    Neither locations nor weights are written to memory.

    Args:
        value, spatial_shapes, level_start_index: as for `ms_deform_attn`.
        reference_points: (N or 1, Q, L or 1, 2), x and y from 0 to 1.
        sampling_offsets: (N, Q, M, L, P, 2), x and y in pixels of the level.
        attention_logits: (N, Q, M, L, P); the softmax runs over L and P.

    Returns:
        (N, Q, M * D) in the type of value.

    Raises:
        RuntimeError: an argument of the wrong shape, type or device, by its name.
    """
    batch, levels = value.shape[0], len(spatial_shapes)
    shape = tuple(reference_points.shape)
    if len(shape) != 4 or shape[0] not in (1, batch) or shape[2] not in (1, levels):
        expected = f"({batch} or 1, Q, {levels} or 1, 2)"
        raise RuntimeError(f"ms_deform_attn: reference_points: expected shape {expected}, got {shape}")
    reference_points = reference_points.expand(batch, -1, levels, -1)
    if has_kernel(value.device):
        shapes, starts = _levels(spatial_shapes, level_start_index, value.device)
        return torch.ops.msda.ms_deform_attn_fused(
            value, shapes, starts, reference_points, sampling_offsets, attention_logits
        )
    points = {"sampling_offsets": sampling_offsets, "attention_logits": attention_logits}
    levels = _level_numbers(spatial_shapes, level_start_index)
    check_shapes(value, len(levels), **points, reference_points=reference_points)
    return plain.ms_deform_attn_fused(value, levels, reference_points, sampling_offsets, attention_logits)


def _check_step(im2col_step: int) -> None:
    if im2col_step < 1:
        raise RuntimeError(f"ms_deform_attn: im2col_step: expected 1 or more, got {im2col_step}")


def _without_autocast(device: torch.device) -> AbstractContextManager:
    """The original's functions know nothing of autocast: what they return has the type of value."""
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def ms_deform_attn_forward(
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    sampling_loc: Tensor,
    attn_weight: Tensor,
    im2col_step: int,
) -> Tensor:
    """The original extension's forward; ``im2col_step`` has no effect, as nothing is unfolded."""
    _check_step(im2col_step)
    with torch.no_grad(), _without_autocast(value.device):
        return ms_deform_attn(value, spatial_shapes, level_start_index, sampling_loc, attn_weight)


def ms_deform_attn_backward(
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    sampling_loc: Tensor,
    attn_weight: Tensor,
    grad_output: Tensor,
    im2col_step: int,
) -> list[Tensor]:
    """The original extension's backward: the gradients of value, sampling locations and attention weights."""
    _check_step(im2col_step)
    with _without_autocast(value.device):
        if has_kernel(value.device):
            deterministic = torch.are_deterministic_algorithms_enabled()
            arguments = (value, spatial_shapes, level_start_index, sampling_loc, attn_weight, grad_output)
            return list(torch.ops.msda.ms_deform_attn_backward(*arguments, deterministic))
        with torch.enable_grad():
            inputs = [tensor.detach().requires_grad_() for tensor in (value, sampling_loc, attn_weight)]
            output = ms_deform_attn(inputs[0], spatial_shapes, level_start_index, inputs[1], inputs[2])
        return list(torch.autograd.grad(output, inputs, grad_output))
