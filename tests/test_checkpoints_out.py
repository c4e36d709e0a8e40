"""Exports: what is written returns bit for bit, and other programs get the same masks from it."""

import json

import pytest
import torch
from other_networks import CLASSES, assert_same_weights, small_network, stirred
from PIL import Image
from sound_folder import contents

from sim_m2f import cli
from sim_m2f.config import get_cfg
from sim_m2f.errors import UserError
from sim_m2f.modeling import build_model
from sim_m2f.segmenter import Segmenter, from_pretrained
from sim_m2f.weights.checkpoint import load_checkpoint, replace_checkpoint
from sim_m2f.weights.export import export
from sim_m2f.weights.folder import TrainedNetwork
from sim_m2f.weights.transformers import transformers_config

FILES = {"safetensors": "folder", "transformers": "folder", "detectron2": "model.pth"}


def trained(network, cfg) -> TrainedNetwork:
    return TrainedNetwork(network, cfg, CLASSES, metrics={})


@pytest.mark.parametrize("backbone", ["ResNet-50", "ResNet-18", "MSRA", "Swin"])
@pytest.mark.parametrize("format_name", FILES)
@pytest.mark.slow
def test_what_is_written_returns_bit_for_bit(tmp_path, backbone, format_name):
    cfg, network = small_network(backbone, seed=1)
    output = tmp_path / FILES[format_name]
    export(trained(network, cfg), format_name, output)
    other = stirred(cfg, seed=2)
    report = load_checkpoint(other, output, complete=True)
    assert_same_weights(other, network)
    assert not report.skipped


@pytest.mark.parametrize(
    ("norm", "format_name"), [("BN", "detectron2"), ("GN", "detectron2"), ("BN", "transformers")]
)
@pytest.mark.slow
def test_trained_norms_return_too(tmp_path, norm, format_name):
    cfg, network = small_network("ResNet-18", overrides=["MODEL.RESNETS.NORM", norm])
    export(trained(network, cfg), format_name, tmp_path / "written")
    other = stirred(cfg, seed=2)
    load_checkpoint(other, tmp_path / "written", complete=True)
    assert_same_weights(other, network)


def test_the_original_finds_versions_and_buffers(tmp_path):
    """It renames the head's weights unless they are of version 2; FrozenBatchNorm2d is of version 3."""
    cfg, network = small_network("Swin")
    export(trained(network, cfg), "detectron2", tmp_path / "model.pth")
    model = torch.load(tmp_path / "model.pth", weights_only=True)["model"]
    assert model._metadata["sem_seg_head"]["version"] == 2
    assert model._metadata["sem_seg_head.predictor"]["version"] == 2
    torch.testing.assert_close(model["criterion.empty_weight"], torch.tensor([1.0, 1.0, 1.0, 0.1]))
    index = model["backbone.layers.0.blocks.1.attn.relative_position_index"]
    places = [(y, x) for y in range(7) for x in range(7)]
    for first, (y, x) in enumerate(places):
        for second, (v, u) in enumerate(places):
            assert index[first, second] == (y - v + 6) * 13 + (x - u + 6)
    cfg, network = small_network("ResNet-18")
    export(trained(network, cfg), "detectron2", tmp_path / "model.pth")
    model = torch.load(tmp_path / "model.pth", weights_only=True)["model"]
    assert model._metadata["backbone.res5.1.conv2.norm"]["version"] == 3


@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers")


@pytest.mark.parametrize("backbone", ["ResNet-18", "MSRA", "Swin"])
@pytest.mark.slow
def test_transformers_loads_the_folder_and_gives_the_same_masks(tmp_path, transformers, backbone):
    cfg, network = small_network(backbone)
    export(trained(network, cfg), "transformers", tmp_path)
    theirs, info = transformers.Mask2FormerForUniversalSegmentation.from_pretrained(
        tmp_path, output_loading_info=True
    )
    unused = ("swin.layernorm.weight", "swin.layernorm.bias")  # behind the feature maps
    assert all(name.endswith(unused) for name in info["missing_keys"])
    assert not info["mismatched_keys"]
    assert [theirs.config.id2label[label] for label in range(3)] == CLASSES
    images = torch.randn(1, 3, 96, 160)  # no multiple of Swin's windows
    with torch.no_grad():
        ours, found = network(images), theirs.eval()(images, output_auxiliary_logits=True)
    torch.testing.assert_close(ours["pred_masks"], found.masks_queries_logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours["pred_logits"], found.class_queries_logits, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_the_image_processor_and_the_pipeline_take_the_folder(tmp_path, transformers):
    cfg, network = small_network("ResNet-18")
    export(trained(network, cfg), "transformers", tmp_path)
    image = Image.effect_noise((90, 60), 80).convert("RGB")

    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path)
    pixels = processor(image, return_tensors="pt")["pixel_values"]
    seen = []
    network.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    Segmenter(network, cfg, CLASSES).predict(image)
    assert pixels.shape == seen[0].shape
    assert (pixels - seen[0]).abs().max() < 0.03  # the libraries round resized pixels differently

    segment = transformers.pipeline("image-segmentation", model=str(tmp_path), image_processor=processor)
    found = segment(image, subtask="instance", threshold=0.0)
    assert {item["label"] for item in found} <= set(CLASSES)
    assert all(item["mask"].size == image.size for item in found)


@pytest.mark.slow
def test_a_network_returns_from_transformers_with_its_classes(tmp_path):
    cfg, network = small_network("Swin")
    export(trained(network, cfg), "transformers", tmp_path)
    model = from_pretrained(tmp_path, device="cpu")
    assert model.class_names == CLASSES
    assert model.cfg.INPUT.MIN_SIZE_TEST == 64
    assert_same_weights(model.network, network)


def test_a_network_of_two_classes_without_names_returns_from_transformers(tmp_path):
    """transformers leaves out of its file what is its default: two classes of these names."""
    names = ["LABEL_0", "LABEL_1"]
    cfg, network = small_network("ResNet-18", overrides=["MODEL.SEM_SEG_HEAD.NUM_CLASSES", "2"])
    export(TrainedNetwork(network, cfg, names, {}), "transformers", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["id2label"], config["label2id"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = from_pretrained(tmp_path, device="cpu")
    assert model.class_names == names
    assert_same_weights(model.network, network)


def test_formats_refuse_networks_that_they_do_not_have(tmp_path, small_cfg):
    timms = trained(build_model(small_cfg), small_cfg)
    for format_name in ("detectron2", "transformers"):
        with pytest.raises(UserError, match="resnet10t") as raised:
            export(timms, format_name, tmp_path / "out")
        assert "\n" not in str(raised.value)
    cfg, network = small_network("ResNet-18", overrides=["MODEL.RESNETS.NORM", "GN"])
    with pytest.raises(UserError, match="GN"):
        export(trained(network, cfg), "transformers", tmp_path / "out")
    cfg, network = small_network("ResNet-18")
    with pytest.raises(UserError, match="2 class names"):
        export(TrainedNetwork(network, cfg, CLASSES[:2], {}), "transformers", tmp_path / "out")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("MODEL.RESNETS.DEPTH", "26"),
        ("MODEL.SEM_SEG_HEAD.DEFORMABLE_TRANSFORMER_ENCODER_IN_FEATURES", "['res4', 'res5']"),
    ],
)
def test_transformers_has_no_such_network(key, value):
    cfg = get_cfg()
    cfg.merge_from_list([key, value])
    with pytest.raises(UserError, match=key.rpartition(".")[2]) as raised:
        transformers_config(cfg, [str(label) for label in range(80)])
    assert "\n" not in str(raised.value)


def test_a_home_that_is_not_known_is_one_line(tmp_path, capsys):
    written = ["--format", "onnx", "--output", str(tmp_path / "x.onnx")]
    assert cli.main(["export", "~nobody-here/x", *written]) == 2
    assert "the home folder that its ~ stands for is not known" in capsys.readouterr().err


@pytest.mark.slow
def test_command(tmp_path, capsys):
    cfg, network = small_network("ResNet-18", seed=1)
    Segmenter(network, cfg, CLASSES).save_pretrained(tmp_path / "trained")
    output = tmp_path / "original.pth"
    arguments = ["export", str(tmp_path / "trained"), "--format", "detectron2", "--output", str(output)]
    assert cli.main(arguments) == 0
    assert str(output) in capsys.readouterr().out
    other = stirred(cfg, seed=2)
    load_checkpoint(other, output, complete=True)
    assert_same_weights(other, network)
    assert cli.main([*arguments[:-1], str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("error: ")


@pytest.mark.parametrize(
    ("format_name", "output", "message"),
    [
        ("safetensors", "run", "would replace"),
        ("transformers", ".", "would replace"),
        ("safetensors", "another", "another: holds a run already (last_checkpoint)"),
        ("detectron2", "run/model_final.pth", "would lie in run, which is read"),
        ("onnx", "run/model_final.pth", "would replace run/model_final.pth"),
        ("safetensors", "repository", "README.md: is of something else"),
    ],
)
def test_an_export_replaces_nothing_that_is_needed(
    tmp_path, monkeypatch, capsys, format_name, output, message
):
    monkeypatch.chdir(tmp_path)
    cfg, network = small_network("ResNet-18")
    for name in ("run", "another"):
        replace_checkpoint(tmp_path / name / "model_final.pth", {"model": network.state_dict()}, None)
        (tmp_path / name / "config.yaml").write_text(cfg.dump())
    (tmp_path / "repository").mkdir()
    (tmp_path / "repository/README.md").write_text("# A program")
    before = contents(tmp_path)
    assert cli.main(["export", "run", "--format", format_name, "--output", output]) == 2
    assert message in capsys.readouterr().err
    assert contents(tmp_path) == before


@pytest.mark.slow
def test_a_checkpoint_is_not_replaced_by_its_export(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    cfg, network = small_network("ResNet-18")
    torch.save({"model": network.state_dict()}, "model.pth")
    (tmp_path / "config.yaml").write_text(cfg.dump())
    command = ["export", "model.pth", "--config-file", "config.yaml", "--format", "detectron2", "--output"]
    for output in ("model.pth", "config.yaml"):
        assert cli.main([*command, output]) == 2
        assert f"would replace {output}" in capsys.readouterr().err
    assert cli.main([*command, "original.pth"]) == 0
    assert cli.main([*command, "original.pth"]) == 0


@pytest.mark.slow
def test_an_export_is_written_anew_over_the_one_before(tmp_path):
    cfg, network = small_network("ResNet-18")
    Segmenter(network, cfg, CLASSES).save_pretrained(tmp_path / "trained")
    for _ in range(2):
        arguments = ["--format", "safetensors", "--output", str(tmp_path / "exported")]
        assert cli.main(["export", str(tmp_path / "trained"), *arguments]) == 0
