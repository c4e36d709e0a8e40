"""Write a contact sheet, the loss curves and one page with both for a finished run, from its files."""

import argparse
from pathlib import Path

from sim_m2f.commands.check import add_limits, limits
from sim_m2f.config import get_cfg
from sim_m2f.config.shipped import find_config
from sim_m2f.data.catalog import DatasetSource, data_sources
from sim_m2f.data.coco import read_coco
from sim_m2f.errors import UserError
from sim_m2f.report.run_report import labelled_boxes, write_report
from sim_m2f.weights.folder import CONFIG


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("output_dir", type=Path, metavar="OUTPUT_DIR", help="folder of the run")
    parser.add_argument("--config-file", type=Path, help="its configuration (OUTPUT_DIR/config.yaml)")
    parser.add_argument("--annotations", type=Path, help="another COCO JSON than the configuration's")
    parser.add_argument("--images", type=Path, help="folder of its images")
    parser.add_argument("--min-score", type=float, default=0.5, help="least score that is drawn (0.5)")
    parser.add_argument("--num-images", "--num-pictures", type=int, default=16, help="images drawn (16)")
    add_limits(parser)


def run(args: argparse.Namespace) -> int:
    if not 0 <= args.min_score <= 1:
        raise UserError(f"--min-score is {args.min_score}; scores are from 0 to 1")
    if args.num_images < 0:
        raise UserError(f"--num-images is {args.num_images}; give a whole number from 0 on")
    source, labelled = _sources(args)
    data = read_coco(source, read_masks=False)
    options = {"min_score": args.min_score, "num_images": args.num_images}
    print(write_report(args.output_dir, data, labelled=labelled, **options))
    return 0


def _sources(args: argparse.Namespace) -> tuple[DatasetSource, DatasetSource | None]:
    """The test set, and the masks of the run's boxes where its configuration says of which images."""
    if args.annotations and args.images:
        return DatasetSource(args.annotations.stem, args.annotations, args.images, limits(args)), None
    if args.annotations or args.images:
        raise UserError("--annotations and --images belong together; give both, or neither and --config-file")
    config_file = find_config(args.config_file or args.output_dir / CONFIG)
    if not config_file.exists():
        raise UserError(f"{config_file}: no such file; give --config-file, or --annotations and --images")
    cfg = get_cfg()
    cfg.merge_from_file(config_file)
    limits(args, cfg)
    return data_sources(cfg, "TEST")[0], labelled_boxes(args.output_dir, cfg)
