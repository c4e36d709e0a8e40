"""The operator on shapes that hypothesis makes up."""

import MultiScaleDeformableAttention as msda  # noqa: N813
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from msda_definition import by_grid_sample, distance, gradients, random_problem

sizes = st.integers(1, 9)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**31),
    batch=st.integers(1, 3),
    shapes=st.lists(st.tuples(sizes, sizes), min_size=1, max_size=5).map(tuple),
    heads=st.integers(1, 5),
    channels=st.integers(1, 70),
    queries=st.integers(1, 40),
    points=st.integers(1, 7),
)
def test_any_shape(**arguments):
    problem = random_problem(**arguments).with_grad()
    output = msda.ms_deform_attn(problem.value, problem.shapes, None, problem.locations, problem.weights)
    expected = by_grid_sample(problem)
    grad_output = torch.linspace(-1, 1, output.numel(), dtype=torch.float64).view(output.shape)
    assert distance(output, expected.detach()) < 1e-10
    results = gradients(output, problem, grad_output), gradients(expected, problem, grad_output)
    for result, same in zip(*results, strict=True):
        assert distance(result, same) < 1e-10
