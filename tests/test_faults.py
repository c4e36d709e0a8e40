"""The benchmark of faults in short: runs that meet one each end as an undisturbed one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

FAULTS = ["SIGTERM", "SIGINT", "kill -9", "rank killed"]
SMALL_DISK = ["unshare", "--mount", "mount", "-t", "tmpfs", "faults", "/mnt"]


def may_mount() -> bool:
    """Whether a small file system can be mounted here, which only root can, and not everywhere."""
    return os.geteuid() == 0 and Path("/mnt").is_dir() and subprocess.run(SMALL_DISK).returncode == 0


@pytest.mark.slow
def test_runs_that_meet_a_fault_end_as_if_nothing_had_happened(tmp_path):
    output, faults = tmp_path / "faults.json", [*FAULTS, *(["disk full"] if may_mount() else [])]
    command = [sys.executable, "benchmarks/faults.py", "--trials", "1", "--output", str(output)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, "--only", *faults], cwd=ROOT, env=environment, check=True)
    counts = {row["fault"]: (row["tried"], row["equal"]) for row in json.loads(output.read_text())}
    assert counts == dict.fromkeys(faults, (1, 1))
