"""What masks of some objects add to boxes of all: the curve that tells what to draw.

    python benchmarks/mixed_masks.py people --seeds 0 1 2 --steps 300 --jobs 2 --weights FILE

Trains the row "best" with MODEL.SIM.SUPERVISION mixed on copies of the training annotations in
which a share of the objects, drawn by the seed, keeps its segmentation. Rows go into
benchmarks/results/mixed_<set>.json; with --jobs 0 nothing is trained. Prints the table and draws
docs/mixed_<set>.png, beside supervision by masks (real_<set>.json). Without any mask a step is bit for bit
that of the row "best", so 0 % takes that row's seeds, too. With --seen S images with a mask are seen so
often that they are the share S of all (MODEL.SIM.KNOWN_MASKS.SHARE); such rows are in the file, not in the
table.
"""

import argparse
import json
import sys
from pathlib import Path
from statistics import fmean

import numpy as np
from matplotlib.figure import Figure
from real import RESULTS, cell, read_rows, share_of
from real_runs import Job, add_run_arguments, configuration, run_all

from sim_m2f.config import CfgNode
from sim_m2f.data.catalog import data_sources
from sim_m2f.errors import UserError


def with_some_masks(cfg: CfgNode, share: float, seen: float, folder: Path) -> CfgNode:
    """The configuration with annotations of which so many percent keep their segmentation."""
    (source,) = data_sources(cfg, "TRAIN")
    content = json.loads(source.annotations.read_text())
    annotations = content["annotations"]
    order = np.random.default_rng(cfg.SEED).permutation(len(annotations))
    for index in order[round(share / 100 * len(annotations)) :]:
        annotations[index].pop("segmentation", None)
    name = f"masks_{share:g}_{seen:g}"
    file = folder / f"{name}_{cfg.SEED}.json"
    folder.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content))
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.SIM.SUPERVISION, cfg.OUTPUT_DIR = "mixed", f"{cfg.OUTPUT_DIR}_{name}"
    cfg.MODEL.SIM.KNOWN_MASKS.SHARE = seen
    cfg.DATASETS.TRAIN_ANNOTATIONS, cfg.DATASETS.TRAIN_IMAGES = str(file), str(source.image_root)
    cfg.freeze()
    return cfg


def settings(share: float, seen: float = 0.0) -> str:
    return f"{share:g} % of the masks" + (f", seen in {seen:g} of the images" if seen else "")


def report(name: str, rows: list[dict], masks: list[dict], shares: list[float]) -> None:
    """The table, and the curve with a dot per seed."""
    whole = [row["segm/AP"] for row in masks]
    print("| masks of | seeds | AP | AP75 | AP / mask supervision's |\n|---|---|---|---|---|")
    figure = Figure(figsize=(5, 3.2), dpi=150, layout="constrained")
    axes = figure.add_subplot(xlabel="objects with a mask, %", ylabel="mask AP")
    means = []
    for share in shares:
        own = [row for row in rows if row["settings"] == settings(share)]
        scores, strict = ([row[key] for row in own] for key in ("segm/AP", "segm/AP75"))
        means.append(fmean(scores))
        print(f"| {share:g} % | {len(own)} | {cell(scores)} | {cell(strict)} | {share_of(scores, whole)} |")
        axes.plot([share] * len(scores), scores, "o", color="#d55e00", markersize=4)
    axes.plot(shares, means, color="#0072b2", label="boxes of all, masks of some")
    if whole:
        axes.axhline(fmean(whole), color="#000000", linestyle="--", label="supervision by masks")
    axes.set_xscale("symlog", linthresh=5)
    axes.set_xlim(-0.5, 130)
    axes.set_xticks(shares, [f"{share:g}" for share in shares])
    axes.minorticks_off()
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(RESULTS.parents[1] / f"docs/mixed_{name}.png")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("set", metavar="SET", help="people, pennfudan, nuclei or coco_more")
    parser.add_argument("--shares", nargs="+", type=float, default=[0, 5, 10, 25, 100], metavar="PERCENT")
    parser.add_argument("--seen", type=float, default=0.0, metavar="SHARE", help="KNOWN_MASKS.SHARE")
    add_run_arguments(parser)
    args = parser.parse_args()
    path = args.results / f"mixed_{args.set}.json"
    jobs = []
    for seed in args.seeds if args.jobs else []:
        cfg = configuration(args.set, "best", seed, args)
        for share in args.shares:
            own = with_some_masks(cfg, share, args.seen, args.output / args.set)
            jobs.append(Job("mixed", own, path, settings(share, args.seen)))
    failed = run_all(jobs, args.jobs)
    rows, real = (read_rows(file) for file in (path, args.results / f"real_{args.set}.json"))
    rows, real = ([row for row in each if row["steps"] == args.steps] for each in (rows, real))
    plain = [row for row in real if "settings" not in row]
    boxes, masks = ([row for row in plain if row["row"] == name] for name in ("best", "mask"))
    own = {row["seed"] for row in rows if row["settings"] == settings(0)}
    rows += [{**row, "settings": settings(0)} for row in boxes if row["seed"] not in own]
    trained = [share for share in args.shares if any(row["settings"] == settings(share) for row in rows)]
    report(args.set, rows, masks, trained)
    return min(failed, 1)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        sys.exit(f"error: {error}")
