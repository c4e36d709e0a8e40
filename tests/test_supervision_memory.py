"""What the supervision of crowded images has in memory, and keeps from its forward to its backward pass."""

import math

import pytest
import torch
from conftest import ROOT
from memory_peak import MemoryPeak

from sim_m2f.config import get_cfg
from sim_m2f.structures import LayerOutputs, Outputs
from sim_m2f.supervision.color_model import FINER, color_labels
from sim_m2f.supervision.criterion import build_criterion
from sim_m2f.supervision.level_set import region_energy
from sim_m2f.supervision.targets import box_pixels, flatten_targets

PIXELS, OBJECTS, LAYERS = 512, 100, 10


def outputs(learning: bool) -> Outputs:
    """Of a network for one image, random."""
    side = PIXELS // 4
    shapes = (1, LAYERS, OBJECTS, 81), (1, LAYERS, OBJECTS, side, side)
    logits, masks = (torch.randn(shape, requires_grad=learning) for shape in shapes)
    layers: LayerOutputs = {"pred_logits": logits, "pred_masks": masks}
    each: list[LayerOutputs] = [
        {"pred_logits": logits[:, layer], "pred_masks": masks[:, layer]} for layer in range(LAYERS)
    ]
    features = torch.randn(1, 256, side, side)
    return {**each[-1], "aux_outputs": each[:-1], "mask_features": features, "layers": layers}


# GiB at 1024 x 1024 pixels beside the network's outputs and their gradients; kept for the backward pass alone
# were 0.84 and 2.7 when every loss kept what autograd keeps by itself.
@pytest.mark.slow
@pytest.mark.parametrize(("share", "most"), [(0.1, 0.5), (0.5, 1.2)])
def test_memory_grows_with_the_boxes_area(share, most):
    cfg = get_cfg()
    cfg.merge_from_file(ROOT / "configs/coco/sim_R50_bs16_50ep.yaml")
    cfg.SOLVER.MAX_ITER = 10
    criterion = build_criterion(cfg)
    criterion.step = 5
    corner = torch.rand(OBJECTS, 2) * PIXELS * (1 - math.sqrt(share))
    boxes = torch.cat([corner, corner + PIXELS * math.sqrt(share)], dim=1)
    target = {"labels": torch.randint(80, (OBJECTS,)), "boxes": boxes}
    images = torch.randn(1, 3, PIXELS, PIXELS)
    student, teacher = outputs(True), outputs(False)
    with MemoryPeak() as memory:
        losses, _ = criterion(student, [target], images, teacher)
        sum(losses.values()).backward()
    scale = (1024 / PIXELS) ** 2 / 2**30
    gradient = student["layers"]["pred_masks"].grad
    assert (memory.bytes - gradient.nbytes) * scale < most


def test_colours_of_small_boxes_need_no_maps_of_their_masks():
    """Two maps at stride 2 are allowed for the result, histograms and the like; 4.5 were needed once."""
    side = PIXELS // 4
    corner = torch.rand(2 * OBJECTS, 2) * (PIXELS - 24)
    target = {"labels": torch.zeros(len(corner)).long(), "boxes": torch.cat([corner, corner + 24], dim=1)}
    objects = flatten_targets([target], (side, side), torch.device("cpu"))
    logits, valid = torch.zeros(len(objects), side, side), torch.ones(1, side, side, dtype=torch.bool)
    images = 255 * torch.rand(1, 3, PIXELS, PIXELS)
    with MemoryPeak() as memory:
        color_labels(logits, images, valid, objects, get_cfg().MODEL.SIM.COLOR_MODEL)
    assert memory.bytes < 2 * FINER**2 * logits.nbytes


def test_the_level_set_of_features_has_no_features_for_every_layer():
    boxes = torch.tensor([[0.0, 0, 200, 200], [100.0, 100, 256, 256]])
    target = {"labels": torch.zeros(2, dtype=torch.int64), "boxes": boxes}
    pixels = box_pixels(flatten_targets([target], (64, 64), torch.device("cpu")))
    values = torch.randn(len(pixels.x), 256)
    masks = torch.rand(LAYERS, len(pixels.x), requires_grad=True)
    with MemoryPeak() as memory:
        region_energy(masks, values, pixels, 2).sum().backward()
    assert memory.bytes < 4 * (masks.nbytes + values.nbytes)
