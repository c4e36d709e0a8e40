"""What happens beside the steps of a run: metrics, checkpoints, evaluation; report/ adds figures and page."""

from torch import Tensor
from tqdm import tqdm

from sim_m2f.data.catalog import eval_sources
from sim_m2f.data.coco import read_coco
from sim_m2f.data.loader import check_classes
from sim_m2f.engine import coco_metrics
from sim_m2f.engine.logging import LossAverage, MetricsLogger, memory_gib
from sim_m2f.engine.run_folder import remove_leftovers, remove_run
from sim_m2f.engine.trainer import Hook, Trainer
from sim_m2f.files import write_file

# Below both, masks are taken for outlines.
OUTLINE_FILL, OUTLINE_SOLIDITY = 0.35, 0.7
SETTLED = 0.2  # share of the run after which masks have a shape


class TestSets(Hook):
    """Reads and checks the test sets before the first step: none of their faults is found after the last."""

    def before_train(self, trainer: Trainer) -> None:
        if not trainer.accelerator.is_main_process:
            return
        train = trainer.loader.dataset.images[0][0]
        for source in eval_sources(trainer.cfg):
            test = read_coco(source, read_masks=False)
            check_classes(trainer.cfg, [train, test])
            if test.has_annotations:
                coco_metrics.load_truth(test.annotations_file)


class CleanFolder(Hook):
    """Removes what killed runs left half-written and, to ``overwrite`` it, the run that the folder holds."""

    def __init__(self, overwrite: bool) -> None:
        self.overwrite = overwrite

    def before_train(self, trainer: Trainer) -> None:
        if trainer.accelerator.is_main_process:
            remove_leftovers(trainer.output_dir)
            if self.overwrite:
                remove_run(trainer.output_dir)


class Metrics(Hook):
    """Writes config.yaml, and the losses of every SOLVER.LOG_PERIOD steps."""

    def before_train(self, trainer: Trainer) -> None:
        self.average, self.warned = LossAverage(), False
        if trainer.accelerator.is_main_process:
            write_file(trainer.output_dir / "config.yaml", trainer.cfg.dump())
            trainer.logger = MetricsLogger(trainer.output_dir, trainer.iteration, trainer.accelerator)

    def after_step(self, trainer: Trainer, losses: dict[str, Tensor]) -> None:
        self.average.add(losses, trainer.observed)
        if not trainer.due(trainer.cfg.SOLVER.LOG_PERIOD):
            return
        means = self.average.take()
        if trainer.logger:
            means["lr"] = float(max(trainer.scheduler.get_last_lr()))
            means["steps_per_second"] = trainer.bar.format_dict["rate"] or 0.0
            means["memory_gib"] = memory_gib(trainer.accelerator.device)
            trainer.logger.write(trainer.iteration - 1, means)
            trainer.bar.set_postfix_str(f"loss {means['total_loss']:.3f}, {means['memory_gib']:.1f} GiB")
            self._warn_of_outlines(trainer, means["mask_fill"], means["mask_solidity"])

    def _warn_of_outlines(self, trainer: Trainer, fill: float, solidity: float) -> None:
        """Say once when, after a fifth of the run, the masks are hollow."""
        settled = trainer.iteration >= SETTLED * trainer.cfg.SOLVER.MAX_ITER
        if settled and not self.warned and fill < OUTLINE_FILL and solidity < OUTLINE_SOLIDITY:
            self.warned = True
            sim = trainer.cfg.MODEL.SIM
            unguarded = sim.SUPERVISION == "box" and not sim.FILL_GUARD.ENABLED
            advice = "; set MODEL.SIM.FILL_GUARD.ENABLED True" if unguarded else ""
            shares = f"they fill {fill:.0%} of their boxes and {solidity:.0%} of their own extent"
            tqdm.write(f"step {trainer.iteration}: masks are outlines: {shares}{advice}")


class Checkpoints(Hook):
    """Saves every SOLVER.CHECKPOINT_PERIOD steps and at the end."""

    def after_step(self, trainer: Trainer, losses: dict[str, Tensor]) -> None:
        if trainer.due(trainer.cfg.SOLVER.CHECKPOINT_PERIOD):
            trainer.save()


class Evaluation(Hook):
    """Scores the test sets every TEST.EVAL_PERIOD steps and at the end."""

    def after_step(self, trainer: Trainer, losses: dict[str, Tensor]) -> None:
        if trainer.due(trainer.cfg.TEST.EVAL_PERIOD) and trainer.iteration < trainer.cfg.SOLVER.MAX_ITER:
            if not trainer.due(trainer.cfg.SOLVER.CHECKPOINT_PERIOD):
                trainer.save()  # so that a signal may end the evaluation
            with trainer.stop.at_once():
                self.after_train(trainer)

    def after_train(self, trainer: Trainer) -> None:
        scores = trainer.evaluate()
        if trainer.logger:
            trainer.logger.write(trainer.iteration - 1, scores)
