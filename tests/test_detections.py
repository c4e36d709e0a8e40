"""Masks that are found, corrected by colour at test time, against a drawn truth."""

import json

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from coloured_coco import SIZES, ColourNetwork, coloured_cfg, write_coloured

import sim_m2f
from sim_m2f.data.catalog import data_sources
from sim_m2f.data.loader import eval_loader
from sim_m2f.detections import detections
from sim_m2f.engine.evaluator import RESULTS_FILE, evaluate
from sim_m2f.segmenter import Segmenter

SIZE, PADDED, ORIGINAL = (120, 112), (128, 128), (240, 224)


@pytest.fixture
def scene():
    """A red disc on green, at the network's size; three queries see it roughly, a fourth nothing."""
    y, x = np.mgrid[: PADDED[0], : PADDED[1]] + 0.5
    disc = (x - 54) ** 2 + (y - 60) ** 2 < 30**2
    image = np.where(disc[..., None], [200, 30, 30], [30, 160, 60]).astype(np.float32)
    image += np.random.default_rng(0).normal(0, 8, image.shape)
    image[SIZE[0] :], image[:, SIZE[1] :] = 0, 0
    logits = torch.full((1, 4, 32, 32), -6.0)
    logits[0, 0, 9:21, 8:20] = 1.0  # too small a square
    logits[0, 1, 7:24, 6:22] = 1.0
    logits[0, 2, 8:22, 6:20] = 1.0
    classes = torch.full((1, 4, 3), -20.0)
    classes[0, :, 0] = torch.tensor([3.0, 2.5, -4.0, 2.0])
    classes[0, 0, 1] = 2.9  # the first query has two classes
    classes[0, :, 2] = 0.0
    outputs = {"pred_logits": classes, "pred_masks": logits}
    truth = (np.mgrid[: ORIGINAL[0], : ORIGINAL[1]] + 0.5) / 2
    disc = (truth[1] - 54) ** 2 + (truth[0] - 60) ** 2 < 30**2
    return (
        outputs,
        torch.from_numpy(image.clip(0, 255)).permute(2, 0, 1)[None].float(),
        torch.from_numpy(disc),
    )


def found_in(scene, *changes, colors=True):
    outputs, images, _ = scene
    cfg = sim_m2f.get_cfg()
    cfg.merge_from_list(["TEST.DETECTIONS_PER_IMAGE", "5", *changes])
    cfg.freeze()
    return detections(outputs, images, [SIZE], [ORIGINAL], cfg, colors)[0]


def test_good_masks_are_corrected_and_keep_their_scores(scene):
    disc = scene[2]
    plain, found = found_in(scene, colors=False), found_in(scene)
    for name in ("scores", "labels", "queries"):
        assert torch.equal(plain[name], found[name])

    def iou(masks):
        return (masks & disc).sum((1, 2)) / (masks | disc).sum((1, 2))

    good = found["queries"] <= 1
    assert good.sum() == 3  # two classes of the first query, one of the second
    assert (iou(plain["masks"])[good] < 0.85).all()
    assert (iou(found["masks"])[good] > 0.9).all()
    expected = [[mask.any(0).nonzero().min(), mask.any(1).nonzero().min()] for mask in found["masks"][good]]
    assert found["boxes"][good][:, :2].tolist() == torch.tensor(expected).float().tolist()
    assert torch.equal(found["masks"][~good], plain["masks"][~good])  # a low score, and an empty mask
    assert torch.equal(found["boxes"][~good], plain["boxes"][~good])


@pytest.mark.parametrize("grow", [0.0, 0.05, 0.2])
def test_a_mask_stays_near_the_box_around_the_found_one(scene, grow):
    """The square in the disc grows by a share of its box on each side, until it is the disc."""
    (box,) = found_in(scene, colors=False)["boxes"][:1]
    (grown,) = found_in(scene, "TEST.COLORS.GROW", str(grow))["boxes"][:1]
    wider = grow * (box[2:] - box[:2])
    disc = torch.tensor([2 * 54 - 60, 2 * 60 - 60, 2 * 54 + 60, 2 * 60 + 60])
    expected = torch.cat([(box[:2] - wider).maximum(disc[:2]), (box[2:] + wider).minimum(disc[2:])])
    assert torch.allclose(grown, expected, atol=4.0)


def test_a_mask_that_colours_empty_stays(scene, monkeypatch):
    monkeypatch.setattr(
        "sim_m2f.detections.corrected_masks",
        lambda logits, *rest, **keywords: torch.full((len(logits), 64, 64), -9.0),
    )
    plain, found = found_in(scene, colors=False), found_in(scene)
    assert torch.equal(plain["masks"], found["masks"])
    assert torch.equal(plain["boxes"], found["boxes"])


def test_evaluation_and_predict_correct_alike(tmp_path):
    """The same masks in the file of results and from a path, and others than without colours."""
    write_coloured(tmp_path)
    cfg, number = coloured_cfg(tmp_path), next(iter(SIZES))
    cfg.MODEL.SIM.PROMPTS.ENABLED = True
    masks = []
    for enabled in (True, False):
        cfg.TEST.COLORS.ENABLED = enabled
        loader = eval_loader(cfg, data_sources(cfg, "TEST")[0])
        evaluate(ColourNetwork(), loader, tmp_path / "out", Accelerator(cpu=True), cfg)
        entries = json.loads((tmp_path / "out" / RESULTS_FILE).read_text())
        masks.append([entry["segmentation"] for entry in entries if entry["image_id"] == number])
        model, image = Segmenter(ColourNetwork(), cfg, ["a", "b", "c"]), tmp_path / f"{number}.png"
        assert model.predict(image).rles == masks[-1]
        assert model.predict([image], colors=True)[0].rles == masks[0]
        free = model.predict_both(image, np.zeros((0, 4)), [], False)[1]
        assert free.rles == model.predict(image, colors=False).rles
    assert model.predict(image, colors=False).rles == masks[1] != masks[0]
