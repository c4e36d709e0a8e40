"""What a run draws while it goes, and the page at its end."""

from torch import Tensor

from sim_m2f.data.catalog import eval_sources
from sim_m2f.data.coco import read_coco
from sim_m2f.engine.method_maps import MethodView
from sim_m2f.engine.trainer import Hook, Trainer
from sim_m2f.report.method_figures import FOLDER, drop_later_steps, write_method
from sim_m2f.report.run_report import write_report
from sim_m2f.supervision.criterion import SIMCriterion
from sim_m2f.supervision.schedule import resolve_steps


class MethodFigures(Hook):
    """Draws what the method makes of some training images every MODEL.SIM.SHOW.PERIOD steps and at the end.

    Only on the first rank, and where there are pseudo masks to see. Nothing that training uses changes.
    """

    view: MethodView | None = None

    def before_train(self, trainer: Trainer) -> None:
        show = trainer.cfg.MODEL.SIM.SHOW
        if not trainer.accelerator.is_main_process:
            return
        drop_later_steps(trainer.output_dir / FOLDER, trainer.iteration)
        self.period = max(1, round(resolve_steps(show.PERIOD, trainer.cfg.SOLVER.MAX_ITER)))
        if show.PERIOD > 0 and show.PICTURES > 0 and trainer.teacher_terms:
            self.view = MethodView(trainer.cfg, trainer.loader.dataset, show.PICTURES, trainer.accelerator)

    def after_step(self, trainer: Trainer, losses: dict[str, Tensor]) -> None:
        if self.view is None or not trainer.due(self.period):
            return
        assert isinstance(trainer.criterion, SIMCriterion)
        assert trainer.teacher
        assert trainer.logger
        maps = self.view.maps(trainer.model, trainer.teacher.network, trainer.criterion)
        for name, figure in write_method(trainer.output_dir / FOLDER, trainer.iteration, maps):
            trainer.logger.write_image(trainer.iteration - 1, f"{FOLDER}/{name}", figure)


class RunPage(Hook):
    """Writes the page of the first test set at the end and says where it is."""

    def after_train(self, trainer: Trainer) -> None:
        if trainer.accelerator.is_main_process:
            source = eval_sources(trainer.cfg)[0]
            page = write_report(trainer.output_dir, read_coco(source, read_masks=False))
            print(f"Report: {page}")
