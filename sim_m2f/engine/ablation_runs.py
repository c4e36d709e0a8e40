"""The runs of an ablation: which are finished, and training the others, one per GPU at a time.

Each run is a process of ``sim-m2f train --resume`` in a folder of its own, so that none can harm another.
"""

import fcntl
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from itertools import count
from pathlib import Path
from typing import IO

from tqdm import tqdm

from sim_m2f.config import CfgNode, get_cfg
from sim_m2f.engine.logging import read_series
from sim_m2f.engine.stop_signal import StopSignal
from sim_m2f.errors import UserError
from sim_m2f.files import write_file

POLL_SECONDS = 0.5


class Run:
    """One row with one seed; its folder is the configuration's OUTPUT_DIR."""

    def __init__(self, row: str, seed: int, cfg: CfgNode) -> None:
        self.row, self.seed, self.cfg = row, seed, cfg
        self.name, self.folder = f"{row}/seed{seed}", Path(cfg.OUTPUT_DIR)
        self.log_file, self.minutes_file = self.folder / "log.txt", self.folder / "minutes.json"

    def minutes(self) -> float:
        """How long training and evaluation have taken so far, over all attempts."""
        return float(self.minutes_file.read_text()) if self.minutes_file.exists() else 0.0

    def is_finished(self) -> bool:
        """Whether the folder holds the last evaluation and the page, of the same configuration."""
        metrics = self.folder / "metrics.jsonl"
        if not (metrics.exists() and (self.folder / "index.html").exists() and self.has_configuration()):
            return False
        return self.cfg.SOLVER.MAX_ITER - 1 in read_series(metrics).get("bbox/AP", {})

    def has_configuration(self) -> bool:
        """Whether the folder's config.yaml says the same; a key that it lacks has its default there."""
        previous = get_cfg()
        try:
            previous.merge_from_file(self.folder / "config.yaml")
        except UserError:
            return False
        previous.OUTPUT_DIR = self.cfg.OUTPUT_DIR  # the folder may have been moved
        return previous == self.cfg

    def start(self, device: str | None) -> None:
        """Train in a process of its own.

        Raises:
            UserError: another process trains in the folder, or it cannot be written to.
        """
        self.started, config_file = time.monotonic(), self.folder / "config.yaml"
        with self._log() as log:
            write_file(config_file, self.cfg.dump())
            self.process = subprocess.Popen(
                [sys.executable, "-m", "sim_m2f.cli", "train", "--resume", "--config-file", str(config_file)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | ({"CUDA_VISIBLE_DEVICES": device} if device else {}),
                start_new_session=True,  # else a Ctrl-C would reach it twice, and the second one kills it
            )

    def end(self) -> str:
        """Wait for the process; returns why the run failed, "" if it did not."""
        status = self.process.wait()
        write_file(self.minutes_file, str(self.minutes() + (time.monotonic() - self.started) / 60))
        if status == 0:
            return ""
        log = self.log_file.read_text(encoding="utf-8", errors="replace").rstrip()
        return f"{log.splitlines()[-1] if log else 'nothing in its log'} (exit status {status})"

    def _log(self) -> IO[bytes]:
        """The log, open for more and locked until the last process that holds it open has ended.

        A run that another configuration left in the folder is set aside first.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            log = self.log_file.open("ab")
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            log.close()
            raise UserError(f"{self.folder}: another process trains here; wait for it, or end it") from error
        except OSError as error:
            where = f"{self.log_file}: cannot be written ({error.strerror})"
            raise UserError(f"{where}; choose another --output") from error
        if self.has_configuration() or not (self.folder / "config.yaml").exists():
            return log
        log.close()
        aside = (self.folder.with_name(f"{self.folder.name}.old{number}") for number in count(1))
        kept = self.folder.rename(next(path for path in aside if not path.exists()))
        tqdm.write(f"{self.folder}: made with another configuration; kept as {kept}")
        return self._log()


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
    training: dict[str | None, Run] = {}  # by device
    with _StopSignal() as stop:
        try:
            while (waiting or training) and not stop.received:
                for device in [device for device in devices if device not in training]:
                    if waiting:
                        run = waiting.popleft()
                        try:
                            run.start(device)
                            training[device] = run
                        except UserError as error:
                            done(run, str(error), bar)
                bar.set_postfix_str(", ".join(run.name for run in training.values()))
                time.sleep(POLL_SECONDS)
                for device, run in list(training.items()):
                    if run.process.poll() is not None:
                        del training[device]
                        done(run, run.end(), bar)
        finally:
            for run in training.values():
                run.process.terminate()
            for run in training.values():
                run.end()
    return stop.received


class _StopSignal(StopSignal):
    """Notes SIGHUP as well: a lost connection does not reach the runs, which have sessions of their own."""

    signals = (*StopSignal.signals, signal.SIGHUP)
