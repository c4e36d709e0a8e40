"""How full and how solid masks are, against their definitions pixel by pixel."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

import sim_m2f
from sim_m2f.engine.hooks import Metrics
from sim_m2f.supervision.mask_shape import mask_fill, mask_solidity


def spanned(mask: np.ndarray) -> int:
    """Pixels from the first to the last True of every row."""
    return sum(int(row.nonzero()[0].max() - row.nonzero()[0].min() + 1) for row in mask if row.any())


def test_fill_and_solidity_of_random_masks():
    logits = torch.randn(6, 9, 13)
    logits[0] = -1
    boxes = torch.zeros(6, 9, 13)
    boxes[:, 2:8, 3:11] = 1
    fill, solidity = mask_fill(logits, boxes), mask_solidity(logits)
    for t in range(6):
        mask = logits[t].numpy() > 0
        assert fill[t].item() == pytest.approx(mask[2:8, 3:11].mean())
        area = mask.sum()
        expected = (area / spanned(mask) + area / spanned(mask.T)) / 2 if area else 0
        assert solidity[t].item() == pytest.approx(expected)


def test_outlines_are_not_solid_and_small_masks_are():
    logits = torch.full((3, 40, 40), -1.0)
    logits[0, 5:35, 5:35] = 1
    logits[0, 6:34, 6:34] = -1  # an outline
    logits[1, 5:35, 5:35] = 1
    logits[2, 7, 7:9] = 1
    solidity = mask_solidity(logits).tolist()
    assert solidity[0] < 0.2
    assert solidity[1:] == [1, 1]


@pytest.mark.parametrize(
    ("settings", "advised"),
    [
        (["MODEL.SIM.SUPERVISION", "box"], True),
        (["MODEL.SIM.SUPERVISION", "box", "MODEL.SIM.FILL_GUARD.ENABLED", "True"], False),
        (["MODEL.SIM.SUPERVISION", "mask"], False),
    ],
)
def test_outlines_are_told_once_and_the_guard_advised_where_it_helps(settings, advised, capsys):
    cfg = sim_m2f.get_cfg()
    cfg.merge_from_list([*settings, "SOLVER.MAX_ITER", "1000"])
    metrics = Metrics()
    metrics.warned = False
    for iteration, fill in ((199, 0.1), (200, 0.5), (220, 0.1), (240, 0.1)):
        metrics._warn_of_outlines(SimpleNamespace(cfg=cfg, iteration=iteration), fill, 0.5)
    said = "".join(capsys.readouterr())
    assert said.count("masks are outlines") == said.count("step 220:") == 1
    assert ("FILL_GUARD.ENABLED True" in said) == advised


def test_masks_of_a_short_run_are_not_called_outlines_while_they_begin(capsys):
    """All runs on real images have hollow masks for 60 steps, from masks as well."""
    cfg = sim_m2f.get_cfg()
    cfg.merge_from_list(["SOLVER.MAX_ITER", "100"])
    metrics = Metrics()
    metrics.warned = False
    for iteration in (20, 40, 60):
        metrics._warn_of_outlines(SimpleNamespace(cfg=cfg, iteration=iteration), 0.1, 0.5)
    assert capsys.readouterr() == ("", "")
    metrics._warn_of_outlines(SimpleNamespace(cfg=cfg, iteration=80), 0.1, 0.5)
    assert "step 80: masks are outlines" in "".join(capsys.readouterr())
