"""Ranks are started, restarted and ended together, on one machine and on two; each parses a file once."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from conftest import ROOT, SMALL
from test_broken_input import CONFIG, data, overrides  # noqa: F401 (a fixture)
from test_reliability import command, last_state
from test_training import train_losses

from sim_m2f.cli import main

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


class Started:
    """A command with everything that it starts, all of which ends with the block."""

    def __init__(self, arguments: list[str], log: Path, **environment: str) -> None:
        self.arguments, self.log, self.environment = arguments, log, ENVIRONMENT | environment

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

    def wait_for(self, condition: Callable[[], bool], seconds: float = 120) -> None:
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


def said(log: Path) -> list[str]:
    return [line for line in log.read_text().splitlines() if line.strip()]


@pytest.mark.slow
def test_ranks_restart_by_themselves_and_tell_last_who_was_killed(tmp_path, data):  # noqa: F811
    output, log = tmp_path / "output", tmp_path / "log.txt"
    sets = [*overrides(tmp_path, data), "SOLVER.CHECKPOINT_PERIOD", "2", "SOLVER.MAX_ITER", "100000"]
    flags = ["--num-gpus=2", "--max-restarts=1"]
    with Started([sys.executable, "train_net.py", *command(output, *sets, *flags)], log) as run:
        run.wait_for((output / "last_checkpoint").exists)
        run.family("train_net.py")[1].kill()
        run.wait_for(lambda: "goes on after step" in log.read_text())
        steps = len(train_losses(output))
        run.wait_for(lambda: len(train_losses(output)) > steps)
        run.family("train_net.py")[1].kill()
        assert run.process.wait(15) == 128 + signal.SIGKILL
    assert last_state(output)["iteration"] >= 2
    assert "SIGKILL" in said(log)[-1]
    assert "Traceback" not in log.read_text()


@pytest.mark.slow
def test_the_error_of_the_rank_that_failed_is_told_last(tmp_path, data):  # noqa: F811
    """The first rank finds the fault of the test set, while the others wait for it."""
    output, log = tmp_path / "output", tmp_path / "log.txt"
    sets = overrides(tmp_path, data)
    data["annotations"][1]["segmentation"] = "nonsense"
    (tmp_path / "test.json").write_text(json.dumps(data))
    sets += ["DATASETS.TEST_ANNOTATIONS", str(tmp_path / "test.json"), "--num-gpus=2"]
    with Started([sys.executable, "train_net.py", *command(output, *sets)], log) as run:
        assert run.process.wait(120) == 2
    assert said(log)[-1].startswith("error: rank 0: ")
    assert "test.json: annotation id 2: segmentation" in said(log)[-1]
    assert "Traceback" not in log.read_text()


def test_what_is_wrong_with_the_command_is_told_before_ranks_are_started(capsys, tmp_path):
    output = tmp_path / "output"
    output.mkdir()
    (output / "last_checkpoint").write_text("model_0000001.pth")
    keys = ["--config-file", CONFIG, "--num-gpus=2", "--max-restarts=1"]
    for flags, word in (([], "holds a run already"), (["--overwrite"], "--max-restarts")):
        assert main(["train", *keys, *flags, *SMALL, "OUTPUT_DIR", str(output)]) == 2
        errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1
        assert word in errors[0]


SRUN = """#!/bin/bash
for node in 0 1; do SLURM_NODEID=$node "$@" & nodes+=($!); done
for node in "${nodes[@]}"; do wait "$node" || status=$?; done
exit "${status:-0}"
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
def test_two_nodes_of_slurm_leave_a_checkpoint_and_are_queued_again(tmp_path, data):  # noqa: F811
    """examples/slurm.sh on two agents of this machine, and the signal that comes before the time is up."""
    for name, script in (("srun", SRUN), ("scontrol", SCONTROL), ("sim-m2f", SIM_M2F)):
        (tmp_path / name).write_text(script)
        (tmp_path / name).chmod(0o755)
    output, log, requeued = tmp_path / "output", tmp_path / "log.txt", tmp_path / "requeued"
    sets = [*overrides(tmp_path, data), "SOLVER.CHECKPOINT_PERIOD", "2", "SOLVER.MAX_ITER", "100000"]
    slurm = {"JOB_ID": "7", "JOB_NODELIST": "node[0-1]", "NNODES": "2", "GPUS_ON_NODE": "1"}
    environment = {f"SLURM_{name}": value for name, value in slurm.items()}
    environment |= {"REQUEUED": str(requeued), "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    environment["PYTHONPATH"] = f"{ROOT}:{ROOT / 'ops'}"
    with Started(["examples/slurm.sh", *command(output, *sets)], log, **environment) as job:
        job.wait_for((output / "last_checkpoint").exists)
        for process in job.family("sim-m2f"):
            process.terminate()
        assert job.process.wait(20) == 128 + signal.SIGTERM
    assert requeued.read_text() == "requeue 7\n"
    assert f"stopped after step {last_state(output)['iteration']}" in log.read_text()


ONCE = """
import os, sys
from pathlib import Path
import torch.distributed as dist
from sim_m2f.distributed import once_per_node

def work():
    with Path(sys.argv[1]).open("a") as file:
        file.write(os.environ["RANK"])
    return ["parsed by", os.environ["RANK"]]

dist.init_process_group("gloo")
print(*once_per_node(work))
once_per_node(lambda: 1 / 0)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("per_node", "parsed"), [(2, ["0", "0"]), (1, ["0", "1"])])
def test_a_file_is_parsed_once_on_every_machine(tmp_path, per_node, parsed):
    """Where that fails, one rank says why and the others end beside it."""
    world = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": str(per_node), "MASTER_ADDR": "127.0.0.1"}
    world |= {"MASTER_PORT": str(29650 + per_node)}
    arguments = [sys.executable, "-c", ONCE, str(tmp_path / "parsed")]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    ranks = [
        subprocess.Popen(arguments, cwd=ROOT, env={**ENVIRONMENT, **world, "RANK": str(rank)}, **streams)
        for rank in range(2)
    ]
    outputs = [rank.communicate(timeout=60) for rank in ranks]
    assert [output for output, _ in outputs] == [f"parsed by {rank}\n" for rank in parsed]
    assert sorted((tmp_path / "parsed").read_text()) == sorted(set(parsed))
    assert [rank.returncode for rank in ranks] == ([1, 2] if per_node == 2 else [1, 1])
