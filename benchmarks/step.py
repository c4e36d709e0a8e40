"""Times training steps of the trainer itself, whole and by part, and counts what they launch and wait for.

    python benchmarks/step.py configs/coco/sim_R50_bs16_50ep.yaml --case 2 16 2:float32
    python benchmarks/step.py configs/shapes/base.yaml+configs/ablation/7_copy_paste.yaml

A configuration is one file or several, joined by +, where later ones change earlier ones; more of them may
follow, and KEY=VALUE for all. A case is a number of images and, behind a colon, a precision other than the
configuration's (float32, bf16, fp16); without cases a configuration is taken as it is. Training stands in the
middle of its run, where losses have started. --synthetic N trains on drawn images of N objects instead of the
configuration's data. --original DIR also times Mask2Former itself, from a checkout, on the images of the
configurations with masks, as it is: AdamW as its train_net.py has it, on the CPU its deformable attention in
PyTorch, see original.py. detectron2 has to be importable.

"data" is the wait for the loader and no part of the step. Parts are timed in steps of their own, since a GPU
has to be waited for at the borders of each; the losses' backward pass ends where it reaches the masks that
the student predicted. --clock cpu counts the processor time of this process, for machines that others use
too. On a GPU one trainer follows the other and has the memory to itself. On the CPU each has a process of
its own, ours keeps freed memory as the commands do, and they take turns, so that they meet the same
disturbances. "times_as_fast" is the original's fastest step divided by the fastest one of a row.
"""

import argparse
import gc
import statistics
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.managers import BaseManager
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT), str(ROOT / "ops")]
import hardware  # noqa: E402
import MultiScaleDeformableAttention as msda  # noqa: E402, N813
import step_trace  # noqa: E402
import synthetic_coco  # noqa: E402
from msda import write  # noqa: E402
from original_step import OriginalTrainer  # noqa: E402

from sim_m2f.allocator import keep_freed_memory  # noqa: E402
from sim_m2f.config import CfgNode, get_cfg  # noqa: E402
from sim_m2f.data.loader import train_loader  # noqa: E402
from sim_m2f.engine.trainer import Trainer  # noqa: E402
from sim_m2f.structures import Outputs  # noqa: E402
from sim_m2f.supervision.base import Criterion  # noqa: E402

PARTS = (
    *("copy-paste", "student forward", "teacher", "criterion", "losses backward", "backward", "optimizer"),
    *("EMA", "rest"),
)
SUPERVISION = ("copy-paste", "criterion", "losses backward")
PRECISIONS = {"float32": (False, "auto"), "bf16": (True, "bf16"), "fp16": (True, "fp16")}
ORIGINAL = "Mask2Former itself"
AnyTrainer = Trainer | OriginalTrainer


def configuration(files: str, case: str, device: str, changes: list[str]) -> CfgNode:
    """The files, changed by KEY=VALUE, as a case wants it on a device."""
    cfg = get_cfg()
    for file in files.split("+"):
        cfg.merge_from_file(file)
    cfg.merge_from_list([item for change in changes for item in change.split("=", 1)])
    images, _, precision = case.partition(":")
    if images:
        cfg.SOLVER.IMS_PER_BATCH = int(images)
    if precision:
        cfg.SOLVER.AMP.ENABLED, cfg.SOLVER.AMP.DTYPE = PRECISIONS[precision]
    cfg.MODEL.DEVICE = device
    return cfg


class Stopwatch:
    """Adds up the milliseconds that a step spends in functions.

    Args:
        device: "cpu" or "cuda".
        clock: "wall", or "cpu" for the time of the processor.
    """

    def __init__(self, device: str, clock: str = "wall") -> None:
        self.device, self.milliseconds = device, defaultdict(float)
        self.started: dict[str, float] = {}
        self.clock = time.perf_counter if clock == "wall" else time.process_time

    def watch(self, owner: Any, name: str, part: str) -> None:
        """Time a method of an object from now on."""
        setattr(owner, name, self.timed(getattr(owner, name), part))

    def timed(self, work: Callable[..., Any], part: str) -> Callable[..., Any]:
        def run(*args: Any, **keywords: Any) -> Any:
            start = self.started[part] = self.now()
            result = work(*args, **keywords)
            self.milliseconds[part] += self.now() - start
            return result

        return run

    def now(self) -> float:
        if self.device == "cuda":
            torch.cuda.synchronize()
        return 1e3 * self.clock()

    def divide(self, whole: str, first: str) -> None:
        """What has passed of a part that is being timed belongs to another one."""
        passed = self.now() - self.started[whole]
        self.milliseconds[first] += passed
        self.milliseconds[whole] -= passed


class WatchedCall:
    """An object whose calls are timed; otherwise it is the object."""

    def __init__(self, inner: Any, stopwatch: Stopwatch, part: str) -> None:
        self.inner, self.call = inner, stopwatch.timed(inner, part)

    def __call__(self, *args: Any) -> Any:
        return self.call(*args)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


def watch_parts(trainer: AnyTrainer, stopwatch: Stopwatch) -> None:
    """Time the parts of the trainer's steps from now on."""
    watch = stopwatch.watch
    watch(trainer.model, "forward", "student forward")
    if isinstance(trainer, OriginalTrainer):
        watch(trainer, "backward", "backward")
        watch(trainer, "update", "optimizer")
        return
    if trainer.copy_paste:
        watch(trainer.copy_paste, "remember", "copy-paste")
        trainer.copy_paste = WatchedCall(trainer.copy_paste, stopwatch, "copy-paste")
    watch(trainer, "_teacher_outputs", "teacher")
    watch(trainer.criterion, "forward", "criterion")
    watch(trainer.criterion, "update", "criterion")
    watch_masks(trainer.criterion, stopwatch)
    watch(trainer.accelerator, "backward", "backward")
    watch(trainer.accelerator, "clip_grad_norm_", "optimizer")
    watch(trainer.optimizer, "step", "optimizer")
    watch(trainer.optimizer, "zero_grad", "optimizer")
    if trainer.teacher:
        watch(trainer.teacher, "update", "EMA")


def watch_masks(criterion: Criterion, stopwatch: Stopwatch) -> None:
    """Part the backward pass at the masks that the student predicted."""
    forward = criterion.forward

    def run(outputs: Outputs, *rest: Any) -> Any:
        masks = outputs["layers"]["pred_masks"]
        masks.register_hook(lambda _: stopwatch.divide("backward", "losses backward"))
        return forward(outputs, *rest)

    criterion.forward = run


class Worker(BaseManager):
    """A process whose objects are used from here."""


class Measured:
    """A trainer with its batches and the times of its steps.

    Args:
        name: how the results call it.
        cfg: its configuration.
        device: "cpu" or "cuda".
        clock: "wall" or "cpu", see ``Stopwatch``.
        original: a checkout of Mask2Former, whose network is trained instead.
    """

    def __init__(
        self, name: str, cfg: CfgNode, device: str, clock: str, original: Path | None = None
    ) -> None:
        self.name, self.cfg, self.stopwatch = name, cfg, Stopwatch(device, clock)
        middle = cfg.SOLVER.MAX_ITER // 2
        self.trainer = OriginalTrainer(original, cfg, device) if original else Trainer(cfg)
        if isinstance(self.trainer, Trainer):
            self.trainer.iteration = self.trainer.criterion.step = middle
        self.batches = iter(train_loader(cfg, middle))
        self.milliseconds: dict[str, list[float]] = defaultdict(list)
        self.objects: list[int] = []

    def next_batch(self) -> dict[str, Any]:
        start = self.stopwatch.now()
        batch = next(self.batches)
        self.milliseconds["data"].append(self.stopwatch.now() - start)
        self.objects += [len(target["labels"]) for target in batch["targets"]]
        return batch

    def step(self, times: str) -> None:
        """A step, whose whole time is added to ``times``."""
        batch = self.next_batch()
        self.stopwatch.milliseconds.clear()
        start = self.stopwatch.now()
        self.trainer.step(batch)
        self.milliseconds[times].append(self.stopwatch.now() - start)

    def forget(self) -> None:
        """The times of the steps so far."""
        self.milliseconds.clear()

    def trace(self) -> dict[str, Any]:
        """What a profiler counts in a step."""
        batch = self.next_batch()
        return step_trace.profiled(lambda: self.trainer.step(batch))

    def watch(self) -> None:
        """Steps by part from now on."""
        watch_parts(self.trainer, self.stopwatch)

    def step_by_part(self) -> None:
        self.step("by part")
        parts = self.stopwatch.milliseconds
        parts["rest"] = self.milliseconds["by part"][-1] - sum(parts.values())
        for part in PARTS:
            self.milliseconds[part].append(parts[part])

    def result(self) -> dict[str, Any]:
        """Medians of milliseconds, and what else is known of the steps."""
        medians = {name: round(statistics.median(times), 2) for name, times in self.milliseconds.items()}
        whole = self.milliseconds["step"]
        return {
            "configuration": self.name,
            "images": self.cfg.SOLVER.IMS_PER_BATCH,
            "pixels": self.cfg.INPUT.IMAGE_SIZE,
            "precision": self.trainer.accelerator.mixed_precision.replace("no", "float32"),
            "objects_per_image": round(statistics.fmean(self.objects), 1),
            "step_ms": medians["step"],
            "step_ms_range": [round(min(whole), 2), round(max(whole), 2)],
            "data_ms": medians["data"],
            "fastest_ms": min(whole),
            "parts_ms": {part: medians[part] for part in PARTS},
            "supervision_share": round(sum(medians[part] for part in SUPERVISION) / medians["by part"], 3),
        }


Worker.register("Measured", Measured)


def measure(group: list[Measured], warmup: int, steps: int, device: str) -> list[dict[str, Any]]:
    """The results of trainers that take turns."""
    for _ in range(warmup):
        for measured in group:
            measured.step("warm-up")
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for measured in group:
        measured.forget()
    for _ in range(steps):
        for measured in group:
            measured.step("step")
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else None
    waits = [waiting_lines(measured) if device == "cuda" else {} for measured in group]
    traces = [measured.trace() for measured in group]
    for measured in group:
        measured.watch()
    for _ in range(steps):
        for measured in group:
            measured.step_by_part()
    results = []
    for measured, lines, trace in zip(group, waits, traces, strict=True):
        memory = {"peak_gib": round(peak / 2**30, 2), "waits_at": lines} if peak else {}
        results.append({**measured.result(), **memory, "trace": trace})
    return results


def waiting_lines(measured: Measured) -> dict[str, int]:
    """The lines of Python at which a step waits for the GPU, and how often."""
    batch = measured.next_batch()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            measured.trainer.step(batch)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    lines = Counter(f"{w.filename}:{w.lineno}" for w in caught if "synchronizing" in str(w.message))
    return {line.replace(f"{ROOT}/", ""): count for line, count in lines.most_common()}


def table(results: list[dict[str, Any]]) -> str:
    """As Markdown, a column per result that has figures."""
    done = [result for result in results if "error" not in result]
    heads = [f"{r['configuration']}, {r['images']} x {r['pixels']}, {r['precision']}" for r in done]
    lines = [f"| milliseconds | {' | '.join(heads)} |", "|" + "---|" * (len(heads) + 1)]
    for part in PARTS:
        lines.append(f"| {part} | {' | '.join(format(r['parts_ms'][part], '.1f') for r in done)} |")
    for key, form in {"step_ms": ".1f", "data_ms": ".1f", "peak_gib": ".2f"}.items():
        lines.append(f"| {key} | {' | '.join(format(r[key], form) if key in r else '' for r in done)} |")
    for key in ("operator_calls", "launches", "synchronisations"):
        lines.append(f"| {key} | {' | '.join(str(r['trace'][key]) for r in done)} |")
    return "\n".join(lines)


def compare(results: list[dict[str, Any]]) -> None:
    """Add how many times as fast as the original's in the same case a row's fastest step is."""
    done = [result for result in results if "error" not in result]
    theirs = {case_of(r): r["fastest_ms"] for r in done if r["configuration"] == ORIGINAL}
    for result in done:
        if case_of(result) in theirs:
            result["times_as_fast"] = round(theirs[case_of(result)] / result["fastest_ms"], 2)


def case_of(result: dict[str, Any]) -> tuple[int, int, str]:
    """Images, their size and the precision of a result."""
    return result["images"], result["pixels"], result["precision"]


def line(result: dict[str, Any]) -> str:
    """The shortest account of a row."""
    name = Path(result["configuration"].split("+")[-1]).stem
    if "error" in result:
        return f"{name} {result['case']}: {result['error']}"
    memory = f", {result['peak_gib']} GiB" if "peak_gib" in result else ""
    factor = f", {result['times_as_fast']} times as fast" if "times_as_fast" in result else ""
    return f"{name} {result['images']} {result['precision']}: {result['step_ms']:.0f} ms{memory}{factor}"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("configurations", nargs="+", metavar="FILE[+FILE] or KEY=VALUE")
    parser.add_argument("--case", nargs="+", default=[""], metavar="IMAGES[:PRECISION]")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--steps", type=int, default=5, help="steps timed as a whole, and as many by part")
    parser.add_argument("--synthetic", type=int, metavar="N", help="draw images of N objects each")
    parser.add_argument("--original", type=Path, metavar="DIR", help="a checkout of Mask2Former")
    parser.add_argument("--output", type=Path, help="a JSON file")
    return parser.parse_args()


@dataclass(frozen=True)
class Row:
    """One thing to measure."""

    name: str
    case: str
    cfg: CfgNode
    original: Path | None = None

    def start(self, device: str, clock: str, processes: ExitStack) -> Measured:
        """The trainer, on a CPU in a process of its own."""
        options = self.name, self.cfg, device, clock, self.original
        if device == "cuda":
            return Measured(*options)
        worker = Worker(ctx=get_context("spawn"))
        worker.start(None if self.original else keep_freed_memory)
        return processes.enter_context(worker).Measured(*options)  # type: ignore[attr-defined]


def rows(args: argparse.Namespace, data: Path) -> list[Row]:
    """All configurations in all cases; ``data`` is a folder for drawn images."""
    changes = [item for item in args.configurations if "=" in item]
    found = []
    for case in args.case:
        for files in (item for item in args.configurations if "=" not in item):
            cfg = configuration(files, case, args.device, changes)
            if args.synthetic:
                classes = cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES
                cfg.merge_from_list(synthetic_coco.write(data / str(classes), classes, args.synthetic))
            found.append(Row(files, case, cfg))
            if args.original and cfg.MODEL.SIM.SUPERVISION == "mask":
                found.append(Row(ORIGINAL, case, cfg, args.original))
    return found


def measure_or_explain(group: list[Row], args: argparse.Namespace) -> list[dict[str, Any]]:
    """The results of rows that take turns, or why there are none; other groups are worth having."""
    try:
        with ExitStack() as processes:
            trainers = [row.start(args.device, args.clock, processes) for row in group]
            return measure(trainers, args.warmup, args.steps, args.device)
    except Exception as error:
        traceback.print_exc()
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        return [{"configuration": row.name, "case": row.case, "error": reason} for row in group]


def main() -> None:
    args = parse_arguments()
    operator = msda.LOAD_ERROR or torch.ops.msda.build_info()
    report: dict[str, Any] = {"hardware": hardware.describe(), "operator": operator, "command": sys.argv[1:]}
    report["results"] = []
    with tempfile.TemporaryDirectory() as data:
        found = rows(args, Path(data))
        for group in [[row] for row in found] if args.device == "cuda" else [found]:
            report["results"] += measure_or_explain(group, args)
            compare(report["results"])
            if args.output:
                write(report, args.output)
            gc.collect()  # the trainer and its watched functions hold each other
            if args.device == "cuda":
                torch.cuda.empty_cache()
    print(table(report["results"]))
    print("; ".join(map(line, report["results"])))
    sys.exit(any("error" in result for result in report["results"]))


if __name__ == "__main__":
    main()
