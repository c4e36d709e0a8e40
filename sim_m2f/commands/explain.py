"""Draw how a checkpoint gets from the boxes of some images to their pseudo masks."""

import argparse
import copy
from pathlib import Path
from typing import Any

import torch

from sim_m2f.commands.train import configuration
from sim_m2f.config import CfgNode
from sim_m2f.data.loader import train_loader
from sim_m2f.engine.accelerator import build_accelerator
from sim_m2f.engine.method_maps import MethodView
from sim_m2f.errors import UserError
from sim_m2f.files import write_file
from sim_m2f.modeling import build_model
from sim_m2f.report.method_figures import read_method, write_method
from sim_m2f.report.page import Page, render
from sim_m2f.supervision.criterion import SIMCriterion, build_criterion
from sim_m2f.weights.checkpoint import load_weights, read_checkpoint, teacher_weights
from sim_m2f.weights.sources import last_checkpoint, local_weights
from sim_m2f.weights.timm_backbone import TIMM

PROTOTYPES = "pseudo_masks.prototypes.vectors"  # in the criterion's state
FOLDER = "explain"  # in OUTPUT_DIR, if no other is given


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config-file", required=True, metavar="FILE", help="the run's config.yaml")
    parser.add_argument("--num-images", "--pictures", type=int, default=4, metavar="N", help="images (4)")
    parser.add_argument("--folder", type=Path, help=f"where to write (default: OUTPUT_DIR/{FOLDER})")
    weights, data = "MODEL.WEIGHTS is the checkpoint (the last one in OUTPUT_DIR)", "DATASETS.TRAIN* the data"
    overrides = f"overrides: {weights}, {data}"
    parser.add_argument("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help=overrides)


def run(args: argparse.Namespace) -> int:
    """Draw what a checkpoint's networks and prototypes make of the first images with objects.

    The checkpoint is MODEL.WEIGHTS where the command line gives it, else the last one in OUTPUT_DIR, else
    MODEL.WEIGHTS of the configuration; the data are those of DATASETS.TRAIN*. A checkpoint without a teacher
    is its own teacher. Writes the figures and index.html, a page with all of them, whose path is printed.

    Raises:
        UserError: the data or the checkpoint have a fault, or its prototypes have never learned.
    """
    if args.num_images < 1:
        raise UserError(f"--num-images {args.num_images}: give a number of at least 1")
    cfg = configuration(args.config_file, args.opts)
    if cfg.MODEL.SIM.SUPERVISION == "mask":
        raise UserError("MODEL.SIM.SUPERVISION mask: no pseudo masks to explain; take a run from boxes")
    folder = args.folder or Path(cfg.OUTPUT_DIR) / FOLDER
    path = _checkpoint(cfg, args.opts)
    state = read_checkpoint(path)
    dataset = train_loader(cfg).dataset
    accelerator = build_accelerator(cfg)
    criterion = _criterion(cfg, state, path).to(accelerator.device)
    student = build_model(cfg).to(accelerator.device).to(memory_format=torch.channels_last)
    teacher = copy.deepcopy(student)
    load_weights(student, state["model"], path)
    load_weights(teacher, teacher_weights(state) or state["model"], path)
    step = state.get("iteration", 0)
    view = MethodView(cfg, dataset, args.num_images, accelerator)
    list(write_method(folder, step, view.maps(student, teacher, criterion)))
    page = Page(
        title="How the method sees its boxes",
        subtitle=f"{path}, after {step:,} steps.",
        evolutions=read_method(folder, step),
        config=cfg.dump(),
    )
    write_file(folder / "index.html", render(page))
    print(folder / "index.html")
    return 0


def _checkpoint(cfg: CfgNode, overrides: list[str]) -> Path:
    """The file to explain; UserError where there is none. timm's weights are of no run."""
    given = "" if cfg.MODEL.WEIGHTS.startswith(TIMM) else cfg.MODEL.WEIGHTS
    last = last_checkpoint(Path(cfg.OUTPUT_DIR))
    if last and not (given and "MODEL.WEIGHTS" in overrides):
        return last
    if not given:
        raise UserError(f"{cfg.OUTPUT_DIR}: holds no checkpoint; set MODEL.WEIGHTS or OUTPUT_DIR")
    return local_weights(given)


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
        advice = "train with MODEL.SIM.PSEUDO_SEMANTIC.ENABLED True"
        raise UserError(f"{path}: its prototypes never learned, for no loss used the teacher; {advice}")
    untrained.copy_(prototypes)
    return criterion.eval()
