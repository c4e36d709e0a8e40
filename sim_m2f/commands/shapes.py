"""Write the embedded shapes data set (COCO JSON and PNG) into the cache or a folder."""

import argparse
from pathlib import Path

from sim_m2f.data.shapes import cached_shapes, write_shapes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", nargs="?", type=Path, help="where to write it (the cache, $SIM_M2F_CACHE)")


def run(args: argparse.Namespace) -> int:
    print(write_shapes(args.folder) if args.folder else cached_shapes())
    return 0
