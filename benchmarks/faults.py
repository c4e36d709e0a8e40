"""Kills runs, stops them, fills their disk, takes their ranks; then resumes and compares them.

    python benchmarks/faults.py --trials 100                       # every fault, 100 times
    python benchmarks/faults.py --only "kill -9" --trials 100
    python benchmarks/faults.py --only resized --resize 2 1 2

The network is that of tests/small.yaml with everything of configs/shapes/sim_R18.yaml switched on, on a few
images, for six steps with checkpoints, evaluations and figures on the way. Faults come at random moments of
every phase in turn; seed and trial choose them. After each the run goes on by --resume to its end. On one
rank it has to end as the undisturbed one, bit for bit: weights, optimizer, teacher, prototypes, paste bank,
losses, detections, scores and figures. On several, weights and losses may differ by rounding. Nowhere may a
file be left half-written. Where the number of ranks changes, batch norms keep their statistics and gradients
are added up exactly (docs/ranks.md), or a run on another number would not be the same.

A full disk is a small file system of its own (tmpfs), which only root can mount. Every fault has a process.
Results are kept after every trial, and a later call goes on with their counts.
"""

import argparse
import contextlib
import dataclasses
import fcntl
import json
import multiprocessing
import os
import random
import re
import reprlib
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT), str(ROOT / "ops")]

import torch  # noqa: E402
import yaml  # noqa: E402
from fault_runs import NAMES, OUTPUT, Durations, Ended, Fault, resize_disk, run  # noqa: E402

from sim_m2f.config import value_of  # noqa: E402
from sim_m2f.config.node import leaf_keys  # noqa: E402
from sim_m2f.data.shapes import cached_shapes  # noqa: E402
from sim_m2f.files import write_file  # noqa: E402
from sim_m2f.own_folder import LOCK  # noqa: E402

RESULTS = ROOT / "benchmarks/results/faults.json"
SETTINGS = {
    "OUTPUT_DIR": OUTPUT,  # below the folder of the trial, where the run is started
    "MODEL.BACKBONE.NAME": "test_resnet",
    "INPUT.IMAGE_SIZE": 64,
    "INPUT.MIN_SIZE_TEST": 64,
    "SOLVER.MAX_ITER": 6,
    "SOLVER.CHECKPOINT_PERIOD": 2,
    "SOLVER.LOG_PERIOD": 4,
    "TEST.EVAL_PERIOD": 3,
    "MODEL.SIM.SHOW.PERIOD": 6.0,
    "DATALOADER.NUM_WORKERS": 1,
}
SIGNALS = {"kill -9": signal.SIGKILL, "SIGTERM": signal.SIGTERM, "SIGINT": signal.SIGINT}
FAULTS = (*SIGNALS, "disk full", "rank killed", "resized")
SAME_ON_ALL_RANKS = {
    "MODEL.BACKBONE.FREEZE_NORMS": True,
    "SOLVER.IMAGES_AT_ONCE": 1,
    "SOLVER.EXACT_SUMS": True,
}
IMAGES = {"TRAIN": ("train", 6), "TEST": ("val", 1)}
CHANGING = ("steps_per_second", "memory_gib")  # in metrics.jsonl
TOLERANCE = 1e-5  # relative, of losses and weights, on several ranks
PHASES = tuple(name for name in NAMES if name != "between")


@dataclass
class Row:
    """The trials of one fault, as in the results.

    Attributes:
        phases: how often a fault met which phase, or the full disk which file.
        largest_difference: relative, of any loss or weight of a trial that counts as equal.
        slowest_end: of the processor's seconds that a rank took from a signal to its end.
        failed: trial and what was wrong, where the end was not equal.
    """

    fault: str
    ranks: str
    seed: int
    tried: int = 0
    equal: int = 0
    largest_difference: float = 0.0
    slowest_end: float = 0.0
    phases: dict[str, int] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)

    def met(self, ended: Ended) -> None:
        self.phases[ended.hit] = self.phases.get(ended.hit, 0) + 1
        self.slowest_end = round(max(self.slowest_end, ended.seconds), 2)


class TrialError(Exception):
    """What a trial found wrong."""


class Bench:
    """Undisturbed runs, by their number of ranks, and what trials need of them."""

    def __init__(self, folder: Path, more: Mapping[str, Any]) -> None:
        folder.mkdir()
        self.folder = folder
        small = yaml.safe_load((ROOT / "tests/small.yaml").read_text())
        settings = {key: value_of(small, key) for key in leaf_keys(small)} | SETTINGS | dict(more)
        for split, (name, count) in IMAGES.items():
            settings[f"DATASETS.{split}_IMAGES"] = cached_shapes() / name
            settings[f"DATASETS.{split}_ANNOTATIONS"] = few_images(folder, name, count)
        words = [str(word) for pair in settings.items() for word in pair]
        self.arguments = ["--resume", "--config-file", str(ROOT / "configs/shapes/sim_R18.yaml"), *words]
        self.undisturbed: dict[int, tuple[Path, Durations]] = {}

    def usual(self, ranks: int) -> tuple[Path, Durations]:
        """Output and durations of the undisturbed run, trained when it is asked for first."""
        if ranks not in self.undisturbed:
            folder = self.folder / f"undisturbed{ranks}"
            folder.mkdir()
            ended = run(folder, self.arguments, ranks)
            if any(ended.statuses):
                raise SystemExit(f"the undisturbed run on {ranks} ranks failed:\n{ended.said}")
            self.undisturbed[ranks] = folder / OUTPUT, json.loads((folder / "durations.json").read_text())
        return self.undisturbed[ranks]

    def struck(self, row: Row, folder: Path, ranks: int, fault: Fault) -> Ended:
        """A run, or a resumed one, that a fault ends."""
        ended = run(folder, self.arguments, ranks, fault)
        if ended.hit:
            row.met(ended)
        return ended

    def resumed(self, folder: Path, ranks: int) -> None:
        """Go on to the end."""
        ended = run(folder, self.arguments, ranks)
        if any(ended.statuses):
            raise TrialError(f"the resumed run ended with {ended.statuses}: {last_line(ended)}")


def few_images(folder: Path, name: str, count: int) -> Path:
    """A data set of the first of the embedded images."""
    data = json.loads((cached_shapes() / f"annotations/{name}.json").read_text())
    data["images"] = data["images"][:count]
    kept = {image["id"] for image in data["images"]}
    data["annotations"] = [entry for entry in data["annotations"] if entry["image_id"] in kept]
    path = folder / f"{name}.json"
    path.write_text(json.dumps(data))
    return path


def trial(bench: Bench, row: Row, folder: Path, number: int, resize: Sequence[int], ranks: int) -> bool:
    """One fault, or several, and the way to the end; whether a fault met the run at all.

    Raises:
        TrialError: what was not as it has to be.
    """
    draw = random.Random(f"{row.fault} {row.seed} {number}")
    phase = PHASES[number % len(PHASES)]
    if row.fault == "disk full":
        return disk_full(bench, row, folder, Fault.drawn(None, phase, bench.usual(1)[1][phase], draw, 1))
    if row.fault == "resized":
        return resized(bench, row, folder, draw, resize)
    if row.fault == "rank killed":
        sent = signal.SIGKILL
    else:
        ranks, sent = 1, SIGNALS[row.fault]
    fault = Fault.drawn(sent, phase, bench.usual(ranks)[1][phase], draw, ranks)
    ended = bench.struck(row, folder, ranks, fault)
    bench.resumed(folder, ranks)
    largest = compare(folder / OUTPUT, bench.usual(ranks)[0], ranks)
    row.largest_difference = max(row.largest_difference, largest)
    if ended.hit and sent != signal.SIGKILL:
        check_stop(ended, sent)
    return bool(ended.hit)


def check_stop(ended: Ended, sent: signal.Signals) -> None:
    """A signal ends the run without a traceback and, once the first batch is there, with a line."""
    expected = [[128 + sent], [-sent]] if ended.hit == "start" else [[128 + sent]]
    silent = ended.hit != "start" and "stopped after step" not in ended.said
    if ended.hit != "between" and (ended.statuses not in expected or silent):
        raise TrialError(f"status {ended.statuses} in {ended.hit}: {last_line(ended)}")
    if "Traceback" in ended.said:
        raise TrialError(f"a traceback in {ended.hit}: {last_line(ended)}")


def disk_full(bench: Bench, row: Row, folder: Path, fault: Fault) -> bool:
    """The disk of the run is full from some moment on; it goes on when there is space again."""
    with mounted(folder / OUTPUT):
        ended = run(folder, bench.arguments, 1, fault)
        full, told = ended.statuses != [0], last_line(ended)
        if full and (ended.statuses != [2] or "Traceback" in ended.said or not told.startswith("error: ")):
            raise TrialError(f"full disk: status {ended.statuses}: {told}")
        if full:
            file = re.sub(r"\d+", "*", Path(told.split(": ")[1]).name)
            row.met(dataclasses.replace(ended, seconds=0.0, hit=file))
        resize_disk(folder / OUTPUT, "1g")
        bench.resumed(folder, 1)
        compare(folder / OUTPUT, bench.usual(1)[0], 1)
    return full


@contextlib.contextmanager
def mounted(folder: Path) -> Iterator[None]:
    """A file system of its own."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "faults", str(folder), "-o", "size=1g"], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def resized(bench: Bench, row: Row, folder: Path, draw: random.Random, resize: Sequence[int]) -> bool:
    """A run that is ended on one number of ranks and goes on with another, several times."""
    met = True
    for leg, ranks in enumerate(resize[:-1]):
        sent, phase = draw.choice(list(SIGNALS.values())), draw.choice(PHASES)
        usual = bench.usual(ranks)[1][phase]
        fault = Fault.drawn(sent, phase, usual[:1] if leg else usual, draw, ranks)  # fewer steps are left
        met = bool(bench.struck(row, folder, ranks, fault).hit) and met
    bench.resumed(folder, resize[-1])
    largest = compare(folder / OUTPUT, bench.usual(resize[0])[0], max(resize))
    row.largest_difference = max(row.largest_difference, largest)
    return met


def last_line(ended: Ended) -> str:
    return ([line for line in ended.said.splitlines() if line.strip()] or ["nothing said"])[-1]


def compare(output: Path, finished: Path, ranks: int) -> float:
    """The largest relative difference of weights and losses from the undisturbed run.

    Raises:
        TrialError: it is above what the number of ranks allows, or the files are not the same.
    """
    names, expected = ({str(file.relative_to(each)) for file in files(each)} for each in (output, finished))
    if names != expected:
        raise TrialError(f"files: {sorted(names ^ expected)}")
    largest = difference(state(output), state(finished))
    if largest > (TOLERANCE if ranks > 1 else 0.0):
        raise TrialError(f"differs by {largest:.2e}")
    exact = [name for name in names if name.startswith(("inference", "method")) or name == "config.yaml"]
    different = [name for name in exact if (output / name).read_bytes() != (finished / name).read_bytes()]
    if ranks == 1 and different:
        raise TrialError(f"differ: {sorted(different)}")
    return largest


def files(output: Path) -> Iterator[Path]:
    """What a run wrote, hidden leftovers among it; not its lock and TensorBoard's file of every start."""
    for file in output.rglob("*"):
        if file.is_file() and file.name != LOCK and not file.name.startswith("events.out.tfevents"):
            yield file


def state(output: Path) -> Any:
    """All that has to be the same: the checkpoint, and what was logged but for speed and memory."""
    records = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    kept = [{key: entry[key] for key in entry if key not in CHANGING} for entry in records]
    return {"checkpoint": torch.load(output / "model_final.pth", weights_only=True), "metrics": kept}


def difference(one: Any, other: Any, where: str = "") -> float:
    """The largest relative difference of floating-point numbers.

    Raises:
        TrialError: anything else is different; says where.
    """
    if isinstance(one, dict) and isinstance(other, dict) and list(one) == list(other):
        return max((difference(one[key], other[key], f"{where}/{key}") for key in one), default=0.0)
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)) and len(one) == len(other):
        pairs = enumerate(zip(one, other, strict=True))
        return max((difference(*pair, f"{where}/{number}") for number, pair in pairs), default=0.0)
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor) and one.shape == other.shape:
        if torch.equal(one, other):
            return 0.0
        if one.is_floating_point():
            return float((one - other).abs().max() / other.abs().max())
    elif isinstance(one, float) and isinstance(other, float):
        return abs(one - other) / max(abs(one), abs(other), 1e-30)
    elif type(one) is type(other) and one == other:
        return 0.0
    raise TrialError(f"{where}: {reprlib.repr(one)}, not {reprlib.repr(other)}")


def load_rows(path: Path, seed: int, ranks: int, resize: Sequence[int]) -> dict[str, Row]:
    """A row for every fault, with the counts of earlier calls with the same seed and ranks."""
    numbers = {"rank killed": str(ranks), "resized": "-".join(map(str, resize))}
    rows = {fault: Row(fault, numbers.get(fault, "1"), seed) for fault in FAULTS}
    for content in json.loads(path.read_text()) if path.exists() else []:
        row = Row(**content)
        if (row.ranks, row.seed) == (rows[row.fault].ranks, seed):
            rows[row.fault] = row
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trials", type=int, default=100, help="of every fault, earlier calls' among them")
    parser.add_argument("--only", nargs="+", choices=FAULTS, default=FAULTS, help="these faults")
    parser.add_argument("--ranks", type=int, default=2, help="of the run that loses one")
    parser.add_argument("--resize", type=int, nargs="+", default=[2, 1, 2], help="ranks, one after the other")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = load_rows(args.output, args.seed, args.ranks, args.resize)
    with tempfile.TemporaryDirectory(prefix="faults") as folder:
        same, moved = Bench(Path(folder) / "same", {}), Bench(Path(folder) / "moved", SAME_ON_ALL_RANKS)
        benches = {fault: moved if fault == "resized" else same for fault in args.only}
        ranks = {"rank killed": [args.ranks], "resized": args.resize}
        for fault, bench in benches.items():
            for number in ranks.get(fault, [1]):
                bench.usual(number)
        fork = multiprocessing.get_context("fork")  # the faults beside each other, with what is imported
        jobs = [fork.Process(target=trials, args=(benches[fault], rows[fault], args)) for fault in args.only]
        for job in jobs:
            job.start()
        for job in jobs:
            job.join()
    return int(any(job.exitcode for job in jobs))


def trials(bench: Bench, row: Row, args: argparse.Namespace) -> None:
    """All trials of one fault; ends the process with status 1 unless all ended as they have to."""
    attempt = row.tried
    while row.tried < args.trials:
        one_trial(bench, row, attempt, args)
        attempt += 1
        store(row, args.output)
    sys.exit(row.equal < row.tried)


def store(row: Row, output: Path) -> None:
    """Put the row in the place of the same one in the results, or behind all others."""
    with locked(output.parent):
        rows = json.loads(output.read_text()) if output.exists() else []
        key = row.fault, row.ranks, row.seed
        places = [place for place, one in enumerate(rows) if (one["fault"], one["ranks"], one["seed"]) == key]
        rows[slice(places[0], places[0] + 1) if places else slice(len(rows), None)] = [vars(row)]
        write_file(output, json.dumps(rows, indent=1) + "\n")


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Within the block no other process of this program writes there."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def one_trial(bench: Bench, row: Row, number: int, args: argparse.Namespace) -> None:
    """Try once and count it, unless the run had ended before the fault came."""
    with tempfile.TemporaryDirectory(dir=bench.folder, ignore_cleanup_errors=True) as folder:
        try:
            if trial(bench, row, Path(folder), number, args.resize, args.ranks):
                row.tried, row.equal = row.tried + 1, row.equal + 1
        except TrialError as error:
            row.tried += 1
            row.failed.append(f"trial {number}: {error}")
            print(f"{row.fault}, trial {number}: {error}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
