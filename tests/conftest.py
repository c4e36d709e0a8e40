"""What several test files share."""

import contextlib
import os
import signal
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


HALF = """import os, signal, sys
from sim_m2f.files import atomic_write
begun = [atomic_write(path) for path in sys.argv[1:]]
files = [each.__enter__() for each in begun]
os.kill(os.getpid(), signal.SIGKILL)
"""


def half_written(*paths: Path) -> list[Path]:
    """What a process leaves that is killed while it writes to these paths."""
    command = [sys.executable, "-c", HALF, *(str(path.absolute()) for path in paths)]
    assert subprocess.run(command, cwd=ROOT, check=False).returncode == -signal.SIGKILL
    left = [file for path in paths for file in path.parent.glob(f".{path.name}.*")]
    assert len(left) == len(paths)
    return left


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
