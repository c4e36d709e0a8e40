"""The operator against its definition: every type, form and device, borders, empty and awkward inputs."""

import os
import subprocess
import sys

import MultiScaleDeformableAttention as msda  # noqa: N813
import pytest
import torch
from msda_definition import Problem, by_grid_sample, by_loops, distance, gradients, random_problem
from MultiScaleDeformableAttention import plain
from torch._subclasses import FakeTensorMode

DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
HALVES = [torch.float16, torch.bfloat16]
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
compiled = pytest.mark.skipif(not msda.has_kernel(torch.device("cpu")), reason="the operator is not compiled")


def attend(problem):
    return msda.ms_deform_attn(problem.value, problem.shapes, None, problem.locations, problem.weights)


def forward_and_gradients(problem, grad_output):
    leaf = problem.with_grad()
    output = attend(leaf)
    return output, *gradients(output, leaf, grad_output)


def expected_results(problem, grad_output):
    leaf = problem.to(torch.float64).to("cpu").with_grad()
    output = by_grid_sample(leaf)
    return output, *gradients(output, leaf, grad_output.cpu())


def noise(problem, seed=9):
    n, _, m, d = problem.value.shape
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(n, problem.locations.shape[1], m * d, generator=generator).double() * 2 - 1


@pytest.mark.parametrize("device", DEVICES)
def test_equals_the_definition(device):
    problem = random_problem(batch=1, heads=2, channels=5, queries=6)
    assert distance(attend(problem.to(device)), by_loops(problem)) < 1e-10


@compiled
def test_the_numbers_of_levels_travel_once_and_serve_gradients_after_inference():
    shapes = [(3, 5), (2, 2)]
    value, points = torch.randn(1, 19, 2, 8), torch.rand(1, 4, 2, 2, 1, 2)
    with torch.inference_mode():
        msda.ms_deform_attn(value, shapes, None, points, points[..., 0])
    numbers = msda._levels(shapes, None, value.device)
    assert all(
        one is other for one, other in zip(numbers, msda._levels(shapes, None, value.device), strict=True)
    )
    assert [tensor.tolist() for tensor in numbers] == [[[3, 5], [2, 2]], [0, 15]]
    value.requires_grad_()
    msda.ms_deform_attn(value, shapes, None, points, points[..., 0]).sum().backward()
    assert value.grad.any()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("channels", [1, 8, 16, 24, 32, 48, 64, 80, 300])
def test_forward_and_backward_agree_with_grid_sample(device, dtype, channels):
    problem = random_problem(channels=channels)
    grad_output = noise(problem)
    results = forward_and_gradients(problem.to(dtype).to(device), grad_output.to(device))
    for result, expected in zip(results, expected_results(problem, grad_output), strict=True):
        assert result.dtype == dtype
        assert distance(result, expected.detach()) < TOLERANCE[dtype]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("points", ["half", "float32"])
@pytest.mark.parametrize("channels", [20, 32])
def test_half_precision_is_the_rounded_float32_result(device, dtype, points, channels):
    problem = random_problem(channels=channels).to(dtype).to(device)
    if points == "float32":
        problem = random_problem(channels=channels).to(torch.float32).to(device)
        problem = type(problem)(problem.shapes, problem.value.to(dtype), problem.locations, problem.weights)
    grad_output = noise(problem).to(dtype).to(device)
    exact = forward_and_gradients(problem.to(torch.float32), grad_output.float())
    for result, single in zip(forward_and_gradients(problem, grad_output), exact, strict=True):
        allowed = torch.finfo(result.dtype).eps * single.abs() + 1e-5 * single.abs().max()
        assert ((result.float() - single).abs() <= allowed).all()


@pytest.mark.parametrize("device", DEVICES)
def test_borders(device):
    """On pixel centres, on edges, one pixel outside; sizes are powers of two, so both sides are exact."""
    shapes = ((4, 8), (2, 2))
    steps = torch.arange(-3, 12, dtype=torch.float64) / 8  # multiples of half a pixel of both levels
    queries = len(steps) ** 2
    problem = random_problem(shapes=shapes, queries=queries, points=1, heads=1, batch=1)
    grid = torch.cartesian_prod(steps, steps).view(1, queries, 1, 1, 1, 2).expand_as(problem.locations)
    problem = type(problem)(problem.shapes, problem.value, grid.contiguous(), problem.weights)
    grad_output = noise(problem)
    results = forward_and_gradients(problem.to(device), grad_output.to(device))
    for result, expected in zip(results, expected_results(problem, grad_output), strict=True):
        assert distance(result, expected.detach()) < 1e-10


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf"), 1e30, -1e30])
@compiled
def test_a_location_nowhere_samples_nothing(device, number):
    problem, silent = random_problem(), random_problem()
    problem.locations[:, ::3, 1, 0, 2, 0] = number
    silent.weights[:, ::3, 1, 0, 2] = 0
    grad_output = noise(problem)
    output, grad_value, grad_locations, grad_weights = forward_and_gradients(
        problem.to(device), grad_output.to(device)
    )
    expected = expected_results(silent, grad_output)
    assert distance(output, expected[0].detach()) < 1e-10
    assert distance(grad_value, expected[1]) < 1e-10
    assert not grad_locations[:, ::3, 1, 0, 2].any()
    assert not grad_weights[:, ::3, 1, 0, 2].any()


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf"), 1e30, -1e30])
def test_a_location_nowhere_samples_nothing_in_plain_pytorch(number):
    problem, silent = random_problem(), random_problem()
    problem.locations[:, ::3, 1, 0, 2, 0] = number
    silent.weights[:, ::3, 1, 0, 2] = 0
    levels = msda._level_numbers(problem.shapes, None)
    leaves = [
        tensor.clone().requires_grad_() for tensor in (problem.value, problem.locations, problem.weights)
    ]
    output = plain.ms_deform_attn(leaves[0], levels, *leaves[1:])
    assert distance(output.detach(), attend(silent)) < 1e-10
    gradients = torch.autograd.grad(output.sum(), leaves)
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert not any(gradient[:, ::3, 1, 0, 2].any() for gradient in gradients[1:])


def test_numbers_of_levels_that_fakes_have_seen_serve_real_tensors():
    sizes = [(3, 5), (2, 7)]  # those of no other test
    tensors = torch.rand(1, 29, 2, 4), torch.rand(1, 6, 2, 2, 3, 2), torch.rand(1, 6, 2, 2, 3)

    def attend_to(value, locations, weights):
        return msda.ms_deform_attn(value, sizes, None, locations, weights)

    def passes():
        with FakeTensorMode() as fakes:
            return attend_to(*map(fakes.from_tensor, tensors)).shape

    assert passes() == attend_to(*tensors).shape == passes()  # the numbers are kept now


@pytest.mark.parametrize("device", DEVICES)
@compiled
def test_value_outside_the_support_does_not_leak(device):
    problem = random_problem(batch=1, shapes=((4, 4),), queries=5)
    problem.locations.fill_(0.5 / 4)  # the centre of pixel 0; its support is the 2 x 2 pixels from there
    problem.value[:, 10:] = float("nan")
    assert attend(problem.to(device)).isfinite().all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "sizes", [{"batch": 0}, {"queries": 0}, {"points": 0}, {"channels": 0}, {"shapes": ()}]
)
@compiled
def test_empty(device, sizes):
    problem = random_problem(**({"channels": 8} | sizes)).to(device)
    output, *grads = forward_and_gradients(problem, noise(problem).to(device))
    assert output.shape == noise(problem).shape
    assert not output.any()
    assert [grad.shape for grad in grads] == [tensor.shape for tensor in problem.tensors]
    assert not any(grad.any() for grad in grads)


@pytest.mark.parametrize("device", DEVICES)
def test_strided_and_misaligned_inputs(device):
    problem = random_problem().to(torch.float32).to(device)
    grad_output = noise(problem).float().to(device)
    expected = forward_and_gradients(problem, grad_output)

    def strided(tensor):
        return tensor.transpose(0, -1).contiguous().transpose(0, -1)

    def misaligned(tensor):
        return torch.cat([tensor.new_zeros(1), tensor.flatten()])[1:].view(tensor.shape)

    for change in (strided, misaligned):
        changed = type(problem)(problem.shapes, *map(change, problem.tensors))
        for result, same in zip(forward_and_gradients(changed, change(grad_output)), expected, strict=True):
            torch.testing.assert_close(result, same, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("device", DEVICES)
def test_levels_in_any_order(device):
    problem = random_problem(shapes=((3, 4), (5, 2)))
    first, second = problem.value[:, :12], problem.value[:, 12:]
    swapped = torch.cat([second, first], dim=1).to(device)
    starts = torch.tensor([10, 0], device=device)
    shapes = torch.tensor(problem.shapes, device=device)
    output = msda.ms_deform_attn(
        swapped, shapes, starts, problem.locations.to(device), problem.weights.to(device)
    )
    assert distance(output, by_grid_sample(problem)) < 1e-10


def fused_inputs(problem, reference_shape):
    """Value, reference points (of N or 1, L or 1), offsets and logits, in float32 but for the value."""
    n, q, m, levels, p = problem.weights.shape
    generator = torch.Generator().manual_seed(1)
    reference = torch.rand(reference_shape[0], q, reference_shape[1], 2, generator=generator)
    offsets = torch.randn(n, q, m, levels, p, 2, generator=generator)
    logits = torch.randn(n, q, m, levels, p, generator=generator) * 3
    return problem.value, reference, offsets, logits


def fused_results(shapes, inputs, grad_output):
    """The output and the gradients of value, reference points, offsets and logits."""
    inputs = [tensor.detach().requires_grad_() for tensor in inputs]
    output = msda.ms_deform_attn_fused(inputs[0], shapes, None, *inputs[1:])
    return output, *torch.autograd.grad(output, inputs, grad_output)


def expected_fused_results(shapes, inputs, grad_output):
    """The same by softmax and location arithmetic in front of the definition, in float64 on the CPU."""
    inputs = [tensor.detach().cpu().double().requires_grad_() for tensor in inputs]
    value, reference, offsets, logits = inputs
    sizes = torch.tensor([(w, h) for h, w in shapes], dtype=torch.float64)[:, None]
    locations = reference[:, :, None, :, None] + offsets / sizes
    weights = logits.flatten(3).softmax(-1).view(logits.shape)
    output = by_grid_sample(Problem(shapes, value, locations, weights))
    return output, *torch.autograd.grad(output, inputs, grad_output.cpu().double())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("reference_shape", [(2, 1), (1, 3)])
def test_fused_front(device, dtype, reference_shape):
    problem = random_problem()
    inputs, grad_output = fused_inputs(problem, reference_shape), noise(problem)
    expected = expected_fused_results(problem.shapes, inputs, grad_output)
    placed = [tensor.to(device, dtype) for tensor in inputs]
    results = fused_results(problem.shapes, placed, grad_output.to(device, dtype))
    for result, same in zip(results, expected, strict=True):
        assert result.dtype == dtype
        assert distance(result, same.detach()) < TOLERANCE[dtype]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("points", ["half", "float32"])
@pytest.mark.parametrize("channels", [20, 32])
@compiled
def test_fused_front_in_half_precision_is_the_rounded_exact_result(device, dtype, points, channels):
    """Output and gradients of value, offsets and logits differ from float64 by their own rounding alone."""
    problem = random_problem(channels=channels)
    value, reference, offsets, logits = fused_inputs(problem, (1, 3))
    offsets = (4 * offsets).round() / 4 + 1 / 8  # off the pixel centres, where the derivative jumps
    point_type = dtype if points == "half" else torch.float32
    numbers = (torch.full_like(reference, 0.5), offsets, logits)
    inputs = [value.to(dtype), *(tensor.to(point_type) for tensor in numbers)]
    grad_output = noise(problem).to(dtype)
    expected = expected_fused_results(problem.shapes, inputs, grad_output)
    results = fused_results(problem.shapes, [tensor.to(device) for tensor in inputs], grad_output.to(device))
    for index in (0, 1, 3, 4):
        result, exact = results[index].detach().cpu(), expected[index].detach()
        rounding = torch.finfo(result.dtype).eps / 2 * exact.abs() + 1e-5 * exact.abs().max()
        assert ((result.double() - exact).abs() <= rounding).all()


PIXELS = [  # levels whose pixels are the queries: whole tiles, cut ones, thin levels and some without pixels
    ((8, 16), (4, 8), (2, 4)),
    ((13, 17), (7, 9), (3, 5)),
    ((1, 30), (0, 4), (11, 1), (5, 0), (9, 9)),
]


def pixel_problem(shapes, **sizes):
    return random_problem(shapes=shapes, queries=sum(h * w for h, w in shapes), **sizes)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shapes", PIXELS[:2])
@pytest.mark.parametrize("channels", [16, 32, 64, 20])
def test_queries_that_are_pixels(device, shapes, channels):
    """The CUDA kernels take them in tiles of 8 x 8."""
    problem = pixel_problem(shapes, channels=channels)
    grad_output = noise(problem)
    results = forward_and_gradients(problem.to(torch.float32).to(device), grad_output.float().to(device))
    for result, expected in zip(results, expected_results(problem, grad_output), strict=True):
        assert distance(result, expected.detach()) < 1e-5


@pytest.mark.parametrize("device", DEVICES)
def test_pixels_of_thin_and_empty_levels(device):
    """The definition by loops, as grid_sample takes no empty level."""
    problem = pixel_problem(PIXELS[2], batch=1, heads=2, channels=8, points=2)
    problem.locations.nan_to_num_(0)  # a level without pixels
    output = attend(problem.to(torch.float32).to(device))
    assert distance(output, by_loops(problem)) < 1e-5


@pytest.mark.parametrize("device", DEVICES)
def test_many_queries_on_the_same_pixels(device):
    """All sums of a tile fall on the same rows of the gradient."""
    problem = pixel_problem(((16, 24), (8, 12)), heads=2)
    problem.locations[..., 0] = problem.locations[..., 0] / 64 + 0.5
    problem.locations[..., 1] = problem.locations[..., 1] / 64 + 0.25
    grad_output = noise(problem)
    results = forward_and_gradients(problem.to(torch.float32).to(device), grad_output.float().to(device))
    for result, expected in zip(results[:2], expected_results(problem, grad_output), strict=False):
        assert distance(result, expected.detach()) < 1e-5


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("points", [1, 9, 70])
def test_few_and_many_points(device, points):
    """So many that a block's memory holds smaller tiles, or none."""
    problem = random_problem(shapes=((7, 5), (4, 6)), points=points, queries=21)
    grad_output = noise(problem)
    results = forward_and_gradients(problem.to(torch.float32).to(device), grad_output.float().to(device))
    for result, expected in zip(results, expected_results(problem, grad_output), strict=True):
        assert distance(result, expected.detach()) < 1e-5


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("channels", [20, 32])
@compiled
def test_half_offsets_with_float32_reference_points(device, dtype, channels):
    """As under autocast: the results are those of the same offsets and logits in float32."""
    problem = random_problem(channels=channels)
    value, reference, offsets, logits = fused_inputs(problem, (1, 3))
    offsets = (4 * offsets).round() / 4 + 1 / 8
    reference = torch.full_like(reference, 0.4)  # not a number of the lower precision
    inputs = [value.to(dtype), reference, offsets.to(dtype), logits.to(dtype)]
    grad_output = noise(problem).to(dtype).to(device)
    results = fused_results(problem.shapes, [tensor.to(device) for tensor in inputs], grad_output)
    wide = [inputs[0], reference, inputs[2].float(), inputs[3].float()]
    expected = fused_results(problem.shapes, [tensor.to(device) for tensor in wide], grad_output)
    for index in (0, 1, 3, 4):
        result, same = results[index], expected[index]
        assert result.dtype == dtype
        allowed = torch.finfo(dtype).eps * same.float().abs() + 1e-5 * same.float().abs().max()
        assert ((result.float() - same.float()).abs() <= allowed).all()


@pytest.mark.parametrize("device", DEVICES)
def test_gradcheck(device):
    problem = random_problem(batch=1, heads=2, channels=3, queries=4, points=2).to(device).with_grad()
    assert torch.autograd.gradcheck(
        lambda *tensors: attend(type(problem)(problem.shapes, *tensors)), problem.tensors, nondet_tol=1e-9
    )


@compiled
@pytest.mark.parametrize("sizes", [{}, {"batch": 1, "heads": 2}])
def test_cpu_results_do_not_depend_on_threads(sizes):
    problem = random_problem(queries=500, **sizes).to(torch.float32)
    threads = torch.get_num_threads()
    results = []
    try:
        for number in (1, 2, 3, 7, 16):
            torch.set_num_threads(number)
            results.append(forward_and_gradients(problem, noise(problem)))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("channels", [32, 20])
def test_cuda_is_deterministic_when_asked(channels):
    problem = random_problem(queries=3000, channels=channels).to(torch.float32).to("cuda")
    grad_output = noise(problem).to("cuda")
    torch.use_deterministic_algorithms(True)
    try:
        first, second = (forward_and_gradients(problem, grad_output) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    expected = expected_results(problem, grad_output)
    assert all(distance(a, b.detach()) < 1e-5 for a, b in zip(first, expected, strict=True))


@compiled
def test_points_of_a_level_without_lines_have_no_gradient():
    """Threads outnumber heads, so each takes a band of lines; PyTorch fills what nobody writes with NaN."""
    problem = random_problem(batch=1, heads=1, shapes=((5, 4), (3, 3), (2, 2))).to(torch.float32)
    shapes = [(5, 4), (0, 3), (2, 2)]
    threads = torch.get_num_threads()
    torch.set_num_threads(4)
    torch.use_deterministic_algorithms(True)
    try:
        emptied = Problem(shapes, *problem.tensors)
        results = forward_and_gradients(emptied, noise(problem).float())
        fused = fused_results(shapes, fused_inputs(emptied, (1, 3)), noise(problem).float())
    finally:
        torch.use_deterministic_algorithms(False)
        torch.set_num_threads(threads)
    assert all(result.isfinite().all() for result in (*results, *fused))
    assert not any(gradient[:, :, :, 1].any() for gradient in (*results[2:], fused[3]))


@compiled
@pytest.mark.parametrize("capability", ["default", "avx2", "avx512"])
@pytest.mark.slow
def test_every_instruction_set(capability):
    """The instruction set is chosen once per process, so each choice runs the comparison in its own."""
    if capability == "avx512" and torch.backends.cpu.get_cpu_capability() != "AVX512":
        pytest.skip("this processor has no AVX-512")
    test = f"{__file__}::test_forward_and_backward_agree_with_grid_sample"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-k",
        "cpu and (32 or 24)",
        "-p",
        "no:cacheprovider",
        test,
    ]
    environment = os.environ | {"ATEN_CPU_CAPABILITY": capability}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
