"""A run with everything beside it, and the evaluation of a checkpoint: what ``sim-m2f train`` does."""

import sys
from collections.abc import Sequence
from pathlib import Path

from sim_m2f.config import CfgNode, frozen_warning
from sim_m2f.engine.hooks import Checkpoints, CleanFolder, Evaluation, Metrics, Notes
from sim_m2f.engine.launch import is_first_of_launched
from sim_m2f.engine.run_folder import refuse_used
from sim_m2f.engine.stop_signal import StopSignal
from sim_m2f.engine.trainer import Hook, Trainer
from sim_m2f.errors import UserError
from sim_m2f.report.hooks import MethodFigures, RunPage
from sim_m2f.weights.sources import last_checkpoint
from sim_m2f.weights.timm_backbone import TIMM


def build_trainer(
    cfg: CfgNode, resume: bool = False, overwrite: bool = False, more: Sequence[Hook] = (RunPage(),)
) -> Trainer:
    """A run with everything beside it: metrics, figures of the method, checkpoints, evaluation, and more.

    Args:
        cfg: the configuration.
        resume: go on from OUTPUT_DIR's last checkpoint, if it has one.
        overwrite: remove the run that OUTPUT_DIR holds, once the configuration and the data have been read.

    Raises:
        UserError: OUTPUT_DIR holds a run, and neither is wanted; else see ``Trainer``.
    """
    if not resume and not overwrite:
        refuse_used(Path(cfg.OUTPUT_DIR))
    if not resume and is_first_of_launched() and (warning := frozen_warning(cfg)):
        print(f"warning: {warning}", file=sys.stderr)
    usual = Notes(), CleanFolder(overwrite), Metrics(), MethodFigures(), Checkpoints(), Evaluation()
    hooks = *usual, *more
    return Trainer(cfg, hooks, resume)


def evaluate(cfg: CfgNode, resume: bool) -> None:
    """Score MODEL.WEIGHTS, or with ``resume``, or where they hold no trained network, the last checkpoint.

    Of a checkpoint with a student and a teacher, the one that TEST.USE_TEACHER names is scored.
    """
    resume = resume or not cfg.MODEL.WEIGHTS or cfg.MODEL.WEIGHTS.startswith(TIMM)
    if resume and last_checkpoint(Path(cfg.OUTPUT_DIR)) is None:
        raise UserError(f"--eval-only: no checkpoint in {cfg.OUTPUT_DIR}; set MODEL.WEIGHTS or OUTPUT_DIR")
    trainer = Trainer(cfg, resume=resume, teacher=cfg.TEST.USE_TEACHER)
    with StopSignal() as stop, stop.at_once("stopped"):
        trainer.evaluate()
        RunPage().after_train(trainer)
