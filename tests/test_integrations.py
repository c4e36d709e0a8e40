"""The criterion in other hands: Hugging Face's network, the original's, and detectron2's trainer."""

import importlib
import importlib.util
import itertools
import math
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, SMALL
from PIL import Image
from small_coco import save, small_coco

has_detectron2 = importlib.util.find_spec("detectron2") is not None
has_original = has_detectron2 and importlib.util.find_spec("mask2former") is not None
needs_detectron2 = pytest.mark.skipif(not has_detectron2, reason="detectron2 is not on the Python path")
CLASSES = ("MODEL.SEM_SEG_HEAD.NUM_CLASSES", 3)


@pytest.fixture
def example(monkeypatch):
    """Imports an example by its name."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    return importlib.import_module


@pytest.mark.slow
def test_the_criterion_trains_hugging_faces_network(example, tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.chdir(ROOT)
    source = save(tmp_path, small_coco(tmp_path))
    overrides = [
        "DATASETS.TRAIN_ANNOTATIONS",
        source.annotations,
        "DATASETS.TRAIN_IMAGES",
        source.image_root,
        *CLASSES,
    ]
    overrides += ["DATALOADER.NUM_WORKERS", 0, "SOLVER.IMS_PER_BATCH", 2, "INPUT.IMAGE_SIZE", 96]
    totals = example("huggingface_boxes").main(["--steps", "3", *map(str, overrides)])
    assert len(totals) == 3
    assert all(map(math.isfinite, totals))


@pytest.mark.skipif(has_detectron2, reason="detectron2 is there")
def test_without_detectron2_the_integration_says_what_is_missing():
    with pytest.raises(ImportError, match="needs detectron2; install it from https") as caught:
        importlib.import_module("sim_m2f.integrations.detectron2")
    assert len(str(caught.value).splitlines()) == 1


@pytest.fixture
def stand_in(monkeypatch):
    """Builds the meta-architecture with changed keys on what it takes of detectron2."""
    node = pytest.importorskip("fvcore.common.config").CfgNode

    class Images(SimpleNamespace):
        from_tensors = staticmethod(
            lambda images, _: Images(
                tensor=torch.stack(images), image_sizes=[each.shape[1:] for each in images]
            )
        )

    def instances(size, **fields):
        return SimpleNamespace(image_size=size, **fields)

    registry = SimpleNamespace(register=lambda: lambda kind: kind)
    contents = {
        "": {},
        ".config": {"CfgNode": node},
        ".data": dict.fromkeys(["DatasetMapper", "build_detection_train_loader", "transforms"]),
        ".engine": {"DefaultTrainer": object},
        ".evaluation": {"COCOEvaluator": None},
        ".modeling": {"META_ARCH_REGISTRY": registry},
        ".structures": {"Boxes": lambda boxes: boxes, "ImageList": Images, "Instances": instances},
    }
    for name, content in contents.items():
        monkeypatch.setitem(sys.modules, f"detectron2{name}", SimpleNamespace(**content))
    module = importlib.import_module("sim_m2f.integrations.detectron2")
    monkeypatch.delitem(sys.modules, module.__name__)  # the next test imports it anew
    own = [*SMALL, *CLASSES, "MODEL.SIM.SUPERVISION", "box", "MODEL.SIM.SHOW.PERIOD", 3.0]
    small = dict(zip(own[::2], own[1::2], strict=True))

    def build(**keys):
        cfg = node({"MODEL": {"DEVICE": "cpu"}})
        module.add_sim_config(cfg)
        cfg.merge_from_list([item for pair in (small | keys).items() for item in pair])
        return module.SIMMask2Former(cfg)

    return build


def test_under_detectron2_teacher_tiles_and_colours_are_as_asked(stand_in):
    model = stand_in(**{"MODEL.SIM.TEACHER.ENABLED": True, "TEST.USE_TEACHER": True, "TEST.TILE": 64})
    seen = []
    model.teacher.network.register_forward_pre_hook(lambda _, given: seen.append(given[0].shape[-2:]))
    model.network.register_forward_pre_hook(lambda _, given: seen.append("student"))
    with torch.no_grad():
        model.eval()([{"image": torch.randint(256, (3, 96, 96), dtype=torch.uint8)}] * 2)
    assert set(seen) == {(64, 64)}


class ObjectOfEachPixel(torch.nn.Module):
    """Finds an object of the first class in each pixel of its masks, which have a stride of 4."""

    def forward(self, images: torch.Tensor, auxiliary: bool) -> dict[str, torch.Tensor]:
        height, width = images.shape[-2] // 4, images.shape[-1] // 4
        masks = 20 * torch.eye(height * width).view(-1, height, width) - 10
        logits = torch.tensor([9.0, 0, 0, 0]).expand(len(images), len(masks), 4)
        return {"pred_logits": logits, "pred_masks": masks.expand(len(images), -1, -1, -1)}


def test_under_detectron2_tiles_give_as_many_objects_as_asked(stand_in):
    model = stand_in(**{"TEST.TILE": 64, "TEST.DETECTIONS_PER_IMAGE": 600})
    model.network = ObjectOfEachPixel()
    with torch.no_grad():
        (found,) = model.eval()([{"image": torch.zeros(3, 112, 112, dtype=torch.uint8)}])
    boxes = found["instances"].pred_boxes[found["instances"].scores > 0.5]
    assert len(torch.unique(boxes, dim=0)) == 600  # of 28 x 28 pixels


def test_under_detectron2_the_student_sees_other_colours(stand_in):
    model, seen = stand_in(**{"INPUT.STUDENT_COLORS": 1.0}), []
    model.network.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    annotated = SimpleNamespace(
        image_size=(64, 64),
        gt_classes=torch.tensor([1]),
        gt_boxes=SimpleNamespace(tensor=torch.tensor([[8.0, 8, 40, 40]])),
    )
    image = torch.randint(256, (3, 64, 64), dtype=torch.uint8)
    losses = model.train()([{"image": image, "instances": annotated}] * 4)
    assert "loss_projection" in losses
    assert (seen[0] != model.pixels.normalise(image)).any()


def test_under_detectron2_keys_without_effect_are_named(stand_in, caplog):
    stand_in(**{"INPUT.BOTTOM_ROWS": 10})
    assert not caplog.messages
    stand_in(**{"SOLVER.IMAGES_AT_ONCE": 2, "INPUT.BOTTOM_ROWS": 0})
    assert caplog.messages == ["without effect under detectron2: INPUT.BOTTOM_ROWS, SOLVER.IMAGES_AT_ONCE"]
    module = (ROOT / "sim_m2f/integrations/detectron2.py").read_text()
    documented = (ROOT / "docs/COMPATIBILITY.md").read_text()
    keys = re.findall(r'^    "([A-Z_.]+)",$', module, re.MULTILINE)
    assert len(keys) == 9
    assert all(f"`{key}`" in documented or f"`{key.rpartition('.')[2]}`" in documented for key in keys)


@pytest.mark.skipif(not has_original, reason="detectron2 and mask2former are not on the Python path")
def test_the_criterion_replaces_the_originals(example):
    import mask2former

    root = Path(mask2former.__file__).parents[1] / "configs/coco/instance-segmentation"
    small = ["MODEL.MASK_FORMER.DEC_LAYERS", 3, "MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_LAYERS", 1]
    arguments = ["--config-file", root / "maskformer2_R50_bs16_50ep.yaml", "--steps", 3, "--size", 64, *small]
    totals = example("original_mask2former").main(list(map(str, arguments)))
    assert len(totals) == 3
    assert all(map(math.isfinite, totals))


@pytest.fixture
def detectron2_cfg(tmp_path):
    """A small network on a small data set that detectron2's catalogue knows."""
    from detectron2.config import get_cfg
    from detectron2.data import DatasetCatalog, MetadataCatalog
    from detectron2.data.datasets import register_coco_instances

    from sim_m2f.integrations.detectron2 import add_sim_config

    content = small_coco(tmp_path)
    for item in content["annotations"]:
        item["area"] = item["bbox"][2] * item["bbox"][3]
    source = save(tmp_path, content)
    cfg = get_cfg()
    add_sim_config(cfg)
    cfg.merge_from_file(str(ROOT / "configs/shapes/boxinst_R18.yaml"))
    small = dict(zip(SMALL[::2], SMALL[1::2], strict=True))
    small["MODEL.SIM.SHOW.PERIOD"] = 0.0  # detectron2 does not take a whole number for it
    cfg.merge_from_list([item for pair in small.items() for item in pair])
    cfg.merge_from_list([*CLASSES, "SOLVER.MAX_ITER", 2, "SOLVER.AMP.ENABLED", False])
    cfg.merge_from_list(
        ["DATASETS.TRAIN", ("small",), "DATASETS.TEST", ("small",), "OUTPUT_DIR", str(tmp_path / "out")]
    )
    register_coco_instances("small", {}, str(source.annotations), str(source.image_root))
    yield cfg
    DatasetCatalog.remove("small")
    MetadataCatalog.remove("small")


@needs_detectron2
@pytest.mark.parametrize(
    ("supervision", "expected"),
    [("box", "loss_projection"), ("mask", "loss_dice"), ("box", "loss_prompt_projection")],
)
def test_detectron2s_trainer_drives_the_network(detectron2_cfg, supervision, expected):
    from sim_m2f.integrations.detectron2 import SIMMask2Former, SIMTrainer

    if supervision == "mask":
        pytest.importorskip("shapely")  # detectron2 crops polygons with it
    cfg = detectron2_cfg
    cfg.MODEL.SIM.SUPERVISION = supervision
    cfg.MODEL.SIM.PROMPTS.ENABLED = "prompt" in expected
    Path(cfg.OUTPUT_DIR).mkdir()
    trainer = SIMTrainer(cfg)
    assert isinstance(trainer.model, SIMMask2Former)
    trainer.resume_or_load(resume=False)
    before = {name: value.clone() for name, value in trainer.model.named_parameters() if value.requires_grad}
    trainer.train()
    assert "AP" in trainer._last_eval_results["segm"]
    assert any(
        not torch.equal(value, before[name])
        for name, value in trainer.model.named_parameters()
        if name in before
    )
    assert expected in trainer.storage.histories()

    again = SIMTrainer(cfg)
    again.resume_or_load(resume=True)
    assert again.model.criterion.step == 2
    weights = again.model.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in trainer.model.state_dict().items())


@needs_detectron2
def test_the_backbones_learning_rate_and_the_clipping_are_mask2formers(detectron2_cfg):
    from sim_m2f.integrations.detectron2 import SIMTrainer

    cfg = detectron2_cfg
    cfg.SOLVER.BACKBONE_MULTIPLIER = 0.1
    model = SIMTrainer.build_model(cfg)
    optimizer = SIMTrainer.build_optimizer(cfg, model)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in model.network.named_parameters():
        if parameter.requires_grad:
            factor = 0.1 if name.startswith("backbone") else 1
            assert rates[id(parameter)] == pytest.approx(factor * cfg.SOLVER.BASE_LR)
            parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    norm = torch.linalg.vector_norm(
        torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None])
    )
    assert norm.item() == pytest.approx(cfg.SOLVER.CLIP_GRADIENTS.CLIP_VALUE, rel=1e-3)


@needs_detectron2
@pytest.mark.parametrize("flip", ["horizontal", "vertical", "none"])
def test_detectron2s_loader_flips_as_asked(detectron2_cfg, flip):
    from detectron2.data import MetadataCatalog

    from sim_m2f.integrations.detectron2 import SIMTrainer

    cfg = detectron2_cfg  # 80 pixels leave the image of 60 x 80 as it is
    cfg.merge_from_list(["INPUT.IMAGE_SIZE", 80, "INPUT.MIN_SCALE", 1.0, "INPUT.MAX_SCALE", 1.0])
    cfg.merge_from_list(["INPUT.RANDOM_FLIP", flip, "DATALOADER.NUM_WORKERS", 0, "SOLVER.IMS_PER_BATCH", 4])
    path = Path(MetadataCatalog.get("small").image_root) / "11.png"
    stored = torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1)
    expected = {
        "none": [stored],
        "horizontal": [stored, stored.flip(2)],
        "vertical": [stored, stored.flip(1)],
    }
    batches = itertools.islice(SIMTrainer.build_train_loader(cfg), 12)
    images = [item["image"] for batch in batches for item in batch if item["image_id"] == 11]
    met = [[torch.equal(image, one) for one in expected[flip]] for image in images]
    assert all(map(any, met))
    assert all(map(any, zip(*met, strict=True))), "each orientation occurs"


@needs_detectron2
def test_detectron2_gets_the_same_instances(detectron2_cfg):
    from sim_m2f.integrations.detectron2 import SIMTrainer
    from sim_m2f.modeling.postprocess import instances

    model = SIMTrainer.build_model(detectron2_cfg).eval()
    image = torch.randint(0, 256, (3, 64, 90), dtype=torch.uint8)
    with torch.no_grad():
        (detected,) = model([{"image": image, "height": 50, "width": 70}])
        normalised = (image - model.pixels.mean) / model.pixels.std
        outputs = model.network(torch.nn.functional.pad(normalised, (0, 6))[None])
    (expected,) = instances(outputs, [(64, 90)], [(50, 70)], detectron2_cfg.TEST.DETECTIONS_PER_IMAGE)
    assert torch.equal(detected["instances"].scores, expected["scores"])
    assert torch.equal(detected["instances"].pred_classes, expected["labels"])
    assert torch.equal(detected["instances"].pred_masks.bool(), expected["masks"])


@needs_detectron2
def test_the_example_starts():
    command = [sys.executable, "examples/detectron2_boxes.py", "--help"]
    assert b"--num-gpus" in subprocess.run(command, cwd=ROOT, check=True, capture_output=True).stdout
