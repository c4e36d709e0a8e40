"""What a run draws while it goes, and the page at its end."""

import time

from torch import Tensor
from tqdm import tqdm

from sim_m2f.data.catalog import DatasetSource, data_sources
from sim_m2f.data.coco import read_coco
from sim_m2f.engine.method_maps import MethodView
from sim_m2f.engine.trainer import Hook, Trainer
from sim_m2f.report.drawing import contact_sheet, write_png
from sim_m2f.report.labelled import labelled_example
from sim_m2f.report.method_figures import FOLDER, drop_later_steps, write_method
from sim_m2f.report.run_report import choose_images, labelled_boxes, write_report
from sim_m2f.segmenter import Segmenter
from sim_m2f.supervision.criterion import SIMCriterion
from sim_m2f.supervision.schedule import resolve_steps

EARLY, FIRST_IMAGES = 0.05, 8  # share of the steps, and images, of the first look


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


class FirstLook(Hook):
    """Draws annotated boxes and their masks once, early: after a minute, or a twentieth of the steps.

    Args:
        source: the data set whose first images are drawn.
    """

    def __init__(self, source: DatasetSource) -> None:
        self.source, self.seen = source, False

    def before_train(self, trainer: Trainer) -> None:
        self.start = time.monotonic()

    def after_step(self, trainer: Trainer, losses: dict[str, Tensor]) -> None:
        late = trainer.iteration >= EARLY * trainer.cfg.SOLVER.MAX_ITER or time.monotonic() > self.start + 60
        if self.seen or not late or not trainer.accelerator.is_main_process:
            return
        self.seen = True
        data = read_coco(self.source, read_masks=False)
        network = trainer.accelerator.unwrap_model(trainer.model)
        model = Segmenter(network, trainer.cfg, data.class_names).to(trainer.accelerator.device)
        rows = []
        for image in choose_images([each for each in data.images if len(each.labels)], FIRST_IMAGES):
            pixels = data.read_image(image)
            colors = model.colors_by_default
            found = model.predict(pixels, boxes=image.boxes, labels=image.labels, colors=colors)
            masks, scores = found.masks.cpu().numpy(), found.scores.tolist()
            example = labelled_example(data, image, pixels, masks, scores)
            rows.append((example.caption, example.panels))
        if not rows:
            return  # of a validation set without objects
        path = trainer.output_dir / "report" / "first_look.png"
        write_png(path, contact_sheet(rows))
        tqdm.write(f"first look, after {trainer.iteration} steps: {path}")


class RunPage(Hook):
    """Writes the page of the first test set at the end and says where it is."""

    def after_train(self, trainer: Trainer) -> None:
        if trainer.accelerator.is_main_process:
            source = data_sources(trainer.cfg, "TEST")[0]
            masks = labelled_boxes(trainer.output_dir, trainer.cfg)
            page = write_report(trainer.output_dir, read_coco(source, read_masks=False), labelled=masks)
            print(f"Report: {page}")
