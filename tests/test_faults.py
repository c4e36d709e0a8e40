"""The benchmark of faults, for two of them: a stopped and a killed run end as an undisturbed one."""

import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT


@pytest.mark.slow
def test_runs_that_are_stopped_or_killed_end_as_if_nothing_had_happened(tmp_path):
    output = tmp_path / "faults.json"
    command = [sys.executable, "benchmarks/faults.py", "--trials", "1", "--output", str(output)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, "--only", "SIGTERM", "kill -9"], cwd=ROOT, env=environment, check=True)
    counts = {row["fault"]: (row["tried"], row["equal"]) for row in json.loads(output.read_text())}
    assert counts == {"SIGTERM": (1, 1), "kill -9": (1, 1)}
