"""Times the operator at the sizes of Mask2Former's pixel decoder; checks it against float64 first.

    python benchmarks/msda.py                 the CPU, two threads; writes benchmarks/results/msda_cpu.json
    python benchmarks/msda.py --device cuda   a GPU; writes benchmarks/results/msda_cuda.json
    python benchmarks/msda.py --peer NAME     also any importable module with the original's interface

    python benchmarks/msda.py --peer FILE.so  also the original's extension itself, built elsewhere

Repetitions of all implementations alternate, so that they meet the same conditions; times are medians. On a
GPU they are between CUDA events, behind a fill of 1 GiB: no data of a step lies in the cache when it begins,
and its kernels wait for the GPU, not for Python. Bytes are those that have to move at least once: inputs
read, results written. It needs PyTorch alone.
"""

import argparse
import ctypes
import importlib.util
import json
import os
import statistics
import sys
import time
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "ops"), str(ROOT / "benchmarks")]
import hardware  # noqa: E402
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
COMPILED = f"compiled {GRID_SAMPLE}"
LOWER = "sim-m2f, fused front, offsets and logits in value's type"  # as they come from layers under autocast
DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16", "float64")}
REPETITIONS = {"cpu": 7, "cuda": 25}
WARM_UP = {"cpu": 1, "cuda": 5}


@dataclass
class Inputs:
    """Arguments of one case, and those of the fused front that lead to the same sampling points."""

    shapes: Sequence[tuple[int, int]]
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

    def to(self, dtype: torch.dtype, device: str) -> "Inputs":
        tensors = list(vars(self).values())[1:]
        return Inputs(self.shapes, *(tensor.to(device, dtype) for tensor in tensors))


def make_inputs(case: str, local: bool, dtype: torch.dtype, device: str) -> Inputs:
    """The encoder's attention in a case; locations and weights as in a network under autocast."""
    height, width, batch = CASES[case]
    shapes = [(height // stride, width // stride) for stride in STRIDES]
    point_dtype = dtype if dtype == torch.float64 else torch.float32
    return random_inputs(shapes, batch, HEADS, CHANNELS, POINTS, local, dtype, point_dtype, device)


def random_inputs(
    shapes: Sequence[tuple[int, int]],
    batch: int,
    heads: int,
    channels: int,
    points: int,
    local: bool,
    dtype: torch.dtype,
    point_dtype: torch.dtype,
    device: str,
) -> Inputs:
    """One query for every position of the levels; the numbers are drawn on the device.

    ``local``: two pixels (standard deviation) around the query's own position; otherwise anywhere.
    """
    generator = torch.Generator(device).manual_seed(0)
    draw = {"generator": generator, "device": device}
    centres = [
        torch.cartesian_prod((torch.arange(h) + 0.5) / h, (torch.arange(w) + 0.5) / w).flip(-1)
        for h, w in shapes
    ]
    reference = torch.cat(centres).to(device)[None, :, None].expand(batch, -1, len(shapes), -1)
    samples = (batch, reference.shape[1], heads, len(shapes), points)
    sizes = torch.tensor(shapes, device=device).flip(-1)[:, None]
    if local:
        offsets = 2 * torch.randn(*samples, 2, **draw)
    else:
        offsets = (torch.rand(*samples, 2, **draw) - reference[:, :, None, :, None]) * sizes
    logits = torch.randn(samples, **draw)
    value = torch.randn(batch, reference.shape[1], heads, channels, **draw)
    grad_output = torch.randn(batch, reference.shape[1], heads * channels, **draw)
    front = [tensor.to(point_dtype) for tensor in (reference, offsets, logits)]
    return Inputs(
        shapes, value.to(dtype), *softmax_and_locations(shapes, *front), *front, grad_output.to(dtype)
    )


def softmax_and_locations(
    shapes: Sequence[tuple[int, int]], reference: Tensor, offsets: Tensor, logits: Tensor
) -> tuple[Tensor, Tensor]:
    """What precedes the operator in the network: sampling locations and attention weights."""
    sizes = torch.tensor(shapes, device=offsets.device).flip(-1)[:, None]
    weights = logits.flatten(3).softmax(-1).view(logits.shape)
    return reference[:, :, None, :, None] + offsets / sizes, weights


def grid_sample_formulation(
    shapes: Sequence[tuple[int, int]], value: Tensor, locations: Tensor, weights: Tensor
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
    }
    if name == COMPILED:
        return autograd_steps(torch.compile(formulation), plain_leaves, inputs.grad_output)
    if name in known:
        return autograd_steps(*known[name], inputs.grad_output)
    peer = load_peer(name)
    arguments = (inputs.value, shapes, starts, inputs.locations, inputs.weights)
    return (
        lambda: peer.ms_deform_attn_forward(*arguments, 128),
        lambda: peer.ms_deform_attn_backward(*arguments, inputs.grad_output, 128),
    )


def load_peer(name: str) -> types.ModuleType:
    """A module by its name, or the original's extension by its file, beside ours of the same name."""
    if not name.endswith(".so"):
        return importlib.import_module(name)
    spec = importlib.util.spec_from_file_location("MultiScaleDeformableAttention", name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def milliseconds(step: Step, device: str) -> float:
    """How long a step takes; on a GPU the time that it takes there."""
    if device == "cpu":
        start = time.perf_counter()
        step()
        return 1e3 * (time.perf_counter() - start)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    filler().zero_()
    start.record()
    step()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


@cache
def filler() -> Tensor:
    """More than any cache holds; filling it takes longer than launching a step."""
    return torch.empty(2**30, dtype=torch.uint8, device="cuda")


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
    source = torch.empty(2**26 if device == "cpu" else 2**30, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    times = [milliseconds(lambda: target.copy_(source), device) for _ in range(10)]
    return 2 * source.nbytes / (1e-3 * min(times))


def measure(names: list[str], inputs: Inputs, device: str, repeat: int) -> dict[str, dict]:
    """Median milliseconds and peak bytes by implementation; what cannot run says why."""
    if COMPILED in names:
        torch._dynamo.reset()  # it falls back to eager when the cases before have used up its recompilations
    steps, results = {}, {}
    for name in names:
        try:
            steps[name] = implementation(name, inputs)
            for step in WARM_UP[device] * steps[name]:
                step()
        except (RuntimeError, ImportError, AttributeError) as error:
            steps.pop(name, None)
            results[name] = {"error": str(error).splitlines()[0]}
    times: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in steps}
    for _ in range(repeat):
        for name, pair in steps.items():
            for step, list_of_times in zip(pair, times[name], strict=True):
                list_of_times.append(milliseconds(step, device))
    for name, (forward, backward) in times.items():
        peaks = [peak_bytes(step, device) for step in steps[name]]
        results[name] = {
            "forward_ms": statistics.median(forward),
            "backward_ms": statistics.median(backward),
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


def summary(cases: list[dict]) -> str:
    """Of the operator as the network calls it, in all cases."""
    found = [case["results"][FUSED] for case in cases]
    parts = []
    for direction in ("forward", "backward"):
        for key, form in (("speedup", ".1f"), ("bandwidth_share", ".0%")):
            numbers = [result[name] for result in found if (name := f"{direction}_{key}") in result]
            if numbers:
                parts.append(f"{direction} {key} {min(numbers):{form}} to {max(numbers):{form}}")
    return f"{FUSED}: {', '.join(parts)}"


COLUMNS = {"speedup": ".1f", "bandwidth_share": ".0%", "extra_mib": ".0f", "memory": ".1%"}  # with formats


def beside_peers(cases: list[dict], peers: Sequence[str]) -> str:
    """How much faster the operator is than each peer, which in lower types is taken in float32, as Markdown.

    The original computes in float32 under autocast, too.
    """
    of_case = {(case["case"], case["local"], case["dtype"]): case["results"] for case in cases}
    lines = []
    for peer in peers:
        for (case, local, dtype), results in of_case.items():
            other = results.get(peer, {})
            if "error" in other:
                other = of_case.get((case, local, "float32"), {}).get(peer, {})
            own, where = results[FUSED], "near the query" if local else "anywhere"
            if "error" not in own and "forward_ms" in other:
                factors = [other[key] / own[key] for key in ("forward_ms", "backward_ms")]
                lines.append(f"| {peer} | {case} | {dtype} | {where} | {factors[0]:.1f} | {factors[1]:.1f} |")
    head = ["| beside | case | type | locations | times as fast forward | backward |"]
    return "\n".join([*head, "|---|---|---|---|---|---|", *lines]) if lines else ""


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
    parser.add_argument("--repeat", type=int, help="default: 7 on the CPU, 25 on a GPU")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/msda_DEVICE.json")
    return parser.parse_args()


def write(report: dict, output: Path) -> None:
    """The cases so far, whole or not at all; a line per entry of a list."""
    temporary = output.with_suffix(".tmp")
    parts = []
    for key, value in report.items():
        text = json.dumps(value)
        if isinstance(value, list):
            text = "[\n" + ",\n".join(f"  {json.dumps(entry)}" for entry in value) + "\n ]"
        parts.append(f" {json.dumps(key)}: {text}")
    temporary.write_text("{\n" + ",\n".join(parts) + "\n}\n")
    temporary.replace(output)


def main() -> None:
    args = parse_arguments()
    from msda_agreement import check  # it draws its problems here

    torch.set_num_threads(args.threads)
    give_back_memory_at_once()
    check(args.device)
    report = {
        "hardware": hardware.describe(),
        "operator": torch.ops.msda.build_info(),
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
        *([COMPILED] if args.compile else []),
        *args.peer,
    ]
    output = args.output or ROOT / "benchmarks" / "results" / f"msda_{args.device}.json"
    print("\n" + "\n".join(f"{key}: {number}" for key, number in report.items() if key != "cases"))
    for case in args.case or DEFAULT_CASES[args.device]:
        for dtype in args.dtype:
            for local in (True, False):
                inputs = make_inputs(case, local, DTYPES[dtype], args.device)
                results = measure(names, inputs, args.device, args.repeat or REPETITIONS[args.device])
                add_ratios(results, least_bytes(inputs), bandwidth)
                entry = {"case": case, "dtype": dtype, "local": local, "results": results}
                report["cases"].append(entry)
                print(table(entry), flush=True)
                write(report, output)
    print("\n" + beside_peers(report["cases"], args.peer))
    print("\n" + summary(report["cases"]))


if __name__ == "__main__":
    main()
