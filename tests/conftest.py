"""What several test files share."""

import os
from pathlib import Path

import pytest
import torch
import yaml

from sim_m2f.config import CfgNode, get_cfg, value_of
from sim_m2f.config.node import leaf_keys

ROOT = Path(__file__).resolve().parents[1]
SMALL_FILE = ROOT / "tests/small.yaml"
_SMALL = yaml.safe_load(SMALL_FILE.read_text())
SMALL = [item for key in leaf_keys(_SMALL) for item in (key, str(value_of(_SMALL, key)))]  # for command lines


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
