"""Annotations of other tools to COCO JSON and back, and a data set in two for training and validation."""

import argparse
import json
from pathlib import Path

from sim_m2f.commands.check import add_limits, limits
from sim_m2f.data.catalog import DatasetSource
from sim_m2f.data.coco import read_coco
from sim_m2f.data.formats.base import images_of, mask_of, objects
from sim_m2f.data.formats.registry import (
    COCO,
    INPUTS,
    WRITERS,
    WRITTEN,
    output_formats,
    read_annotations,
    refuse_read_again,
    refuse_shared_files,
)
from sim_m2f.data.split import part, split_images
from sim_m2f.errors import UserError
from sim_m2f.files import refuse_inputs, write_file
from sim_m2f.own_folder import locked, remove_leftovers

ANNOTATIONS, PARTS = "annotations.json", ("train.json", "val.json")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--annotations", required=True, type=Path, metavar="PATH", help="file, or a folder")
    parser.add_argument("--images", required=True, type=Path, metavar="FOLDER", help="their images")
    parser.add_argument("--from", default=COCO, choices=INPUTS, dest="input", help="what they are (coco)")
    formats = f"beside COCO's annotations.json, with commas between: {', '.join(WRITERS)}"
    parser.add_argument("--format", default="", metavar="NAMES", help=formats)
    parser.add_argument("--output", type=Path, default=Path("converted"), metavar="FOLDER")
    split = "share of the objects for validation: train.json and val.json beside annotations.json"
    parser.add_argument("--split", type=float, default=0.0, metavar="SHARE", help=split)
    parser.add_argument("--seed", type=int, default=0, help="of the split")
    add_limits(parser)


def run(args: argparse.Namespace) -> int:
    """Check and write the annotations; returns the exit status.

    Raises:
        UserError: there is nothing of the kind, or it has a fault.
    """
    if args.split and not 0 < args.split < 1:
        raise UserError(f"--split is {args.split}; give a share between 0 and 1, such as 0.2")
    formats = output_formats(args.format)
    parts = [args.output / name for name in PARTS] if args.split else []
    outputs = [args.output / ANNOTATIONS, *parts, *(args.output / WRITERS[name].place for name in formats)]
    refuse_inputs(outputs, [args.annotations], [args.images])
    refuse_read_again(args.output, args.input, args.annotations, args.images, formats)
    source = DatasetSource(args.annotations.stem, args.annotations, args.images, limits(args))
    content = read_annotations(source.annotations, source.image_root, args.input, source.limits)
    read_coco(source, read_masks=False, content=content)
    split = split_parts(content, args.split, args.seed) if args.split else []
    if args.split and not split:
        raise UserError(f"{len(content['images'])} images are too few to be split; give a validation set")
    refuse_shared_files(args.annotations, (image["file_name"] for image in content["images"]), formats)
    try:
        for image, annotations in images_of(content):
            for annotation in objects(annotations):
                mask_of(image, annotation)
    except UserError as error:
        raise UserError(f"{args.annotations}: {error}") from error
    with locked(args.output, "--output"):
        remove_leftovers(args.output, (ANNOTATIONS, *PARTS, *WRITTEN))
        write_file(args.output / ANNOTATIONS, json.dumps(content))
        for name in formats:
            WRITERS[name].write(args.output, content["categories"], images_of(content))
        for path, one in zip(parts, split, strict=True):
            write_file(path, json.dumps(one))
    print(f"{len(content['images'])} images, {len(content.get('annotations', []))} objects: {args.output}")
    return 0


def split_parts(content: dict, share: float, seed: int) -> list[dict]:
    """What is for training and what is for validation; nothing where one of them would be empty.

    Raises:
        UserError: the seed is negative.
    """
    if seed < 0:
        raise UserError(f"--seed is {seed}; give a whole number from 0 on")
    held = split_images(content, share, seed)
    rest = {image["id"] for image in content["images"]} - held
    return [part(content, rest), part(content, held)] if held and rest else []
