"""Batches: their format, their order for any workers and ranks, and that boxes alone are read."""

import copy
import itertools
import json
import multiprocessing
import os
import subprocess
import sys
from multiprocessing import resource_sharer
from multiprocessing.connection import Client

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from pycocotools.coco import COCO
from small_coco import SIZES, save, small_coco, write_images

from sim_m2f import get_cfg
from sim_m2f.data import loader
from sim_m2f.data.catalog import DatasetSource, find_source
from sim_m2f.errors import UserError
from sim_m2f.pixels import Pixels

MASK = ["MODEL.SIM.SUPERVISION", "mask"]
PLAIN = ["INPUT.MIN_SCALE", 1.0, "INPUT.MAX_SCALE", 1.0, "INPUT.RANDOM_FLIP", "none"]


def config(source, *overrides):
    cfg = get_cfg()
    cfg.merge_from_list(
        ["INPUT.IMAGE_SIZE", 96, "INPUT.MIN_SIZE_TEST", 64, "MODEL.SEM_SEG_HEAD.NUM_CLASSES", 3]
    )
    cfg.merge_from_list(["MODEL.SIM.SUPERVISION", "box", "SOLVER.IMS_PER_BATCH", 4])
    cfg.merge_from_list(["DATALOADER.NUM_WORKERS", 0, *overrides])
    for split in ("TRAIN", "TEST"):
        cfg.DATASETS[f"{split}_ANNOTATIONS"] = str(source.annotations)
        cfg.DATASETS[f"{split}_IMAGES"] = str(source.image_root)
    return cfg


@pytest.fixture
def source(tmp_path):
    return save(tmp_path, small_coco(tmp_path))


def first_batches(count, *arguments, **options):
    return list(itertools.islice(loader.train_loader(*arguments, **options), count))


def assert_same(one, other):
    """Nested dicts, lists and tensors that are equal bit for bit."""
    assert type(one) is type(other)
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other)
        for pair in zip(one, other, strict=True):
            assert_same(*pair)
    elif isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
    else:
        assert one == other


def test_format_of_a_batch(source):
    for batch in first_batches(3, config(source, *MASK)):
        assert batch.keys() == {"images", "targets", "image_ids", "image_sizes", "original_sizes"}
        assert batch["images"].shape == (4, 3, 96, 96)
        assert batch["images"].dtype == torch.uint8
        for index, target in enumerate(batch["targets"]):
            assert batch["original_sizes"][index] == SIZES[batch["image_ids"][index]]
            height, width = batch["image_sizes"][index]
            assert (batch["images"][index, :, height:] == 0).all()
            assert (batch["images"][index, :, :, width:] == 0).all()
            count = len(target["labels"])
            assert target["labels"].dtype == torch.int64
            assert target["boxes"].shape == (count, 4)
            assert target["boxes"].dtype == torch.float32
            assert (target["boxes"] <= torch.tensor([width, height, width, height])).all()
            assert target["valid"].shape == (96, 96)
            assert target["valid"].dtype == torch.bool
            assert not target["valid"][height:].any()
            assert not target["valid"][:, width:].any()
            assert target["masks"].shape == (count, 96, 96)
            assert target["masks"].dtype == torch.bool
            assert not target["masks"][:, height:].any()


def test_pixels_masks_and_valid_rows_without_augmentation(tmp_path):
    """IMAGE_SIZE 90 on an image of 90 x 90 leaves it as it is; the input is padded to 96."""
    content = small_coco(tmp_path)
    content["annotations"] = [
        {
            "id": 1,
            "image_id": 15,
            "category_id": 7,
            "bbox": [5, 6, 40, 50],
            "segmentation": [[5, 6, 45, 6, 45, 56]],
        }
    ]
    source = save(tmp_path, content)
    (batch,) = first_batches(
        1, config(source, *MASK, *PLAIN, "INPUT.IMAGE_SIZE", 90, "SOLVER.IMS_PER_BATCH", 1)
    )
    pixels = np.asarray(Image.open(source.image_root / "15.png"), np.float64)
    expected = (pixels - [123.675, 116.280, 103.530]) / [58.395, 57.120, 57.375]
    image = Pixels(config(source)).of_batch(batch["images"], batch["image_sizes"])[0]
    assert image.shape == (3, 96, 96)
    np.testing.assert_allclose(image[:, :90, :90].permute(1, 2, 0), expected, atol=1e-5)
    assert image[:, 90:].eq(0).all()
    assert image[:, :, 90:].eq(0).all()
    target = batch["targets"][0]
    assert target["labels"].tolist() == [1]
    assert target["boxes"].tolist() == [[5, 6, 45, 56]]
    valid = np.zeros((96, 96), bool)
    valid[:80, :90] = True
    np.testing.assert_array_equal(target["valid"], valid)
    reference = COCO(source.annotations)
    np.testing.assert_array_equal(target["masks"][0, :90, :90], reference.annToMask(reference.anns[1]))


@pytest.mark.parametrize("damage", ["deleted", "text", "number"])
def test_boxes_alone_are_read(tmp_path, damage):
    content = small_coco(tmp_path)
    expected = first_batches(20, config(save(tmp_path, content)))
    changed = copy.deepcopy(content)
    for annotation in changed["annotations"]:
        del annotation["segmentation"]
        if damage != "deleted":
            annotation["segmentation"] = {"text": "nonsense", "number": -1}[damage]
    assert_same(first_batches(20, config(save(tmp_path, changed))), expected)


def test_box_and_mask_supervision_see_the_same_data(source):
    boxes, masks = first_batches(10, config(source)), first_batches(10, config(source, *MASK))
    for batch in masks:
        for target in batch["targets"]:
            del target["masks"], target["known"]
    assert_same(boxes, masks)


def test_workers_do_not_change_what_is_seen(source):
    expected = first_batches(6, config(source))
    assert_same(first_batches(6, config(source, "DATALOADER.NUM_WORKERS", 2)), expected)


def test_resuming_goes_on_where_it_stopped(source):
    assert_same(first_batches(3, config(source), start_iteration=4), first_batches(7, config(source))[4:])


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_share_the_global_batch_in_order(source, ranks):
    whole = first_batches(4, config(source))
    parts = [first_batches(4, config(source), rank=rank, world_size=ranks) for rank in range(ranks)]
    for batch, *shares in zip(whole, *parts, strict=True):
        assert torch.equal(batch["images"], torch.cat([part["images"] for part in shares]))
        assert_same(batch["targets"], list(itertools.chain(*(part["targets"] for part in shares))))
        assert batch["image_ids"] == list(itertools.chain(*(part["image_ids"] for part in shares)))


def test_epochs_are_permutations_of_the_images_with_objects(tmp_path):
    content = small_coco(tmp_path)
    content["annotations"].append({"id": 200, "image_id": 15, "category_id": 3, "bbox": [1, 1, 50, 50]})
    batches = first_batches(15, config(save(tmp_path, content)))
    seen = [number for batch in batches for number in batch["image_ids"]]
    epochs = [tuple(seen[start : start + 3]) for start in range(0, 60, 3)]
    assert all(sorted(epoch) == [11, 12, 15] for epoch in epochs)
    assert len(set(epochs)) == 6, "all orders occur"
    other = first_batches(15, config(save(tmp_path, content), "SEED", 1))
    assert seen != [number for batch in other for number in batch["image_ids"]]


def test_each_visit_is_augmented_anew(source):
    boxes = [
        tuple(target["boxes"].flatten().tolist())
        for batch in first_batches(6, config(source))
        for target, number in zip(batch["targets"], batch["image_ids"], strict=True)
        if number == 11
    ]
    assert len(set(boxes)) == len(boxes) > 5


@pytest.mark.parametrize("workers", [0, 2])
def test_the_global_random_states_are_left_alone(source, workers):
    torch.manual_seed(7)
    np.random.seed(7)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    first_batches(2, config(source, "DATALOADER.NUM_WORKERS", workers))
    assert torch.equal(torch.get_rng_state(), before[0])
    np.testing.assert_array_equal(np.random.get_state()[1], before[1])


def test_what_is_left_out_is_told_once(source, capsys):
    loader.train_loader(config(source), rank=0, world_size=2)
    left_out = "1 boxes of zero area and 1 images without an object"
    assert capsys.readouterr().err == f"note: set: left out {left_out}\n"
    loader.train_loader(config(source), rank=1, world_size=2)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("world_size", [1, 2, 5])
def test_a_test_set_is_seen_once_over_all_ranks(source, world_size):
    ids = []
    for rank in range(world_size):
        batches = loader.eval_loader(config(source), source, rank, world_size)
        assert [image.id for image in batches.dataset.data.images] == [11, 12, 15]
        ids += [number for batch in batches for number in batch["image_ids"]]
    assert sorted(ids) == [11, 12, 15]


def test_test_images_are_resized_and_their_boxes_with_them(source):
    first, second, third = loader.eval_loader(config(source, *MASK), source)
    assert first["image_sizes"] == [(64, 85)]
    assert first["images"].shape == (1, 3, 64, 96)
    assert first["original_sizes"] == [(60, 80)]
    expected = np.array([[10, 20, 40, 40], [10, 20, 12, 40]]) * np.array([85 / 80, 64 / 60] * 2)
    np.testing.assert_allclose(first["targets"][0]["boxes"], expected, rtol=1e-6)
    assert first["targets"][0]["labels"].tolist() == [2, 0]
    assert "masks" not in first["targets"][0]
    assert second["image_sizes"] == [(85, 64)]
    assert third["targets"][0]["boxes"].shape == (0, 4)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_image_is_one_line_from_any_worker(source, workers):
    path = source.image_root / "12.png"
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(UserError) as error:
        first_batches(6, config(source, "DATALOADER.NUM_WORKERS", workers))
    assert str(error.value).startswith(f"{path}: cannot be decoded (")
    assert len(str(error.value).splitlines()) == 1


def test_a_worker_is_silent_when_the_run_ends_while_it_takes_a_batch(source, capfd, monkeypatch):
    def ended(ident):
        address, key = ident[0], multiprocessing.current_process().authkey
        Client(address, authkey=key).close()
        with Client(address, authkey=key) as last:  # it is answered once the worker has done with the other
            last.send(None)
            last.poll(10)
        raise KeyboardInterrupt

    monkeypatch.setattr(resource_sharer._resource_sharer, "get_connection", ended)
    with pytest.raises(KeyboardInterrupt):
        first_batches(1, config(source, "DATALOADER.NUM_WORKERS", 1))
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.slow
def test_a_process_ends_while_its_workers_wait(source):
    """Python ends the processes that are left with SIGTERM and waits for them; workers block that signal."""
    script = f"""
import sys
from pathlib import Path
from test_data_loader import DatasetSource, config, loader
source = DatasetSource("set", Path({str(source.annotations)!r}), Path({str(source.image_root)!r}))
batches = iter(loader.train_loader(config(source, "DATALOADER.NUM_WORKERS", 2)))
next(batches)
sys.modules["kept"] = batches  # as a traceback that somebody keeps does
"""
    path = os.pathsep.join([str(ROOT), str(ROOT / "ops"), str(ROOT / "tests")])
    command, environment = [sys.executable, "-c", script], {**os.environ, "PYTHONPATH": path}
    subprocess.run(command, env=environment, check=True, timeout=60)


def test_runs_that_do_not_make_up_the_mask_are_told_with_their_annotation(tmp_path):
    content = small_coco(tmp_path)
    content["annotations"][0]["segmentation"] = {"size": [60, 80], "counts": "abc"}
    source = save(tmp_path, content)
    with pytest.raises(UserError, match=r"set\.json: annotation id 101: segmentation cannot be decoded"):
        first_batches(6, config(source, *MASK))


def test_wrong_settings_are_one_line(tmp_path, source):
    for overrides, words in [
        (["MODEL.SEM_SEG_HEAD.NUM_CLASSES", 80], "set MODEL.SEM_SEG_HEAD.NUM_CLASSES 3"),
        (["SOLVER.IMS_PER_BATCH", 1], "SOLVER.IMS_PER_BATCH is 1; use as many as there are ranks, 2"),
    ]:
        with pytest.raises(UserError, match=words):
            loader.train_loader(config(source, *overrides), rank=0, world_size=2)
    cfg = config(source, "MODEL.RESNETS.NORM", "SyncBN", "SOLVER.IMAGES_AT_ONCE", 1)
    with pytest.raises(UserError, match="all ranks need as many images; use a multiple of 3"):
        loader.train_loader(cfg, rank=0, world_size=3)
    cfg = config(source)
    cfg.DATASETS.TRAIN_IMAGES = ""
    with pytest.raises(UserError, match=r"DATASETS\.TRAIN_IMAGES is not set"):
        loader.train_loader(cfg)
    cfg = config(DatasetSource("", "", ""))
    cfg.DATASETS.TRAIN = ()
    with pytest.raises(UserError, match=r"DATASETS\.TRAIN names no data set"):
        loader.train_loader(cfg)


@pytest.mark.parametrize("content", ["no annotations", "crowds only"])
def test_nothing_to_train_on_is_one_line(tmp_path, content):
    data = small_coco(tmp_path)
    if content == "no annotations":
        del data["annotations"]
    for annotation in data.get("annotations", []):
        annotation["iscrowd"] = 1
    source = save(tmp_path, data)
    with pytest.raises(UserError, match=f"{source.annotations}: no object to train on"):
        loader.train_loader(config(source))


def write_as_coco(root, split, content):
    (root / "coco/annotations").mkdir(parents=True, exist_ok=True)
    (root / f"coco/annotations/instances_{split}2017.json").write_text(json.dumps(content))
    (root / f"coco/{split}2017").mkdir(exist_ok=True)
    write_images(root / f"coco/{split}2017")


def test_several_sets_are_trained_on_together_if_their_categories_agree(tmp_path, monkeypatch):
    content = small_coco(tmp_path / "content")
    write_as_coco(tmp_path, "train", content)
    shifted = copy.deepcopy(content)
    for image in shifted["images"]:
        image["id"] += 1000
    for annotation in shifted["annotations"]:
        annotation["image_id"] += 1000
    write_as_coco(tmp_path, "val", shifted)
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    cfg = config(DatasetSource("", "", ""), "DATASETS.TRAIN", "('coco_2017_train', 'coco_2017_val')")
    seen = {number for batch in first_batches(2, cfg) for number in batch["image_ids"]}
    assert seen == {11, 12, 1011, 1012}
    shifted["categories"][0]["name"] = "d"
    write_as_coco(tmp_path, "val", shifted)
    with pytest.raises(UserError, match="its categories differ"):
        loader.train_loader(cfg)


@pytest.mark.parametrize("supervision", ["box", "mask"])
def test_a_batch_may_have_no_object_left(tmp_path, supervision):
    content = small_coco(tmp_path)
    content["annotations"] = content["annotations"][1:2]  # 2 pixels wide on an image of 80
    cfg = config(save(tmp_path, content), "MODEL.SIM.SUPERVISION", supervision)
    cfg.merge_from_list(["INPUT.MIN_SCALE", 0.2, "INPUT.MAX_SCALE", 0.3])
    (batch,) = first_batches(1, cfg)
    assert batch["images"].shape == (4, 3, 96, 96)
    for target in batch["targets"]:
        assert target["labels"].shape == (0,)
        assert target["boxes"].shape == (0, 4)
        assert target["valid"].shape == (96, 96)
        if supervision == "mask":
            assert target["masks"].shape == (0, 96, 96)


@pytest.mark.usefixtures("coco_root")
@pytest.mark.slow
def test_real_coco_images_train_and_test():
    cfg = get_cfg()
    cfg.merge_from_list(["INPUT.IMAGE_SIZE", 256, "DATALOADER.NUM_WORKERS", 2, *MASK])
    (batch,) = first_batches(1, cfg)
    assert batch["images"].shape == (16, 3, 256, 256)
    assert sum(len(target["labels"]) for target in batch["targets"]) > 16
    for target in batch["targets"]:
        for box, mask in zip(target["boxes"], target["masks"], strict=True):
            rows, columns = np.nonzero(mask.numpy())
            if len(rows):
                assert columns.min() >= box[0] - 2
                assert rows.min() >= box[1] - 2
                assert columns.max() <= box[2] + 1
                assert rows.max() <= box[3] + 1
    source = find_source("coco_2017_val")
    sizes = [batch["image_sizes"][0] for batch in loader.eval_loader(cfg, source)]
    assert all(min(size) == 800 or max(size) == 1333 for size in sizes)


@pytest.mark.parametrize(
    ("name", "annotations"),
    [
        ("people_train", "people/annotations/train.json"),
        ("people_train_boxes_only", "people/annotations/train_boxes_only.json"),
        ("pennfudan_val", "pennfudan/annotations/val.json"),
        ("coco_more_val", "coco_more/annotations/val.json"),
    ],
)
def test_sets_of_one_image_folder_are_found_by_name(name, annotations, monkeypatch, tmp_path):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    source = find_source(name)
    assert source.annotations == tmp_path / annotations
    assert source.image_root == source.annotations.parents[1] / "images"
