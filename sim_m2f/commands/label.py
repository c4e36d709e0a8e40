"""Masks for the boxes of a data set: each annotated object gets its own, with a score."""

import argparse
from pathlib import Path

from sim_m2f.commands.check import add_limits, limits
from sim_m2f.data.catalog import DatasetSource
from sim_m2f.data.formats.registry import (
    BOXES,
    COCO,
    INPUTS,
    WRITERS,
    WRITTEN,
    as_coco,
    output_formats,
    refuse_read_again,
)
from sim_m2f.engine.run_folder import FILES
from sim_m2f.errors import UserError
from sim_m2f.files import expanded, refuse_inputs
from sim_m2f.labelling.quality import Quality, read_quality, reliability, write_quality
from sim_m2f.labelling.run import Labeller, calibrated, check_set, label_set
from sim_m2f.own_folder import locked, remove_leftovers
from sim_m2f.report.drawing import write_png
from sim_m2f.report.labelled import MASKS
from sim_m2f.report.run_report import RELIABILITY
from sim_m2f.segmenter import Segmenter, from_pretrained


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, metavar="NAME", help="a network: folder or name on the Hub")
    parser.add_argument("--config-file", default="", metavar="FILE", help="its YAML file, for a checkpoint")
    parser.add_argument("--annotations", required=True, type=Path, metavar="FILE", help="the boxes")
    parser.add_argument("--images", required=True, type=Path, metavar="FOLDER", help="their images")
    parser.add_argument(
        "--from", default=COCO, choices=INPUTS, dest="input", help="format of the boxes (coco)"
    )
    parser.add_argument("--output", type=Path, default=Path("labelled"), metavar="FOLDER")
    formats = f"beside COCO's masks.json, with commas between: {', '.join(WRITERS)}"
    parser.add_argument("--format", default="", metavar="NAMES", help=formats)
    colors = "correct masks by colour; auto: as validation masks have it, else on without TEST.TILE"
    parser.add_argument("--colors", choices=("auto", "on", "off"), default="auto", help=colors)
    overlaps = "of masks of one class: resolve gives a pixel to the object in whose box it is most central"
    parser.add_argument("--overlaps", choices=("resolve", "keep"), default="resolve", help=overlaps)
    parser.add_argument("--val", type=Path, metavar="JSON", help="COCO JSON with masks to fit scores to")
    parser.add_argument("--val-images", type=Path, metavar="FOLDER", help="its images (those of --images)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    add_limits(parser)


def run(args: argparse.Namespace) -> int:
    """Write ``masks.json`` and what --format asks for; returns the exit status.

    Raises:
        UserError: the arguments, the network or the data have a fault; see ``label_set``.
    """
    formats = output_formats(args.format)
    outputs = args.output / MASKS, *(args.output / WRITERS[name].place for name in formats)
    refuse_inputs(outputs, (args.annotations, args.val), (args.images, args.val_images))
    figures = ["png"] if args.val else []
    refuse_read_again(args.output, args.input, args.annotations, args.images, formats + figures)
    with locked(args.output, "--output"):
        remove_leftovers(args.output, (*FILES, Path(MASKS).with_suffix(BOXES).name, *WRITTEN))
        label_boxes(args, formats)
    return 0


def label_boxes(args: argparse.Namespace, formats: list[str]) -> None:
    """Do it, in a folder that nobody else writes to."""
    model, masks = from_pretrained(args.model, args.config_file, args.device), args.output / MASKS
    own = limits(args, model.cfg.clone())  # what is done stays where a limit is raised
    annotations = as_coco(args.annotations, args.images, args.input, masks.with_suffix(BOXES), own)
    source = DatasetSource(annotations.stem, annotations, args.images, own)
    check_set(source, model.class_names, formats)
    colors = None if args.colors == "auto" else args.colors == "on"
    if args.val:
        images = args.val_images or args.images
        held_back = DatasetSource(args.val.stem, args.val, images, own)
        quality = calibrate(model, held_back, args.output, colors)
    elif args.val_images:
        raise UserError("--val-images: give --val, the JSON of these images, too")
    else:
        quality = read_quality(expanded(args.model), model.colors_by_default)
    colors = quality.colors if colors is None else colors
    labeller = Labeller(model, quality, colors, args.overlaps == "keep")
    label_set(labeller, source, masks, formats)
    print(f"masks: {masks}")


def calibrate(model: Segmenter, source: DatasetSource, output: Path, colors: bool | None = None) -> Quality:
    """Scores fitted to validation masks (see ``calibrated``); written to ``output``, with a plot, and told.

    Raises:
        UserError: the data have a fault, or a file cannot be written.
    """
    quality, found = calibrated(model, source, colors)
    write_quality(output, quality)
    write_png(output / RELIABILITY, reliability(found.scores, found.ious))
    for name, value in quality.measured.items():
        print(
            f"validation, {name}: {value:.0f}" if name == "objects" else f"validation, {name}: {value:.1f} %"
        )
    return quality
