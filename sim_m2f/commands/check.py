"""Check a data set completely: every record of its JSON, every image decoded; one line for each problem."""

import argparse
import os
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from sim_m2f.config import CfgNode, get_cfg, validate
from sim_m2f.data.catalog import DatasetSource, find_source
from sim_m2f.data.coco import CocoData, ImageRecord, inspect_coco, limit_problem
from sim_m2f.data.dataset import read_mask
from sim_m2f.data.formats.base import Record
from sim_m2f.data.formats.registry import COCO, INPUTS, read_annotations
from sim_m2f.data.notes import notes
from sim_m2f.errors import UserError
from sim_m2f.progress import progress


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", help="a data set's name, such as coco_2017_train or shapes_val")
    parser.add_argument("--annotations", type=Path, metavar="JSON", help="or: COCO JSON of a data set ...")
    parser.add_argument("--images", type=Path, metavar="FOLDER", help="... and the folder of its images")
    parser.add_argument("--from", default=COCO, choices=INPUTS, dest="input", help="their format (coco)")
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
        UserError: the arguments do not name a data set, or its JSON is not one.
    """
    if args.name and not args.annotations and not args.images:
        source = find_source(args.name, limits(args))
    elif args.annotations and args.images and not args.name:
        source = DatasetSource(args.annotations.stem, args.annotations, args.images, limits(args))
    else:
        raise UserError("check takes the name of a data set, or both --annotations JSON and --images FOLDER")
    content = read_annotations(source.annotations, source.image_root, args.input, source.limits)
    data, problems = inspect_set(source, args.masks, content)
    for line in problems:
        print(line)
    for line in notes(get_cfg(), [data]):
        print(f"note: {line}")
    objects = sum(len(image.labels) for image in data.images)
    contents = f"{len(data.images)} images, {objects} objects, {len(data.category_ids)} categories"
    print(f"{data.name}: {contents}, {data.zero_area} boxes of zero area; {len(problems) or 'no'} problems")
    return 2 if problems else 0


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
    is_there = os.path.lexists(path) and not os.path.isdir(path)
    checks = [partial(data.read_image, image)] if is_there else []
    checks += [partial(read_mask, data, image, index) for index in range(len(image.segmentations or []))]
    for check in checks:
        try:
            check()
        except UserError as error:
            problems.append(str(error))
    return problems
