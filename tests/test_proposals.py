"""Masks from elsewhere: made for boxes by GrabCut and SAM, read beside them, blended into pseudo masks."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from coloured_coco import CATEGORIES, write_coloured
from conftest import half_written, held
from pycocotools import mask as coco_mask

import sim_m2f
from sim_m2f.cli import main
from sim_m2f.config import validate
from sim_m2f.data import loader
from sim_m2f.data.catalog import DatasetSource, find_source
from sim_m2f.data.coco import read_coco
from sim_m2f.data.image import read_image
from sim_m2f.data.loader import train_loader
from sim_m2f.data.proposals import with_proposals
from sim_m2f.engine.trainer import Trainer
from sim_m2f.errors import UserError
from sim_m2f.labelling import proposals
from sim_m2f.labelling.masks import filled
from sim_m2f.supervision.criterion import build_criterion
from sim_m2f.supervision.layers import Layers
from sim_m2f.supervision.pseudo_masks import Evidence, PseudoMasks, pseudo_labels
from sim_m2f.supervision.targets import BoxPixels, flatten_targets


@pytest.fixture
def data(tmp_path) -> tuple[Path, dict]:
    """A folder with images and boxes.json; the set with masks."""
    folder = tmp_path / "set"
    content = write_coloured(folder)
    boxes = [
        {key: value for key, value in each.items() if key != "segmentation"}
        for each in content["annotations"]
    ]
    (folder / "boxes.json").write_text(json.dumps({**content, "annotations": boxes}))
    return folder, content


def arguments(folder: Path, output: Path, name: str = "grabcut") -> list[str]:
    paths = ["--annotations", str(folder / "boxes.json"), "--images", str(folder), "--output", str(output)]
    return ["propose", "--with", name, *paths]


def test_grabcut_finds_objects_of_one_colour(data, tmp_path):
    pytest.importorskip("cv2")
    folder, content = data
    assert main(arguments(folder, tmp_path / "out/found.json")) == 0
    found = json.loads((tmp_path / "out/found.json").read_text())
    assert found["images"] == content["images"]
    for one, other in zip(content["annotations"], found["annotations"], strict=True):
        assert {**one, **{key: other[key] for key in ("segmentation", "area", "score")}} == other
        truth, mask = (coco_mask.decode(each["segmentation"]).astype(bool) for each in (one, other))
        assert other["area"] == mask.sum()
        assert 0 <= other["score"] <= 1
        x, y, w, h = one["bbox"]
        assert not (mask & ~filled(np.array([x, y, x + w, y + h]), *mask.shape)).any()
        if CATEGORIES[one["category_id"]] != "star & bar":  # it touches the border of its image
            assert (mask & truth).sum() / (mask | truth).sum() > 0.95
    assert {file.name for file in (tmp_path / "out").iterdir()} == {".found.lock", "found.json"}


def test_filled_are_the_pixels_with_centres_in_a_box():
    centres = np.arange(6) + 0.5
    for start in np.arange(0, 4, 0.25):
        for end in np.arange(start + 1, 6.25, 0.25):
            inside = np.flatnonzero((centres >= start) & (centres < end))
            across = filled(np.array([start, 1, end, 3]), 5, 6)
            down = filled(np.array([1, start, 3, end]), 6, 5)
            np.testing.assert_array_equal(np.flatnonzero(across.any(0)), inside)
            np.testing.assert_array_equal(np.flatnonzero(down.any(1)), inside)


def test_grabcut_in_two_parts_is_grabcut():
    cv2 = pytest.importorskip("cv2")
    pixels = np.random.default_rng(0).integers(0, 120, (40, 50, 3), dtype=np.uint8)
    pixels[8:30, 10:35] += 80
    labels = np.zeros((40, 50), np.uint8)
    cv2.setRNGSeed(0)
    models = np.zeros((1, 65)), np.zeros((1, 65))
    bgr = np.ascontiguousarray(pixels[..., ::-1])
    cv2.grabCut(bgr, labels, (6, 4, 36, 32), *models, 5, cv2.GC_INIT_WITH_RECT)
    mask, score = proposals.grabcut_mask(pixels, np.array([6.0, 4.0, 42.0, 36.0]))
    np.testing.assert_array_equal(mask, (labels == cv2.GC_FGD) | (labels == cv2.GC_PR_FGD))
    assert 0 < score <= 1
    mask, score = proposals.grabcut_mask(pixels, np.array([0.0, 0.0, 50.0, 40.0]))
    assert mask.all()
    assert score == 0


def test_a_stopped_call_goes_on(data, tmp_path, monkeypatch):
    folder, _ = data
    boxes = []

    def stripes(pixels, given):
        if len(boxes) == 2:
            raise KeyboardInterrupt
        boxes.append(len(given))
        return np.stack([np.indices(pixels.shape[:2]).sum(0) % 3 == 0] * len(given)), np.full(len(given), 0.5)

    made = proposals.Proposer("stripes", stripes)
    monkeypatch.setattr("sim_m2f.commands.propose.find_proposer", lambda *given: made)
    assert main(arguments(folder, tmp_path / "found.json", "stripes")) == 130
    assert (tmp_path / "found.progress.jsonl").exists()
    assert not (tmp_path / "found.json").exists()
    boxes.insert(0, -1)
    boxes.append(-1)  # from now on more than two
    assert main(arguments(folder, tmp_path / "found.json", "stripes")) == 0
    assert boxes == [-1, 3, 3, -1, 3, 3]  # each image with objects once
    assert not (tmp_path / "found.progress.jsonl").exists()


def test_boxes_of_another_format_leave_files_of_the_same_name_alone(data, tmp_path, monkeypatch):
    folder, content = data
    monkeypatch.chdir(tmp_path)
    names = {image["id"]: image["file_name"] for image in content["images"]}
    table = ["image,label,xmin,ymin,xmax,ymax"]
    for each in content["annotations"]:
        x, y, w, h = each["bbox"]
        table.append(f"{names[each['image_id']]},{each['category_id']},{x},{y},{x + w},{y + h}")
    Path("table.csv").write_text("\n".join(table))
    Path("boxes.json").write_text("the user's")

    def empty(pixels, given):
        return np.zeros((len(given), *pixels.shape[:2]), bool), np.zeros(len(given))

    made = proposals.Proposer("none", empty)
    monkeypatch.setattr("sim_m2f.commands.propose.find_proposer", lambda *given: made)
    paths = ["--from", "csv", "--annotations", "table.csv", "--images", str(folder)]
    left = half_written(Path("proposals.json"), Path("proposals.boxes.json"))
    with held(Path(".proposals.lock")):
        assert main(["propose", "--with", "none", *paths]) == 2
        assert all(file.exists() for file in left)
    for _ in range(2):  # its own file may be there already
        assert main(["propose", "--with", "none", *paths]) == 0
        assert not any(file.exists() for file in left)
    assert Path("boxes.json").read_text() == "the user's"
    boxes, masks = (json.loads(Path(f"proposals{end}.json").read_text()) for end in (".boxes", ""))
    assert [each["bbox"] for each in boxes["annotations"]] == [each["bbox"] for each in masks["annotations"]]


def test_two_processes_do_not_write_one_file(data, tmp_path, monkeypatch, capsys):
    folder, _ = data
    made = proposals.Proposer(
        "all", lambda pixels, given: (np.ones((3, *pixels.shape[:2]), bool), np.ones(3))
    )
    monkeypatch.setattr("sim_m2f.commands.propose.find_proposer", lambda *given: made)
    with held(tmp_path / ".found.lock"):
        assert main(arguments(folder, tmp_path / "found.json")) == 2
        assert "another process is at work here" in capsys.readouterr().err
        assert main(arguments(folder, tmp_path / "other.json")) == 0
    assert main(arguments(folder, tmp_path / "found.json")) == 0


BROKEN = {
    "no method": (["--with", "magic"], None, ["--with magic", "grabcut or sam:NAME"]),
    "no name": (["--with", "sam:"], None, ["--with sam:", "sam:NAME"]),
    "no SAM": (["--with", "sam:no/such/folder"], None, ["--with sam:no/such/folder", "cannot be loaded"]),
    "a folder of something else": (["--with", "sam:other"], None, ["--with sam:other", "cannot be loaded"]),
    "no file": (["--annotations", "none.json"], None, ["none.json", "no such file"]),
    "cut": (["--annotations", "cut.json"], None, ["cut.json", "not JSON"]),
    "no folder of images": (["--images", "nowhere"], None, ["nowhere", "no such folder of images"]),
    "box outside": ([], {"bbox": [90, 5, 30, 5]}, ["annotation id 1", "out of its image"]),
    "class of nobody": ([], {"category_id": 4}, ["annotation id 1", "category_id 4"]),
    "image of nobody": ([], {"image_id": 77}, ["annotation id 1", "image_id 77"]),
    "another format": (["--from", "cvat"], None, ["boxes.json", "CVAT"]),
    "the boxes themselves": (["--output", "boxes.json"], None, ["boxes.json: would replace", "--output"]),
    "a folder": (["--output", "other"], None, ["--output other", "is a folder"]),
    "a file in the way": (["--output", "cut.json/found.json"], None, ["cannot be written"]),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_fault_is_one_line_and_loses_nothing(data, tmp_path, capsys, monkeypatch, name):
    if name in ("no SAM", "a folder of something else"):
        pytest.importorskip("transformers")
    folder, _ = data
    monkeypatch.chdir(tmp_path)
    flags, change, said = BROKEN[name]
    content = json.loads((folder / "boxes.json").read_text())
    content["annotations"] = content["annotations"][:1]
    content["annotations"][0].update(change or {})
    (tmp_path / "boxes.json").write_text(json.dumps(content))
    (tmp_path / "found.json").write_text("found before")
    (tmp_path / "cut.json").write_text('{"images": [')
    (tmp_path / "other").mkdir()
    (tmp_path / "other/config.json").write_text('{"model_type": "bert"}')
    before = {file: file.read_bytes() for file in tmp_path.rglob("*.json")}
    paths = ["--annotations", "boxes.json", "--images", str(folder), "--output", "found.json"]
    assert main(["propose", "--with", "grabcut", *paths, *flags]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, errors
    assert all(text in errors[0] for text in said), errors
    assert {file: file.read_bytes() for file in tmp_path.rglob("*.json")} == before


def test_a_broken_image_does_not_cost_the_others(data, tmp_path, capsys):
    pytest.importorskip("cv2")
    folder, _ = data
    whole = (folder / "2.png").read_bytes()
    (folder / "2.png").write_bytes(whole[:100])
    assert main(arguments(folder, tmp_path / "found.json")) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert "2.png: cannot be decoded" in errors[0]
    assert "the same command goes on" in errors[1]
    (folder / "2.png").write_bytes(whole)
    for number in (5, 9):  # done already
        (folder / f"{number}.png").write_bytes(b"")
    assert main(arguments(folder, tmp_path / "found.json")) == 0


def small_sam(folder: Path, version: int) -> Path:
    """A folder with a randomly initialised SAM of a few layers, of 64 pixels a side, and its processor."""
    transformers = pytest.importorskip("transformers")
    if version == 2 and not hasattr(transformers, "Sam2ImageProcessor"):
        pytest.skip("transformers without SAM 2")
    torch.manual_seed(0)
    size, small = {"height": 64, "width": 64}, {"height": 16, "width": 16}
    prompt = {"hidden_size": 32, "image_size": 64, "mask_input_channels": 4}
    decoder = {"hidden_size": 32, "mlp_dim": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    decoder |= {"iou_head_hidden_dim": 32, "attention_downsample_rate": 2}
    if version == 1:
        vision = {"hidden_size": 32, "output_channels": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
        vision |= {"image_size": 64, "mlp_dim": 32, "num_pos_feats": 16, "window_size": 2}
        vision["global_attn_indexes"] = [1]
        parts = {"vision_config": vision, "prompt_encoder_config": prompt, "mask_decoder_config": decoder}
        network = transformers.SamModel(transformers.SamConfig(**parts))
        masks = {"mask_size": {"longest_edge": 16}, "mask_pad_size": small}
        image = transformers.SamImageProcessor(size={"longest_edge": 64}, pad_size=size, **masks)
        processor = transformers.SamProcessor(image)
    else:
        backbone = {"model_type": "sam2_hiera_det_model", "hidden_size": 8, "num_attention_heads": 1}
        backbone |= {"blocks_per_stage": [1, 1, 2, 1], "embed_dim_per_stage": [8, 16, 32, 64]}
        backbone |= {"num_attention_heads_per_stage": [1, 2, 4, 8], "window_size_per_stage": [4, 4, 2, 2]}
        backbone |= {"global_attention_blocks": [3], "window_positional_embedding_background_size": [2, 2]}
        vision = {"backbone_config": {**backbone, "image_size": [64, 64]}, "fpn_hidden_size": 32}
        vision |= {"backbone_channel_list": [64, 32, 16, 8]}
        vision |= {"backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]]}
        parts = {"vision_config": vision, "prompt_encoder_config": prompt, "mask_decoder_config": decoder}
        network = transformers.Sam2Model(transformers.Sam2Config(**parts))
        image = transformers.Sam2ImageProcessor(size=size, mask_size=small)
        processor = transformers.Sam2Processor(image)
    network.eval().save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("version", [1, 2])
def test_sam_answers_boxes(data, tmp_path, monkeypatch, version):
    """Each box by itself, through the whole network and the processor as their documentation has it."""
    transformers = pytest.importorskip("transformers")
    folder, content = data
    path = small_sam(tmp_path / "sam", version)
    monkeypatch.setattr(proposals, "TOGETHER", 2)
    assert main(arguments(folder, tmp_path / "found.json", f"sam:{path}")) == 0
    found = json.loads((tmp_path / "found.json").read_text())["annotations"]
    kinds = {1: (transformers.SamModel, transformers.SamProcessor)}
    kinds[2] = transformers.Sam2Model, transformers.Sam2Processor
    network, processor = (kind.from_pretrained(path) for kind in kinds[version])
    for one, other in zip(content["annotations"], found, strict=True):
        pixels = read_image(folder / f"{one['image_id']}.png")
        x, y, w, h = one["bbox"]
        inputs = processor(images=pixels, input_boxes=[[[x, y, x + w, y + h]]], return_tensors="pt")
        with torch.no_grad():
            outputs = network(**inputs)
        best = outputs.iou_scores[0, 0].argmax()
        sizes = [inputs[key] for key in ("original_sizes", "reshaped_input_sizes") if key in inputs]
        masks = processor.post_process_masks(outputs.pred_masks, *sizes)[0][0].numpy()
        expected = masks[best] & filled(np.array([x, y, x + w, y + h]), *pixels.shape[:2])
        mask = coco_mask.decode(other["segmentation"]).astype(bool)
        if expected.any():
            assert (mask != expected).mean() < 0.002  # a logit of zero may fall to either side
            score = float(outputs.iou_scores[0, 0, best].clamp(0, 1))
            assert other["score"] == pytest.approx(score, abs=1e-4)
        else:
            assert mask.any()
            assert other["score"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("version", [1, 2])
def test_a_sam_saved_in_half_precision_answers_in_float32(data, tmp_path, version, kind):
    transformers = pytest.importorskip("transformers")
    folder, _ = data
    path = small_sam(tmp_path / "sam", version)
    network = (transformers.SamModel if version == 1 else transformers.Sam2Model).from_pretrained(path)
    found = {}
    for name, weights in ("half", kind), ("whole", torch.float32):  # the same numbers
        network.to(kind).to(weights).save_pretrained(path)
        assert main(arguments(folder, tmp_path / f"{name}.json", f"sam:{path}")) == 0
        found[name] = (tmp_path / f"{name}.json").read_bytes()
    assert found["half"] == found["whole"]


def test_a_blend_with_proposals_pixel_by_pixel():
    generator = torch.Generator().manual_seed(0)
    target = torch.repeat_interleave(torch.arange(3), torch.tensor([20, 7, 13]))
    semantic, instance, proposed = torch.rand(3, 40, generator=generator, dtype=torch.float64)
    quality = torch.tensor([0.9, 0.0, 0.6], dtype=torch.float64)
    given = torch.tensor([0.7, 0.8, 0.0], dtype=torch.float64)
    pixels = BoxPixels(target, target, target, torch.ones_like(target), target, target)
    keys = 0.25, (0.7, 0.7), 0.4, 0.7
    labels = pseudo_labels(semantic, instance, pixels, quality, *keys, proposal=(proposed, given))
    for i, t in enumerate(target.tolist()):
        own = 0.25 * semantic[i] + 0.75 * instance[i]
        blend = (quality[t] * own + given[t] * proposed[i]) / (quality[t] + given[t])
        assert labels.blend[i].item() == pytest.approx(blend.item(), rel=1e-9)
        assert labels.final[i] == (1 if blend >= 0.7 else 0 if blend < 0.4 else -1)
    means = (quality**2 + given**2) / (quality + given)
    torch.testing.assert_close(labels.quality, means)
    plain = pseudo_labels(semantic, instance, pixels, quality, *keys)
    torch.testing.assert_close(labels.blend[target == 2], plain.blend[target == 2])


def test_proposals_go_through_the_quality_gate():
    """Two objects; the confidence of the first is high, but its mask fills a part of its box only."""
    cfg = sim_m2f.get_cfg()
    cfg.MODEL.SIM.GATED_MASKS.MIN_QUALITY = 0.5
    boxes = torch.tensor([[8.0, 8.0, 40.0, 40.0], [20.0, 4.0, 60.0, 30.0]])
    masks = torch.zeros(2, 64, 64, dtype=torch.bool)
    masks[0, 8:20, 8:40], masks[1, 4:30, 22:60] = True, True
    target = {"boxes": boxes, "labels": torch.zeros(2, dtype=torch.int64), "proposals": masks}
    objects = flatten_targets(
        [{**target, "proposal_scores": torch.tensor([0.9, 0.8])}], (16, 16), torch.device("cpu")
    )
    expected = [0.9 * 12 / 32, 0.8 * 38 / 40]
    assert objects.proposals.quality.tolist() == pytest.approx(expected)
    shares = masks.double().reshape(2, 16, 4, 16, 4).mean((2, 4))
    torch.testing.assert_close(objects.proposals.masks.double(), shares)
    pseudo = PseudoMasks(cfg)
    layers = Layers(torch.zeros(1, 1, 3, 81), torch.randn(1, 1, 3, 16, 16))
    match = build_criterion(_boxes(cfg)).matcher(layers, objects)
    evidence = pseudo.evidence(layers, torch.randn(1, 256, 16, 16), objects, match)
    y, x, t = evidence.pixels.y, evidence.pixels.x, evidence.pixels.target
    torch.testing.assert_close(evidence.proposal[0].double(), shares[t, y, x])
    labels = pseudo.labels(evidence)
    quality = evidence.positive.quality
    without = Evidence(evidence.pixels, evidence.semantic, evidence.instance, evidence.positive)
    plain = pseudo.labels(without)
    torch.testing.assert_close(labels.blend[t == 0], plain.blend[t == 0])
    mixed = (quality[1] * plain.blend + expected[1] * shares[t, y, x].float()) / (quality[1] + expected[1])
    torch.testing.assert_close(labels.blend[t == 1], mixed[t == 1])


def _boxes(cfg):
    cfg = cfg.clone()
    cfg.MODEL.SIM.SUPERVISION = "box"
    return cfg


def proposed(folder: Path, content: dict, change=None) -> Path:
    """A file with a proposal for every second annotation: its own mask."""
    content = json.loads(json.dumps(content))
    for number, annotation in enumerate(content["annotations"]):
        annotation["score"] = round(0.7 + 0.3 * (number % 7) / 7, 3)
        if number % 2:
            del annotation["segmentation"]
    if change:
        change(content)
    (folder / "proposals.json").write_text(json.dumps(content))
    return folder / "proposals.json"


@pytest.fixture
def training_cfg(small_cfg, tmp_path):
    """The embedded shapes, every second with a proposal, which is its true mask."""
    source = find_source("shapes_train")
    content = json.loads(source.annotations.read_text())
    small_cfg.DATASETS.TRAIN_ANNOTATIONS = str(source.annotations)
    small_cfg.DATASETS.TRAIN_IMAGES = str(source.image_root)
    small_cfg.DATASETS.TRAIN_PROPOSALS = str(proposed(tmp_path, content))
    small_cfg.MODEL.SIM.GATED_MASKS.ENABLED = small_cfg.MODEL.SIM.TEACHER.ENABLED = True
    return small_cfg


@pytest.mark.slow
def test_proposals_follow_the_augmentation(training_cfg):
    """Where they are the true masks they look as these do, in every crop; the others are empty."""
    cfg = training_cfg
    cfg.MODEL.SIM.SUPERVISION = "mixed"
    targets = next(iter(train_loader(cfg)))["targets"]
    masks, given, scores = (
        torch.cat([target[name] for target in targets]) for name in ("masks", "proposals", "proposal_scores")
    )
    some = scores > 0
    assert 0 < some.sum() < len(some)
    assert torch.equal(given[some], masks[some])
    assert not given[~some].any()
    content = json.loads(Path(cfg.DATASETS.TRAIN_PROPOSALS).read_text())
    known = {annotation["score"] for annotation in content["annotations"]}
    assert {round(score, 3) for score in scores[some].tolist()} <= known


@pytest.mark.slow
def test_segmentations_stay_unread_when_proposals_are(training_cfg):
    cfg = training_cfg
    cfg.MODEL.SIM.SUPERVISION = "box"
    target = next(iter(train_loader(cfg)))["targets"][0]
    assert "masks" not in target
    assert target["proposals"].shape[1:] == (cfg.INPUT.IMAGE_SIZE, cfg.INPUT.IMAGE_SIZE)


@pytest.mark.slow
def test_whole_masks_are_learned_from_proposals_at_once(training_cfg):
    """An untrained teacher's own masks do not pass the gate. In the second step objects are pasted, too."""
    sim, training_cfg.SOLVER.IMS_PER_BATCH = training_cfg.MODEL.SIM, 4
    sim.SUPERVISION, sim.GATED_MASKS.START, sim.GATED_MASKS.WARMUP = "box", 0.0, 0.0
    sim.COPY_PASTE.ENABLED, sim.COPY_PASTE.START, sim.COPY_PASTE.PROBABILITY = True, 0.0, 1.0
    losses = {}
    for file in (training_cfg.DATASETS.TRAIN_PROPOSALS, ""):
        training_cfg.DATASETS.TRAIN_PROPOSALS = file
        trainer, batches = Trainer(training_cfg), iter(train_loader(training_cfg))
        losses[file] = [trainer.step(next(batches))["loss_gated_masks"].item() for _ in range(2)]
    with_proposals, without = losses.values()
    assert all(loss > 0 for loss in with_proposals)
    assert without == [0, 0]


def test_proposals_that_nothing_learns_from_are_refused(training_cfg):
    cfg = training_cfg
    cfg.MODEL.SIM.SUPERVISION = "box"
    validate(cfg)
    cfg.MODEL.SIM.GATED_MASKS.ENABLED = False
    with pytest.raises(UserError, match=r"TRAIN_PROPOSALS: no loss learns from them; set MODEL\.SIM\.GATED"):
        validate(cfg)
    cfg.MODEL.SIM.GATED_MASKS.ENABLED, cfg.MODEL.SIM.SUPERVISION = True, "mask"
    with pytest.raises(UserError, match="TRAIN_PROPOSALS"):
        validate(cfg)
    cfg.MODEL.SIM.SUPERVISION = "box"
    cfg.DATASETS.TRAIN_ANNOTATIONS = cfg.DATASETS.TRAIN_IMAGES = ""
    cfg.DATASETS.TRAIN = ("shapes_train", "shapes_val")
    with pytest.raises(UserError, match="TRAIN_PROPOSALS: has the ids of one data set"):
        train_loader(cfg)


@pytest.mark.slow
def test_proposals_are_parsed_once_per_node(training_cfg, monkeypatch):
    """A rank that is given what the first one of its node has read needs no file."""
    read: list = []
    monkeypatch.setattr(loader, "once_per_node", lambda work: read.append(work()) or read[0])
    train_loader(training_cfg, rank=0, world_size=2)
    Path(training_cfg.DATASETS.TRAIN_PROPOSALS).unlink()
    monkeypatch.setattr(loader, "once_per_node", lambda _: read[0])
    batch = next(iter(train_loader(training_cfg, rank=1, world_size=2)))
    assert all("proposals" in target for target in batch["targets"])


def _first(key, value):
    return lambda content: content["annotations"][0].update({key: value})


FAULTS = {
    "no score": (_first("score", None), "annotation id 1: has score None"),
    "score above one": (_first("score", 1.5), "annotation id 1: has score 1.5"),
    "of another image": (_first("image_id", 2), "annotation id 1: belongs to image id 2, not 5"),
    "another size": (_first("segmentation", {"size": [3, 4], "counts": "52"}), "segmentation has size"),
    "no polygon": (_first("segmentation", [[1, 2, 3]]), "segmentation is not a list of polygons"),
    "other ids": (
        lambda content: [each.update(id=each["id"] + 1000) for each in content["annotations"]],
        "has no mask for an annotation of",
    ),
    "no annotations": (lambda content: content.pop("annotations"), "has no list 'annotations'"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_broken_file_of_proposals_is_one_line(data, name):
    folder, content = data
    change, said = FAULTS[name]
    path = proposed(folder, content, change)
    boxes = read_coco(DatasetSource("boxes", folder / "boxes.json", folder), read_masks=False)
    with pytest.raises(UserError) as error:
        with_proposals(boxes, path)
    (line,) = str(error.value).splitlines()
    assert str(path) in line
    assert said in line
