"""Memory of a training step: images at once, and activations that are computed again.

    python benchmarks/memory.py    # writes benchmarks/results/memory.json

The recipe of configs/coco/sim_R50_bs16_50ep.yaml on a CPU in float32, 4 images of 256 x 256 pixels,
random weights. Counted is what operators allocate during a step and do not give back meanwhile: maps and
gradients, not the weights and the optimizer's moments, which are there before.
"""

import itertools
import json
import sys
import tempfile
from pathlib import Path

import torch
from hardware import describe

import sim_m2f
from sim_m2f.data.loader import train_loader
from sim_m2f.engine.trainer import Trainer

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))
from memory_peak import MemoryPeak  # noqa: E402

RESULTS = ROOT / "benchmarks/results/memory.json"
RECIPE = [
    *("MODEL.DEVICE", "cpu", "DATALOADER.NUM_WORKERS", "0", "TRACKERS", "()", "INPUT.IMAGE_SIZE", "256"),
    *("MODEL.WEIGHTS", "", "MODEL.SEM_SEG_HEAD.NUM_CLASSES", "8", "DATASETS.TRAIN", "('shapes_train',)"),
    *("SOLVER.IMS_PER_BATCH", "4", "MODEL.SIM.COPY_PASTE.START", "0"),
    *("INPUT.MIN_SCALE", "1.0", "INPUT.MAX_SCALE", "2.0", "SOLVER.MAX_ITER", "100"),
]
BACKBONE = ["MODEL.BACKBONE.USE_CHECKPOINT", "True"]
ENCODER = ["MODEL.SEM_SEG_HEAD.USE_CHECKPOINT", "True"]
ONE = ["SOLVER.IMAGES_AT_ONCE", "1"]
RUNS: dict[str, list[str]] = {
    "4 images at once": [],
    "2 images at once": ["SOLVER.IMAGES_AT_ONCE", "2"],
    "1 image at once": ONE,
    "backbone recomputed": BACKBONE,
    "encoder recomputed": ENCODER,
    "both recomputed": BACKBONE + ENCODER,
    "both recomputed, 1 image at once": BACKBONE + ENCODER + ONE,
}


def peak(overrides: list[str]) -> float:
    """GiB at the peak of the second step."""
    cfg = sim_m2f.get_cfg()
    cfg.merge_from_file(ROOT / "configs/coco/sim_R50_bs16_50ep.yaml")
    with tempfile.TemporaryDirectory() as folder:
        cfg.merge_from_list([*RECIPE, "OUTPUT_DIR", folder, *overrides])
        trainer = Trainer(cfg)
        first, second = itertools.islice(train_loader(cfg), 2)
        trainer.step(first)
        with MemoryPeak() as memory:
            trainer.step(second)
        return memory.bytes / 2**30


def main() -> None:
    torch.set_num_threads(1)
    rows = []
    for name, overrides in RUNS.items():
        rows.append({"run": name, "overrides": overrides, "gib": peak(overrides)})
        print(json.dumps(rows[-1]), flush=True)
    RESULTS.write_text(json.dumps({**describe(), "runs": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
