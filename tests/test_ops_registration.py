"""The operator as PyTorch sees it: opcheck, compile, export, autocast, the drop-in module, error messages."""

import os
import subprocess
from pathlib import Path

import MultiScaleDeformableAttention as msda  # noqa: N813
import pytest
import torch
from msda_definition import by_grid_sample, distance, random_problem
from MultiScaleDeformableAttention import operators, plain

DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
compiled = pytest.mark.skipif(not operators.KERNELS, reason="the operator is not compiled")
ROOT = Path(__file__).parents[1]


def level_tensors(shapes, device="cpu"):
    return msda._levels(shapes, None, torch.device(device))


def plain_arguments(device="cpu", dtype=torch.float32):
    problem = random_problem().to(dtype).to(device).with_grad()
    return problem.value, *level_tensors(problem.shapes, device), problem.locations, problem.weights


def fused_arguments(device="cpu", dtype=torch.float32):
    value, shapes, starts, locations, logits = plain_arguments(device, dtype)
    reference = locations[:, :, 0, :, 0].detach().clone().requires_grad_()
    return value, shapes, starts, reference, locations, logits


@pytest.mark.slow
@compiled
@pytest.mark.parametrize("device", DEVICES)
def test_opcheck(device):
    grad_output = torch.ones(2, 37, 128, device=device)
    torch.library.opcheck(torch.ops.msda.ms_deform_attn, plain_arguments(device))
    torch.library.opcheck(torch.ops.msda.ms_deform_attn_fused, fused_arguments(device))
    detached = [tensor.detach() for tensor in plain_arguments(device)]
    torch.library.opcheck(torch.ops.msda.ms_deform_attn_backward, (*detached, grad_output, True))
    fused = [tensor.detach() for tensor in fused_arguments(device)]
    backward = torch.ops.msda.ms_deform_attn_fused_backward
    torch.library.opcheck(backward, (*fused, grad_output, True))


class Attention(torch.nn.Module):
    def __init__(self, shapes):
        super().__init__()
        self.shapes = shapes

    def forward(self, value, reference, offsets, logits):
        fused = msda.ms_deform_attn_fused(value, self.shapes, None, reference, offsets, logits)
        return fused + msda.ms_deform_attn(value, self.shapes, None, offsets, logits)


def module_and_arguments(device):
    value, shapes, _, reference, offsets, logits = fused_arguments(device)
    return Attention(shapes.tolist()).to(device), (value, reference, offsets, logits)


@pytest.mark.parametrize("device", DEVICES)
def test_compile_without_graph_break(device):
    module, arguments = module_and_arguments(device)
    expected = module(*arguments)
    output = torch.compile(module, fullgraph=True, backend="aot_eager")(*arguments)
    torch.testing.assert_close(output, expected)
    grads = [torch.autograd.grad(result.sin().sum(), arguments) for result in (output, expected)]
    for result, same in zip(*grads, strict=True):
        torch.testing.assert_close(result, same)


@pytest.mark.parametrize("device", DEVICES)
def test_export(device):
    module, arguments = module_and_arguments(device)
    exported = torch.export.export(module, arguments)
    torch.testing.assert_close(exported.module()(*arguments), module(*arguments))


@compiled
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_keeps_the_precision_of_locations(device, dtype):
    value, shapes, starts, locations, weights = plain_arguments(device)
    with torch.autocast(device, dtype=dtype):
        output = torch.ops.msda.ms_deform_attn(value, shapes, starts, locations, weights)
        inside = torch.compile(torch.ops.msda.ms_deform_attn, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(inside(value, shapes, starts, locations, weights), output)
    expected = torch.ops.msda.ms_deform_attn(value.to(dtype), shapes, starts, locations, weights)
    assert output.dtype == dtype
    assert torch.equal(output, expected)
    grads = torch.autograd.grad(output.float().sum(), (value, locations, weights))
    assert [grad.dtype for grad in grads] == [torch.float32] * 3


@compiled
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_leaves_offsets_and_logits_in_the_lower_precision(device, dtype):
    """Where they have it; reference points are float32 in any case."""
    arguments = [tensor.detach() for tensor in fused_arguments(device)]
    value, shapes, starts, reference, offsets, logits = arguments
    lower = [tensor.to(dtype).requires_grad_() for tensor in (value, offsets, logits)]
    with torch.autocast(device, dtype=dtype):
        output = torch.ops.msda.ms_deform_attn_fused(lower[0], shapes, starts, reference, lower[1], lower[2])
    arguments = lower[0], shapes, starts, reference, lower[1].float(), lower[2].float()
    expected = torch.ops.msda.ms_deform_attn_fused(*arguments)
    assert output.dtype == dtype
    assert torch.equal(output, expected)
    results = [torch.autograd.grad(result.float().sum(), lower) for result in (output, expected)]
    for result, same in zip(*results, strict=True):
        assert result.dtype == dtype
        torch.testing.assert_close(result, same)


@compiled
def test_autocast_leaves_float64_alone():
    value, shapes, starts, locations, weights = plain_arguments(dtype=torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.ops.msda.ms_deform_attn(value, shapes, starts, locations, weights).dtype == torch.float64


@compiled
def test_meta_device():
    value, shapes, starts, locations, weights = (tensor.to("meta") for tensor in plain_arguments())
    assert msda.ms_deform_attn(value, shapes, starts, locations, weights).shape == (2, 37, 128)


@compiled
def test_second_derivatives_are_refused():
    value, shapes, starts, locations, weights = plain_arguments()
    output = msda.ms_deform_attn(value, shapes, starts, locations, weights)
    (grad,) = torch.autograd.grad(output.sin().sum(), value, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives"):
        grad.sum().backward()


@pytest.mark.parametrize("device", DEVICES)
def test_drop_in_has_the_original_signatures(device):
    problem = random_problem().to(device)
    shapes, starts = level_tensors(problem.shapes, device)
    leaf = random_problem().with_grad()
    expected = by_grid_sample(leaf)
    grad_output = torch.ones_like(expected)
    expected_grads = torch.autograd.grad(expected, leaf.tensors, grad_output)
    arguments = problem.value, shapes, starts, problem.locations, problem.weights
    assert distance(msda.ms_deform_attn_forward(*arguments, 128), expected.detach()) < 1e-10
    results = msda.ms_deform_attn_backward(*arguments, grad_output.to(device), 128)
    for result, same in zip(results, expected_grads, strict=True):
        assert distance(result, same) < 1e-10
    with pytest.raises(RuntimeError, match="im2col_step"):
        msda.ms_deform_attn_forward(*arguments, 0)


class OriginalFunction(torch.autograd.Function):
    """The original's own, without custom_fwd and custom_bwd."""

    @staticmethod
    def forward(ctx, *arguments):
        ctx.save_for_backward(*arguments)
        return msda.ms_deform_attn_forward(*arguments, 128)

    @staticmethod
    def backward(ctx, grad_output):
        grads = msda.ms_deform_attn_backward(*ctx.saved_tensors, grad_output, 128)
        return grads[0], None, None, grads[1], grads[2]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kernel", [pytest.param(True, marks=compiled), False])
def test_drop_in_ignores_autocast(device, kernel, monkeypatch):
    """As the original's callers use it: a float32 value in a network under autocast, backward included."""
    if not kernel:
        monkeypatch.setattr(msda, "has_kernel", lambda device: False)
    results = []
    for enabled in (True, False):
        arguments = plain_arguments(device)
        with torch.autocast(device, dtype=torch.bfloat16, enabled=enabled):
            output = OriginalFunction.apply(*arguments)
            grads = torch.autograd.grad(output.sin().sum(), (arguments[0], *arguments[3:]))
        results.append((output, *grads))
    for inside, outside in zip(*results, strict=True):
        torch.testing.assert_close(inside, outside)


def broken(name):
    arguments = dict(
        zip(
            ("value", "spatial_shapes", "level_start_index", "sampling_locations", "attention_weights"),
            plain_arguments(),
            strict=True,
        )
    )
    arguments[name] = {
        "value": lambda tensor: tensor[0],
        "spatial_shapes": lambda tensor: tensor[:, :1],
        "level_start_index": lambda tensor: tensor[:2],
        "sampling_locations": lambda tensor: tensor[:, :, :3],
        "attention_weights": lambda tensor: tensor[:, :5],
    }[name](arguments[name])
    return arguments


@pytest.mark.parametrize("kernel", [pytest.param(True, marks=compiled), False])
@pytest.mark.parametrize("size", [(3, 37, 1, 2), (2, 37, 2, 2), (2, 36, 3, 2), (2, 37, 3, 1), (37, 3, 2)])
def test_reference_points_of_a_wrong_shape_are_named(size, kernel, monkeypatch):
    if not kernel:
        monkeypatch.setattr(msda, "has_kernel", lambda device: False)
    value, shapes, starts, _, offsets, logits = fused_arguments()
    with pytest.raises(RuntimeError, match="reference_points: expected shape"):
        msda.ms_deform_attn_fused(value, shapes, starts, torch.rand(size), offsets, logits)


NAMES = ["value", "spatial_shapes", "level_start_index", "sampling_locations", "attention_weights"]


@compiled
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("mode", ["eager", "meta"])
def test_shape_errors_name_the_argument(name, mode):
    arguments = [tensor.detach() for tensor in broken(name).values()]
    if mode == "meta":
        arguments = [tensor.to("meta") for tensor in arguments]
    with pytest.raises(RuntimeError, match=f"{name}: expected shape"):
        torch.ops.msda.ms_deform_attn(*arguments)


@compiled
@pytest.mark.parametrize("name", NAMES)
def test_type_errors_name_the_argument(name):
    arguments = dict(zip(NAMES, plain_arguments(), strict=True))
    other = torch.int32 if arguments[name].dtype == torch.int64 else torch.int64
    arguments[name] = arguments[name].detach().to(other)
    with pytest.raises(RuntimeError, match=f"{name}: expected"):
        torch.ops.msda.ms_deform_attn(*arguments.values())


@compiled
@pytest.mark.parametrize(
    ("name", "numbers"),
    [
        ("spatial_shapes", [[700, 5], [4, 6], [1, 3]]),
        ("spatial_shapes", [[-1, 5], [4, 6], [1, 3]]),
        ("level_start_index", [0, 35, 60]),
        ("level_start_index", [-1, 35, 59]),
    ],
)
def test_levels_that_reach_beyond_value_are_refused(name, numbers):
    arguments = dict(zip(NAMES, plain_arguments(), strict=True))
    arguments[name] = torch.tensor(numbers)
    with pytest.raises(RuntimeError, match=name):
        torch.ops.msda.ms_deform_attn(*arguments.values())


@compiled
def test_a_device_without_a_kernel_is_served_by_plain_pytorch(monkeypatch):
    """The face falls back; both give the same numbers and the same complaints."""
    value, shapes, starts, locations, weights = plain_arguments()
    expected = msda.ms_deform_attn(value, shapes, starts, locations, weights)
    monkeypatch.setattr(msda, "has_kernel", lambda device: False)
    torch.testing.assert_close(msda.ms_deform_attn(value, shapes, starts, locations, weights), expected)
    with pytest.raises(RuntimeError, match="attention_weights: expected shape"):
        msda.ms_deform_attn(value, shapes, starts, locations, weights[:, :5])
    levels = msda._level_numbers(shapes, starts)
    torch.testing.assert_close(plain.ms_deform_attn(value, levels, locations, weights), expected)


@compiled
@pytest.mark.skipif("OTHER_TORCH_PYTHON" not in os.environ, reason="needs a Python with another PyTorch")
def test_the_same_library_serves_another_torch():
    script = (
        "import torch, test_ops_registration as t; print(torch.__version__); assert t.operators.KERNELS; "
    )
    script += "t.test_drop_in_has_the_original_signatures('cpu')"
    environment = os.environ | {"PYTHONPATH": f"{ROOT / 'ops'}{os.pathsep}{ROOT / 'tests'}"}
    command = [os.environ["OTHER_TORCH_PYTHON"], "-c", script]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() != torch.__version__
