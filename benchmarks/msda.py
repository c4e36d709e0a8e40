"""Times the operator at the sizes of Mask2Former's pixel decoder; checks it against float64 first.

    python benchmarks/msda.py                 the CPU, two threads; writes benchmarks/results/msda_cpu.json
    python benchmarks/msda.py --device cuda   a GPU; writes benchmarks/results/msda_cuda.json
    python benchmarks/msda.py --peer NAME     also any importable module with the original's interface

Repetitions of all implementations alternate, so that they meet the same conditions; times are medians. Bytes
are those that have to move at least once: inputs read, results written. It needs PyTorch alone.
"""

import argparse
import ctypes
import importlib
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "ops"))
import MultiScaleDeformableAttention as msda  # noqa: E402, N813
import torch.nn.functional as F  # noqa: E402

CASES = {  # height and width of the image, batch
    "tiny": (64, 96, 1),
    "800x1088": (800, 1088, 1),
    "1024x1024, batch 2": (1024, 1024, 2),
    "1024x1024, batch 16": (1024, 1024, 16),
}
DEFAULT_CASES = {
    "cpu": ("800x1088", "1024x1024, batch 2"),
    "cuda": ("800x1088", "1024x1024, batch 2", "1024x1024, batch 16"),
}
STRIDES = (32, 16, 8)
HEADS, CHANNELS, POINTS = 8, 32, 4
OWN, FUSED, APART, GRID_SAMPLE = "sim-m2f", "sim-m2f, fused front", "sim-m2f, front apart", "grid_sample"
LOWER = "sim-m2f, fused front, offsets and logits in value's type"  # as they come from layers under autocast
DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16", "float64")}


@dataclass
class Inputs:
    """Arguments of one case, and those of the fused front that lead to the same sampling points."""

    shapes: list[tuple[int, int]]
    value: Tensor
    locations: Tensor
    weights: Tensor
    reference: Tensor
    offsets: Tensor
    logits: Tensor
    grad_output: Tensor

    @property
    def levels(self) -> tuple[Tensor, Tensor]:
        shapes = torch.tensor(self.shapes, device=self.value.device)
        sizes = shapes.prod(1)
        return shapes, sizes.cumsum(0) - sizes


def make_inputs(case: str, local: bool, dtype: torch.dtype, device: str) -> Inputs:
    """``local``: two pixels (standard deviation) around the query's own position; otherwise anywhere.

    Locations and weights are float32 (float64 for float64), as in a network under autocast.
    """
    height, width, batch = CASES[case]
    shapes = [(height // stride, width // stride) for stride in STRIDES]
    generator = torch.Generator().manual_seed(0)
    centres = [
        torch.cartesian_prod((torch.arange(h) + 0.5) / h, (torch.arange(w) + 0.5) / w).flip(-1)
        for h, w in shapes
    ]
    reference = torch.cat(centres)[None, :, None].expand(batch, -1, len(shapes), -1)
    samples = (batch, reference.shape[1], HEADS, len(shapes), POINTS)
    sizes = torch.tensor(shapes).flip(-1)[:, None]
    if local:
        offsets = 2 * torch.randn(*samples, 2, generator=generator)
    else:
        offsets = (torch.rand(*samples, 2, generator=generator) - reference[:, :, None, :, None]) * sizes
    logits = torch.randn(samples, generator=generator)
    value = torch.randn(batch, reference.shape[1], HEADS, CHANNELS, generator=generator)
    grad_output = torch.randn(batch, reference.shape[1], HEADS * CHANNELS, generator=generator)
    point_dtype = dtype if dtype == torch.float64 else torch.float32
    points = [tensor.to(device, point_dtype) for tensor in (reference, offsets, logits)]
    front = softmax_and_locations(shapes, *points)
    return Inputs(shapes, value.to(device, dtype), *front, *points, grad_output.to(device, dtype))


def softmax_and_locations(
    shapes: list[tuple[int, int]], reference: Tensor, offsets: Tensor, logits: Tensor
) -> tuple[Tensor, Tensor]:
    """What precedes the operator in the network: sampling locations and attention weights."""
    sizes = torch.tensor(shapes, device=offsets.device).flip(-1)[:, None]
    weights = logits.flatten(3).softmax(-1).view(logits.shape)
    return reference[:, :, None, :, None] + offsets / sizes, weights


def grid_sample_formulation(
    shapes: list[tuple[int, int]], value: Tensor, locations: Tensor, weights: Tensor
) -> Tensor:
    """The usual fallback without a compiled operator: all samples of all levels, then their weighted sum.

    Raises:
        RuntimeError: float16 on the CPU, where PyTorch's own grid_sample crashes on maps of this size.
    """
    if value.dtype == torch.float16 and value.device.type == "cpu":
        raise RuntimeError("PyTorch's grid_sample crashes in float16 on the CPU")
    batch, _, heads, channels = value.shape
    queries, points = locations.shape[1], locations.shape[4]
    sampled = []
    for level, (height, width) in enumerate(shapes):
        start = sum(h * w for h, w in shapes[:level])
        maps = value[:, start : start + height * width].flatten(2).transpose(1, 2)
        grid = 2 * locations[:, :, :, level].transpose(1, 2).flatten(0, 1) - 1
        maps = maps.reshape(batch * heads, channels, height, width)
        sampled.append(F.grid_sample(maps, grid.to(maps.dtype), padding_mode="zeros", align_corners=False))
    weights = weights.transpose(1, 2).reshape(batch * heads, 1, queries, len(shapes) * points).to(value.dtype)
    output = (torch.stack(sampled, dim=-2).flatten(-2) * weights).sum(-1)
    return output.view(batch, heads * channels, queries).transpose(1, 2).contiguous()


Step = Callable[[], object]


def autograd_steps(
    forward: Callable[..., Tensor], leaves: tuple[Tensor, ...], grad_output: Tensor
) -> tuple[Step, Step]:
    """A forward step, and a backward step on a graph that is built once, outside of what is timed."""
    leaves = tuple(leaf.detach().requires_grad_() for leaf in leaves)
    graph = forward(*leaves)

    def forward_step() -> Tensor:
        with torch.no_grad():
            return forward(*leaves)

    def backward_step() -> tuple[Tensor, ...]:
        return torch.autograd.grad(graph, leaves, grad_output, retain_graph=True)

    return forward_step, backward_step


def implementation(name: str, inputs: Inputs) -> tuple[Step, Step]:
    """The forward and backward step of an implementation; anything but a known name is a module to import."""
    shapes, starts = inputs.levels
    plain_leaves = (inputs.value, inputs.locations, inputs.weights)
    fused_leaves = (inputs.value, inputs.offsets, inputs.logits)

    def own(value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
        return msda.ms_deform_attn(value, shapes, starts, locations, weights)

    def fused(value: Tensor, offsets: Tensor, logits: Tensor) -> Tensor:
        return msda.ms_deform_attn_fused(value, shapes, starts, inputs.reference, offsets, logits)

    def apart(value: Tensor, offsets: Tensor, logits: Tensor) -> Tensor:
        return own(value, *softmax_and_locations(inputs.shapes, inputs.reference, offsets, logits))

    def formulation(*leaves: Tensor) -> Tensor:
        return grid_sample_formulation(inputs.shapes, *leaves)

    known = {
        OWN: (own, plain_leaves),
        FUSED: (fused, fused_leaves),
        LOWER: (fused, tuple(leaf.to(inputs.value.dtype) for leaf in fused_leaves)),
        APART: (apart, fused_leaves),
        GRID_SAMPLE: (formulation, plain_leaves),
        f"compiled {GRID_SAMPLE}": (torch.compile(formulation), plain_leaves),
    }
    if name in known:
        return autograd_steps(*known[name], inputs.grad_output)
    peer = importlib.import_module(name)
    arguments = (inputs.value, shapes, starts, inputs.locations, inputs.weights)
    return (
        lambda: peer.ms_deform_attn_forward(*arguments, 128),
        lambda: peer.ms_deform_attn_backward(*arguments, inputs.grad_output, 128),
    )


def seconds(step: Step, device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def peak_bytes(step: Step, device: str) -> int:
    """Largest memory in use during a step, beyond its inputs and its results."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        results = step()
        return torch.cuda.max_memory_allocated() - before - result_bytes(results)
    if sys.platform != "linux":
        return -1
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = resident("VmRSS")
    results = step()
    return resident("VmHWM") - before - result_bytes(results)


def result_bytes(results: Tensor | Sequence[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in ([results] if isinstance(results, Tensor) else results))


def resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise SystemExit(f"/proc/self/status has no {field}")


def give_back_memory_at_once() -> None:
    """glibc returns every block above 128 KiB when it is freed, so the resident size tells what is in use."""
    if sys.platform == "linux":
        ctypes.CDLL("libc.so.6").mallopt(-3, 128 * 1024)  # M_MMAP_THRESHOLD


def least_bytes(inputs: Inputs) -> tuple[int, int]:
    """Bytes that a forward and a backward have to move."""
    read = sum(tensor.nbytes for tensor in (inputs.value, inputs.locations, inputs.weights))
    return read + inputs.grad_output.nbytes, 2 * read + inputs.grad_output.nbytes


def device_bandwidth(device: str) -> float:
    """Bytes a second that copying a large tensor moves, reading and writing."""
    source = torch.empty(2**26 if device == "cpu" else 2**29, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    times = [seconds(lambda: target.copy_(source), device) for _ in range(10)]
    return 2 * source.nbytes / min(times)


def check(device: str) -> None:
    """The operator against the float64 formulation on a small case.

    Raises:
        SystemExit: they disagree.
    """
    for dtype, tolerance in (
        (torch.float64, 1e-10),
        (torch.float32, 1e-5),
        (torch.bfloat16, 2e-2),
        (torch.float16, 2e-3),
    ):
        inputs = make_inputs("tiny", False, dtype, device)
        exact = Inputs(inputs.shapes, *(tensor.double() for tensor in list(vars(inputs).values())[1:]))
        expected = [step() for step in implementation(GRID_SAMPLE, exact)]
        for name in (OWN, FUSED):
            forward, backward = (step() for step in implementation(name, inputs))
            pairs = [(forward, expected[0]), (backward[0], expected[1][0])]
            pairs += list(zip(backward, expected[1], strict=True)) if name == OWN else []
            error = max(((a.double() - b).abs().max() / b.abs().max()).item() for a, b in pairs)
            print(f"check {name}, {dtype}, {device}: largest relative difference {error:.1e}")
            if not error < tolerance:
                raise SystemExit(f"{name} in {dtype} on {device} differs from grid_sample by {error:.1e}")


def measure(names: list[str], inputs: Inputs, device: str, repeat: int) -> dict[str, dict]:
    """Median seconds and peak bytes by implementation; what cannot run says why."""
    torch._dynamo.reset()  # it would fall back to eager when the cases before had used up its recompilations
    steps, results = {}, {}
    for name in names:
        try:
            steps[name] = implementation(name, inputs)
            for step in steps[name]:
                step()
        except (RuntimeError, ImportError, AttributeError) as error:
            steps.pop(name, None)
            results[name] = {"error": str(error).splitlines()[0]}
    times: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in steps}
    for _ in range(repeat):
        for name, pair in steps.items():
            for step, list_of_times in zip(pair, times[name], strict=True):
                list_of_times.append(seconds(step, device))
    for name, (forward, backward) in times.items():
        peaks = [peak_bytes(step, device) for step in steps[name]]
        results[name] = {
            "forward_ms": 1e3 * statistics.median(forward),
            "backward_ms": 1e3 * statistics.median(backward),
            "forward_extra_mib": peaks[0] / 2**20,
            "backward_extra_mib": peaks[1] / 2**20,
        }
    return results


def add_ratios(results: dict[str, dict], moved: tuple[int, int], bandwidth: float) -> None:
    """Adds, in place, the share of the device's bandwidth and the factors against grid_sample."""
    base = results.get(GRID_SAMPLE, {})
    for result in results.values():
        for direction, count in zip(("forward", "backward"), moved, strict=True):
            if "error" in result:
                continue
            result[f"{direction}_moved_mib"] = count / 2**20
            result[f"{direction}_bandwidth_share"] = count / (result[f"{direction}_ms"] * 1e-3) / bandwidth
            if "error" not in base and base:
                result[f"{direction}_speedup"] = base[f"{direction}_ms"] / result[f"{direction}_ms"]
                result[f"{direction}_memory"] = (
                    result[f"{direction}_extra_mib"] / base[f"{direction}_extra_mib"]
                )


def table(entry: dict) -> str:
    """One case as Markdown."""
    spread = "near the query" if entry["local"] else "uniformly random"
    lines = [f"\n{entry['case']}, {entry['dtype']}, locations {spread}\n"]
    lines += ["| | forward ms | backward ms | speed-up | share of bandwidth | extra MiB | of grid_sample's |"]
    lines += ["|---|---|---|---|---|---|---|"]
    for name, result in entry["results"].items():
        if "error" in result:
            lines.append(f"| {name} | {result['error']} | | | | | |")
            continue
        cells = [f"{result['forward_ms']:.2f}", f"{result['backward_ms']:.2f}"]
        for key, form in COLUMNS.items():
            pair = [result.get(f"{direction}_{key}") for direction in ("forward", "backward")]
            cells.append(" / ".join("-" if value is None else format(value, form) for value in pair))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


COLUMNS = {"speedup": ".1f", "bandwidth_share": ".0%", "extra_mib": ".0f", "memory": ".1%"}  # with formats


def hardware(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    if Path("/proc/cpuinfo").exists():
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.lower().startswith("model name"):
                return f"{line.partition(':')[2].strip()}, {os.cpu_count()} cores"
    return f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=2, help="of the CPU")
    parser.add_argument("--case", nargs="+", choices=tuple(CASES), help="default: all that suit the device")
    parser.add_argument(
        "--dtype", nargs="+", choices=tuple(DTYPES), default=["float32", "bfloat16", "float16"]
    )
    parser.add_argument(
        "--peer", nargs="+", default=[], help="modules with ms_deform_attn_forward and _backward"
    )
    parser.add_argument(
        "--compile", action="store_true", help="also torch.compile of the grid_sample formulation"
    )
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--check-only", action="store_true", help="compare with float64 and stop")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/msda_DEVICE.json")
    return parser.parse_args()


def write(report: dict, output: Path) -> None:
    """The cases so far, whole or not at all."""
    temporary = output.with_suffix(".tmp")
    temporary.write_text(json.dumps(report, indent=1) + "\n")
    temporary.replace(output)


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    give_back_memory_at_once()
    check(args.device)
    if args.check_only:
        return
    report = {
        "hardware": hardware(args.device),
        "torch": torch.__version__,
        "operator": msda.LOAD_ERROR or torch.ops.msda.build_info(),
        "threads": args.threads,
        "load_average_before": os.getloadavg()[0],
        "bandwidth_gib_s": (bandwidth := device_bandwidth(args.device)) / 2**30,
        "cases": [],
    }
    names = [
        OWN,
        FUSED,
        LOWER,
        APART,
        GRID_SAMPLE,
        *([f"compiled {GRID_SAMPLE}"] if args.compile else []),
        *args.peer,
    ]
    output = args.output or ROOT / "benchmarks" / "results" / f"msda_{args.device}.json"
    print("\n" + "\n".join(f"{key}: {number}" for key, number in report.items() if key != "cases"))
    for case in args.case or DEFAULT_CASES[args.device]:
        for dtype in args.dtype:
            for local in (True, False):
                inputs = make_inputs(case, local, DTYPES[dtype], args.device)
                results = measure(names, inputs, args.device, args.repeat)
                add_ratios(results, least_bytes(inputs), bandwidth)
                entry = {"case": case, "dtype": dtype, "local": local, "results": results}
                report["cases"].append(entry)
                print(table(entry), flush=True)
                write(report, output)


if __name__ == "__main__":
    main()
