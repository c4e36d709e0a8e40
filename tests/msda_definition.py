"""Multi-scale deformable attention from its definition, for the operator's tests: float64, on the CPU."""

import itertools
import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Problem:
    """Arguments of the operator; ``shapes`` are numbers."""

    shapes: list[tuple[int, int]]
    value: Tensor
    locations: Tensor
    weights: Tensor

    def to(self, *args) -> "Problem":
        tensors = {name: getattr(self, name).to(*args) for name in ("value", "locations", "weights")}
        return replace(self, **tensors)

    def with_grad(self) -> "Problem":
        return Problem(self.shapes, *(tensor.detach().requires_grad_() for tensor in self.tensors))

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.value, self.locations, self.weights


def random_problem(
    seed: int = 0,
    *,
    batch: int = 2,
    shapes: tuple[tuple[int, int], ...] = ((7, 5), (4, 6), (1, 3)),
    heads: int = 4,
    channels: int = 32,
    queries: int = 37,
    points: int = 4,
) -> Problem:
    """Locations reach a little beyond the levels, not where the derivative jumps; numbers are float32."""
    generator = torch.Generator().manual_seed(seed)

    def rand(*size: int) -> Tensor:
        return torch.rand(*size, generator=generator)

    samples = (batch, queries, heads, len(shapes), points)
    sizes = torch.tensor([(width, height) for height, width in shapes], dtype=torch.float64).view(-1, 1, 2)
    pixels = torch.floor(rand(*samples, 2) * (sizes + 4)) - 2.5 + 0.1 + 0.8 * rand(*samples, 2)
    value = rand(batch, sum(h * w for h, w in shapes), heads, channels) * 2 - 1
    weights = rand(batch, queries, heads, len(shapes) * points).softmax(-1).view(samples)
    locations = (pixels + 0.5) / sizes
    return Problem(list(shapes), value.double(), locations.float().double(), weights.double())


def by_grid_sample(problem: Problem) -> Tensor:
    """The formulation with `grid_sample`, differentiable."""
    n, _, m, d = problem.value.shape
    q = problem.locations.shape[1]
    columns = []
    levels = problem.value.split([h * w for h, w in problem.shapes], dim=1)
    for level, ((height, width), numbers) in enumerate(zip(problem.shapes, levels, strict=True)):
        maps = numbers.flatten(2).transpose(1, 2).reshape(n * m, d, height, width)
        grid = 2 * problem.locations[:, :, :, level].transpose(1, 2).flatten(0, 1) - 1
        columns.append(F.grid_sample(maps, grid, mode="bilinear", padding_mode="zeros", align_corners=False))
    weights = problem.weights.transpose(1, 2).reshape(n * m, 1, q, -1)
    sums = (torch.stack(columns, dim=-2).flatten(-2) * weights).sum(-1)
    return sums.view(n, m * d, q).transpose(1, 2)


def by_loops(problem: Problem) -> Tensor:
    """One product at a time, with the hat function max(0, 1 - |distance|) for the bilinear weights."""
    n, _, m, d = problem.value.shape
    output = torch.zeros(n, problem.locations.shape[1], m, d, dtype=torch.float64)
    for index in itertools.product(*(range(size) for size in problem.weights.shape)):
        image, query, head, level, _ = index
        height, width = problem.shapes[level]
        start = sum(h * w for h, w in problem.shapes[:level])
        x, y = (problem.locations[index] * torch.tensor([width, height]) - 0.5).tolist()
        if not (math.isfinite(x) and math.isfinite(y)):
            continue
        for row, column in itertools.product(range(height), range(width)):
            hat = max(0.0, 1 - abs(x - column)) * max(0.0, 1 - abs(y - row))
            if hat > 0:
                number = problem.value[image, start + row * width + column, head]
                output[image, query, head] += problem.weights[index] * hat * number
    return output.flatten(2)


def gradients(output: Tensor, problem: Problem, grad_output: Tensor) -> tuple[Tensor, ...]:
    """Of value, locations and weights."""
    return torch.autograd.grad(output, problem.tensors, grad_output.to(output))


def distance(result: Tensor, expected: Tensor) -> float:
    """Largest difference relative to the largest expected number."""
    scale = expected.abs().max().item() if expected.numel() else 1.0
    return ((result.detach().cpu().double() - expected).abs().max() / (scale or 1.0)).item()
