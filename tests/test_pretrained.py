"""The Python interface: folders in, predictions out, folders out again."""

import json
import re
import shutil
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT, SMALL, half_written, held
from PIL import Image
from pycocotools import mask as coco_mask

import sim_m2f
from sim_m2f.cli import main
from sim_m2f.data.class_names import class_names, coco_names
from sim_m2f.errors import UserError
from sim_m2f.modeling.postprocess import instances
from sim_m2f.report.drawing import draw
from sim_m2f.segmenter import Segmenter
from sim_m2f.weights.checkpoint import save_checkpoint
from sim_m2f.weights.folder import model_card

NAMES = ["crescent", "ring", "star"]


@pytest.fixture
def model():
    """A small network with random weights that sees images at 64 pixels."""
    cfg = sim_m2f.get_cfg()
    cfg.merge_from_file(ROOT / "configs/shapes/sim_R18.yaml")
    cfg.merge_from_list([*SMALL, "MODEL.SEM_SEG_HEAD.NUM_CLASSES", "3", "INPUT.MIN_SIZE_TEST", "64"])
    cfg.merge_from_list(
        ["DATASETS.TEST_ANNOTATIONS", "/home/me/val.json", "DATASETS.TEST_IMAGES", "/home/me"]
    )
    return sim_m2f.Segmenter(sim_m2f.build_model(cfg), cfg, NAMES, {"segm/AP": 12.34, "segm/APl": None})


@pytest.fixture
def image() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (50, 70, 3), np.uint8)


def test_predictions_are_those_of_the_network_at_the_images_size(model, image):
    """Height 50 is resized to 64, width 70 to 90, padded to 96; normalised by hand here."""
    detected = model.predict(image)
    resized = torch.nn.functional.interpolate(
        torch.from_numpy(image).permute(2, 0, 1)[None].float(),
        size=(64, 90),
        mode="bilinear",
        antialias=True,
    ).round()
    normalised = (resized - torch.tensor([123.675, 116.28, 103.53]).view(3, 1, 1)) / torch.tensor(
        [58.395, 57.12, 57.375]
    ).view(3, 1, 1)
    with torch.no_grad():
        outputs = model.network(torch.nn.functional.pad(normalised, (0, 6)))
    (expected,) = instances(outputs, [(64, 90)], [(50, 70)], model.cfg.TEST.DETECTIONS_PER_IMAGE)
    assert len(detected) == min(8 * 3, model.cfg.TEST.DETECTIONS_PER_IMAGE)
    torch.testing.assert_close(detected.scores, expected["scores"], atol=1e-2, rtol=0)
    assert detected.masks.shape == (len(detected), 50, 70)
    assert (detected.masks == expected["masks"]).float().mean() > 0.98
    assert detected.names == [NAMES[label] for label in detected.labels.tolist()]


def test_rles_decode_to_the_masks(model, image):
    detected = model.predict(image)
    for rle, mask in zip(json.loads(json.dumps(detected.rles)), detected.masks.numpy(), strict=True):
        assert np.array_equal(coco_mask.decode(rle).astype(bool), mask)


@pytest.mark.slow
def test_all_kinds_of_images_are_the_same_image(model, image, tmp_path):
    Image.fromarray(image).save(tmp_path / "image.png")
    tensor = torch.from_numpy(image).permute(2, 0, 1)
    kinds = [tmp_path / "image.png", str(tmp_path / "image.png"), Image.fromarray(image), tensor]
    expected = model.predict(image)
    for detected in model.predict(kinds):
        assert torch.equal(detected.masks, expected.masks)
        assert torch.equal(detected.scores, expected.scores)


def test_a_threshold_leaves_out_what_is_below(model, image):
    everything = model.predict(image)
    threshold = float(everything.scores[5])
    assert torch.equal(
        model.predict(image, threshold).scores, everything.scores[everything.scores >= threshold]
    )


def test_the_orientation_of_a_photograph_is_applied(model, image, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned by a quarter
    Image.fromarray(image).save(tmp_path / "turned.png", exif=exif)
    assert model.predict(tmp_path / "turned.png").masks.shape[1:] == (70, 50)


@pytest.mark.parametrize(
    "wrong",
    [
        *(np.zeros((5, 5), np.uint8), np.zeros((5, 5, 3)), torch.zeros(5, 5, 3, dtype=torch.uint8)),
        *(np.zeros((0, 5, 3), np.uint8), torch.zeros(3, 5, 0, dtype=torch.uint8), Image.new("RGB", (0, 5))),
        *(Image.new("F", (5, 5)), Image.new("I", (5, 0)), "nowhere.jpg"),
    ],
)
def test_what_is_no_image_is_refused(model, wrong):
    with pytest.raises(UserError, match="image"):
        model.predict(wrong)


def same(one: sim_m2f.Segmenter, other: sim_m2f.Segmenter) -> bool:
    weights = other.network.state_dict()
    return all(torch.equal(weight, weights[name]) for name, weight in one.network.state_dict().items())


def test_a_saved_folder_gives_the_same_model(model, image, tmp_path):
    model.save_pretrained(tmp_path / "folder")
    assert {file.name for file in (tmp_path / "folder").iterdir()} == {
        *("model.safetensors", "config.yaml", "classes.json", "README.md")
    }
    again = sim_m2f.from_pretrained(tmp_path / "folder", device="cpu")
    assert same(model, again)
    assert again.class_names == NAMES
    assert torch.equal(again.predict(image).masks, model.predict(image).masks)
    assert "/home/me" not in (tmp_path / "folder/config.yaml").read_text()


def test_the_model_card_has_metadata_and_figures(model, tmp_path):
    model.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    metadata = yaml.safe_load(card.split("---")[1])
    assert metadata["library_name"] == "sim-m2f"
    assert metadata["pipeline_tag"] == "image-segmentation"
    assert "box-supervised" in metadata["tags"]
    assert "| segm/AP | 12.3 |" in card
    assert "segm/APl" not in card
    assert "crescent, ring, star" in card


def test_the_model_card_tells_of_boxes_and_masks(model):
    model.cfg.defrost()
    model.cfg.MODEL.SIM.SUPERVISION = "mixed"
    try:
        assert "learned from bounding boxes, and from masks where there are any." in model_card(model.trained)
    finally:
        model.cfg.MODEL.SIM.SUPERVISION = "box"


def test_names_of_classes_are_no_markup(model, tmp_path):
    model.class_names[:] = ["<b>ring", "a|b", "# star"]
    model.save_pretrained(tmp_path)
    assert r"Classes: \<b\>ring, a\|b, \# star." in (tmp_path / "README.md").read_text()


def test_a_name_for_every_class(model, tmp_path):
    model.save_pretrained(tmp_path)
    (tmp_path / "classes.json").write_text('{"class_names": ["ring"]}')
    with pytest.raises(UserError, match="has 1 names, the network 3 classes"):
        sim_m2f.from_pretrained(tmp_path)


def test_the_folder_of_a_run_gives_its_last_weights(model, image, tmp_path):
    (tmp_path / "config.yaml").write_text(model.cfg.dump())
    save_checkpoint(tmp_path / "model_0000009.pth", {"model": model.network.state_dict()})
    (tmp_path / "last_checkpoint").write_text("model_0000009.pth")
    (tmp_path / "inference").mkdir()
    (tmp_path / "inference/metrics.json").write_text('{"segm/AP": 5.0}')
    run = sim_m2f.from_pretrained(tmp_path, device="cpu")
    assert same(model, run)
    assert run.class_names == ["class 0", "class 1", "class 2"]
    assert run.metrics == {"segm/AP": 5.0}


def test_what_was_trained_in_the_folder_of_a_network_comes_first(model, tmp_path):
    model.save_pretrained(tmp_path)
    trained = {name: weight + 1 for name, weight in model.network.state_dict().items()}
    save_checkpoint(tmp_path / "model_0000009.pth", {"model": trained})
    (tmp_path / "last_checkpoint").write_text("model_0000009.pth")
    found = sim_m2f.from_pretrained(tmp_path, device="cpu").network.state_dict()
    assert all(torch.equal(found[name], trained[name]) for name in trained)


def test_weights_come_before_what_a_trainer_leaves_beside_them(model, tmp_path):
    model.save_pretrained(tmp_path)
    torch.save(model.network.state_dict(), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    save_checkpoint(tmp_path / "rng_state.pth", {"cpu": torch.zeros(8)})
    assert same(model, sim_m2f.from_pretrained(tmp_path, device="cpu"))


def test_no_run_begins_in_the_folder_of_a_network(model, tmp_path, capsys):
    model.save_pretrained(tmp_path)
    (tmp_path / "run.yaml").write_text(model.cfg.dump())
    assert main(["train", "--config-file", str(tmp_path / "run.yaml"), "OUTPUT_DIR", str(tmp_path)]) == 2
    assert "holds a network already (model.safetensors)" in capsys.readouterr().err


@pytest.mark.slow
def test_a_checkpoint_and_a_configuration_give_a_model(model, tmp_path):
    (tmp_path / "network.yaml").write_text(model.cfg.dump())
    save_checkpoint(tmp_path / "model.pth", {"model": model.network.state_dict()})
    assert same(model, sim_m2f.from_pretrained(tmp_path / "model.pth", tmp_path / "network.yaml", "cpu"))
    with pytest.raises(UserError, match="give its config"):
        sim_m2f.from_pretrained(tmp_path / "model.pth")


def test_names_of_classes(model, tmp_path):
    cfg = sim_m2f.get_cfg()
    cfg.merge_from_list(["DATASETS.TEST_ANNOTATIONS", "", "MODEL.SEM_SEG_HEAD.NUM_CLASSES", "2"])
    categories = [{"id": 9, "name": "b"}, {"id": 3, "name": "a"}]
    content = {"images": [{"id": 1}], "categories": categories}
    (tmp_path / "val.json").write_text(json.dumps(content))
    cfg.DATASETS.TEST_ANNOTATIONS, cfg.DATASETS.TEST_IMAGES = str(tmp_path / "val.json"), str(tmp_path)
    assert class_names(cfg) == ["a", "b"]
    assert len(coco_names()) == 80
    assert (coco_names()[0], coco_names()[79]) == ("person", "toothbrush")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "neither config.yaml nor config.json"),
        ({"config.yaml": ""}, "not a|without model.safetensors"),
        ({"config.yaml": "SEED: 1", "a.pth": "", "b.pth": ""}, "without model.safetensors"),
        ({"config.json": '{"model_type": "bert"}', "model.safetensors": ""}, "not of Mask2Former"),
        ({"config.json": "{", "model.safetensors": ""}, "not JSON"),
        ({"config.json": "[]", "model.safetensors": ""}, "holds a JSON list"),
        ({"config.json": '{"model_type": "mask2former", "id2label": ["a"]}'}, "id2label is an object"),
        ({"config.json": '{"model_type": "mask2former", "id2label": {"a": "b"}}'}, "id2label has a number"),
        ({"config.json": '{"model_type": "mask2former", "backbone_config": "swin"}'}, "backbone_config is"),
        (
            {"config.yaml": "SEED: 1", "model.safetensors": "", "classes.json": "[]"},
            "classes.json: holds a JSON list",
        ),
    ],
)
def test_a_folder_of_something_else_is_named(tmp_path, files, message):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        sim_m2f.from_pretrained(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_a_configuration_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "config.json").mkdir()
    with pytest.raises(UserError, match=r"config\.json: cannot be read \(Is a directory\)"):
        sim_m2f.from_pretrained(tmp_path)


class Hub:
    """huggingface_hub.HfApi without the network: what would be sent is noted."""

    def __init__(self):
        self.created, self.files = [], {}

    def create_repo(self, repo_id, **options):
        self.created.append((repo_id, options))
        return huggingface_hub.RepoUrl(f"https://huggingface.co/{repo_id}")

    def upload_folder(self, *, repo_id, folder_path):
        self.files[repo_id] = {file.name: file.read_bytes() for file in Path(folder_path).iterdir()}


def test_an_uploaded_network_is_the_saved_one(model, tmp_path, monkeypatch):
    hub = Hub()
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: hub)
    assert model.push_to_hub("somebody/stars", private=True) == "https://huggingface.co/somebody/stars"
    assert hub.created == [("somebody/stars", {"exist_ok": True, "private": True})]
    model.save_pretrained(tmp_path)
    assert hub.files == {"somebody/stars": {file.name: file.read_bytes() for file in tmp_path.iterdir()}}


@pytest.mark.slow
def test_a_device_that_does_not_exist_is_named(model, tmp_path):
    model.save_pretrained(tmp_path)
    for device in ("abacus", "meta"):
        with pytest.raises(UserError, match=f"device {device}: cannot be used"):
            sim_m2f.from_pretrained(tmp_path, device=device)


def test_a_folder_that_does_not_exist_is_named():
    with pytest.raises(UserError, match=re.escape("no/such/folder: no such folder or file")):
        sim_m2f.from_pretrained("no/such/folder")


@pytest.mark.slow
def test_the_command_writes_a_coco_json_and_overlays(model, image, tmp_path, capsys):
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "images").mkdir()
    for name in ("b.png", "a.jpg"):
        Image.fromarray(image).save(tmp_path / "images" / name)
    (tmp_path / "images/notes.txt").write_text("no image")
    folders = ["--model", str(tmp_path / "model"), "--output", str(tmp_path / "out")]
    assert main(["predict", *folders, "--threshold", "0.01", str(tmp_path / "images")]) == 0
    content = json.loads((tmp_path / "out/predictions.json").read_text())
    assert [image["file_name"] for image in content["images"]] == ["a.jpg", "b.png"]
    assert [category["name"] for category in content["categories"]] == NAMES
    second = [item for item in content["annotations"] if item["image_id"] == content["images"][1]["id"]]
    detected = model.predict(image, 0.01)
    assert [item["score"] for item in second] == pytest.approx(detected.scores.tolist())
    for item, mask in zip(second, detected.masks.numpy(), strict=True):
        assert np.array_equal(coco_mask.decode(item["segmentation"]).astype(bool), mask)
        assert item["area"] == mask.sum()
    assert Image.open(tmp_path / "out/overlays/a.jpg.png").size[0] >= 70
    assert str(tmp_path / "out") in capsys.readouterr().out


@pytest.mark.slow
def test_an_overlay_of_16_bits_shows_what_the_network_saw(model, tmp_path):
    """A ramp over all values; Pillow alone would make all but the darkest 255 of them white."""
    model.save_pretrained(tmp_path / "model")
    ramp = np.linspace(0, 65535, 50 * 70).round().astype(np.uint16).reshape(50, 70)
    Image.fromarray(ramp).save(tmp_path / "a.png")
    folders = ["--model", str(tmp_path / "model"), "--output", str(tmp_path / "out")]
    assert main(["predict", *folders, "--threshold", "1", str(tmp_path / "a.png")]) == 0
    overlay = np.asarray(Image.open(tmp_path / "out/overlays/a.png.png").convert("L").resize((70, 50)))
    np.testing.assert_allclose(overlay, ramp / 65535 * 255, atol=8)
    shown = np.asarray(draw(Image.open(tmp_path / "a.png"), [], 70).convert("L"))
    np.testing.assert_allclose(shown, ramp / 65535 * 255, atol=8)


@pytest.mark.slow
def test_what_a_killed_call_left_half_written_goes_unless_one_is_at_work(model, image, tmp_path, capsys):
    model.save_pretrained(tmp_path / "model")
    Image.fromarray(image).save(tmp_path / "a.png")
    out = tmp_path / "out"
    written = "predictions.json", "overlays/a.png.png", "overlays/b/1.png"
    left = half_written(*(out / name for name in written))
    given = ["predict", "--model", str(tmp_path / "model"), "--output", str(out), str(tmp_path / "a.png")]
    with held(out / ".lock"):
        assert main(given) == 2
        assert f"{out}: another process is at work here" in capsys.readouterr().err
        assert all(file.exists() for file in left)
    assert main(given) == 0
    files = {file.relative_to(out).as_posix() for file in out.rglob("*") if file.is_file()}
    assert files == {".lock", "predictions.json", "overlays/a.png.png"}


@pytest.mark.slow
def test_images_of_the_same_name_stay_apart(model, image, tmp_path):
    model.save_pretrained(tmp_path / "model")
    for name in ("a/1.jpg", "a/1.png", "b/1.jpg", "b/2.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.fromarray(image).save(tmp_path / name)
    folders = ["--model", str(tmp_path / "model"), "--output", str(tmp_path / "out")]
    images = [tmp_path / "a", tmp_path / "b", tmp_path / "a/1.jpg"]  # the last one for the second time
    assert main(["predict", *folders, *map(str, images)]) == 0
    content = json.loads((tmp_path / "out/predictions.json").read_text())
    names = ["a/1.jpg", "1.png", "b/1.jpg", "2.jpg"]
    assert [image["file_name"] for image in content["images"]] == names
    overlays = tmp_path / "out/overlays"
    written = {file.relative_to(overlays).as_posix() for file in overlays.rglob("*.png")}
    assert written == {f"{name}.png" for name in names}


@pytest.mark.slow
def test_overlays_of_an_earlier_call_are_no_images(model, image, tmp_path, monkeypatch):
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "photos").mkdir()
    Image.fromarray(image).save(tmp_path / "photos/a.png")
    monkeypatch.chdir(tmp_path / "photos")
    for output in ("predictions", "."):
        for _ in range(2):
            assert main(["predict", "--model", str(tmp_path / "model"), "--output", output, "."]) == 0
        content = json.loads(Path(output, "predictions.json").read_text())
        assert [image["file_name"] for image in content["images"]] == ["a.png"]
        shutil.rmtree(Path(output, "overlays"))


def test_the_command_without_images_says_so(model, tmp_path, capsys):
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "empty").mkdir()
    folders = ["--model", str(tmp_path / "model"), "--output", str(tmp_path / "out")]
    assert main(["predict", *folders, str(tmp_path / "empty")]) == 2
    assert "holds no image" in capsys.readouterr().err


@pytest.mark.slow
def test_an_overlay_that_cannot_be_written_costs_no_prediction(model, image, tmp_path, capsys):
    model.save_pretrained(tmp_path / "model")
    Image.fromarray(image).save(tmp_path / "a.png")
    (tmp_path / "out/overlays/a.png.png").mkdir(parents=True)
    arguments = ["predict", "--model", str(tmp_path / "model"), "--output", str(tmp_path / "out")]
    assert main([*arguments, str(tmp_path / "a.png")]) == 2
    assert "a.png.png: cannot be written" in capsys.readouterr().err
    assert len(json.loads((tmp_path / "out/predictions.json").read_text())["images"]) == 1


def test_a_threshold_that_no_score_reaches_is_refused(model, tmp_path, capsys):
    assert main(["predict", "--model", str(tmp_path), "--threshold", "2", str(tmp_path)]) == 2
    assert "--threshold is 2.0" in capsys.readouterr().err


def test_a_missing_image_is_called_missing(model):
    with pytest.raises(UserError, match=r"^none\.png: is missing"):
        model.predict("none.png")


@pytest.mark.slow
@pytest.mark.parametrize("ended", [False, True])
def test_an_image_without_memory_and_ctrl_c_cost_no_other_one(
    model, image, tmp_path, capsys, monkeypatch, ended
):
    model.save_pretrained(tmp_path / "model")
    for name in "abcd":
        Image.fromarray(image).save(tmp_path / f"{name}.png")
    predict, images = Segmenter.predict, []

    def fails(self, *given, **options):
        images.append(given)
        if len(images) == 4 and ended:
            raise KeyboardInterrupt
        if len(images) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return predict(self, *given, **options)

    monkeypatch.setattr(Segmenter, "predict", fails)
    folders = ["--model", str(tmp_path / "model"), "--output", str(tmp_path / "out")]
    assert main(["predict", *folders, *(str(tmp_path / f"{name}.png") for name in "abcd")]) == (
        130 if ended else 2
    )
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    advice = "out of memory (CUDA out of memory); take a smaller image, or --device cpu"
    assert errors == ([] if ended else [f"error: {tmp_path / 'b.png'}: {advice}"])
    content = json.loads((tmp_path / "out/predictions.json").read_text())
    assert [image["file_name"] for image in content["images"]] == ["a.png", "c.png", "d.png"][: 3 - ended]


@pytest.mark.slow
def test_a_broken_image_costs_no_other_one(model, image, tmp_path, capsys):
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "a.png").write_bytes(b"no image")
    Image.fromarray(image).save(tmp_path / "b.png")
    folders = ["--model", str(tmp_path / "model"), "--output", str(tmp_path / "out")]
    assert main(["predict", *folders, str(tmp_path / "a.png"), str(tmp_path / "b.png")]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert f"{tmp_path / 'a.png'}: cannot be decoded" in line
    content = json.loads((tmp_path / "out/predictions.json").read_text())
    assert [image["file_name"] for image in content["images"]] == ["b.png"]
