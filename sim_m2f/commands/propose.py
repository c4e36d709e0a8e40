"""Masks of annotated boxes by GrabCut or SAM, with a confidence each: further evidence for a training."""

import argparse
import glob
from pathlib import Path

from sim_m2f.commands.check import add_limits, limits
from sim_m2f.data.catalog import DatasetSource
from sim_m2f.data.formats.registry import BOXES, COCO, INPUTS, as_coco, refuse_read_again
from sim_m2f.errors import UserError
from sim_m2f.files import refuse_inputs
from sim_m2f.labelling.proposals import GRABCUT, SAM, find_proposer
from sim_m2f.labelling.run import label_set
from sim_m2f.own_folder import locked, remove_leftovers


def add_arguments(parser: argparse.ArgumentParser) -> None:
    names = f"{GRABCUT} (OpenCV), or {SAM}NAME, a folder or name on the Hub of SAM or SAM 2 (transformers)"
    parser.add_argument("--with", required=True, dest="name", metavar="NAME", help=names)
    parser.add_argument("--annotations", required=True, type=Path, metavar="PATH", help="the boxes")
    parser.add_argument("--images", required=True, type=Path, metavar="FOLDER", help="their images")
    parser.add_argument(
        "--from", default=COCO, choices=INPUTS, dest="input", help="format of the boxes (coco)"
    )
    parser.add_argument("--output", type=Path, default=Path("proposals.json"), metavar="FILE")
    parser.add_argument("--device", default="auto", help="of SAM: auto, cpu, cuda or cuda:N")
    add_limits(parser)


def run(args: argparse.Namespace) -> int:
    """Write the proposals; returns the exit status.

    Raises:
        UserError: the arguments, SAM or the data have a fault; see ``label_set``.
    """
    if args.output.is_dir():
        raise UserError(f"--output {args.output}: is a folder; give a file")
    refuse_inputs([args.output], [args.annotations], [args.images])
    refuse_read_again(args.output, args.input, args.annotations, args.images)
    proposer = find_proposer(args.name, args.device)
    own = limits(args)
    with locked(args.output.parent, "--output", f".{args.output.stem}.lock"):
        boxes = args.output.with_suffix(BOXES)
        remove_leftovers(args.output.parent, (glob.escape(path.name) for path in (args.output, boxes)))
        path = as_coco(args.annotations, args.images, args.input, boxes, own)
        label_set(proposer, DatasetSource(path.stem, path, args.images, own), args.output)
    print(f"proposals: {args.output} (for training on {path}: DATASETS.TRAIN_PROPOSALS)")
    return 0
