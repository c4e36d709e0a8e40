"""The losses of the first steps of every configuration in configs/shapes, to compare versions of the code.

    python benchmarks/first_losses.py              # writes benchmarks/results/first_losses.json
    python benchmarks/first_losses.py --compare    # compares with it, bit for bit

One thread on a CPU; MAX_ITER is the number of steps, so that every term of the method begins on the way.
Numbers are the same bit for bit only with the same processor and the same version of PyTorch.
"""

import argparse
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
RESULTS = ROOT / "benchmarks/results/first_losses.json"
STEPS = 20


def first_losses(config: Path) -> list[dict[str, float]]:
    """The losses of each step, by name."""
    cfg = sim_m2f.get_cfg()
    cfg.merge_from_file(config)
    with tempfile.TemporaryDirectory() as folder:
        overrides = {"MODEL.DEVICE": "cpu", "DATALOADER.NUM_WORKERS": 0, "SOLVER.MAX_ITER": STEPS}
        cfg.merge_from_list([item for pair in overrides.items() for item in pair] + ["OUTPUT_DIR", folder])
        trainer = Trainer(cfg)
        batches = itertools.islice(train_loader(cfg), STEPS)
        return [{name: loss.item() for name, loss in trainer.step(batch).items()} for batch in batches]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--compare", action="store_true", help="compare with the file instead of writing it")
    args = parser.parse_args()
    torch.set_num_threads(1)
    configs = sorted(file for file in (ROOT / "configs/shapes").glob("*.yaml") if file.stem != "base")
    losses = {file.stem: first_losses(file) for file in configs}
    if not args.compare:
        content = {**describe(), "losses": losses}
        RESULTS.write_text(json.dumps(content, indent=1) + "\n")
        return 0
    before = json.loads(RESULTS.read_text())["losses"]
    for name, steps in losses.items():
        print(f"{name}: {'the same' if steps == before[name] else 'different'}")
    return int(losses != before)


if __name__ == "__main__":
    sys.exit(main())
