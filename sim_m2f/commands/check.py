"""Check a data set completely: every record of its JSON, every image decoded; one line for each problem."""

import argparse
import itertools
import os
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from sim_m2f.config import CfgNode, get_cfg, validate
from sim_m2f.data.catalog import DatasetSource, find_source
from sim_m2f.data.coco import CocoData, ImageRecord, check_categories, inspect_coco, limit_problem, read_mask
from sim_m2f.data.formats.base import Record
from sim_m2f.data.formats.registry import COCO, INPUTS, read_annotations
from sim_m2f.data.image import links_outside
from sim_m2f.data.notes import notes
from sim_m2f.errors import UserError
from sim_m2f.progress import progress


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", help="a data set's name, such as coco_2017_train or shapes_val")
    parser.add_argument("--annotations", type=Path, metavar="JSON", help="or: COCO JSON of a data set ...")
    parser.add_argument("--images", type=Path, metavar="FOLDER", help="... and the folder of its images")
    parser.add_argument("--from", default=COCO, choices=INPUTS, dest="input", help="their format (coco)")
    parser.add_argument("--val", type=Path, metavar="PATH", help="annotations of its validation set, too")
    parser.add_argument("--val-images", type=Path, metavar="FOLDER", help="their images (those of --images)")
    about = "configuration that notes are about (the default one)"
    parser.add_argument("--config-file", default="", metavar="FILE", help=about)
    parser.add_argument("--masks", action="store_true", help="each box needs a segmentation")
    add_limits(parser)


def add_limits(parser: argparse.ArgumentParser) -> None:
    meaning = "a key of INPUT.LIMITS, such as INPUT.LIMITS.PIXELS 400000000; may be repeated"
    parser.add_argument("--set", nargs=2, action="append", default=[], metavar=("KEY", "VALUE"), help=meaning)


def limits(args: argparse.Namespace, cfg: CfgNode | None = None) -> CfgNode:
    """INPUT.LIMITS of a configuration, by default the default one, after what --set says is done to it.

    Raises:
        UserError: a key or a value has a fault.
    """
    cfg = cfg or get_cfg()
    for key, value in args.set:
        if not key.startswith("INPUT.LIMITS."):
            raise UserError(f"--set {key}: takes keys of INPUT.LIMITS; see sim_m2f/config/defaults.yaml")
        cfg.merge_from_list([key, value])
    validate(cfg)
    return cfg.INPUT.LIMITS


def run(args: argparse.Namespace) -> int:
    """Print the problems and a summary; returns 2 when there are any, else 0.

    Raises:
        UserError: the arguments do not name a data set, its JSON is not one, or the validation set has other
            categories.
    """
    cfg = get_cfg()
    if args.config_file:
        cfg.merge_from_file(args.config_file)
    found = []
    for source in _sources(args, limits(args, cfg)):
        content = read_annotations(source.annotations, source.image_root, args.input, source.limits)
        found.append(inspect_set(source, args.masks, content))
    train, *val = (data for data, _ in found)
    for line in itertools.chain(*(problems for _, problems in found)):
        print(line)
    for line in notes(cfg, [train], val):
        print(f"note: {line}")
    for data, problems in found:
        objects = sum(len(image.labels) for image in data.images)
        contents = f"{len(data.images)} images, {objects} objects, {len(data.category_ids)} categories"
        problems_found = f"{data.zero_area} boxes of zero area; {len(problems) or 'no'} problems"
        print(f"{data.name}: {contents}, {problems_found}")
    check_categories([train, *val])
    return 2 if any(problems for _, problems in found) else 0


def _sources(args: argparse.Namespace, limits: CfgNode) -> list[DatasetSource]:
    """The set, and where there is one its validation set."""
    if args.name and not args.annotations and not args.images:
        source = find_source(args.name, limits)
    elif args.annotations and args.images and not args.name:
        source = DatasetSource(args.annotations.stem, args.annotations, args.images, limits)
    else:
        raise UserError("check takes the name of a data set, or both --annotations JSON and --images FOLDER")
    if args.val_images and not args.val:
        raise UserError("--val-images: give --val, the annotations of these images, too")
    if not args.val:
        return [source]
    return [source, DatasetSource(args.val.stem, args.val, args.val_images or source.image_root, limits)]


def inspect_set(
    source: DatasetSource, masks: bool = False, content: Record | None = None
) -> tuple[CocoData, list[str]]:
    """A data set and everything that is wrong with its JSON and its images.

    Args:
        source: where it is.
        masks: whether each object needs a segmentation; those that are there are checked.
        content: its JSON, where the annotations are in another format.

    Raises:
        UserError: the file is not a COCO JSON at all.
    """
    data, problems = inspect_coco(source, read_masks=True, some_masks=not masks, content=content)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        by_image = pool.map(partial(image_problems, data), data.images)
        for lines in progress(by_image, "check", len(data.images)):
            problems += lines
    return data, problems


def image_problems(data: CocoData, image: ImageRecord) -> list[str]:
    """What is wrong with one image's file and with the masks that were read, unless its record has told."""
    path, problems = data.image_root / image.file_name, []
    if limit_problem(image.file_name, image.height, image.width, data.image_root, data.limits):
        return []
    if not data.limits.OUTSIDE and links_outside(data.image_root, path):
        return []
    is_there = os.path.lexists(path) and not os.path.isdir(path)
    checks = [partial(data.read_image, image)] if is_there else []
    checks += [partial(read_mask, data, image, index) for index in range(len(image.segmentations or []))]
    for check in checks:
        try:
            check()
        except UserError as error:
            problems.append(str(error))
    return problems
