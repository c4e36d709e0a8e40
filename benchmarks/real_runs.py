"""Trains the rows of the ablation on real images, several runs at a time, and collects them.

    python benchmarks/real_runs.py people pennfudan --rows boxinst best mask --jobs 2

A row is configs/real/rows/*_<row>.yaml, or a YAML file of one's own, on configs/<set>/base.yaml. What real.py
measures of every finished run goes into benchmarks/results/real_<set>.json, or into --results. Folders, logs
and checkpoints are below --output. KEY VALUE pairs after --opts change all runs. Each of --jobs processes
takes one run after the other, with one thread, on the GPU where there is one: it starts, and loads its
kernels, once. For many processes on one GPU start nvidia-cuda-mps-control -d before: their kernels then run
side by side.
"""

import argparse
import ctypes
import gc
import os
import signal
import sys
import traceback
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from real import RESULTS, measure, store
from tqdm import tqdm

from sim_m2f.config import CfgNode, get_cfg, validate
from sim_m2f.config.shipped import shipped_configs
from sim_m2f.errors import UserError
from sim_m2f.training import build_trainer

REAL = shipped_configs() / "real" / "rows"
PR_SET_PDEATHSIG = 1  # of prctl(2), Linux


@dataclass(frozen=True)
class Job:
    """One run: a row with its configuration, the results file it belongs in, and what is special about it."""

    row: str
    cfg: CfgNode
    results: Path
    settings: str = ""

    @property
    def folder(self) -> Path:
        return Path(self.cfg.OUTPUT_DIR)


def configuration(name: str, row: str, seed: int, args: argparse.Namespace, *changes: Path) -> CfgNode:
    """The base of the set, changed by files, by the row, then by the command line."""
    cfg = get_cfg()
    for file in (shipped_configs() / name / "base.yaml", *changes):
        cfg.merge_from_file(file)
    cfg.merge_from_file(row if row.endswith(".yaml") else next(REAL.glob(f"*_{row}.yaml"), row))
    if args.weights:  # a file of timm's names that was converted for pixels of -1 to 1
        half = [127.5] * 3
        cfg.merge_from_list(
            ["MODEL.WEIGHTS", args.weights, "MODEL.PIXEL_MEAN", str(half), "MODEL.PIXEL_STD", str(half)]
        )
    folder = args.output / name / Path(row).stem / f"{args.steps}_{seed}"
    cfg.merge_from_list(["SEED", str(seed), "SOLVER.MAX_ITER", str(args.steps), "OUTPUT_DIR", str(folder)])
    cfg.merge_from_list(args.opts)
    validate(cfg)
    cfg.freeze()
    return cfg


def row_name(row: str) -> str:
    """As it stands in the results: of a file its name, without the depth of the shapes' networks."""
    return Path(row).stem.removesuffix("_R18")


def end_with_parent() -> None:
    """This process is killed when the one that started it ends, however it ends."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def run_job(job: Job) -> dict[str, str | float] | None:
    """Train and measure in this process, which from now on writes to the log in the run's folder.

    Returns the row of the results, or nothing if the run failed; the log says why.
    """
    torch.set_num_threads(1)
    try:
        job.folder.mkdir(parents=True, exist_ok=True)
        with (job.folder / "log.txt").open("a") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        build_trainer(job.cfg, overwrite=True).train()
        return measure(job.row, job.folder, job.settings)
    except (Exception, SystemExit):
        traceback.print_exc()
        return None
    finally:
        sys.stdout.flush()  # before the log is that of the next run
        gc.collect()  # and the network of this one gives back its memory


def run_all(jobs: list[Job], at_a_time: int) -> int:
    """Run all, several at a time; returns how many failed. An interrupt ends all at once."""
    if not jobs:
        return 0
    failed = 0
    gc.freeze()
    with ProcessPoolExecutor(max(1, at_a_time), get_context("fork"), end_with_parent) as pool:
        running = {pool.submit(run_job, job): job for job in jobs}
        try:
            for future in tqdm(as_completed(running), total=len(jobs), unit="run", mininterval=0):
                failed += not stored(running[future], future)
        except KeyboardInterrupt:
            os._exit(128 + signal.SIGINT)  # the pool would begin the runs that wait
    return failed


def stored(job: Job, future: Future[dict[str, str | float] | None]) -> bool:
    """Whether a run that has ended has a row, which then is in its results file."""
    try:
        row = future.result()
    except BrokenProcessPool:  # killed, for lack of memory perhaps; it takes the others along
        row = None
    if row is None:
        tqdm.write(f"{job.folder}: failed, see log.txt there", file=sys.stderr)
        return False
    store(job.results, row)
    return True


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """What says how rows are trained."""
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="N")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--weights", default="", metavar="FILE", help="pretrained backbone, else timm's")
    parser.add_argument("--output", type=Path, default=Path("output/real"), metavar="FOLDER")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FOLDER")
    parser.add_argument("--opts", nargs=argparse.REMAINDER, default=[], metavar="KEY VALUE")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sets", nargs="+", metavar="SET", help="people, pennfudan, nuclei, coco_more, shapes")
    parser.add_argument("--rows", nargs="+", required=True, metavar="ROW")
    add_run_arguments(parser)
    args = parser.parse_args()
    jobs = [
        Job(row_name(row), configuration(name, row, seed, args), args.results / f"real_{name}.json")
        for seed in args.seeds
        for name in args.sets
        for row in args.rows
    ]
    return min(run_all(jobs, args.jobs), 1)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        sys.exit(f"error: {error}")
