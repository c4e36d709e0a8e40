"""A few steps of a run on trial: how long one takes on this machine, and how much memory."""

import contextlib
import time
from dataclasses import dataclass

import torch

from sim_m2f.config import CfgNode
from sim_m2f.data.loader import train_loader
from sim_m2f.engine.logging import forget_peak, memory_gib
from sim_m2f.engine.trainer import Trainer
from sim_m2f.errors import UserError, memory_problem

STEPS = 3  # the first one is not counted
KEYS = ("SOLVER.IMS_PER_BATCH", "INPUT.IMAGE_SIZE", "MODEL.MASK_FORMER.NUM_OBJECT_QUERIES")


class OutOfMemoryError(UserError):
    """Memory does not suffice for a step."""


@dataclass(frozen=True)
class Trial:
    """What was measured."""

    seconds_per_step: float
    memory_gib: float
    trainer: Trainer


def trial(cfg: CfgNode) -> Trial:
    """Take a few steps of a run that writes nothing.

    Raises:
        UserError: the configuration, the data or the weights have a fault.
        OutOfMemoryError: memory does not suffice.
    """
    cfg = cfg.clone()
    cfg.SOLVER.MAX_ITER = max(cfg.SOLVER.MAX_ITER, STEPS)
    with contextlib.redirect_stdout(None), contextlib.redirect_stderr(None):  # the run itself will say it
        trainer = Trainer(cfg)
        batches = iter(train_loader(cfg))
    forget_peak(trainer.accelerator.device)
    try:
        trainer.step(next(batches))
        start = time.perf_counter()
        for _ in range(STEPS - 1):
            trainer.step(next(batches))
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds = (time.perf_counter() - start) / (STEPS - 1)
    except Exception as error:
        if not memory_problem(error):
            raise
        raise OutOfMemoryError(f"out of memory in a step on trial; lower {', '.join(KEYS)}") from error
    return Trial(seconds, memory_gib(trainer.accelerator.device), trainer)
