"""Train the method term by term (rows of configs/ablation) with several seeds, and compare the results.

A row is a YAML file of overrides of one base configuration. What is finished is not trained again.
"""

import argparse
import difflib
import itertools
import os
import re
import shlex
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from sim_m2f.commands.train import configuration
from sim_m2f.config import CfgNode
from sim_m2f.config.shipped import find_config, shipped_configs
from sim_m2f.data.catalog import data_sources
from sim_m2f.data.coco import read_coco
from sim_m2f.engine import coco_metrics
from sim_m2f.engine.ablation_runs import Run, train_all
from sim_m2f.errors import UserError
from sim_m2f.report.ablation import Result, Row, read_result, write_tables

ROWS = shipped_configs() / "ablation"
KEY = re.compile(r"[A-Z][A-Z0-9_.]*")  # a key of the configuration; no row and no seed looks like one


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config-file", required=True, metavar="FILE", help="what all rows start from")
    rows = "rows of configs/ablation by name, YAML files of overrides, or a folder of them (configs/ablation)"
    parser.add_argument("--variants", nargs="+", default=[], metavar="ROW", help=rows)
    parser.add_argument("--seeds", nargs="+", default=["0", "1"], metavar="N", help="seeds of each row (0 1)")
    parser.add_argument("--output", type=Path, metavar="DIR", help="where to write (OUTPUT_DIR/ablation)")
    overrides = "overrides of the base; a row's own keys come after them"
    parser.add_argument("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help=overrides)


def run(args: argparse.Namespace) -> int:
    """Train what is not finished yet; returns 0, 1 if a run failed, or 128 + the signal that stopped it."""
    names, overrides = _until_key(args.variants)
    seeds, more = _until_key(args.seeds)
    overrides += more + [item for item in args.opts if item != "--"]
    base = configuration(args.config_file, overrides)
    folder = args.output or Path(base.OUTPUT_DIR) / "ablation"
    rows = find_rows(names)
    if not all(seed.isascii() and seed.isdigit() for seed in seeds):
        raise UserError(f"--seeds: {' '.join(seeds)}; give whole numbers from 0 on")
    runs = plan(base, rows, sorted(set(map(int, seeds))), folder)
    _check_test_set(base)
    command = ["sim-m2f", "ablate", "--config-file", args.config_file]
    command += ["--variants", *names] if names else []
    command += ["--seeds", *seeds, "--output", str(folder), *overrides]
    ablation = Ablation(rows, runs, folder, shlex.join(command))
    status = ablation.run(devices(base))
    print(f"{len(ablation.results)} of {len(runs)} runs are finished: {folder / 'ablation.md'}")
    return status


def find_rows(names: Sequence[str]) -> list[Row]:
    """Rows by the name of a file in configs/ablation (its number may be left out), or by a path.

    Args:
        names: as on the command line; none stands for all of configs/ablation.

    Raises:
        UserError: a row is unknown, a file is missing, or two rows have one name.
    """
    own = {file.stem: file for file in sorted(ROWS.glob("*.yaml"))}
    known = own | {re.sub(r"^\d+_", "", name): file for name, file in own.items()}
    rows: dict[str, Row] = {}
    given = ([name] if name in known else _of_folder(name) for name in names or [str(ROWS)])
    for name in itertools.chain.from_iterable(given):
        file = Path(name) if name.endswith((".yaml", ".yml")) else known.get(name)
        if file is None:
            nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
            advice = f"did you mean {nearest[0]}?" if nearest else "give the path of a YAML file"
            raise UserError(f"--variants: no row {name!r} in {ROWS}; {advice}")
        if file.stem in rows:
            raise UserError(f"--variants: two rows have the name {file.stem}; rename a file")
        rows[file.stem] = Row(file.stem, _title(file), file)
    return list(rows.values())


def _of_folder(name: str) -> list[str]:
    """The YAML files of a folder, in the order of their names; any other name as it is.

    Raises:
        UserError: the folder has none.
    """
    folder = find_config(name)
    files = sorted(map(str, folder.glob("*.yaml")))
    if folder.is_dir() and not files:
        raise UserError(f"--variants: {folder}: no rows here; give YAML files of overrides")
    return files if folder.is_dir() else [name]


def plan(base: CfgNode, rows: Sequence[Row], seeds: Sequence[int], folder: Path) -> list[Run]:
    """One run per row and seed, in ``folder``/<row>/seed<N>; all rows of a seed before the next seed.

    Raises:
        UserError: a row's file has an unknown key or a value of the wrong type.
    """
    runs = []
    for seed in seeds:
        for row in rows:
            cfg = base.clone()
            cfg.defrost()
            cfg.merge_from_file(row.file)
            cfg.SEED, cfg.OUTPUT_DIR = seed, str(folder / row.name / f"seed{seed}")
            cfg.freeze()
            runs.append(Run(row.name, seed, cfg))
    return runs


def devices(cfg: CfgNode) -> Sequence[str | None]:
    """A value of CUDA_VISIBLE_DEVICES for each run that may train at a time; [None] where there is no GPU."""
    count = 0 if cfg.MODEL.DEVICE == "cpu" else torch.cuda.device_count()
    if not count:
        return [None]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(count)))
    return visible.split(",")[:count]


class Ablation:
    """The runs and what is known of them; its tables in ``folder`` are written anew after each run."""

    def __init__(self, rows: Sequence[Row], runs: Sequence[Run], folder: Path, command: str) -> None:
        self.rows, self.runs, self.folder, self.command = rows, runs, folder, command
        self.results: list[Result] = []
        self.failures: list[str] = []

    def run(self, devices: Sequence[str | None]) -> int:
        """Train what is not finished; returns the exit status as ``run`` does."""
        waiting = [run for run in self.runs if not run.is_finished()]
        for run in [run for run in self.runs if run not in waiting]:
            self._add_result(run)
        self._write()
        with tqdm(total=len(self.runs), initial=len(self.results), desc="ablation", unit="run") as bar:
            stopped_by = train_all(waiting, devices, self._done, bar)
        return 128 + stopped_by if stopped_by else int(bool(self.failures))

    def _done(self, run: Run, failure: str, bar: tqdm) -> None:
        if failure:
            self.failures.append(f"{run.name} failed: {failure}")
            bar.write(self.failures[-1])
        else:
            self._add_result(run)
            scores = self.results[-1].scores
            bar.write(f"{run.name}: {scores['segm/AP']:.1f} AP in {run.minutes():.1f} minutes")
        self._write()
        bar.update()

    def _add_result(self, run: Run) -> None:
        truth = coco_metrics.load_truth(data_sources(run.cfg, "TEST")[0].annotations)
        self.results.append(read_result(run.row, run.seed, run.folder, run.minutes(), truth))

    def _write(self) -> None:
        write_tables(self.folder, self.command, self.rows, self.results, self.failures)


def _check_test_set(base: CfgNode) -> None:
    """Raises UserError for a test set without objects, or without their masks."""
    data = read_coco(data_sources(base, "TEST")[0], read_masks=False)
    if not data.has_annotations or not coco_metrics.has_masks(coco_metrics.load_truth(data.annotations_file)):
        fault = "annotations without segmentation"
    elif not any(len(image.labels) for image in data.images):
        fault = "no objects"
    else:
        return
    advice = "evaluate on a data set with masks (DATASETS.TEST)"
    raise UserError(f"{data.annotations_file}: {fault}, so masks cannot be compared; {advice}")


def _until_key(values: Sequence[str]) -> tuple[list[str], list[str]]:
    """The values of a flag, and the pairs KEY VALUE that came after them and that argparse took as well."""
    end = next((index for index, value in enumerate(values) if KEY.fullmatch(value)), len(values))
    return list(values[:end]), list(values[end:])


def _title(file: Path) -> str:
    """The comment in the first line, if there is one."""
    try:
        first = file.read_text(encoding="utf-8").partition("\n")[0]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: cannot be read ({error}); give the path of a YAML file") from error
    return first.lstrip("# ") if first.startswith("#") else ""
