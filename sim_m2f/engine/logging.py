"""What a run tells while it goes: a progress bar, ``metrics.jsonl`` and accelerate's trackers."""

import json
import math
import os
import re
import threading
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor

from sim_m2f.distributed import mean_over_ranks
from sim_m2f.engine.run_folder import EVENTS
from sim_m2f.errors import UserError, file_problem
from sim_m2f.files import read_text, write_file, writing

Series = dict[str, dict[int, float]]  # {key: {iteration: value}}
EXPERIMENT = "sim-m2f"  # in MLflow, unless MLFLOW_EXPERIMENT_NAME says another
LARGEST = torch.finfo(torch.float32).max  # of what is logged


class MetricsLogger:
    """Appends to OUTPUT_DIR/metrics.jsonl (detectron2's keys) and to the trackers that TRACKERS names.

    Args:
        output_dir: the run's folder.
        start: the first step to come; what a previous run wrote of later steps is dropped, and a line that a
            killed process left unfinished.
        accelerator: its trackers are started.

    Attributes:
        scored: whether the previous run wrote the scores of its last step, after the losses.

    Raises:
        UserError: what a previous run wrote is damaged.
    """

    def __init__(self, output_dir: Path, start: int, accelerator: Accelerator) -> None:
        self.path, self.accelerator = output_dir / "metrics.jsonl", accelerator
        records = _records(self.path) if start and self.path.exists() else ()
        kept = [line for line, record in records if record["iteration"] < start]
        write_file(self.path, "".join(f"{line}\n" for line in kept))
        self.last = kept[-1] if kept else ""
        last = json.loads(self.last) if kept else {}
        self.scored = last.get("iteration") == start - 1 and "total_loss" not in last
        purged = start if any(output_dir.glob(EVENTS)) else None  # from step 0 on, too
        threading.excepthook = _left_to_the_run
        os.environ.setdefault("MLFLOW_EXPERIMENT_NAME", EXPERIMENT)  # it takes no empty name
        accelerator.init_trackers("", init_kwargs={"tensorboard": {"purge_step": purged}})

    def write(self, iteration: int, values: dict[str, float]) -> None:
        """One line: the step (0 is the first) and its values; not-a-number is written as null."""
        for tracker in self.accelerator.trackers:
            names = map(_name_for_mlflow, values) if tracker.name == "mlflow" else values
            tracker.log(dict(zip(names, values.values(), strict=True)), step=iteration)
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        line = json.dumps({"iteration": iteration, **finite})
        if line != self.last:  # a finished run that is resumed is evaluated again
            self.last = line
            with writing(self.path), self.path.open("a", encoding="utf-8") as file:
                file.write(f"{line}\n")

    def write_image(self, iteration: int, name: str, image: Image.Image) -> None:
        """An image for the trackers that take some."""
        for tracker in self.accelerator.trackers:
            if hasattr(tracker, "log_images"):
                layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                tracker.log_images({name: np.asarray(image)[None]}, step=iteration, **layout)


def _name_for_mlflow(name: str) -> str:
    """The name of a value, as a class may have it, in the characters that MLflow takes."""
    return re.sub(r"[^\w/.\- :]", "_", name)


def read_series(metrics_file: Path) -> Series:
    """Every finite number of a metrics.jsonl, as {key: {iteration: value}} in the order of the iterations.

    Of an iteration that was logged twice the later value holds; a line that a killed process left unfinished
    is passed over.

    Raises:
        UserError: another line is damaged.
    """
    series: Series = {}
    for _, record in _records(metrics_file):
        for key, value in record.items():
            if isinstance(value, (int, float)) and abs(value) <= LARGEST:
                series.setdefault(key, {})[record["iteration"]] = value
    return {key: dict(sorted(values.items())) for key, values in series.items()}


def _records(metrics_file: Path) -> list[tuple[str, dict[str, Any]]]:
    """Every line of a metrics.jsonl and what it says, but for a last one that a killed run left unfinished.

    Raises:
        UserError: the file is no text, or another line is not what ``MetricsLogger`` writes.
    """
    lines = read_text(metrics_file).split("\n")
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            if number == len(lines):  # what ends with the file and not with its line
                break
            record = None
        if not isinstance(record, dict) or not _is_step(record.get("iteration")):
            fault = "is no JSON object with the number of an iteration"
            raise UserError(f"{metrics_file}: line {number} {fault}; remove the line")
        records.append((line, record))
    return records


def _is_step(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**63


def add_to(sums: dict[str, Tensor], values: dict[str, Tensor]) -> None:
    """Add values to the sums of their names, in place."""
    for name, value in values.items():
        sums[name] = sums.get(name, 0) + value.detach()


class LossAverage:
    """The mean of each loss since the last ``take``, kept on the device so that no step waits for it."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.observed: set[str] = set()
        self.steps = 0

    def add(self, losses: dict[str, Tensor], observed: dict[str, Tensor]) -> None:
        """Add a step's losses, and values of the same step that are not part of the total."""
        add_to(self.sums, losses | observed)
        self.observed.update(observed)
        self.steps += 1

    def take(self) -> dict[str, float]:
        """Means over steps and ranks by name, and the sum of the losses as "total_loss"; one transfer.

        All ranks call it.
        """
        values = mean_over_ranks(torch.stack(list(self.sums.values())) / self.steps).tolist()
        means = dict(zip(self.sums, values, strict=True))
        self.sums, self.steps = {}, 0
        total = sum(mean for name, mean in means.items() if name not in self.observed)
        return {"total_loss": total, **means}

    def state_dict(self) -> dict[str, Any]:
        """What a run needs to go on, on any number of ranks; all of them call it."""
        sums = {name: mean_over_ranks(value) for name, value in self.sums.items()}
        return {"sums": sums, "observed": sorted(self.observed), "steps": self.steps}

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """Go on from ``state_dict``; an empty one, of older checkpoints, begins anew."""
        self.sums = {name: value.to(device) for name, value in state.get("sums", {}).items()}
        self.observed, self.steps = set(state.get("observed", ())), int(state.get("steps", 0))


def _left_to_the_run(args: threading.ExceptHookArgs) -> None:
    """Silence for a tracker's thread that cannot write its file: the run's next write to it raises that."""
    if args.exc_value is None or file_problem(args.exc_value) is None:
        threading.__excepthook__(args)


def forget_peak(device: torch.device) -> None:
    """Let ``memory_gib`` tell of a GPU what is allocated from now on."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def memory_gib(device: torch.device) -> float:
    """GiB in use: the most on a GPU since ``forget_peak``, or the resident memory of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return psutil.Process(os.getpid()).memory_info().rss / 2**30
