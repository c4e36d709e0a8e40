"""Compares the operator with float64: channels, heads, levels, points, types, fused and apart, both modes.

    python benchmarks/msda_agreement.py                                on the CPU
    python benchmarks/msda_agreement.py --device cuda --output FILE    on a GPU; what was found, as JSON
    python benchmarks/msda_agreement.py --device cuda --small          less of it, for compute-sanitizer

What is expected comes from the `grid_sample` formulation and its autograd in float64 on the CPU, with the
very numbers that the operator gets. Differences are relative to the largest number of a tensor. In the
deterministic mode a second call has to give the same bits. It needs PyTorch alone.
"""

import argparse
import sys
from collections.abc import Iterator
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
import hardware
import msda
from msda import msda as operator

ODD = ((7, 5), (4, 6), (1, 3))
TOLERANCE = {
    torch.float64: 1e-10,
    torch.float32: 1e-5,
    torch.bfloat16: torch.finfo(torch.bfloat16).eps,  # twice the largest error of rounding once
    torch.float16: torch.finfo(torch.float16).eps,
}
EDGE = 1e-3  # pixels; nearer to a pixel's centre line the derivative by the location jumps
IMPLEMENTATIONS = (msda.OWN, msda.FUSED)


@dataclass(frozen=True)
class Form:
    """Sizes of a call, with a query for every position of the levels."""

    shapes: tuple[tuple[int, int], ...] = ODD
    batch: int = 2
    heads: int = 4
    channels: int = 32
    points: int = 4


NETWORK = Form(((25, 34), (50, 68), (100, 136)), batch=1, heads=8)
FORMS = [
    *(Form(channels=channels) for channels in (1, 2, 7, 8, 16, 20, 24, 32, 48, 64, 80, 128, 256, 300)),
    *(Form(heads=heads) for heads in (1, 3, 8, 16)),
    *(Form(points=points) for points in (1, 2, 3, 8)),
    *(Form(batch=batch) for batch in (1, 5)),
    *(Form(shapes) for shapes in (((9, 13),), ((33, 17), (1, 1)), ((12, 10), (6, 5), (3, 3), (2, 1)))),
    Form(((31, 29), (16, 15), (8, 8), (4, 4)), batch=1, heads=8, channels=16),
    NETWORK,
]


@dataclass(frozen=True)
class Call:
    """How a form is computed: the types of value and of the points, the implementation, the mode."""

    dtype: torch.dtype
    point_dtype: torch.dtype
    implementation: str
    deterministic: bool

    def describe(self) -> dict[str, str | bool]:
        types = {"dtype": str(self.dtype)[6:], "points": str(self.point_dtype)[6:]}
        return {**types, "implementation": self.implementation, "deterministic": self.deterministic}


def types(small: bool) -> Iterator[tuple[torch.dtype, torch.dtype]]:
    """Those of value and of the points; halves with points of their own type and of float32."""
    for dtype in (torch.float32, torch.bfloat16) if small else TOLERANCE:
        yield dtype, dtype
        if dtype.itemsize == 2:
            yield dtype, torch.float32


def gradients(implementation: str, inputs: msda.Inputs) -> tuple[Tensor, ...]:
    """The output and the gradients of an implementation's own arguments."""
    forward, backward = msda.implementation(implementation, inputs)
    return forward(), *backward()


def expected_by(implementation: str, inputs: msda.Inputs) -> tuple[Tensor, ...]:
    """The same in float64 on the CPU, by `grid_sample`."""
    exact = inputs.to(torch.float64, "cpu")
    if implementation == msda.OWN:
        return gradients(msda.GRID_SAMPLE, exact)
    leaves = [tensor.detach().requires_grad_() for tensor in (exact.value, exact.offsets, exact.logits)]
    front = msda.softmax_and_locations(exact.shapes, exact.reference, *leaves[1:])
    output = msda.grid_sample_formulation(exact.shapes, leaves[0], *front)
    return output.detach(), *torch.autograd.grad(output, leaves, exact.grad_output)


def smooth(implementation: str, inputs: msda.Inputs) -> Tensor:
    """Points (..., 2) where the derivative by the location does not jump within EDGE."""
    exact = inputs.to(torch.float64, "cpu")
    sizes = torch.tensor(exact.shapes).flip(-1)[:, None]
    pixels = exact.locations * sizes
    if implementation == msda.FUSED:
        pixels = exact.reference[:, :, None, :, None] * sizes + exact.offsets
    pixels = pixels - 0.5
    return ((pixels - pixels.round()).abs() > EDGE).all(-1, keepdim=True)


def difference(result: Tensor, expected: Tensor) -> float:
    """The largest, relative to the largest expected number; NaN where the result has one."""
    largest = expected.abs().max().item() or 1.0
    return (result.cpu().double() - expected).abs().max().item() / largest


def compare(call: Call, inputs: msda.Inputs, expected: tuple[Tensor, ...], kept: Tensor) -> dict[str, Any]:
    """What a call gives: differences of output and gradients, and whether all are within their tolerance."""
    torch.use_deterministic_algorithms(call.deterministic)
    try:
        results = gradients(call.implementation, inputs)
        again = gradients(call.implementation, inputs) if call.deterministic else results
    except RuntimeError as error:
        return {**call.describe(), "error": str(error), "ok": False}
    finally:
        torch.use_deterministic_algorithms(False)
    differences, within = {}, True
    for name, result, exact in zip(("output", "value", "points", "weights"), results, expected, strict=True):
        mask = kept if name == "points" else torch.ones(())
        differences[name] = difference(result.cpu() * mask, exact * mask)
        within &= differences[name] < TOLERANCE[result.dtype]
    same = all(torch.equal(*pair) for pair in zip(results, again, strict=True))
    return {**call.describe(), "differences": differences, "same_again": same, "ok": within and same}


def check_form(form: Form, device: str, small: bool = False) -> Iterator[dict[str, Any]]:
    """The calls of a form, one after the other; ``small``: in two types."""
    for dtype, point_dtype in types(small):
        inputs = msda.random_inputs(*astuple(form), True, dtype, point_dtype, device)
        for implementation in IMPLEMENTATIONS:
            expected = expected_by(implementation, inputs)
            kept = smooth(implementation, inputs).double()
            for deterministic in (False, True):
                call = Call(dtype, point_dtype, implementation, deterministic)
                yield {"form": vars(form), **compare(call, inputs, expected, kept)}


def check(device: str) -> None:
    """A quick look before a benchmark.

    Raises:
        SystemExit: the operator is wrong, or there is none for the device.
    """
    require_kernel(device)
    for row in check_form(Form(), device):
        if not row["ok"]:
            raise SystemExit(f"the operator differs from float64 on {device}: {row}")


def require_kernel(device: str) -> None:
    """Raises SystemExit where plain PyTorch would serve instead of the compiled operator."""
    if not operator.has_kernel(torch.device(device)):
        raise SystemExit(operator.LOAD_ERROR or f"the operator was built without a kernel for {device}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--small", action="store_true", help="two types, nothing of a network's size")
    parser.add_argument("--output", type=Path, help="a JSON file")
    args = parser.parse_args()
    require_kernel(args.device)
    build = torch.ops.msda.build_info()
    report: dict[str, Any] = {"hardware": hardware.describe(), "operator": build, "rows": []}
    for form in FORMS:
        if args.small and form == NETWORK:
            continue
        rows = list(check_form(form, args.device, small=args.small or form == NETWORK))
        report["rows"] += rows
        print(f"{form}: {sum(row['ok'] for row in rows)} of {len(rows)} agree")
        for row in rows:
            if not row["ok"]:
                print(f"  {row}")
        if args.output:
            msda.write(report, args.output)
    failed = sum(not row["ok"] for row in report["rows"])
    print(f"{args.device}: {len(report['rows']) - failed} calls agree with float64, {failed} do not")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
