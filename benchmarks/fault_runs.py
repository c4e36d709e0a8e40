"""Training runs in forked processes, each with a fault at a chosen moment of a chosen phase.

A process that has imported everything forks, so that a run of a few steps takes seconds. What a run is doing
is seen from outside: the functions that make up its phases are wrapped here, and the package knows nothing.
Of the figures only those of whole images and one curve are drawn, since all of them take longer than the run.
"""

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing import RawArray
from pathlib import Path
from typing import Any

import torch.utils.tensorboard  # noqa: F401  (imported once, not by every run)
from torch.utils.data import dataloader

from sim_m2f.cli import main
from sim_m2f.engine.launch import ALONE
from sim_m2f.engine.trainer import Trainer
from sim_m2f.report import method_figures, run_report
from sim_m2f.report.curves import draw_curves
from sim_m2f.report.hooks import MethodFigures, RunPage

OUTPUT = "output"  # of a run, in the folder where it is started
START = "start"
PHASES: dict[str, tuple[Any, str]] = {
    "data": (dataloader._BaseDataLoaderIter, "__next__"),
    "step": (Trainer, "step"),
    "checkpoint": (Trainer, "save"),
    "evaluation": (Trainer, "evaluate"),
    "figures": (MethodFigures, "after_step"),
    "report": (RunPage, "after_train"),
}
NAMES = (START, *PHASES, "between")
Durations = dict[str, list[float]]  # seconds of every time that a run is in a phase


@dataclass(frozen=True)
class Fault:
    """A signal to one rank, ``delay`` seconds after it enters a phase for the ``count``-th time, from 0.

    Without a signal the disk that the run writes to is full from that moment on.
    """

    number: signal.Signals | None
    phase: str
    count: int
    delay: float
    rank: int = 0
    group: bool = False  # its data workers receive it too

    @classmethod
    def drawn(
        cls, number: signal.Signals | None, phase: str, usual: list[float], draw: random.Random, ranks: int
    ) -> "Fault":
        """A random moment of the times that a run is in a phase, which take ``usual`` seconds each."""
        count = draw.choices(range(len(usual)), usual)[0]
        delay = draw.uniform(0, usual[count])
        return cls(number, phase, count, delay, draw.randrange(ranks), draw.random() < 0.5)


def resize_disk(folder: Path, size: str = "") -> None:
    """Give a mounted tmpfs another size, by default what it holds."""
    disk = os.statvfs(folder)
    used = max(disk.f_blocks - disk.f_bfree, 1) * disk.f_frsize  # 0 would stand for no limit
    options = f"remount,size={size or used}"
    subprocess.run(["mount", "-t", "tmpfs", "faults", str(folder), "-o", options], check=True)


class Phases:
    """What this process does, as contexts; they tell when and in which phase the fault came."""

    def __init__(self, fault: Fault | None, told: Any) -> None:
        self.fault, self.told, self.now = fault, told, NAMES.index("between")
        self.times: Counter[str] = Counter()
        self.durations: Durations = {name: [] for name in NAMES}
        self.started = contextlib.ExitStack()

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Enter a phase; one within another is a part of that."""
        if self.now != NAMES.index("between"):
            yield
            return
        self.now, start = NAMES.index(name), time.monotonic()
        if self.fault and (name, self.times[name]) == (self.fault.phase, self.fault.count):
            timer = threading.Timer(self.fault.delay, self._strike)
            timer.daemon = True
            timer.start()
        self.times[name] += 1
        try:
            yield
        finally:
            self.now = NAMES.index("between")
            self.durations[name].append(time.monotonic() - start)

    def _strike(self) -> None:
        assert self.fault
        self.told[:] = time.process_time(), self.now
        if self.fault.number is None:
            resize_disk(Path(OUTPUT))
        else:
            (os.killpg if self.fault.group else os.kill)(os.getpid(), self.fault.number)

    def watch(self) -> None:
        """From now on; the start ends with the first batch."""
        self.started.enter_context(self.phase(START))
        method_figures.object_figure = method_figures.whole_figure
        run_report.draw_curves = lambda series: draw_curves({"total_loss": series["total_loss"]})
        for name, (owner, function) in PHASES.items():
            setattr(owner, function, self._watched(getattr(owner, function), name))

    def _watched(self, work: Callable[..., Any], name: str) -> Callable[..., Any]:
        def run(*args: Any, **keywords: Any) -> Any:
            if name == "data":
                self.started.close()
            with self.phase(name):
                return work(*args, **keywords)

        return run


@dataclass(frozen=True)
class Ended:
    """How a run ended.

    Attributes:
        statuses: of every rank; below 0 the signal that ended it.
        seconds: of the processor, that the rank took from the fault to its end.
        hit: the phase that the fault met; "" where the run had ended before.
        said: what all ranks have written.
    """

    statuses: list[int]
    seconds: float
    hit: str
    said: str


def run(
    folder: Path, arguments: list[str], ranks: int, fault: Fault | None = None, patience: float = 900
) -> Ended:
    """``sim-m2f train`` in a folder; its durations are in durations.json there when it has come to its end.

    What has not ended after ``patience`` seconds is killed.
    """
    told = RawArray("d", 2)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    logs = [folder / f"log{rank}.txt" for rank in range(ranks)]
    pids = []
    for rank, log in enumerate(logs):
        pid = os.fork()
        if pid == 0:
            try:
                _enter(folder, log, rank, ranks, port)
                _train(arguments, Phases(fault if fault and fault.rank == rank else None, told))
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(1)
        pids.append(pid)
    ends = _waited(pids, time.monotonic() + patience)
    said = "".join(log.read_text() for log in logs)
    hit, struck = (NAMES[int(told[1])], fault.rank) if fault and told[0] else ("", 0)
    return Ended([status for status, _ in ends], ends[struck][1] - told[0], hit, said)


def _enter(folder: Path, log: Path, rank: int, ranks: int, port: int) -> None:
    """Make this process a rank in a session of its own, which writes to a log."""
    os.setsid()
    os.chdir(folder)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # shells let what runs behind them ignore it
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for number in (1, 2):
        os.dup2(output, number)
    if ranks > 1:
        numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
        os.environ.update({name: str(number) for name, number in numbers.items()})
        os.environ.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)})


def _train(arguments: list[str], phases: Phases) -> None:
    """Train and end this process."""
    phases.watch()
    try:
        status = main(["train", *arguments])
        Path("durations.json").write_text(json.dumps(phases.durations))
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else 1
    sys.stdout.flush()
    os._exit(status)


def _waited(pids: list[int], deadline: float) -> list[tuple[int, float]]:
    """Status and processor's seconds of ranks. Where one fails the others are told to end, as by torchrun."""
    ends: dict[int, tuple[int, float]] = {}
    told = False
    while len(ends) < len(pids):
        for pid in set(pids) - set(ends):
            ended, status, usage = os.wait4(pid, os.WNOHANG)
            if ended:
                ends[pid] = os.waitstatus_to_exitcode(status), usage.ru_utime + usage.ru_stime
        left = set(pids) - set(ends)
        if any(status for status, _ in ends.values()) and not told:
            told, deadline = True, min(deadline, time.monotonic() + ALONE)
            for pid in left:
                os.kill(pid, signal.SIGTERM)
        if time.monotonic() > deadline:
            for pid in left:
                os.killpg(pid, signal.SIGKILL)
        time.sleep(0.01)
    return [ends[pid] for pid in pids]
