"""Mixed supervision: masks where they are annotated, boxes elsewhere, in one batch."""

import itertools
import json
from pathlib import Path

import pytest
import torch

import sim_m2f
from sim_m2f.data.catalog import DatasetSource, find_source
from sim_m2f.data.coco import read_coco
from sim_m2f.data.loader import train_loader
from sim_m2f.errors import UserError
from sim_m2f.pixels import Pixels
from sim_m2f.supervision import criterion as criterion_module
from sim_m2f.supervision.copy_paste import build_copy_paste
from sim_m2f.supervision.criterion import TERMS, build_criterion
from sim_m2f.supervision.matched import per_object
from sim_m2f.supervision.projection import projection_loss

OWN = {"loss_ce", "loss_known_masks"}


@pytest.fixture
def mixed_cfg(small_cfg, tmp_path):
    """The embedded shapes; of every image every second annotation has lost its segmentation."""
    source = find_source("shapes_train")
    content = json.loads(source.annotations.read_text())
    for annotation in content["annotations"][1::2]:
        del annotation["segmentation"]
    (tmp_path / "some.json").write_text(json.dumps(content))
    small_cfg.MODEL.SIM.SUPERVISION = "mixed"
    small_cfg.DATASETS.TRAIN_ANNOTATIONS = str(tmp_path / "some.json")
    small_cfg.DATASETS.TRAIN_IMAGES = str(source.image_root)
    return small_cfg


def batches(cfg):
    """Batches of training, their images as the network gets them."""
    for batch in train_loader(cfg):
        yield {**batch, "images": Pixels(cfg).of_batch(batch["images"], batch["image_sizes"])}


def step(cfg, batch, change=None):
    """The losses of one batch, and the gradient of their sum (or of one) towards the mask logits."""
    network, criterion = sim_m2f.build_model(cfg).eval(), build_criterion(cfg)
    outputs = network(batch["images"])
    outputs["layers"]["pred_masks"].retain_grad()
    torch.manual_seed(0)
    losses, matched = criterion(outputs, change or batch["targets"], batch["images"])
    return losses, matched, outputs


@pytest.mark.slow
def test_every_annotation_is_read_and_knows_whether_it_has_a_mask(mixed_cfg):
    batch = next(batches(mixed_cfg))
    known = torch.cat([target["known"] for target in batch["targets"]])
    masks = torch.cat([target["masks"] for target in batch["targets"]])
    assert 0 < known.sum() < len(known)
    assert torch.equal(masks.flatten(1).any(1), known)


def test_known_masks_are_learned_as_in_supervision_by_masks_and_nothing_else_of_them(mixed_cfg):
    batch = next(batches(mixed_cfg))
    losses, matched, outputs = step(mixed_cfg, batch)
    known = torch.cat([target["known"] for target in batch["targets"]])
    assert set(losses) >= {"loss_known_masks", "loss_projection"}
    masks = matched.masks
    unknown = projection_loss(masks.amax(-2), masks.amax(-1), *matched.objects.projections)[:, ~known]
    weight = mixed_cfg.MODEL.SIM.PROJECTION.WEIGHT
    assert torch.allclose(losses["loss_projection"], weight * unknown.sum() / len(known))
    losses["loss_known_masks"].backward()
    image, query = matched.objects.image_index, matched.match.query[-1]
    moved = outputs["layers"]["pred_masks"].grad[image, -1, query].flatten(1).any(1)
    assert torch.equal(moved, known)


@pytest.mark.slow
def test_all_masks_known_is_supervision_by_masks_for_the_same_match(mixed_cfg):
    """Cross-entropy and dice equal those of the mask criterion at the same points, weighted by 5."""
    batch = next(batches(mixed_cfg))
    targets = [{**t, "known": torch.ones_like(t["known"]), "masks": t["masks"]} for t in batch["targets"]]
    losses, matched, outputs = step(mixed_cfg, batch, targets)
    names = [name for name in losses if name not in OWN]
    assert all(losses[name] == 0 for name in names)
    assert set(names) <= set(TERMS)
    mask_cfg = mixed_cfg.clone()
    mask_cfg.MODEL.SIM.SUPERVISION = "mask"
    criterion = build_criterion(mask_cfg)
    truth = torch.cat([target["masks"] for target in targets])
    torch.manual_seed(0)
    expected = criterion._losses(criterion.layers(outputs), matched, truth)
    assert torch.allclose(losses["loss_known_masks"], expected["loss_mask"] + expected["loss_dice"])


@pytest.mark.slow
def test_a_batch_without_masks_is_one_from_boxes(mixed_cfg):
    batch = next(batches(mixed_cfg))
    targets = [{**t, "known": torch.zeros_like(t["known"])} for t in batch["targets"]]
    mixed, _, _ = step(mixed_cfg, batch, targets)
    mixed_cfg.MODEL.SIM.SUPERVISION = "box"
    plain = [{name: target[name] for name in ("labels", "boxes", "valid")} for target in targets]
    boxes, _, _ = step(mixed_cfg, batch, plain)
    assert mixed.keys() - boxes.keys() == {"loss_known_masks"}
    assert mixed["loss_known_masks"] == 0
    assert all(torch.equal(mixed[name], boxes[name]) for name in boxes)


@pytest.mark.parametrize(("share", "times"), [(0.0, 1), (0.1, 1), (0.5, 9), (0.75, 27)])
@pytest.mark.slow
def test_images_with_a_mask_are_seen_as_often_as_asked_for(mixed_cfg, share, times):
    """Of 40 images four have a mask: 9 times 4 are half of all."""
    file = Path(mixed_cfg.DATASETS.TRAIN_ANNOTATIONS)
    content = json.loads(file.read_text())
    images = sorted({each["image_id"] for each in content["annotations"]})[:40]
    content["images"] = [each for each in content["images"] if each["id"] in images]
    content["annotations"] = [each for each in content["annotations"] if each["image_id"] in images]
    for annotation in content["annotations"]:
        if annotation["image_id"] not in images[:4]:
            annotation.pop("segmentation", None)
    file.write_text(json.dumps(content))
    mixed_cfg.MODEL.SIM.KNOWN_MASKS.SHARE = share
    mixed_cfg.DATALOADER.NUM_WORKERS, mixed_cfg.SOLVER.IMS_PER_BATCH = 0, 36 + 4 * times
    epochs = [batch["image_ids"] for batch in itertools.islice(train_loader(mixed_cfg), 2)]
    for seen in epochs:
        assert sorted(seen) == sorted(images[4:] + images[:4] * times)
    assert epochs[0] != epochs[1]


@pytest.mark.slow
def test_missing_segmentations_are_faults_of_supervision_by_masks_alone(mixed_cfg):
    paths = mixed_cfg.DATASETS.TRAIN_ANNOTATIONS, mixed_cfg.DATASETS.TRAIN_IMAGES
    source = DatasetSource("some", *map(Path, paths))
    assert read_coco(source, read_masks=True, some_masks=True).images
    with pytest.raises(UserError, match="segmentation is missing"):
        read_coco(source, read_masks=True)


@pytest.mark.slow
def test_the_loss_is_per_annotated_object(mixed_cfg):
    batch = next(batches(mixed_cfg))
    _, matched, _ = step(mixed_cfg, batch)
    ones = torch.ones(matched.match.matched.shape)
    known = torch.cat([target["known"] for target in batch["targets"]])
    shares = [per_object(ones, match, matched.objects) for match in (matched.annotated, matched.by_box)]
    assert shares[1] / shares[0] == pytest.approx(1 - known.float().mean().item())


def test_maps_are_transferred_from_where_the_loader_has_pinned_them(mixed_cfg, monkeypatch):
    batch = next(batches(mixed_cfg))
    maps = [target[name] for target in batch["targets"] for name in ("valid", "masks")]
    expected = torch.cat([target["masks"][target["known"]] for target in batch["targets"]])
    moved, move = set(), torch.Tensor.to

    def to(tensor, *args, **kwargs):
        if args and isinstance(args[0], torch.device) and tensor.shape[-2:] == batch["images"].shape[-2:]:
            moved.add(tensor.untyped_storage().data_ptr())
        return move(tensor, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "to", to)
    _, matched, _ = step(mixed_cfg, batch)
    assert torch.equal(matched.supervision.truth, expected)
    assert moved == {each.untyped_storage().data_ptr() for each in maps}


@pytest.mark.slow
def test_objects_pasted_by_true_masks_are_learned_from_as_known_ones(mixed_cfg):
    """The same losses as if the pasted objects with true masks were the images' own."""
    mixed_cfg.MODEL.SIM.COPY_PASTE.ENABLED = mixed_cfg.MODEL.SIM.COLOR_MODEL.ENABLED = True
    mixed_cfg.MODEL.SIM.COPY_PASTE.START, mixed_cfg.MODEL.SIM.COPY_PASTE.PROBABILITY = 0.0, 1.0
    copying = build_copy_paste(mixed_cfg, torch.device("cpu"))
    first, second = itertools.islice(batches(mixed_cfg), 2)
    _, matched, _ = step(mixed_cfg, first)
    copying.remember(first["images"], [matched], 0)
    assert copying.bank.known.tolist() == torch.cat([t["known"] for t in first["targets"]]).tolist()
    copying.bank.scores[copying.bank.known.nonzero()[2:]] = 0.5  # a few true ones, and others after them
    images, targets = copying(second["images"], second["targets"], 0)
    pasted, known = (torch.cat([target[name] for target in targets]) for name in ("pasted", "known"))
    assert (pasted & known).any()
    assert (pasted & ~known).any()
    losses, matched, _ = step(mixed_cfg, {"images": images, "targets": targets})
    own = [{**target, "pasted": target["pasted"] & ~target["known"]} for target in targets]
    expected, _, _ = step(mixed_cfg, {"images": images, "targets": own})
    assert losses.keys() >= {"loss_known_masks", "loss_copy_paste", "loss_projection"}
    assert all(torch.equal(losses[name], expected[name]) for name in expected)
    count = copying.bank.scores.count_nonzero()
    copying.remember(images, [matched], 0)
    assert copying.bank.scores.count_nonzero() == count + (~pasted).sum()  # nothing is pasted twice


@pytest.mark.slow
def test_edges_of_a_part_of_a_batch_are_looked_for_once(mixed_cfg, monkeypatch):
    calls, look = [], criterion_module.alike_edges
    monkeypatch.setattr(criterion_module, "alike_edges", lambda *given: calls.append(1) or look(*given))
    batch, criterion = next(batches(mixed_cfg)), build_criterion(mixed_cfg)
    outputs = sim_m2f.build_model(mixed_cfg).eval()(batch["images"])
    given = batch["targets"], batch["images"]
    losses, _ = criterion(outputs, *given, prepared=criterion.prepare(*given))
    assert len(calls) == 1
    assert losses["loss_pairwise"] == criterion(outputs, *given)[0]["loss_pairwise"]
