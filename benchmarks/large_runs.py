"""Trains coco_more and people at 512 pixels with the full-size head on a GPU, all runs side by side.

    python benchmarks/large_runs.py --weights FILE
    python benchmarks/large_runs.py --steps 2 --jobs 1 --results /tmp/trial --output /tmp/trial \
        --opts INPUT.IMAGE_SIZE 64 INPUT.MIN_SIZE_TEST 64 INPUT.MAX_SIZE_TEST 64              a trial

configs/real/large.yaml on the base of each set, learned by the rows of configs/real/rows. On people, what
learns from boxes also sees the images that have boxes only (people_train_boxes_only). Rows go into
benchmarks/results/large_<set>.json, as real_runs.py has them.
"""

import argparse
import sys

from real import print_table, read_rows
from real_runs import Job, add_run_arguments, configuration, run_all

from sim_m2f.config.shipped import shipped_configs
from sim_m2f.errors import UserError

SETS = ("coco_more", "people")
ROWS = ("boxinst", "sim", "best", "mask")
ONLY_BOXES = ["DATASETS.TRAIN", "('people_train', 'people_train_boxes_only')"]


def jobs_of(args: argparse.Namespace) -> list[Job]:
    """A run of each set, row and seed."""
    jobs, opts = [], args.opts
    for seed in args.seeds:
        for name in args.sets:
            for row in args.rows:
                args.opts = [*(ONLY_BOXES if name == "people" and row != "mask" else []), *opts]
                cfg = configuration(name, row, seed, args, shipped_configs() / "real/large.yaml")
                jobs.append(Job(row, cfg, args.results / f"large_{name}.json"))
    return jobs


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sets", nargs="+", choices=SETS, default=SETS)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=ROWS)
    add_run_arguments(parser)
    parser.set_defaults(seeds=[0], steps=1500, jobs=len(SETS) * len(ROWS))
    args = parser.parse_args()
    failed = run_all(jobs_of(args), args.jobs)
    for name in args.sets:
        print(f"\n{name}\n")
        print_table(read_rows(args.results / f"large_{name}.json"))
    return min(failed, 1)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        sys.exit(f"error: {error}")
