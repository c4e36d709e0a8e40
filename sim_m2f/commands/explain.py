"""Draw how a checkpoint gets from the boxes of some images to their pseudo masks."""

import argparse
from pathlib import Path
from typing import Any

import torch

from sim_m2f.commands.train import configuration
from sim_m2f.config import CfgNode
from sim_m2f.data.loader import train_loader
from sim_m2f.engine.accelerator import build_accelerator
from sim_m2f.engine.method_maps import MethodView
from sim_m2f.errors import UserError
from sim_m2f.files import atomic_write
from sim_m2f.modeling import build_model
from sim_m2f.report.method_figures import read_method, write_method
from sim_m2f.report.page import Page, render
from sim_m2f.supervision.criterion import SIMCriterion, build_criterion
from sim_m2f.weights.checkpoint import last_checkpoint, load_weights, read_checkpoint, teacher_weights
from sim_m2f.weights.timm_backbone import TIMM

PROTOTYPES = "pseudo_masks.prototypes.vectors"  # in the criterion's state
FOLDER = "explain"  # in OUTPUT_DIR, if no other is given


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config-file", required=True, metavar="FILE", help="the run's config.yaml")
    parser.add_argument(
        "--num-images", "--pictures", type=int, default=4, metavar="N", help="first images (4)"
    )
    parser.add_argument("--folder", type=Path, help=f"where to write (default: OUTPUT_DIR/{FOLDER})")
    parser.add_argument(
        "opts",
        nargs=argparse.REMAINDER,
        metavar="KEY VALUE",
        help="overrides: MODEL.WEIGHTS is the checkpoint (default: the last one in OUTPUT_DIR), "
        "DATASETS.TRAIN_ANNOTATIONS and DATASETS.TRAIN_IMAGES (or DATASETS.TRAIN) the boxes and images",
    )


def run(args: argparse.Namespace) -> int:
    """Write the figures and a page with all of them; prints the path of the page."""
    if args.num_images < 1:
        raise UserError(f"--num-images {args.num_images}: give a number of at least 1")
    cfg = configuration(args.config_file, args.opts)
    if cfg.MODEL.SIM.SUPERVISION != "box":
        raise UserError("MODEL.SIM.SUPERVISION mask: no pseudo masks to explain; take a run from boxes")
    print(explain(cfg, args.num_images, args.folder or Path(cfg.OUTPUT_DIR) / FOLDER))
    return 0


def explain(cfg: CfgNode, images: int, folder: Path) -> Path:
    """Draw what a checkpoint's networks and prototypes make of the first ``images`` images with objects.

    The checkpoint is MODEL.WEIGHTS, or the last one in OUTPUT_DIR; the data are those of DATASETS.TRAIN*. A
    checkpoint without a teacher is its own teacher.

    Args:
        cfg: the configuration of the run, MODEL.SIM.SUPERVISION "box".
        images: how many.
        folder: where to write the figures, and index.html with all of them.

    Returns:
        the path of index.html.

    Raises:
        UserError: the data or the checkpoint have a fault, or its prototypes have never learned.
    """
    path = _checkpoint(cfg)
    state = read_checkpoint(path)
    dataset = train_loader(cfg).dataset
    accelerator = build_accelerator(cfg)
    criterion = _criterion(cfg, state, path).to(accelerator.device)
    student, teacher = (
        build_model(cfg).to(accelerator.device).to(memory_format=torch.channels_last) for _ in range(2)
    )
    load_weights(student, state["model"], path)
    load_weights(teacher, teacher_weights(state) or state["model"], path)
    step = state.get("iteration", 0)
    view = MethodView(cfg, dataset, images, accelerator)
    list(write_method(folder, step, view.maps(student, teacher, criterion)))
    page = Page(
        title="How the method sees its boxes",
        subtitle=f"{path}, after {step:,} steps.",
        metrics={},
        class_names=[],
        examples=[],
        evolutions=read_method(folder),
        config=cfg.dump(),
    )
    with atomic_write(folder / "index.html") as file:
        file.write(render(page))
    return folder / "index.html"


def _checkpoint(cfg: CfgNode) -> Path:
    weights = cfg.MODEL.WEIGHTS
    if weights and not weights.startswith(TIMM):
        return Path(weights)
    if (path := last_checkpoint(Path(cfg.OUTPUT_DIR))) is None:
        raise UserError(f"{cfg.OUTPUT_DIR}: holds no checkpoint; set MODEL.WEIGHTS or OUTPUT_DIR")
    return path


def _criterion(cfg: CfgNode, state: dict[str, Any], path: Path) -> SIMCriterion:
    """The criterion with the checkpoint's prototypes, which must have learned something."""
    criterion = build_criterion(cfg)
    assert isinstance(criterion, SIMCriterion)
    untrained = criterion.pseudo_masks.prototypes.vectors
    prototypes = state.get("criterion", {}).get(PROTOTYPES)
    if prototypes is None or "model" not in state:
        raise UserError(f"{path}: holds no prototypes; take a checkpoint that train_net.py made from boxes")
    if prototypes.shape != untrained.shape:
        shapes = f"{tuple(prototypes.shape)}, the configuration asks for {tuple(untrained.shape)}"
        raise UserError(f"{path}: prototypes of shape {shapes}; give the run's own config.yaml")
    if torch.equal(prototypes, untrained):
        raise UserError(
            f"{path}: its prototypes never learned, for no loss of the run used the teacher; train with "
            "MODEL.SIM.PSEUDO_SEMANTIC.ENABLED True"
        )
    untrained.copy_(prototypes)
    return criterion.eval()
