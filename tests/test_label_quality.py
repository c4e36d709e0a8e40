"""The masks for boxes that need no learning, as the benchmark of label quality makes them."""

import importlib
import math
import sys

import numpy as np
import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
label_quality = importlib.import_module("label_quality")  # it imports its neighbour "real"


def test_box_and_ellipse_of_a_box():
    image, box = np.zeros((60, 80, 3), np.uint8), np.array([10.0, 5.0, 50.0, 45.0])
    filled, ellipse = (function(image, box) for function in (label_quality.filled, label_quality.ellipse))
    assert filled.sum() == 40 * 40
    assert filled[5:45, 10:50].all()
    assert ellipse.sum() == pytest.approx(math.pi / 4 * 1600, rel=0.01)
    assert not (ellipse & ~filled).any()
    assert label_quality.filled(image, np.array([20.2, 30.1, 20.4, 30.2])).sum() == 1


def test_how_well_a_mask_fits_its_box():
    mask = np.zeros((20, 20), bool)
    assert label_quality.fit(mask, np.array([0.0, 0.0, 5.0, 5.0])) == 0
    mask[2:6, 3:9] = True
    assert label_quality.fit(mask, np.array([3.0, 2.0, 9.0, 6.0])) == 1
    assert label_quality.fit(mask, np.array([3.0, 2.0, 9.0, 10.0])) == pytest.approx(0.5)
