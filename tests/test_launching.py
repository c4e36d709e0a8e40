"""Ranks are started, restarted and ended together, on one machine and on two; each parses a file once."""

import contextlib
import errno
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, SMALL
from test_broken_input import CONFIG, data, overrides  # noqa: F401 (a fixture)
from test_reliability import command, errors, last_state, train

from sim_m2f.cli import main
from sim_m2f.distributed import once_per_node
from sim_m2f.engine.launch import launch
from sim_m2f.errors import UserError

ADDRESS = "tcp://127.0.0.1:29500"

# How a rank ends by which others have to be ended: what it does, what is said last, the exit status.
ENDS = {
    "killed": ("os.kill(os.getpid(), 9)", "error: rank 1: ended by SIGKILL", 128 + signal.SIGKILL),
    "error": ("recorded('UserError: a.json: broken'); sys.exit(2)", "error: rank 1: a.json: broken", 2),
}
RANK = """
import json, os, sys, time

def recorded(message):  # as torch does
    told = {{"message": message, "extraInfo": {{"py_callstack": "", "timestamp": int(time.time())}}}}
    with open(os.environ["TORCHELASTIC_ERROR_FILE"], "w") as file:
        json.dump({{"message": told}}, file)

if os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] in "{restarts}":
    {end}
time.sleep(0 if "{restarts}" == "0" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "1" else 60)
"""


@pytest.fixture
def _signals():
    """torchrun's handlers stay."""
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


@pytest.mark.slow
@pytest.mark.usefixtures("_signals")
@pytest.mark.parametrize("name", ENDS)
def test_one_rank_ends_the_others_and_its_error_is_told_last(capsys, tmp_path, name):
    end, last, status = ENDS[name]
    script = tmp_path / "rank.py"
    script.write_text(RANK.format(end=end, restarts="01"))
    assert launch([str(script)], "run", 2, 1, 0, ADDRESS, 1) == status
    assert capsys.readouterr().err.splitlines()[-1] == last
    script.write_text(RANK.format(end=end, restarts="0"))
    assert launch([str(script)], "run", 2, 1, 0, ADDRESS, 1) == 0


@pytest.mark.slow
@pytest.mark.usefixtures("_signals")
def test_a_rank_that_waits_for_a_dead_one_is_ended_within_15_seconds(tmp_path):
    """It has noted the signal, as runs do, and comes to no end by itself."""
    script = tmp_path / "rank.py"
    wait = "signal.signal(signal.SIGTERM, lambda *_: None); [time.sleep(0.1) for _ in range(600)]"
    die = "pathlib.Path('died').touch(); os._exit(3)"
    choice = f"exec({wait!r} if os.environ['RANK'] == '0' else {('time.sleep(1); ' + die)!r})"
    script.write_text(f"import os, pathlib, signal, time\nos.chdir({str(tmp_path)!r})\n{choice}\n")
    assert launch([str(script)], "run", 2, 1, 0, ADDRESS, 0) == 3
    assert time.time() - (tmp_path / "died").stat().st_mtime < 15


LAUNCHER = """import sys
from sim_m2f.engine.launch import launch
launch(sys.argv[1:], "run", 2, 1, 0, "tcp://127.0.0.1:29500", 0)
"""
LONELY = """import pathlib, os, time
from sim_m2f.engine.launch import end_with_launcher
end_with_launcher()
pathlib.Path("ready" + os.environ["RANK"]).touch()
time.sleep(600)
"""


@pytest.mark.slow
def test_ranks_end_when_their_launcher_is_killed(tmp_path):
    (tmp_path / "rank.py").write_text(LONELY)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "ops")])}
    command = [sys.executable, "-c", LAUNCHER, "rank.py"]
    with psutil.Popen(command, cwd=tmp_path, env=environment) as launcher:
        deadline = time.time() + 120
        while len(list(tmp_path.glob("ready*"))) < 2:
            assert time.time() < deadline
            time.sleep(0.1)
        ranks = launcher.children(recursive=True)
        launcher.kill()
    _, left = psutil.wait_procs(ranks, timeout=10)
    for each in left:
        each.kill()
    assert not left


def test_a_rank_records_its_error_for_the_launcher(capsys, tmp_path, data, monkeypatch):  # noqa: F811
    sets = overrides(tmp_path, data)
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    assert train(tmp_path / "output", *sets, "DATASETS.TEST_IMAGES", str(tmp_path / "none")) == 2
    recorded = json.loads((tmp_path / "error.json").read_text())["message"]["message"]
    assert f"error: {recorded.removeprefix('UserError: ')}" == errors(capsys)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
            "lower SOLVER.IMS_PER_BATCH",
        ),
        (OSError(errno.ENOSPC, "No space left on device"), "free space, or write elsewhere"),
    ],
)
def test_a_rank_without_memory_or_space_records_what_to_do(capsys, tmp_path, data, monkeypatch, error, said):  # noqa: F811
    def step(*_):
        raise error

    monkeypatch.setattr("sim_m2f.engine.trainer.Trainer.step", step)
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    assert train(tmp_path / "output", *overrides(tmp_path, data)) == 2
    recorded = json.loads((tmp_path / "error.json").read_text())["message"]["message"]
    assert said in recorded
    assert f"error: {recorded.removeprefix('UserError: ')}" == errors(capsys)


def test_what_is_wrong_with_the_command_is_told_before_ranks_are_started(capsys, tmp_path):
    output = tmp_path / "output"
    output.mkdir()
    (output / "last_checkpoint").write_text("model_0000001.pth")
    keys = ["--config-file", CONFIG, "--num-gpus=2", "--max-restarts=1"]
    for flags, word in (([], "holds a run already"), (["--overwrite"], "--max-restarts")):
        assert main(["train", *keys, *flags, *SMALL, "OUTPUT_DIR", str(output)]) == 2
        assert word in errors(capsys)


@pytest.mark.parametrize("flags", [["--num-machines=2", "--machine-rank=2"], ["--machine-rank=7"]])
def test_machines_are_numbered_from_0(capsys, flags):
    assert main(["train", "--config-file", CONFIG, "--num-gpus=2", *flags]) == 2
    assert f"--machine-rank is {flags[-1][-1]}, but --num-machines" in errors(capsys)


@pytest.mark.usefixtures("_signals")
def test_a_port_that_is_taken_is_one_line():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"tcp://127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(UserError, match=f"machines do not meet at {address}"):
            launch(["rank.py"], "run", 1, 2, 0, address, 0)


class Started:
    """A command with everything that it starts, all of which ends with the block."""

    def __init__(self, arguments: list[str], log: Path, **environment: str) -> None:
        self.arguments, self.log = arguments, log
        self.environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}

    def __enter__(self) -> "Started":
        streams = {"stdout": self.log.open("w"), "stderr": subprocess.STDOUT}
        self.process = psutil.Popen(self.arguments, cwd=ROOT, env=self.environment, **streams)
        return self

    def family(self, word: str = "") -> list[psutil.Process]:
        """What it has started, in the order of starting, if its command line contains a word."""
        found = []
        for child in self.process.children(recursive=True):
            with contextlib.suppress(psutil.Error):  # it has ended meanwhile
                found += [child] if word in " ".join(child.cmdline()) else []
        return found

    def wait_for(self, condition: Callable[[], bool], seconds: float = 240) -> None:
        deadline = time.time() + seconds
        while not condition():
            assert self.process.poll() is None, self.log.read_text()
            assert time.time() < deadline, self.log.read_text()
            time.sleep(0.05)

    def __exit__(self, *_) -> None:
        if self.process.is_running():
            for each in (*self.family(), self.process):
                with contextlib.suppress(psutil.Error):
                    each.kill()
            self.process.wait()


SRUN = """#!/bin/bash
for node in 0 1; do SLURM_NODEID=$node "$@" & nodes+=($!); done
for node in "${nodes[@]}"; do wait "$node" || status=$?; done
exit "${status:-0}"
"""
SLOW_DISK = """
import os, signal, sys, time
from sim_m2f.cli import main
from sim_m2f.engine.launch import ALONE

if "RANK" in os.environ:
    from sim_m2f.engine.trainer import Trainer
    from sim_m2f.weights import checkpoint

    whole, step = checkpoint.save_checkpoint, Trainer.step

def slow(*arguments):
    end = time.monotonic() + ALONE + 3
    while time.monotonic() < end:  # a signal may end a sleep
        time.sleep(0.1)
    whole(*arguments)

def told(trainer, batch):
    losses = step(trainer, batch)
    if trainer.iteration == 2 and trainer.accelerator.process_index == 1:
        os.kill(os.getpid(), signal.SIGTERM)
    return losses

if "RANK" in os.environ:
    checkpoint.save_checkpoint, Trainer.step = slow, told
sys.exit(main(["train", *sys.argv[1:]]))
"""
SCONTROL = """#!/bin/bash
[ "$1" = show ] && echo 127.0.0.1 || echo "$@" > "$REQUEUED"
"""
SIM_M2F = f"""#!{sys.executable}
import sys
from sim_m2f.cli import main
sys.exit(main())
"""


@pytest.mark.slow
def test_two_nodes_of_slurm_restart_leave_a_checkpoint_and_are_queued_again(tmp_path, data):  # noqa: F811
    """examples/slurm.sh with two agents on this machine: a rank is killed, later the time is up."""
    for name, script in (("srun", SRUN), ("scontrol", SCONTROL), ("sim-m2f", SIM_M2F)):
        (tmp_path / name).write_text(script)
        (tmp_path / name).chmod(0o755)
    output, log, requeued = tmp_path / "output", tmp_path / "log.txt", tmp_path / "requeued"
    sets = [*overrides(tmp_path, data), "SOLVER.CHECKPOINT_PERIOD", "2", "SOLVER.MAX_ITER", "100000"]
    job_id = str(os.getpid())  # gives the port
    slurm = {"JOB_ID": job_id, "JOB_NODELIST": "node[0-1]", "NNODES": "2", "GPUS_ON_NODE": "1"}
    environment = {f"SLURM_{name}": value for name, value in slurm.items()}
    environment |= {"REQUEUED": str(requeued), "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    environment["PYTHONPATH"] = f"{ROOT}:{ROOT / 'ops'}"
    with Started(["examples/slurm.sh", *command(output, *sets)], log, **environment) as job:
        job.wait_for((output / "last_checkpoint").exists)
        job.family("-u")[-1].kill()  # torchrun starts ranks so
        job.wait_for(lambda: "goes on after step" in log.read_text())
        steps = last_state(output)["iteration"]
        job.wait_for(lambda: f"step {steps + 2}/" in log.read_text().partition("goes on")[2])
        for process in job.family(sys.executable):
            process.terminate()
        assert job.process.wait(240) == 128 + signal.SIGTERM
    assert requeued.read_text() == f"requeue {job_id}\n"
    assert f"stopped after step {last_state(output)['iteration']}" in log.read_text()
    assert "Traceback" not in log.read_text()


@pytest.mark.slow
def test_a_rank_that_is_told_to_stop_waits_for_the_checkpoint_of_the_first(tmp_path, data):  # noqa: F811
    """Once a rank has ended, torchrun kills the others after some seconds; a checkpoint may take longer."""
    (tmp_path / "slow.py").write_text(SLOW_DISK)
    output, log = tmp_path / "output", tmp_path / "log.txt"
    sets = [*overrides(tmp_path, data), "--num-gpus=2", "SOLVER.MAX_ITER", "1000"]
    arguments = [sys.executable, str(tmp_path / "slow.py"), *command(output, *sets)]
    with Started(arguments, log, PYTHONPATH=f"{ROOT}:{ROOT / 'ops'}") as run:
        assert run.process.wait(240) == 128 + signal.SIGTERM
    assert last_state(output)["iteration"] == 2
    assert "stopped after step 2" in log.read_text()


def rank(number: int, per_node: int, parsed: Path, meeting: Path) -> None:
    os.environ["LOCAL_WORLD_SIZE"] = str(per_node)
    dist.init_process_group("gloo", f"file://{meeting}", rank=number, world_size=2)

    def parse() -> list[str]:
        with parsed.open("a") as file:
            file.write(str(number))
        return [f"of rank {number}"]

    parsed.with_name(f"got{number}").write_text(once_per_node(parse)[0])
    once_per_node(lambda: sys.exit(3))


@pytest.mark.parametrize(("per_node", "parsing"), [(2, ["0", "0"]), (1, ["0", "1"])])
def test_a_file_is_parsed_once_on_every_machine(tmp_path, per_node, parsing):
    """Where that fails on the first rank, the others end too."""
    fork = multiprocessing.get_context("fork")
    paths = tmp_path / "parsed", tmp_path / "meeting"
    ranks = [fork.Process(target=rank, args=(number, per_node, *paths)) for number in range(2)]
    for each in ranks:
        each.start()
    for each in ranks:
        each.join()
    assert sorted(paths[0].read_text()) == sorted(set(parsing))
    got = [(tmp_path / f"got{number}").read_text() for number in range(2)]
    assert got == [f"of rank {number}" for number in parsing]
    assert [each.exitcode for each in ranks] == ([3, 2] if per_node == 2 else [3, 3])
