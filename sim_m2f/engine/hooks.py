"""What happens beside the steps of a run: metrics, checkpoints, evaluation; report/ adds figures and page."""

import sys
from pathlib import Path

from torch import Tensor
from tqdm import tqdm

from sim_m2f.config import CfgNode
from sim_m2f.data.catalog import data_sources
from sim_m2f.data.coco import check_images, read_coco
from sim_m2f.data.loader import check_classes
from sim_m2f.data.notes import notes
from sim_m2f.distributed import largest_number
from sim_m2f.engine import coco_metrics
from sim_m2f.engine.logging import MetricsLogger, forget_peak, memory_gib
from sim_m2f.engine.run_folder import FILES, remove_run
from sim_m2f.engine.trainer import Hook, Trainer
from sim_m2f.files import expanded, write_file
from sim_m2f.own_folder import remove_leftovers

# Below both, masks are taken for outlines.
OUTLINE_FILL, OUTLINE_SOLIDITY = 0.35, 0.7
SETTLED, SETTLED_STEPS = 0.2, 80  # share of the run, and steps at least, after which masks have a shape


class Notes(Hook):
    """Reads and checks the test sets before the first step: no fault is found after the last. Tells notes."""

    def before_train(self, trainer: Trainer) -> None:
        if not trainer.accelerator.is_main_process:
            return
        train = list({id(data): data for data, _ in trainer.loader.dataset.images}.values())
        test = [read_coco(source, read_masks=False) for source in data_sources(trainer.cfg, "TEST")]
        check_classes(trainer.cfg, [*train, *test])
        for data in test:
            check_images(data)
            if data.has_annotations:
                coco_metrics.load_truth(data.annotations_file)
        for line in notes(trainer.cfg, train, test):
            print(f"note: {line}", file=sys.stderr)


class CleanFolder(Hook):
    """Removes what killed runs left half-written and, to ``overwrite`` it, the run that the folder holds."""

    def __init__(self, overwrite: bool) -> None:
        self.overwrite = overwrite

    def before_train(self, trainer: Trainer) -> None:
        if trainer.accelerator.is_main_process:
            remove_leftovers(trainer.output_dir, FILES)
            if self.overwrite:
                remove_run(trainer.output_dir, _inputs(trainer.cfg))


def _inputs(cfg: CfgNode) -> set[Path]:
    """The files of annotations and masks that a run reads."""
    sources = *data_sources(cfg, "TRAIN"), *data_sources(cfg, "TEST")
    proposals = expanded(cfg.DATASETS.TRAIN_PROPOSALS)
    return {path.resolve() for path in (proposals, *(source.annotations for source in sources))}


class Metrics(Hook):
    """Writes config.yaml, and the losses of every SOLVER.LOG_PERIOD steps."""

    def before_train(self, trainer: Trainer) -> None:
        self.warned = False
        forget_peak(trainer.accelerator.device)
        if trainer.accelerator.is_main_process:
            trainer.logger = MetricsLogger(trainer.output_dir, trainer.iteration, trainer.accelerator)
            write_file(trainer.output_dir / "config.yaml", trainer.cfg.dump())

    def after_step(self, trainer: Trainer, losses: dict[str, Tensor]) -> None:
        trainer.average.add(losses, trainer.observed)
        if not trainer.due(trainer.cfg.SOLVER.LOG_PERIOD):
            return
        means = trainer.average.take()
        if trainer.logger:
            means["lr"] = trainer.rate
            means["steps_per_second"] = trainer.bar.format_dict["rate"] or 0.0
            means["memory_gib"] = memory_gib(trainer.accelerator.device)
            trainer.logger.write(trainer.iteration - 1, means)
            state = f"loss {means['total_loss']:.3f}, {means['memory_gib']:.1f} GiB"
            trainer.bar.set_postfix_str(state)
            if not sys.stderr.isatty():
                print(_line(trainer, means["steps_per_second"], state), file=sys.stderr, flush=True)
            self._warn_of_outlines(trainer, means["mask_fill"], means["mask_solidity"])

    def _warn_of_outlines(self, trainer: Trainer, fill: float, solidity: float) -> None:
        """Say once when, after a fifth of the run and not at its very beginning, the masks are hollow."""
        settled = trainer.iteration >= max(SETTLED * trainer.cfg.SOLVER.MAX_ITER, SETTLED_STEPS)
        if settled and not self.warned and fill < OUTLINE_FILL and solidity < OUTLINE_SOLIDITY:
            self.warned = True
            sim = trainer.cfg.MODEL.SIM
            unguarded = sim.SUPERVISION != "mask" and not sim.FILL_GUARD.ENABLED
            advice = "; set MODEL.SIM.FILL_GUARD.ENABLED True" if unguarded else ""
            shares = f"they fill {fill:.0%} of their boxes and {solidity:.0%} of their own extent"
            tqdm.write(f"step {trainer.iteration}: masks are outlines: {shares}{advice}")


def _line(trainer: Trainer, rate: float, state: str) -> str:
    """What a log without a terminal has in place of the bar."""
    total = trainer.cfg.SOLVER.MAX_ITER
    left = tqdm.format_interval((total - trainer.iteration) / rate) if rate else "?"
    return f"step {trainer.iteration}/{total}: {state}, {rate:.2f} steps/s, {left} left"


class Checkpoints(Hook):
    """Saves every SOLVER.CHECKPOINT_PERIOD steps and at the end."""

    def after_step(self, trainer: Trainer, losses: dict[str, Tensor]) -> None:
        if trainer.due(trainer.cfg.SOLVER.CHECKPOINT_PERIOD):
            trainer.save()


class Evaluation(Hook):
    """Scores the test sets every TEST.EVAL_PERIOD steps and at the end."""

    def before_train(self, trainer: Trainer) -> None:
        """Makes up for an evaluation that was cut short, between the last checkpoint and its scores."""
        within = 0 < trainer.iteration < trainer.cfg.SOLVER.MAX_ITER
        if within and trainer.due(trainer.cfg.TEST.EVAL_PERIOD):
            missing = trainer.logger is not None and not trainer.logger.scored
            if largest_number(missing):
                self.after_train(trainer)

    def after_step(self, trainer: Trainer, losses: dict[str, Tensor]) -> None:
        if trainer.due(trainer.cfg.TEST.EVAL_PERIOD) and trainer.iteration < trainer.cfg.SOLVER.MAX_ITER:
            if not trainer.due(trainer.cfg.SOLVER.CHECKPOINT_PERIOD):
                trainer.save()  # so that a signal may end the evaluation
            with trainer.stop.at_once(trainer.stopped):
                self.after_train(trainer)

    def after_train(self, trainer: Trainer) -> None:
        scores = trainer.evaluate()
        if trainer.logger:
            trainer.logger.write(trainer.iteration - 1, scores)
