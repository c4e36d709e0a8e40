"""What several test files share."""

import os
from pathlib import Path

import pytest
import torch

from sim_m2f.config import CfgNode, get_cfg

ROOT = Path(__file__).resolve().parents[1]
SMALL = [
    *("MODEL.BACKBONE.NAME", "resnet10t"),
    *("MODEL.SEM_SEG_HEAD.CONVS_DIM", "32"),
    *("MODEL.SEM_SEG_HEAD.MASK_DIM", "32"),
    *("MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_LAYERS", "1"),
    *("MODEL.MASK_FORMER.HIDDEN_DIM", "32"),
    *("MODEL.MASK_FORMER.DEC_LAYERS", "3"),
    *("MODEL.MASK_FORMER.NUM_OBJECT_QUERIES", "8"),
    *("MODEL.DEVICE", "cpu"),
    *("SOLVER.IMS_PER_BATCH", "2"),
    *("SOLVER.LOG_PERIOD", "1"),
    *("DATALOADER.NUM_WORKERS", "0"),
    *("MODEL.SIM.SHOW.PERIOD", "3"),
    *("MODEL.SIM.SHOW.PICTURES", "1"),
]


@pytest.fixture(autouse=True)
def _deterministic():
    torch.manual_seed(0)


@pytest.fixture
def small_cfg(tmp_path) -> CfgNode:
    """A network of a few layers on the embedded shapes, writing to a folder of the test's own."""
    cfg = get_cfg()
    cfg.merge_from_file(ROOT / "configs/shapes/boxinst_R18.yaml")
    cfg.merge_from_list([*SMALL, "OUTPUT_DIR", str(tmp_path / "output")])
    return cfg


@pytest.fixture(scope="session")
def coco_root() -> Path:
    """The folder that holds coco/, with real images; the test is skipped where there is none."""
    root = Path(os.environ.get("DETECTRON2_DATASETS", "datasets"))
    if not (root / "coco/annotations/instances_train2017.json").exists():
        pytest.skip("DETECTRON2_DATASETS has no coco/ here")
    return root
