"""Find the objects in images: a COCO JSON of masks, and every image with its masks drawn on it."""

import argparse
import json
import os
from collections import Counter
from pathlib import Path
from typing import Any, cast

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask

from sim_m2f.commands.check import add_limits, limits
from sim_m2f.data.image import image_files, read_image
from sim_m2f.engine.evaluator import encode
from sim_m2f.errors import UserError, image_problem
from sim_m2f.files import write_file
from sim_m2f.own_folder import locked, remove_leftovers
from sim_m2f.progress import progress
from sim_m2f.report.drawing import Shape, colours, draw, write_png
from sim_m2f.segmenter import Instances, Segmenter, from_pretrained
from sim_m2f.structures import Detections

PREDICTIONS, OVERLAYS = "predictions.json", "overlays"
SIDE = 1024  # longer side of an overlay in pixels


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help="files, or folders of them")
    parser.add_argument("--model", required=True, metavar="NAME", help="a network: folder or name on the Hub")
    parser.add_argument("--config-file", default="", metavar="FILE", help="its YAML file, for a checkpoint")
    parser.add_argument("--output", type=Path, default=Path("predictions"), metavar="FOLDER")
    parser.add_argument("--threshold", type=float, default=0.5, help="least score (default 0.5)")
    colors = "correct masks by colour; auto: as TEST.COLORS of its configuration says"
    parser.add_argument("--colors", choices=("auto", "on", "off"), default="auto", help=colors)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    add_limits(parser)


def run(args: argparse.Namespace) -> int:
    """Write ``predictions.json`` and ``overlays/``; returns the exit status.

    Raises:
        UserError: there are no images, or no such network; images that cannot be decoded or take too much
            memory, one line each, after all others are done.
    """
    if not 0 <= args.threshold <= 1:
        raise UserError(f"--threshold is {args.threshold}; scores are from 0 to 1")
    given = [Path(os.path.abspath(path)) for path in args.images]
    overlays = Path(os.path.abspath(args.output / OVERLAYS))
    files = list(dict.fromkeys(file for path in given for file in _images_in(path, overlays)))
    model = from_pretrained(args.model, args.config_file, args.device)
    limits(args, model.cfg)
    with locked(args.output, "--output"):
        remove_leftovers(args.output, (PREDICTIONS, f"{OVERLAYS}/**/*"))
        predict(args, model, dict(zip(files, _names(files, given), strict=True)))
    return 0


def predict(args: argparse.Namespace, model: Segmenter, names: dict[Path, str]) -> None:
    """Do it, in a folder that nobody else writes to; ``names`` are those of the files."""
    colors = None if args.colors == "auto" else args.colors == "on"
    categories = [{"id": number, "name": name} for number, name in enumerate(model.class_names, start=1)]
    category_ids = list(range(1, len(categories) + 1))
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    problems = []
    try:
        for number, file in enumerate(progress(names, "predict", len(names)), start=1):
            try:
                pixels = read_image(file, limits=model.cfg.INPUT.LIMITS)
                detected = model.predict(pixels, args.threshold, colors=colors)
                found = encode(number, cast(Detections, vars(detected)), category_ids)
                height, width = detected.masks.shape[1:]
                images.append({"id": number, "file_name": names[file], "height": height, "width": width})
                annotations += found
                _draw(pixels, detected, args.output / OVERLAYS / f"{names[file]}.png")
            except Exception as error:
                problems.append(image_problem(error, file))
    finally:  # Ctrl-C costs nothing of what has been found
        for number, annotation in enumerate(annotations, start=1):
            annotation.update(id=number, area=int(coco_mask.area(annotation["segmentation"])), iscrowd=0)
        info = {"description": f"{len(names)} images by SIM-M2F"}
        content = {"info": info, "images": images, "annotations": annotations, "categories": categories}
        write_file(args.output / PREDICTIONS, json.dumps(content))
    print(f"{len(annotations)} objects in {len(images)} images: {args.output / PREDICTIONS}")
    if problems:
        raise UserError("\n".join(problems))


def _images_in(path: Path, overlays: Path) -> list[Path]:
    """The path itself, or the images in the folder and below, in the order of their names.

    Args:
        path: a file or a folder.
        overlays: where those of an earlier call may lie; they are left out.

    Raises:
        UserError: the folder holds no image.
    """
    if not path.is_dir():
        return [path]
    files = [file for file in image_files(path) if overlays not in file.parents]
    if not files:
        raise UserError(f"{path}: holds no image; give a folder of images, or their paths")
    return files


def _names(files: list[Path], given: list[Path]) -> list[str]:
    """A name for every file, each one once: its path within the folder that was given, or its own name.

    Where two files have the same one, as many of the folders above stand before it as tell them apart.
    """
    parents = [next((path for path in given if path in file.parents), file.parent) for file in files]
    names = [file.relative_to(parent).as_posix() for file, parent in zip(files, parents, strict=True)]
    while common := {name for name, number in Counter(names).items() if number > 1}:
        parents = [p.parent if name in common else p for name, p in zip(names, parents, strict=True)]
        names = [file.relative_to(parent).as_posix() for file, parent in zip(files, parents, strict=True)]
    return names


def _draw(pixels: np.ndarray, detected: Instances, path: Path) -> None:
    masks = detected.masks.cpu().numpy()
    texts = [f"{name} {score:.2f}" for name, score in zip(detected.names, detected.scores, strict=True)]
    worn = colours(detected.labels.tolist())
    shapes = [Shape(colour, text, mask=mask) for colour, text, mask in zip(worn, texts, masks, strict=True)]
    write_png(path, draw(Image.fromarray(pixels), shapes, SIDE))
