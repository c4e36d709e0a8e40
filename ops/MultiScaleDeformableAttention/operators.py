"""The compiled operators `torch.ops.msda.*`: loading, and what PyTorch needs besides the kernels.

Autograd, fake tensors (torch.compile, torch.export, the meta device), autocast. There is no vmap rule: N is
the batch. The forward is deterministic on every device. So is the backward on the CPU; on CUDA it adds
atomically, unless `torch.use_deterministic_algorithms(True)` is set: then sums are taken in a fixed order.
"""

from pathlib import Path

import torch
from torch import Tensor

LIBRARY = Path(__file__).with_name("_C.so")


def _load() -> str:
    """Loads the library; returns why that was not possible, or nothing."""
    if not LIBRARY.exists():
        return "the operator was not compiled when the package was installed"
    try:
        torch.ops.load_library(str(LIBRARY))
    except OSError as error:
        return f"{LIBRARY} does not load with PyTorch {torch.__version__}: {error}"
    return ""


LOAD_ERROR = _load()
_DEVICES = {"cpu": "CPU", "cuda": "CUDA"}
KERNELS = (
    frozenset()
    if LOAD_ERROR
    else frozenset(
        device
        for device, key in _DEVICES.items()
        if torch._C._dispatch_has_kernel_for_dispatch_key("msda::ms_deform_attn", key)
    )
)


def has_kernel(device: torch.device) -> bool:
    """Whether tensors on ``device`` run through the compiled operator."""
    return device.type in KERNELS or (device.type == "meta" and bool(KERNELS))


def expect_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    """Raises RuntimeError, which names the argument, where ``tensor`` has another shape."""
    if tuple(tensor.shape) != shape:
        raise RuntimeError(f"ms_deform_attn: {name}: expected shape {shape}, got {tuple(tensor.shape)}")


def check_shapes(value: Tensor, levels: int, **points: Tensor) -> None:
    """Checks shapes as the kernels do; ``points`` are the arguments with samples, by name, locations first.

    Raises:
        RuntimeError: names the argument.
    """
    if value.dim() != 4:
        raise RuntimeError(f"ms_deform_attn: value: expected shape (N, S, M, D), got {tuple(value.shape)}")
    name, locations = next(iter(points.items()))
    if locations.dim() != 6:
        raise RuntimeError(
            f"ms_deform_attn: {name}: expected shape (N, Q, M, L, P, 2), got {tuple(locations.shape)}"
        )
    batch, queries, heads = value.shape[0], locations.shape[1], value.shape[2]
    samples = (batch, queries, heads, levels, locations.shape[4])
    shapes = {
        "sampling_locations": (*samples, 2),
        "sampling_offsets": (*samples, 2),
        "attention_weights": samples,
        "attention_logits": samples,
        "reference_points": (batch, queries, levels, 2),
    }
    for name, tensor in points.items():
        expect_shape(name, tensor, shapes[name])


def _check_levels(spatial_shapes: Tensor, level_start_index: Tensor) -> int:
    levels = spatial_shapes.shape[0]
    expect_shape("spatial_shapes", spatial_shapes, (levels, 2))
    expect_shape("level_start_index", level_start_index, (levels,))
    return levels


def _output_like(value: Tensor, locations: Tensor) -> Tensor:
    return value.new_empty(value.shape[0], locations.shape[1], value.shape[2] * value.shape[3])


def _gradients_like(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(tensor.new_empty(tensor.shape) for tensor in tensors)


def _plain_fake(value, shapes, starts, locations, weights):
    check_shapes(
        value, _check_levels(shapes, starts), sampling_locations=locations, attention_weights=weights
    )
    return _output_like(value, locations)


def _fused_fake(value, shapes, starts, reference, offsets, logits):
    points = {"sampling_offsets": offsets, "attention_logits": logits, "reference_points": reference}
    check_shapes(value, _check_levels(shapes, starts), **points)
    return _output_like(value, offsets)


def _plain_backward_fake(value, shapes, starts, locations, weights, grad_output, deterministic):
    return _gradients_like(value, locations, weights)


def _fused_backward_fake(value, shapes, starts, reference, offsets, logits, grad_output, deterministic):
    return _gradients_like(value, offsets, logits)


def _setup(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _plain_backward(ctx, grad_output):
    grads = torch.ops.msda.ms_deform_attn_backward(
        *ctx.saved_tensors, grad_output, torch.are_deterministic_algorithms_enabled()
    )
    grad_value, grad_locations, grad_weights = grads
    return grad_value, None, None, grad_locations, grad_weights


def _fused_backward(ctx, grad_output):
    grads = torch.ops.msda.ms_deform_attn_fused_backward(
        *ctx.saved_tensors, grad_output, torch.are_deterministic_algorithms_enabled()
    )
    grad_value, grad_offsets, grad_logits = grads
    grad_reference = None
    if ctx.needs_input_grad[3]:
        _, shapes, _, reference, *_ = ctx.saved_tensors
        sizes = shapes.flip(-1)[
            :, None
        ]  # an offset of one pixel is a step of 1 / size of the reference point
        wide = torch.promote_types(grad_offsets.dtype, torch.float32)
        grad_reference = (grad_offsets.to(wide) * sizes).sum((2, 4)).to(reference.dtype)
    return grad_value, None, None, grad_reference, grad_offsets, grad_logits


def _no_second_derivative(ctx, *grads):
    raise RuntimeError("ms_deform_attn: second derivatives are not implemented")


def _autocast(name: str, device_type: str):
    """Under autocast value is lowered; locations and weights are float32, because small steps matter.

    So are reference points; offsets and logits that a layer computed in the lower precision stay in it.
    """
    operator = getattr(torch.ops.msda, name)
    fused = name == "ms_deform_attn_fused"

    def rule(value, shapes, starts, first, *others):
        if value.dtype != torch.float64:
            value = value.to(torch.get_autocast_dtype(device_type))
            first = first.float()
            others = [other if fused and other.dtype == value.dtype else other.float() for other in others]
        with torch.amp.autocast(device_type, enabled=False):
            return operator(value, shapes, starts, first, *others)

    return rule


def _register() -> torch.library.Library:
    rules = torch.library.Library("msda", "FRAGMENT")
    for name, fake, backward in (
        ("ms_deform_attn", _plain_fake, _plain_backward),
        ("ms_deform_attn_fused", _fused_fake, _fused_backward),
    ):
        torch.library.register_fake(f"msda::{name}", fake, lib=rules)
        torch.library.register_autograd(f"msda::{name}", backward, setup_context=_setup, lib=rules)
        rules.impl(name, _autocast(name, "cpu"), "AutocastCPU")
        rules.impl(name, _autocast(name, "cuda"), "AutocastCUDA")
    for name, fake in (
        ("ms_deform_attn_backward", _plain_backward_fake),
        ("ms_deform_attn_fused_backward", _fused_backward_fake),
    ):
        torch.library.register_fake(f"msda::{name}", fake, lib=rules)
        torch.library.register_autograd(f"msda::{name}", _no_second_derivative, lib=rules)
    return rules


_RULES = None if LOAD_ERROR else _register()
