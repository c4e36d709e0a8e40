"""The runs of an ablation: which are finished, and training the others, one per GPU at a time.

Each run is a process of ``sim-m2f train --resume`` in a folder of its own, so that none can harm another.
"""

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from tqdm import tqdm

from sim_m2f.config import CfgNode, get_cfg
from sim_m2f.engine.logging import read_series
from sim_m2f.engine.stop_signal import StopSignal
from sim_m2f.errors import UserError
from sim_m2f.files import atomic_write

POLL_SECONDS = 0.5


@dataclass(frozen=True, eq=False)
class Run:
    """One row with one seed; its folder is the configuration's OUTPUT_DIR."""

    name: str
    row: str
    seed: int
    cfg: CfgNode

    @property
    def folder(self) -> Path:
        return Path(self.cfg.OUTPUT_DIR)

    @property
    def log_file(self) -> Path:
        return self.folder / "log.txt"

    @property
    def minutes_file(self) -> Path:
        return self.folder / "minutes.json"

    def minutes(self) -> float:
        """How long training and evaluation have taken so far, over all attempts."""
        return json.loads(self.minutes_file.read_text()) if self.minutes_file.exists() else 0.0

    def is_finished(self) -> bool:
        """Whether the folder holds the last evaluation and the page, of the same configuration."""
        metrics = self.folder / "metrics.jsonl"
        if not (metrics.exists() and (self.folder / "index.html").exists() and self.has_configuration()):
            return False
        return self.cfg.SOLVER.MAX_ITER - 1 in read_series(metrics).get("bbox/AP", {})

    def has_configuration(self) -> bool:
        """Whether the folder's config.yaml says the same; a key that it lacks has its default there."""
        former = get_cfg()
        try:
            former.merge_from_file(self.folder / "config.yaml")
        except UserError:
            return False
        former.OUTPUT_DIR = self.cfg.OUTPUT_DIR  # the folder may have been moved
        return former == self.cfg


def train_all(
    runs: Iterable[Run], devices: Sequence[str | None], done: Callable[[Run, str, tqdm], None], bar: tqdm
) -> int:
    """Train the runs, as many at a time as there are devices.

    SIGINT, SIGTERM and SIGHUP make the runs write a checkpoint and end; the same call goes on with them.

    Args:
        runs: those not finished; one that was interrupted goes on from its last checkpoint, and what another
            configuration left in its folder is set aside.
        devices: values of CUDA_VISIBLE_DEVICES; None leaves the variable alone.
        done: called with each run that has ended, why it failed ("" if it did not), and the bar.
        bar: the runs that are training are named beside it.

    Returns:
        the number of the signal received, 0 for none.
    """
    waiting = deque(runs)
    training: dict[str | None, _Training] = {}
    with _StopSignal() as stop:
        try:
            while (waiting or training) and not stop.received:
                for device in devices:
                    if waiting and device not in training:
                        run = waiting.popleft()
                        try:
                            training[device] = _Training(run, device)
                        except UserError as error:
                            done(run, str(error), bar)
                bar.set_postfix_str(", ".join(item.run.name for item in training.values()))
                time.sleep(POLL_SECONDS)
                for device, item in list(training.items()):
                    if item.process.poll() is not None:
                        del training[device]
                        done(item.run, item.end(), bar)
        finally:
            for item in training.values():
                item.process.terminate()
            for item in training.values():
                item.end()
    return stop.received


class _Training:
    """The process that trains a run.

    Raises:
        UserError: another process trains in the run's folder, or the folder cannot be written to.
    """

    def __init__(self, run: Run, device: str | None) -> None:
        self.run, self.start = run, time.monotonic()
        config_file = run.folder / "config.yaml"
        with _log_of(run) as log:
            with atomic_write(config_file) as file:
                file.write(run.cfg.dump())
            self.process = subprocess.Popen(
                [sys.executable, "-m", "sim_m2f.cli", "train", "--resume", "--config-file", str(config_file)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | ({"CUDA_VISIBLE_DEVICES": device} if device else {}),
                start_new_session=True,  # else a Ctrl-C would reach it twice, and the second one kills it
            )

    def end(self) -> str:
        """Wait for the end; returns why the run failed, "" if it did not."""
        status = self.process.wait()
        minutes = self.run.minutes() + (time.monotonic() - self.start) / 60
        with atomic_write(self.run.minutes_file) as file:
            json.dump(minutes, file)
        if status == 0:
            return ""
        log = self.run.log_file.read_text(encoding="utf-8", errors="replace").rstrip()
        return f"{log.splitlines()[-1] if log else 'nothing in its log'} (exit status {status})"


def _log_of(run: Run) -> IO[bytes]:
    """The run's log, open for more and locked until the last process that holds it open has ended.

    A run that another configuration left in the folder is set aside first.
    """
    log = _locked(run.log_file)
    if not run.has_configuration() and (run.folder / "config.yaml").exists():
        log.close()
        _set_aside(run.folder)
        log = _locked(run.log_file)
    return log


def _locked(path: Path) -> IO[bytes]:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        log = path.open("ab")
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); choose another --output") from error
    try:
        fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        log.close()
        raise UserError(f"{path.parent}: another process trains here; wait for it, or end it") from error
    return log


def _set_aside(folder: Path) -> None:
    number = 1
    while (aside := folder.with_name(f"{folder.name}.old{number}")).exists():
        number += 1
    folder.rename(aside)
    tqdm.write(f"{folder}: made with another configuration; kept as {aside}")


class _StopSignal(StopSignal):
    """Notes SIGHUP as well: a lost connection does not reach the runs, which have sessions of their own."""

    signals = (*StopSignal.signals, signal.SIGHUP)
