"""Starts the ranks of a run on this machine by torchrun, and tells last why the first of them failed."""

import contextlib
import ctypes
import os
import signal
import sys
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

from torch.distributed import run as torchrun
from torch.distributed.elastic.multiprocessing.api import PContext, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.elastic.rendezvous import RendezvousError

from sim_m2f.errors import UserError, first_line

PATIENCE = 120  # seconds that ranks have for the checkpoint of an ordered stop, where torchrun can be told
ALONE = 10  # seconds that ranks have to end when another one has failed: they may wait for it
WAIT = 600  # seconds that machines wait for the first one
PR_SET_PDEATHSIG = 1  # Linux's name, from sys/prctl.h


def launch(
    command: Sequence[str],
    name: str,
    ranks: int,
    machines: int,
    machine: int,
    address: str,
    restarts: int,
) -> int:
    """Run a Python file once for every rank of this machine; several machines find each other by c10d.

    Args:
        command: the file and its arguments, the same for all ranks.
        name: of the run, the same on all machines; no other meets there.
        ranks: per machine.
        machines: how many machines call this.
        machine: this one's number, from 0.
        address: tcp://HOST:PORT of machine 0, where several have to meet.
        restarts: how often all ranks are started again after one of them has failed.

    Returns:
        the exit status: 0, that of the rank that failed first, or 128 and the signal that ended it or this.

    Raises:
        UserError: the address is none, or machines do not meet there.
    """
    options = [f"--nproc-per-node={ranks}", f"--nnodes={machines}", f"--max-restarts={restarts}"]
    options += _meeting(name, machines, machine, address)
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(PATIENCE))
    PContext.close.__defaults__ = (None, ALONE)  # torchrun has no option for its 30 seconds
    # in one store for all starts, restarted ranks find addresses of those before them and wait for ever
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    try:
        torchrun.run(torchrun.parse_args([*options, *command]))
    except RendezvousError as error:
        said = first_line(error.__cause__ or error)
        advice = "start machine 0 too, and choose a port that is free there"
        raise UserError(f"--dist-url: machines do not meet at {address} ({said}); {advice}") from error
    except SignalException as error:
        return 128 + error.sigval
    except ChildFailedError as error:
        return _told(error)
    return 0


def end_with_launcher() -> None:
    """Let a rank get SIGTERM when torchrun is killed, or it would go on alone; only Linux can do it."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def is_first_of_launched() -> bool:
    """Whether this process is torchrun's rank 0 or nobody's, before the ranks know each other."""
    return os.environ.get("RANK", "0") == "0"


def _meeting(name: str, machines: int, machine: int, address: str) -> list[str]:
    """torchrun's options on where the machines meet."""
    try:
        parts = urlsplit(address)
        host, port = parts.hostname, parts.port
    except ValueError:
        host, port = None, None
    if not host or not port:
        raise UserError(f"--dist-url: {address} is no address; write tcp://HOST:PORT")
    if machines == 1:
        return ["--standalone", "--local-addr=localhost"]
    conf = f"--rdzv-conf=is_host={machine == 0},read_timeout={WAIT}"
    return ["--rdzv-backend=c10d", f"--rdzv-endpoint={host}:{port}", f"--rdzv-id={name}", conf]


def _told(error: ChildFailedError) -> int:
    """Say last what the rank said that failed first, since other ranks have spoken after it; its status."""
    rank, failure = min(error.failures.items(), key=_consequence)
    said: Any = failure.message  # a text is not the rank's
    lines: list[str] = []
    if isinstance(said, dict):
        lines = said["message"].removeprefix("UserError: ").splitlines()
    elif failure.exitcode < 0:
        lines = [f"ended by {signal.Signals(-failure.exitcode).name}"]
    for line in lines:
        print(f"error: rank {rank}: {line}", file=sys.stderr)
    return failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode


def _consequence(item: tuple[int, ProcessFailure]) -> tuple[int, int]:
    """Orders failures: a rank that said why, one that ended by itself, a killed one (perhaps by torchrun, for
    not ending), one left alone (its status is 2, and it has said so), one that torchrun has asked to end.
    """
    failure = item[1]
    code, said = failure.exitcode, isinstance(failure.message, dict)
    signs = said, code > 0 and code != 2, code < 0 and code != -signal.SIGTERM, code == 2
    return (signs.index(True) if any(signs) else len(signs)), failure.timestamp
