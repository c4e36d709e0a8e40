"""From boxes to masks: a network learned from a data set's boxes, the masks of these boxes, and a page."""

import argparse
import contextlib
import io
import json
import math
import os
import sys
import time
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

from sim_m2f.commands.check import inspect_set
from sim_m2f.commands.convert import split_parts
from sim_m2f.commands.label import calibrate
from sim_m2f.config import CfgNode, get_cfg, validate
from sim_m2f.config.shipped import shipped_configs
from sim_m2f.data.catalog import DatasetSource
from sim_m2f.data.class_names import read_class_names
from sim_m2f.data.coco import CocoData, load_json, read_coco, refuse, xyxy
from sim_m2f.data.formats.base import Record, with_categories
from sim_m2f.data.formats.registry import (
    COCO,
    INPUTS,
    WRITERS,
    WRITTEN,
    as_coco,
    output_formats,
    refuse_read_again,
    refuse_shared_files,
)
from sim_m2f.data.segmentation import JUST_BOXES, mostly_boxes
from sim_m2f.data.split import part
from sim_m2f.data.survey import survey
from sim_m2f.engine.run_folder import refuse_used
from sim_m2f.engine.trainer import Hook, Trainer
from sim_m2f.engine.trial import OutOfMemoryError, Trial, trial
from sim_m2f.errors import UserError
from sim_m2f.files import refuse_inputs, write_file
from sim_m2f.labelling.masks import label
from sim_m2f.labelling.quality import FILE, Quality
from sim_m2f.labelling.run import Labeller, label_set
from sim_m2f.modeling import build_model
from sim_m2f.own_folder import locked, remove_leftovers
from sim_m2f.report.hooks import FirstLook
from sim_m2f.report.labelled import MASKS
from sim_m2f.report.run_report import RELIABILITY, write_report
from sim_m2f.segmenter import Segmenter, from_pretrained
from sim_m2f.training import build_trainer
from sim_m2f.weights.checkpoint import load_checkpoint
from sim_m2f.weights.folder import CLASSES, CONFIG
from sim_m2f.weights.timm_backbone import TIMM

OWN = "fit.boxes.json", "fit.train.json", "fit.val.json"  # what it makes of the annotations
FLAGS = {  # of keys that more than the run depends on
    "OUTPUT_DIR": "--output",
    "SEED": "--seed",
    "DATASETS.TRAIN_ANNOTATIONS": "--annotations",
    "DATASETS.TRAIN_IMAGES": "--images",
    "DATASETS.TEST_ANNOTATIONS": "--val",
    "DATASETS.TEST_IMAGES": "--val-images",
}
RECIPE = "base.yaml", "boxes.yaml"
VALIDATION = 0.2  # share of the objects, where no validation set is given
FEWEST = 5  # images that are split
LEAST_STEPS, MOST_STEPS, EPOCHS = 50, 600, 10  # large sets get as many steps as make up the epochs
OBJECT_SIDE = 32  # pixels of the network's input that half of the objects should have at least
CELL, SIZES = 32, (256, 512)  # the network's input: a multiple, and its range, in pixels
MOST_QUERIES = 200
MINUTES, SPARE = 15.0, 0.9  # for all of it, and the share of them that is planned for


@dataclass(frozen=True)
class Sets:
    """What is learned from, evaluated on and labelled."""

    train: DatasetSource
    val: DatasetSource  # the same as train where there are too few images
    boxes: DatasetSource
    data: CocoData  # of the boxes
    masks: bool  # whether every object of val has one
    images: list[int]  # how many train and val have


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--annotations", required=True, type=Path, metavar="PATH", help="the boxes")
    parser.add_argument("--images", required=True, type=Path, metavar="FOLDER", help="their images")
    parser.add_argument(
        "--from", default=COCO, choices=INPUTS, dest="input", help="format of the boxes (coco)"
    )
    parser.add_argument("--output", type=Path, default=Path("fitted"), metavar="FOLDER")
    parser.add_argument("--minutes", type=float, help=f"time for all of it, about ({MINUTES:g})")
    parser.add_argument("--val", type=Path, metavar="PATH", help="validation set (a fifth of the objects)")
    parser.add_argument("--val-images", type=Path, metavar="FOLDER", help="its images (those of --images)")
    weights = "pretrained weights (timm's); the file of another may want other MODEL.PIXEL_MEAN and _STD"
    parser.add_argument("--weights", metavar="FILE", help=weights)
    formats = f"of the masks, beside COCO's masks.json, with commas between: {', '.join(WRITERS)}"
    parser.add_argument("--format", default="", metavar="NAMES", help=formats)
    parser.add_argument("--seed", type=int, help="of the split and the run (0)")
    folder = parser.add_mutually_exclusive_group()
    folder.add_argument("--resume", action="store_true", help="go on with a run that stopped")
    folder.add_argument("--overwrite", action="store_true", help="remove the run that --output holds")
    parser.add_argument("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="overrides of other keys")


def run(args: argparse.Namespace) -> int:
    """Check, plan, train, evaluate, label; returns the exit status.

    Raises:
        UserError: the arguments or the data have a fault, told before anything is loaded.
    """
    if args.minutes is not None and not 0 < args.minutes < math.inf:
        raise UserError(f"--minutes is {args.minutes:g}; give a positive number")
    if args.val_images and not args.val:
        raise UserError("--val-images: give --val, the annotations of these images, too")
    formats = output_formats(args.format)
    outputs = [args.output / name for name in (MASKS, *OWN[1:], *(WRITERS[name].place for name in formats))]
    refuse_inputs(outputs, (args.annotations, args.val), (args.images, args.val_images))
    written = (*formats, "png")  # its figures
    refuse_read_again(args.output, args.input, args.annotations, args.images, written)
    if args.val:
        refuse_read_again(args.output, args.input, args.val, args.val_images or args.images, written)
    if not args.resume and not args.overwrite:
        refuse_used(args.output)
    with locked(args.output, "--output"):
        remove_leftovers(args.output, (*OWN, *WRITTEN))
        fit(args, formats)
    return 0


def fit(args: argparse.Namespace, formats: list[str]) -> None:
    """Do it all, in a folder that nobody else writes to."""
    previous = stopped_run(args)
    with contextlib.ExitStack() as failed:
        if args.overwrite:
            failed.callback(restore, {file: file.read_bytes() for file in own_files(args) if file.is_file()})
        sets = find_sets(args, previous)
        refuse_shared_files(sets.boxes.annotations, (image.file_name for image in sets.data.images), formats)
        if previous:
            cfg = previous
            go_on(cfg, args, sets)
        else:
            cfg = settings(args, sets)
            plan(cfg, sets, args)
        cfg.freeze()
        beside = Begun(sets.data.class_names, failed), FirstLook(sets.val)
        build_trainer(cfg, args.resume, args.overwrite, beside).train()
    label_boxes(args, cfg, sets, formats)


def label_boxes(args: argparse.Namespace, cfg: CfgNode, sets: Sets, formats: list[str]) -> None:
    """Calibrate where there are validation masks, label, and write the page."""
    model = from_pretrained(args.output, device=cfg.MODEL.DEVICE)
    quality = Quality(colors=model.colors_by_default)
    if sets.masks and sets.val != sets.train:
        quality = calibrate(model, sets.val, args.output)
    else:
        for name in (FILE, RELIABILITY):
            (args.output / name).unlink(missing_ok=True)
    masks = DatasetSource("masks", args.output / MASKS, args.images, cfg.INPUT.LIMITS)
    labeller = Labeller(model, quality, quality.colors, keep_overlaps=False)
    label_set(labeller, sets.boxes, masks.annotations, formats)
    page = write_report(args.output, read_coco(sets.val, read_masks=False), labelled=masks)
    print(f"masks of the boxes: {masks.annotations}")
    print(f"network:            {args.output} (sim-m2f predict --model {args.output} IMAGE)")
    print(f"page:               {page}")


def own_files(args: argparse.Namespace) -> tuple[Path, Path, Path]:
    """Where boxes, training and validation set are written, as far as they are made here."""
    boxes, train, val = (args.output / name for name in OWN)
    return boxes, train, val


def restore(contents: dict[Path, bytes]) -> None:
    """Give files what they held: those of a run that another one could not replace."""
    for file, content in contents.items():
        write_file(file, content)


class Begun(Hook):
    """Once the folder holds no other run: writes classes.json, and lets go what a failure would restore."""

    def __init__(self, names: list[str], failed: contextlib.ExitStack) -> None:
        self.names, self.failed = names, failed

    def before_train(self, trainer: Trainer) -> None:
        self.failed.pop_all()
        write_file(trainer.output_dir / CLASSES, json.dumps({"class_names": self.names}))


def stopped_run(args: argparse.Namespace) -> CfgNode | None:
    """The settings of the run that goes on, but for keys of the command line; None where a new one begins.

    Its data are split as before, whatever --seed says.

    Raises:
        UserError: an override has a fault.
    """
    if not args.resume or not (args.output / CONFIG).exists():
        args.seed = args.seed or 0
        return None
    cfg = get_cfg()
    cfg.merge_from_file(args.output / CONFIG)
    own = {"--minutes": "SOLVER.MAX_ITER", "--weights": "MODEL.WEIGHTS", "--seed": "SEED"}
    for flag, key in own.items():
        if getattr(args, flag.removeprefix("--")) is not None:
            print(f"note: {flag}: without effect on a run that goes on with its own {key}", file=sys.stderr)
    args.seed = cfg.SEED
    cfg.merge_from_list(overrides(args))
    validate(cfg)
    return cfg


def go_on(cfg: CfgNode, args: argparse.Namespace, sets: Sets) -> None:
    """Take the folder and the data of the command line: those of a stopped run may have been moved.

    Raises:
        UserError: the run has learned from images that would now be held back.
    """
    if Path(cfg.DATASETS.TRAIN_ANNOTATIONS).name != OWN[1] == sets.train.annotations.name:
        fault = "has learned from all of its images, and would now be validated with some of them"
        raise UserError(f"--resume: the run in {args.output} {fault}; give its --annotations and --val again")
    set_paths(cfg, args, sets)
    validate(cfg)


def set_paths(cfg: CfgNode, args: argparse.Namespace, sets: Sets) -> None:
    """Say where the run and its data are."""
    data, cfg.OUTPUT_DIR = cfg.DATASETS, str(args.output)
    data.TRAIN_ANNOTATIONS, data.TRAIN_IMAGES = str(sets.train.annotations), str(sets.train.image_root)
    data.TEST_ANNOTATIONS, data.TEST_IMAGES = str(sets.val.annotations), str(sets.val.image_root)


def find_sets(args: argparse.Namespace, previous: CfgNode | None) -> Sets:
    """Read, check and, without --val, split the annotations.

    Args:
        args: the command line.
        previous: the settings of the run that goes on, whose INPUT.LIMITS hold.

    Raises:
        UserError: an override has a fault; or whatever is wrong with the data, one line each, 20 at most.
    """
    cfg = previous
    if cfg is None:
        cfg = get_cfg()
        cfg.merge_from_list(overrides(args))
    limits = cfg.INPUT.LIMITS
    own_boxes, own_train, own_val = own_files(args)
    path = as_coco(args.annotations, args.images, args.input, own_boxes, limits)
    boxes = DatasetSource(path.stem, path, args.images, limits)
    data = checked(boxes)
    if not any(len(image.labels) for image in data.images):
        raise UserError(f"{path}: no object to learn from (crowds and empty boxes aside); give another file")
    if previous and (args.output / CLASSES).exists():
        refuse_other_classes(args.output / CLASSES, data)
    content = load_json(path, limits)
    train, val = boxes, boxes
    if args.val:
        images = args.val_images or args.images
        path = as_coco(args.val, images, args.input, own_val, limits)
        held = checked(DatasetSource(path.stem, path, images, limits))
        if not any(len(image.labels) for image in held.images):
            raise UserError(f"{path}: no object to validate with; give another file, or leave --val out")
        own = load_json(path, limits)
        same = with_categories(own, content["categories"], path)
        if same != own:
            path = own_val
            write_file(path, json.dumps(same))
        val = DatasetSource(path.stem, path, images, limits)
    elif divide(content, args.seed, previous, (own_train, own_val)):
        train, val = (DatasetSource(path.stem, path, args.images, limits) for path in (own_train, own_val))
    counts = [len(load_json(source.annotations, limits)["images"]) for source in (train, val)]
    return Sets(train, val, boxes, data, _has_masks(val), counts)


def divide(content: Record, seed: int, previous: CfgNode | None, paths: tuple[Path, Path]) -> bool:
    """Write what is for training and what is for validation; False where there are too few images to do so.

    A run that goes on holds back the images that it has held back before: it has learned from the others.

    Raises:
        UserError: the seed is negative, or none of these images is left, or no other.
    """
    if previous is None or Path(previous.DATASETS.TRAIN_ANNOTATIONS).name != OWN[1]:
        parts = split_parts(content, VALIDATION, seed) if len(content["images"]) >= FEWEST else []
    else:
        parts = parts_as_before(content, previous, paths[1])
    for path, one in zip(paths, parts, strict=False):  # there may be none
        write_file(path, json.dumps(one))
    return bool(parts)


def parts_as_before(content: Record, previous: CfgNode, val: Path) -> list[Record]:
    """What is for training and what for validation in a run that goes on, which wrote the latter to ``val``.

    Raises:
        UserError: none of these images is left, or no other.
    """
    before = {image["file_name"] for image in load_json(val, previous.INPUT.LIMITS)["images"]}
    held = {image["id"] for image in content["images"] if image["file_name"] in before}
    rest = {image["id"] for image in content["images"]} - held
    if not held or not rest:
        fault = f"{'all' if held else 'none'} of the annotated images are those that the run held back"
        raise UserError(f"--resume: {fault} ({val}); give the images of the run")
    return [part(content, rest), part(content, held)]


def refuse_other_classes(path: Path, data: CocoData) -> None:
    """Raises UserError unless the data have the classes that a run has noted in ``path``, in their order."""
    pairs = zip_longest(map(repr, data.class_names), map(repr, read_class_names(path)), fillvalue="missing")
    for number, (given, noted) in enumerate(pairs):
        if given != noted:
            fault = f"class {number} is {given}, and {noted} in {path}"
            raise UserError(f"{data.annotations_file}: {fault}; give the run's classes in its order")


def checked(source: DatasetSource) -> CocoData:
    """The data set, every image and every segmentation decoded.

    Raises:
        UserError: it has problems: one line each, 20 at most.
    """
    data, problems = inspect_set(source)
    refuse(problems)
    return data


def _has_masks(val: DatasetSource) -> bool:
    """Whether a checked data set has a mask of every object; a note tells where these are just boxes."""
    annotations = load_json(val.annotations, val.limits).get("annotations", [])
    if not annotations or not all(each.get("segmentation") for each in annotations):
        return False
    if not mostly_boxes((each["segmentation"], xyxy(each["bbox"])) for each in annotations):
        return True
    print(f"note: {val.annotations}: {JUST_BOXES}, and masks are not scored by them", file=sys.stderr)
    return False


def settings(args: argparse.Namespace, sets: Sets) -> CfgNode:
    """The recipe for small sets of real images, with what follows from the data, and the user's overrides.

    Raises:
        UserError: an override has a fault.
    """
    counts = survey(sets.data)
    cfg = get_cfg()
    for name in RECIPE if not counts.many_small else (*RECIPE, "tiles.yaml"):
        cfg.merge_from_file(shipped_configs() / "real" / name)
    set_paths(cfg, args, sets)
    network, cfg.SEED = cfg.MODEL.MASK_FORMER, args.seed
    cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES = len(sets.data.category_ids)
    most = counts.most
    if counts.many_small:
        most = math.ceil(counts.most / cfg.INPUT.MIN_SCALE**2)  # a crop shows so many
    else:
        size = OBJECT_SIDE / counts.side / CELL
        cfg.INPUT.IMAGE_SIZE = CELL * min(max(math.ceil(size), SIZES[0] // CELL), SIZES[1] // CELL)
    network.NUM_OBJECT_QUERIES = min(max(network.NUM_OBJECT_QUERIES, 8 * math.ceil(most / 5)), MOST_QUERIES)
    cfg.TEST.DETECTIONS_PER_IMAGE = min(max(cfg.TEST.DETECTIONS_PER_IMAGE, 2 * counts.most), MOST_QUERIES)
    cfg.DATALOADER.NUM_WORKERS = min(max(len(os.sched_getaffinity(0)) - 1, 1), 4)
    if args.weights is not None:
        cfg.MODEL.WEIGHTS = args.weights
    cfg.merge_from_list(overrides(args))
    if not cfg.MODEL.WEIGHTS:
        learn_whole_backbone(cfg)
    if not counts.many_small:
        cfg.INPUT.MIN_SIZE_TEST = cfg.INPUT.MAX_SIZE_TEST = cfg.INPUT.IMAGE_SIZE
    cfg.merge_from_list(overrides(args))  # which may say otherwise
    validate(cfg)
    return cfg


def learn_whole_backbone(cfg: CfgNode) -> None:
    """What is right for a backbone that starts at random."""
    cfg.MODEL.BACKBONE.FREEZE_NORMS, cfg.SOLVER.BACKBONE_MULTIPLIER = False, 1.0


def overrides(args: argparse.Namespace) -> list[str]:
    """KEY VALUE pairs of the command line.

    Raises:
        UserError: one of the keys has a flag that says more.
    """
    pairs = [item for item in args.opts if item != "--"]
    for key in pairs[::2]:
        if key in FLAGS:
            raise UserError(f"command line: {key}: follows from {FLAGS[key]} in fit; give that instead")
    return pairs


def plan(cfg: CfgNode, sets: Sets, args: argparse.Namespace) -> None:
    """Settle weights and steps by what the machine does in a trial, and tell all of it.

    Raises:
        UserError: the weights or the configuration have a fault, or memory does not suffice.
    """
    origin = settle_weights(cfg)
    print("a few steps on trial ...", flush=True)
    tried = affordable_trial(cfg, "SOLVER.IMAGES_AT_ONCE" in args.opts)
    after = labelling_seconds(cfg, tried, sets)
    if "SOLVER.MAX_ITER" not in args.opts:
        most = max(MOST_STEPS, math.ceil(EPOCHS * sets.images[0] / cfg.SOLVER.IMS_PER_BATCH))
        steps = (SPARE * 60 * (args.minutes or MINUTES) - after) / tried.seconds_per_step
        cfg.SOLVER.MAX_ITER = int(min(max(steps, LEAST_STEPS), most))
        if "SOLVER.WARMUP_ITERS" not in args.opts:
            cfg.SOLVER.WARMUP_ITERS = min(cfg.SOLVER.WARMUP_ITERS, cfg.SOLVER.MAX_ITER // 8)
        if "SOLVER.CHECKPOINT_PERIOD" not in args.opts:
            cfg.SOLVER.CHECKPOINT_PERIOD = max(1, cfg.SOLVER.MAX_ITER // 4)
    for name, text in summary(cfg, sets, tried, origin, after).items():
        print(f"{name:<12}{text}")
    sys.stdout.flush()


def affordable_trial(cfg: CfgNode, fixed: bool) -> Trial:
    """A trial with the whole batch at once or, where memory does not suffice, in as large parts as it allows
    unless these are ``fixed``; what is learned is the same.

    Raises:
        UserError: memory does not suffice for a single image, or for the parts that were asked for.
    """
    while True:
        at_once = cfg.SOLVER.IMAGES_AT_ONCE or cfg.SOLVER.IMS_PER_BATCH
        try:
            return trial(cfg)
        except OutOfMemoryError:
            if at_once == 1 or fixed:
                raise
        cfg.SOLVER.IMAGES_AT_ONCE = at_once // 2


def settle_weights(cfg: CfgNode) -> str:
    """Where the weights come from; without them the backbone starts from random ones, its norms not frozen.

    Raises:
        UserError: a file or an address that was asked for has a fault.
    """
    if not cfg.MODEL.WEIGHTS:
        return "none: all of it starts at random"
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            load_checkpoint(build_model(cfg), cfg.MODEL.WEIGHTS)
    except UserError as error:
        if not cfg.MODEL.WEIGHTS.startswith(TIMM):
            raise
        cfg.MODEL.WEIGHTS = ""
        learn_whole_backbone(cfg)
        return f"none, so masks will be worse ({error}; --weights FILE takes a file)"
    return str(cfg.MODEL.WEIGHTS)


def labelling_seconds(cfg: CfgNode, tried: Trial, sets: Sets) -> float:
    """About how long evaluation, calibration and labelling will take, from one image."""
    network = tried.trainer.accelerator.unwrap_model(tried.trainer.model)
    model = Segmenter(network, cfg, sets.data.class_names).to(tried.trainer.accelerator.device)
    images = [image for image in sets.data.images if len(image.labels)]
    image = sorted(images, key=lambda each: len(each.labels))[len(images) // 2]
    for _ in range(2):  # the first time is longer
        start = time.perf_counter()
        label(model, sets.data.read_image(image), image.boxes, image.labels, model.colors_by_default)
        seconds = time.perf_counter() - start
    return seconds * (len(images) + sets.images[1] * (2.5 if sets.masks and sets.val != sets.train else 0.5))


def summary(cfg: CfgNode, sets: Sets, tried: Trial, origin: str, after: float) -> dict[str, str]:
    """What will be done, a line by name."""
    counts, steps, (train, val) = survey(sets.data), cfg.SOLVER.MAX_ITER, sets.images
    classes = ", ".join(f"{name} ({number})" for name, number in list(counts.per_class.items())[:8])
    more = f" and {len(counts.per_class) - 8} more" if len(counts.per_class) > 8 else ""
    held = "the same images" if sets.val == sets.train else f"{val} images"
    tiles = f", as tiles of {cfg.TEST.TILE} of {cfg.INPUT.MIN_SIZE_TEST}" if cfg.TEST.TILE else ""
    epochs = steps * cfg.SOLVER.IMS_PER_BATCH / train
    minutes = (steps * tried.seconds_per_step + after) / 60
    parts = f" ({cfg.SOLVER.IMAGES_AT_ONCE} at once)" if cfg.SOLVER.IMAGES_AT_ONCE else ""
    return {
        "data": f"{counts.images} images, {counts.objects} objects, {counts.per_image:.1f} in an image, "
        f"{counts.most} at most",
        "classes": classes + more,
        "training": f"{train} images",
        "validation": f"{held}, {'with masks' if sets.masks else 'boxes alone: masks are not scored'}",
        "network": f"{cfg.MODEL.BACKBONE.NAME}, {cfg.MODEL.MASK_FORMER.NUM_OBJECT_QUERIES} queries, "
        f"images of {cfg.INPUT.IMAGE_SIZE} pixels{tiles}",
        "weights": origin,
        "device": f"{tried.trainer.accelerator.device}, {tried.memory_gib:.1f} GiB of memory in a step",
        "run": f"{steps} steps of {cfg.SOLVER.IMS_PER_BATCH} images{parts}, {epochs:.1f} epochs, "
        f"{tried.seconds_per_step:.2g} s a step",
        "estimate": f"{minutes:.0f} minutes, {after / 60:.1f} of them for evaluation and labelling",
    }
