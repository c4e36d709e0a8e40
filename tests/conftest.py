"""What several test files share."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests run side by side; read when torch is imported

import pytest
import torch
import yaml

from sim_m2f.config import CfgNode, get_cfg, value_of
from sim_m2f.config.node import leaf_keys

ROOT = Path(__file__).resolve().parents[1]
SMALL_FILE = ROOT / "tests/small.yaml"
_SMALL = yaml.safe_load(SMALL_FILE.read_text())
SMALL = [item for key in leaf_keys(_SMALL) for item in (key, str(value_of(_SMALL, key)))]  # for command lines


HOLD = """import fcntl, sys
file = open(sys.argv[1], "a")
fcntl.lockf(file, fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()
"""


@contextlib.contextmanager
def held(lock: Path) -> Iterator[None]:
    """Within the block another process holds a lock; it is killed at the end."""
    command = [sys.executable, "-c", HOLD, str(lock)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"held\n"
        yield
        process.kill()


@pytest.fixture(autouse=True)
def _deterministic():
    torch.manual_seed(0)


@pytest.fixture
def small_cfg(tmp_path) -> CfgNode:
    """A network of a few layers on the embedded shapes, writing to a folder of the test's own."""
    cfg = get_cfg()
    cfg.merge_from_file(ROOT / "configs/shapes/boxinst_R18.yaml")
    cfg.merge_from_file(SMALL_FILE)
    cfg.OUTPUT_DIR = str(tmp_path / "output")
    return cfg


@pytest.fixture(scope="session")
def coco_root() -> Path:
    """The folder that holds coco/, with real images; the test is skipped where there is none."""
    root = Path(os.environ.get("DETECTRON2_DATASETS", "datasets"))
    if not (root / "coco/annotations/instances_train2017.json").exists():
        pytest.skip("DETECTRON2_DATASETS has no coco/ here")
    return root
