"""Trains on a GPU what has been trained on a CPU, side by side, and sets the AP of both beside each other.

    python benchmarks/gpu_trainings.py --output FILE.json [--weights FILE.safetensors]

The embedded shapes, from boxes and from masks, 1,000 steps as in benchmarks/results/ablation_shapes.json;
with a timm-named file of MobileNetV2 for pixels from -1 to 1, and people in DETECTRON2_DATASETS, also
configs/people/boxes.yaml, 300 steps as in benchmarks/results/real_people.json.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT), str(ROOT / "ops")]
import hardware  # noqa: E402
from msda import write  # noqa: E402

from sim_m2f.data.shapes import cached_shapes  # noqa: E402

RESULTS = ROOT / "benchmarks/results"
SCORES = ("segm/AP", "segm/AP50", "segm/AP75")
PIXELS = "[127.5, 127.5, 127.5]"
POLL_SECONDS = 1.0


@dataclass
class Training:
    """One run, and how the results files call the runs on a CPU that it is compared with."""

    name: str
    config: str
    steps: int
    results: str
    row: str
    changes: list[str] = field(default_factory=list)

    def command(self, folder: Path, device: str, steps: int | None) -> list[str]:
        length = ["SOLVER.MAX_ITER", str(steps or self.steps), "TEST.EVAL_PERIOD", "0"]
        config = ["--config-file", f"configs/{self.config}.yaml", *self.changes, *length]
        where = ["MODEL.DEVICE", device, "SOLVER.CHECKPOINT_PERIOD", "0", "OUTPUT_DIR", str(folder)]
        return [sys.executable, "train_net.py", *config, *where]

    def on_cpu(self) -> dict[str, list[float]]:
        """The scores of every seed."""
        rows = json.loads((RESULTS / self.results).read_text())
        usual = [row for row in rows if row["row"] == self.row and row["steps"] == self.steps]
        seeds = [row for row in usual if not row.get("settings") and row.get("device", "CPU") == "CPU"]
        found: dict[str, list[float]] = {}
        for name in SCORES:
            values = [row[name] for row in seeds if name in row]
            if values:
                found[name] = values[0] if isinstance(values[0], list) else values
        return found


SHAPES = [
    Training("shapes, boxes", "shapes/sim_R18", 1000, "ablation_shapes.json", "7_copy_paste"),
    Training("shapes, masks", "shapes/mask_R18", 1000, "ablation_shapes.json", "mask"),
]
PEOPLE = Training("people, boxes", "people/boxes", 300, "real_people.json", "best")


def trainings(weights: Path | None) -> list[Training]:
    """Those that can be made here; says which cannot."""
    data = Path(os.environ.get("DETECTRON2_DATASETS") or "datasets") / "people"
    if weights is None or not weights.exists() or not data.is_dir():
        print(f"left out people: needs {data} (DETECTRON2_DATASETS) and --weights FILE, got {weights}")
        return SHAPES
    pixels = ["MODEL.PIXEL_MEAN", PIXELS, "MODEL.PIXEL_STD", PIXELS]
    own_masks = ["TEST.COLORS.ENABLED", "False"]  # as in real_people.json
    PEOPLE.changes = ["MODEL.WEIGHTS", str(weights.resolve()), *pixels, *own_masks]
    return [*SHAPES, PEOPLE]


def scores(folder: Path) -> dict[str, float]:
    """The last scores of a run, and its last losses."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    evaluated = [line for line in lines if "segm/AP" in line]
    logged = [line for line in lines if "total_loss" in line]
    found = {name: round(evaluated[-1][name], 2) for name in SCORES} if evaluated else {}
    if logged:
        found |= {name: logged[-1][name] for name in ("total_loss", "steps_per_second", "memory_gib")}
    return found


def outcome(
    training: Training, folder: Path, status: int, seconds: float, steps: int | None
) -> dict[str, Any]:
    """What came of a run that has ended."""
    result: dict[str, Any] = {"training": training.name, "steps": steps or training.steps}
    result |= {"exit_status": status, "seconds": round(seconds, 1), "on_cpu": training.on_cpu()}
    if (folder / "metrics.jsonl").exists():
        result |= scores(folder)
    if status:
        result["error"] = (folder / "log.txt").read_text(errors="replace").strip().splitlines()[-1:]
    return result


def line(result: dict[str, Any]) -> str:
    """The AP of a run beside the CPU's."""
    cpu = ", ".join(f"{score:.1f}" for score in result["on_cpu"].get("segm/AP", [])) or "none"
    return f"{result['training']}: AP {result.get('segm/AP', 'none')} (on the CPU {cpu})"


def train_all(chosen: list[Training], args: argparse.Namespace, folder: Path, report: dict[str, Any]) -> None:
    """Train side by side; every run is reported when it ends."""
    threads = max(1, (os.cpu_count() or 1) // len(chosen))
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    running, start = {}, time.monotonic()
    for number, training in enumerate(chosen):
        run = folder / str(number)
        run.mkdir()
        command = training.command(run, args.device, args.steps)
        with (run / "log.txt").open("w") as log:
            process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)
        running[process] = training, run
    while running:
        time.sleep(POLL_SECONDS)
        for process in [process for process in running if process.poll() is not None]:
            training, run = running.pop(process)
            seconds = time.monotonic() - start
            report["results"].append(outcome(training, run, process.returncode, seconds, args.steps))
            print(json.dumps(report["results"][-1]), flush=True)
            if process.returncode:
                print((run / "log.txt").read_text(errors="replace")[-3000:], flush=True)
            write(report, args.output)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--weights", type=Path, help="MobileNetV2, names of timm, a safetensors file")
    parser.add_argument("--steps", type=int, help="instead of those that the CPU's scores belong to")
    parser.add_argument("--output", type=Path, required=True, help="a JSON file")
    args = parser.parse_args()
    cached_shapes()  # else both runs would write it
    report: dict[str, Any] = {"hardware": hardware.describe(), "results": []}
    with tempfile.TemporaryDirectory() as folder:
        train_all(trainings(args.weights), args, Path(folder), report)
    print("; ".join(map(line, report["results"])))
    sys.exit(any(result["exit_status"] for result in report["results"]))


if __name__ == "__main__":
    main()
