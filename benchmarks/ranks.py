"""The same training on any number of ranks, stopped and gone on with by another number, and in parts.

    python benchmarks/ranks.py    # writes benchmarks/results/ranks.json

Local ranks (gloo, one thread each) train a small network on the embedded shapes by the whole method, with
group norms. Each run is compared with that of one process: the largest relative difference of a loss over all
steps, and of the weights at the end. In float32 rounding grows from step to step, and where it moves a
threshold or a match, it jumps, unless SOLVER.EXACT_SUMS keeps it from the gradients. "float64" computes
networks, gradients and optimizer in float64.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from hardware import describe
from torch import Tensor

import sim_m2f
from sim_m2f.config import CfgNode
from sim_m2f.engine import trainer as trainer_file
from sim_m2f.engine.logging import LossAverage
from sim_m2f.engine.trainer import Hook, Trainer
from sim_m2f.modeling import build_model
from sim_m2f.modeling.mask2former import Mask2Former
from sim_m2f.structures import Outputs, Prompts

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results/ranks.json"
LEAST = 1e-5  # relative difference that counts
SMALL = [
    *("MODEL.DEVICE", "cpu", "DATALOADER.NUM_WORKERS", "0", "TRACKERS", "()", "INPUT.IMAGE_SIZE", "64"),
    *("MODEL.BACKBONE.NAME", "build_resnet_backbone", "MODEL.RESNETS.RES2_OUT_CHANNELS", "32"),
    *("MODEL.RESNETS.NORM", "GN", "MODEL.SEM_SEG_HEAD.CONVS_DIM", "32", "MODEL.SEM_SEG_HEAD.MASK_DIM", "32"),
    *("MODEL.MASK_FORMER.HIDDEN_DIM", "32", "MODEL.MASK_FORMER.DEC_LAYERS", "3"),
    *("MODEL.MASK_FORMER.TRAIN_NUM_POINTS", "64"),
]
EVERYTHING = [
    *("MODEL.SIM.PSEUDO_SEMANTIC.START", "10", "MODEL.SIM.SELF_CORRECTION.START", "10"),
    *("MODEL.SIM.PROTOTYPES.CONFIDENT", "0.5", "MODEL.SIM.PROTOTYPES.PIXELS_PER_CLASS", "64"),
    *("MODEL.SIM.GATED_MASKS.ENABLED", "True", "MODEL.SIM.GATED_MASKS.START", "0"),
    *("MODEL.SIM.GATED_MASKS.MIN_QUALITY", "0.01", "MODEL.SIM.PROMPTS.ENABLED", "True"),
    *("MODEL.SIM.COLOR_MODEL.ENABLED", "True", "MODEL.SIM.FILL_GUARD.ENABLED", "True"),
    *("MODEL.SIM.LEVEL_SET.ENABLED", "True", "MODEL.SIM.LEVEL_SET.START", "0"),
    *("MODEL.SIM.COPY_PASTE.START", "10", "MODEL.SIM.COPY_PASTE.PICTURES", "20"),
    *("MODEL.SIM.COPY_PASTE.PROBABILITY", "0.8", "INPUT.STUDENT_COLORS", "0.3"),
]
EXACT = ["SOLVER.IMAGES_AT_ONCE", "1", "SOLVER.EXACT_SUMS", "True"]


class Recorder(Hook):
    """Keeps the losses of every step, those of all ranks together, and stops after step ``last``."""

    def __init__(self, file: Path, last: int) -> None:
        self.file, self.last = file, last
        self.steps: list[dict[str, float]] = []

    def after_step(self, trainer: Trainer, losses: dict[str, Tensor]) -> None:
        average = LossAverage()
        average.add(losses, trainer.observed)
        self.steps.append(average.take())
        if trainer.iteration == self.last:
            trainer.save()
            if trainer.accelerator.is_main_process:
                self.file.write_text(json.dumps(self.steps))
            raise SystemExit(0)


def configuration(folder: str, images: int, overrides: list[str]) -> CfgNode:
    cfg = sim_m2f.get_cfg()
    cfg.merge_from_file(ROOT / "configs/shapes/sim_R18.yaml")
    own = ["OUTPUT_DIR", folder, "SOLVER.IMS_PER_BATCH", str(images), "SOLVER.MAX_ITER", "1000"]
    cfg.merge_from_list([*SMALL, *EVERYTHING, *own, *overrides])
    return cfg


class Float64(Mask2Former):
    """The network with weights and maps in float64; what it returns, the losses take in float32."""

    def forward(self, images: Tensor, auxiliary: bool = True, prompts: Prompts | None = None) -> Outputs:
        torch.set_default_dtype(torch.float64)
        try:
            boxes = Prompts(prompts.boxes.double(), prompts.labels) if prompts else None
            return super().forward(images.double(), auxiliary, boxes)
        finally:
            torch.set_default_dtype(torch.float32)


def in_float64(cfg: CfgNode) -> Mask2Former:
    network = build_model(cfg).double()
    network.__class__ = Float64
    return network


def rank(arguments: list[str]) -> None:
    """What each process of ``train`` does."""
    dtype, last, file, folder, images, *overrides = arguments
    torch.set_num_threads(1)
    if dtype == "float64":
        trainer_file.build_model = in_float64
    cfg = configuration(folder, int(images), overrides)
    Trainer(cfg, [Recorder(Path(file), int(last))], resume=True).train()


def train(
    ranks: list[int], images: int, steps: int, dtype: str = "float32", *overrides: str
) -> tuple[list[dict[str, float]], dict[str, Tensor]]:
    """Losses of every step and the last weights of a run by so many ranks, one number after the other."""
    losses: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as name:
        folder, file = Path(name), Path(name) / "losses.json"
        for part, number in enumerate(ranks, 1):
            own = [dtype, steps * part // len(ranks), file, folder, images, *overrides]
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
            command += [f"--nproc-per-node={number}", __file__, "--rank", *map(str, own)]
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
            subprocess.run(command, check=True, env=environment, stdout=sys.stderr)
            losses += json.loads(file.read_text())
        state = torch.load(folder / (folder / "last_checkpoint").read_text(), weights_only=True)
    return losses, state["model"]


def compared(one: tuple[list, dict], other: tuple[list, dict]) -> dict[str, Any]:
    """The largest relative differences, and the first step with one that counts."""
    differences = [
        {name: difference(a[name], b[name]) for name in a} for a, b in zip(one[0], other[0], strict=True)
    ]
    largest = [max(step.values()) for step in differences]
    step = largest.index(max(largest))
    apart = [number for number, value in enumerate(largest) if value > LEAST]
    weights, others = (torch.cat([w.double().flatten() for w in run[1].values()]) for run in (one, other))
    return {
        "largest": max(largest),
        "loss": max(differences[step], key=differences[step].__getitem__),
        "at_step": step,
        "first_step_above_1e-5": apart[0] if apart else None,
        "weights": ((weights - others).norm() / weights.norm()).item(),
    }


def difference(a: float, b: float) -> float:
    """Relative; 0 of two zeros."""
    return abs(a - b) / max(abs(a), abs(b), 1e-30)


def measure(
    part: str, runs: dict[str, list[int]], images: int, steps: int, dtype: str, *overrides: str
) -> None:
    """Compare runs with one process, and put a row each into the file, in place of that of the same run."""
    alone = train([1], images, steps, dtype, *overrides)
    for name, ranks in runs.items():
        row = {"part": part, "images": images, "steps": steps, "type": dtype, "overrides": overrides}
        row |= {"run": name, **compared(alone, train(ranks, images, steps, dtype, *overrides))}
        print(json.dumps(row), flush=True)
        before = json.loads(RESULTS.read_text())["runs"] if RESULTS.exists() else []
        kept = [each for each in before if (each["part"], each["run"]) != (part, name)]
        RESULTS.write_text(json.dumps({**describe(), "runs": [*kept, row]}, indent=1) + "\n")


LONG = {"2 ranks": [2], "4 ranks": [4], "1, 2, then 1 rank": [1, 2, 1]}
PARTS: dict[str, tuple[Any, ...]] = {
    "exact": (LONG, 4, 200, "float32", *EXACT),
    "float32": ({"2 ranks": [2]}, 4, 40, "float32"),
    "float64": ({"2 ranks": [2]}, 4, 40, "float64"),
    "wide": ({f"{number} ranks": [number] for number in (2, 3, 6, 8)}, 16, 3, "float32"),
    "wide, in parts": ({"3 ranks": [3]}, 16, 3, "float32", "SOLVER.IMAGES_AT_ONCE", "2"),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=list(PARTS), help="measure these alone")
    parser.add_argument("--rank", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank:
        return rank(args.rank)
    for part in args.parts:
        measure(part, *PARTS[part])


if __name__ == "__main__":
    main()
