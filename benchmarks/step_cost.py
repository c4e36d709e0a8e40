"""What a training step costs by part: projection + pairwise (= BoxInst) against the whole method (= SIM).

    python benchmarks/step_cost.py

Both rows of configs/ablation take turns on the same images of the embedded shapes, with networks of the
shapes' and of the COCO recipe's size; medians over the steps. Writes benchmarks/results/step_cost.json.
"""

import argparse
import json
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
import hardware

from sim_m2f.config import CfgNode, get_cfg
from sim_m2f.data.loader import train_loader
from sim_m2f.engine.trainer import Trainer

ROOT = Path(__file__).resolve().parents[1]
ROWS = {"projection + pairwise": "2_pairwise", "everything": "7_copy_paste"}
TERMS = ("PAIRWISE", "PSEUDO_SEMANTIC", "SELF_CORRECTION", "COPY_PASTE")
PARTS = (
    "paste",
    "student forward",
    "teacher forward",
    "losses",
    "losses backward",
    "student backward",
    "update",
)
SUPERVISION = ("paste", "losses", "losses backward")
NETWORKS = {
    "shapes: R-18, 128 x 128, batch 8": [],
    "COCO recipe: R-50, 256 x 256, batch 2": [
        *("MODEL.RESNETS.DEPTH", "50", "MODEL.RESNETS.RES2_OUT_CHANNELS", "256"),
        *("MODEL.SEM_SEG_HEAD.CONVS_DIM", "256", "MODEL.SEM_SEG_HEAD.MASK_DIM", "256"),
        *("MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_LAYERS", "6"),
        *("MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_DIM_FEEDFORWARD", "1024"),
        *("MODEL.SEM_SEG_HEAD.DEFORMABLE_TRANSFORMER_ENCODER_N_HEADS", "8"),
        *("MODEL.MASK_FORMER.HIDDEN_DIM", "256", "MODEL.MASK_FORMER.DIM_FEEDFORWARD", "2048"),
        *("MODEL.MASK_FORMER.NHEADS", "8", "MODEL.MASK_FORMER.DEC_LAYERS", "10"),
        *("MODEL.MASK_FORMER.NUM_OBJECT_QUERIES", "100"),
        *("INPUT.IMAGE_SIZE", "256", "INPUT.MIN_SCALE", "1.6", "INPUT.MAX_SCALE", "2.5"),
        *("SOLVER.IMS_PER_BATCH", "2"),
    ],
}


def configuration(row: str, network: list[str]) -> CfgNode:
    """The row with every loss at its full weight from the first step."""
    cfg = get_cfg()
    cfg.merge_from_file(ROOT / "configs/shapes/base.yaml")
    cfg.merge_from_list(network)
    cfg.merge_from_file(ROOT / f"configs/ablation/{row}.yaml")
    for term in TERMS:
        cfg.merge_from_list([f"MODEL.SIM.{term}.START", "0", f"MODEL.SIM.{term}.WARMUP", "0"])
    cfg.merge_from_list(["MODEL.SIM.BOX_FILL.WEIGHT", "0", "DATALOADER.NUM_WORKERS", "0"])
    return cfg


class TimedTrainer:
    """The parts of ``Trainer.step``, each with its time.

    The losses' own backward pass, down to the network's outputs, is taken apart from the network's.
    """

    def __init__(self, cfg: CfgNode) -> None:
        self.trainer = Trainer(cfg)
        self.seconds: dict[str, list[float]] = defaultdict(list)

    def _timed(self, part: str, work: Callable[[], Any]) -> Any:
        if self.trainer.accelerator.device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        result = work()
        if self.trainer.accelerator.device.type == "cuda":
            torch.cuda.synchronize()
        self.seconds[part].append(time.perf_counter() - start)
        return result

    def step(self, batch: dict[str, Any]) -> None:
        trainer = self.trainer
        trainer.model.train()
        trainer.criterion.train()
        images = batch["images"].to(trainer.accelerator.device, memory_format=torch.channels_last)
        targets = batch["targets"]
        if trainer.copy_paste:
            images, targets = self._timed(
                "paste", lambda: trainer.copy_paste(images, targets, trainer.iteration)
            )
        outputs = self._timed("student forward", lambda: trainer.model(images))
        teacher = self._timed("teacher forward", lambda: trainer._teacher_outputs(images))
        leaves: list[tuple[Tensor, Tensor]] = []
        detached = detach(outputs, leaves)

        def supervise() -> Tensor:
            losses, matched = trainer.criterion(detached, targets, images, teacher)
            trainer.criterion.update(matched)
            if trainer.copy_paste:
                trainer.copy_paste.remember(images, matched)
            return sum(losses.values())

        losses = self._timed("losses", supervise)
        self._timed("losses backward", losses.backward)
        reached = [(output, leaf.grad) for output, leaf in leaves if leaf.grad is not None]
        self._timed("student backward", lambda: torch.autograd.backward(*zip(*reached, strict=True)))
        self._timed("update", self._update)
        trainer.iteration += 1

    def _update(self) -> None:
        trainer = self.trainer
        clip = trainer.cfg.SOLVER.CLIP_GRADIENTS
        trainer.accelerator.clip_grad_norm_(trainer.model.parameters(), clip.CLIP_VALUE, clip.NORM_TYPE)
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()
        if trainer.teacher:
            trainer.teacher.update(trainer.accelerator.unwrap_model(trainer.model))


def detach(outputs: Any, leaves: list[tuple[Tensor, Tensor]]) -> Any:
    """The outputs as leaves of a graph of their own; each pair (output, leaf) is added to ``leaves``."""
    if isinstance(outputs, Tensor):
        leaf = outputs.detach().requires_grad_()
        leaves.append((outputs, leaf))
        return leaf
    if isinstance(outputs, dict):
        return {name: detach(value, leaves) for name, value in outputs.items()}
    return [detach(value, leaves) for value in outputs]


def measure(network: list[str], warmup: int, steps: int) -> dict[str, dict[str, float]]:
    """Median milliseconds of every part, by row."""
    trainers = {name: TimedTrainer(configuration(row, network)) for name, row in ROWS.items()}
    batches = iter(train_loader(next(iter(trainers.values())).trainer.cfg))
    for number in range(warmup + steps):
        batch = next(batches)
        for trainer in trainers.values():
            if number == warmup:
                trainer.seconds.clear()
            trainer.step(batch)
    return {name: summary(trainer.seconds) for name, trainer in trainers.items()}


def summary(seconds: dict[str, list[float]]) -> dict[str, float]:
    """Milliseconds by part and of the whole step, and the share of the supervision in it."""
    parts = {part: 1000 * statistics.median(seconds[part]) for part in PARTS}
    step = sum(parts.values())
    share = sum(parts[part] for part in SUPERVISION) / step
    return {
        **{part: round(value, 2) for part, value in parts.items()},
        "step": round(step, 1),
        "share": round(share, 3),
    }


def table(rows: dict[str, dict[str, float]]) -> str:
    lines = [f"| milliseconds | {' | '.join(rows)} |", "|---|---|---|"]
    for part in (*PARTS, "step"):
        lines.append(f"| {part} | {' | '.join(f'{row[part]:.1f}' for row in rows.values())} |")
    shares = (f"{100 * row['share']:.0f} %" for row in rows.values())
    lines.append(f"| share of the supervision | {' | '.join(shares)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=40, help="steps measured")
    parser.add_argument("--warmup", type=int, default=10, help="steps before")
    args = parser.parse_args()
    results: dict[str, Any] = {"command": "python benchmarks/step_cost.py", "hardware": hardware.describe()}
    for name, network in NETWORKS.items():
        rows = measure(network, args.warmup, args.steps)
        ratio = rows["everything"]["step"] / rows["projection + pairwise"]["step"]
        results[name] = {**rows, "ratio": round(ratio, 2)}
        print(f"\n{name}\n{table(rows)}\nThe whole method's step takes {ratio:.2f} times the other's.")
    (ROOT / "benchmarks/results/step_cost.json").write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
