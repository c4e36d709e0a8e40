"""Checkpoints of others, made as their authors publish them, are loaded; wrong ones are refused in a line."""

import collections
import json
import os
import pickle
import re
import sys

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from other_networks import assert_same_weights, small_network
from safetensors.torch import save_file

from sim_m2f.errors import UserError
from sim_m2f.weights.checkpoint import load_checkpoint
from sim_m2f.weights.detectron2 import detectron2_checkpoint
from sim_m2f.weights.names import detectron2_names, to_names
from sim_m2f.weights.pickles import multiarray, read_pickle
from sim_m2f.weights.weight_files import read_weight_file


def backbone_file(network) -> dict[str, torch.Tensor]:
    """The backbone's weights under detectron2's names, as a file of the backbone alone has them."""
    named = to_names(network.state_dict(), detectron2_names)
    return {
        name.removeprefix("backbone."): weight
        for name, weight in named.items()
        if name.startswith("backbone.") and not re.match(r"backbone\.norm\d", name)
    }


def assert_same_backbone(network, other) -> None:
    own, others = network.backbone.body.state_dict(), other.backbone.body.state_dict()
    assert all(torch.equal(own[name], others[name]) for name in own)


def test_final_model_of_mask2former(tmp_path, capsys):
    _, source = small_network("ResNet-50", seed=1)
    _, network = small_network("ResNet-50", seed=2)
    model = collections.OrderedDict(
        (name, weight.numpy()) for name, weight in to_names(source.state_dict(), detectron2_names).items()
    )
    model["criterion.empty_weight"] = np.ones(4, np.float32)
    model._metadata = {"sem_seg_head": {"version": 2}}
    (tmp_path / "model_final.pkl").write_bytes(pickle.dumps({"model": model, "__author__": "someone"}))
    report = load_checkpoint(network, tmp_path / "model_final.pkl", complete=True)
    assert_same_weights(network, source)
    assert not report.skipped
    assert "Mask2Former (detectron2)" in capsys.readouterr().out


@pytest.mark.slow
def test_training_checkpoint_of_detectron2(tmp_path):
    cfg, source = small_network("Swin", seed=1)
    _, network = small_network("Swin", seed=2)
    state = detectron2_checkpoint(source.state_dict(), cfg)
    state["optimizer"] = {"param_groups": [{"lr": np.float64(1e-4)}], "state": {0: torch.ones(2)}}
    torch.save(state, tmp_path / "model_0004999.pth")
    load_checkpoint(network, tmp_path / "model_0004999.pth", complete=True)
    assert_same_weights(network, source)


def test_training_checkpoint_of_the_detectron2_integration(tmp_path):
    """SIMTrainer's file: the network among the teacher and the criterion of the meta-architecture."""
    _, source = small_network("ResNet-18", seed=1)
    _, network = small_network("ResNet-18", seed=2)
    model = {f"network.{name}": weight for name, weight in source.state_dict().items()}
    teacher = {f"teacher.{name}": torch.zeros_like(weight) for name, weight in model.items()}
    model |= teacher | {"criterion._extra_state.step": torch.tensor(7)}
    torch.save({"model": model, "iteration": 7}, tmp_path / "model_0000007.pth")
    assert not load_checkpoint(network, tmp_path / "model_0000007.pth", complete=True).skipped
    assert_same_weights(network, source)


def test_arrays_of_another_byte_order(tmp_path):
    _, source = small_network("ResNet-18", seed=1)
    _, network = small_network("ResNet-18", seed=2)
    model = {name: weight.numpy().astype(">f4") for name, weight in source.state_dict().items()}
    (tmp_path / "model.pkl").write_bytes(pickle.dumps({"model": model}))
    load_checkpoint(network, tmp_path / "model.pkl", complete=True)
    assert_same_weights(network, source)


@pytest.mark.parametrize("zipped", [True, False])
def test_torchvision(tmp_path, zipped):
    _, network = small_network("ResNet-18", overrides=["MODEL.RESNETS.RES2_OUT_CHANNELS", "64"])
    source = torchvision.models.resnet18()
    torch.save(source.state_dict(), tmp_path / "r18.pth", _use_new_zipfile_serialization=zipped)
    report = load_checkpoint(network, tmp_path / "r18.pth")
    x = torch.randn(1, 3, 64, 64)
    expected = source.eval().layer1(source.maxpool(source.relu(source.bn1(source.conv1(x)))))
    torch.testing.assert_close(network.backbone(x)["res2"], expected, rtol=1e-4, atol=1e-5)
    assert sorted(report.skipped) == ["fc.bias", "fc.weight"]
    assert {name.partition(".")[0] for name in report.missing} == {"sem_seg_head"}


def test_torchvision_weights_in_detectron2s_zoo(tmp_path):
    """R-50.pkl: NumPy arrays under detectron2's names, and a classifier."""
    _, source = small_network("ResNet-50", seed=1)
    _, network = small_network("ResNet-50", seed=2)
    model = {name: weight.numpy() for name, weight in backbone_file(source).items()}
    content = {"model": {**model, "stem.fc.weight": np.ones((2, 3))}, "__author__": "torchvision"}
    (tmp_path / "R-50.pkl").write_bytes(pickle.dumps({**content, "matching_heuristics": True}, protocol=2))
    assert load_checkpoint(network, tmp_path / "R-50.pkl").skipped == ["stem.fc.weight"]
    assert_same_backbone(network, source)


def caffe2_name(name: str) -> str:
    """The name in MSRA's R-50.pkl of a weight that detectron2 calls ``name``."""
    norm = {"weight": "gamma", "bias": "beta", "running_mean": "running_mean", "running_var": "running_var"}
    branch = {"shortcut": "branch1", "conv1": "branch2a", "conv2": "branch2b", "conv3": "branch2c"}
    *where, last = name.split(".")
    if where[0] == "stem":
        return f"res_conv1_bn_{norm[last]}" if "norm" in where else "conv1_w"
    ending = f"bn_{norm[last]}" if "norm" in where else "w"
    return f"{where[0]}_{where[1]}_{branch[where[2]]}_{ending}"


@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.slow
def test_msra(tmp_path, capsys, folded):
    """BGR pixels of which only the mean is subtracted give what the network gives for its own RGB pixels."""
    _, source = small_network("MSRA", seed=1)
    cfg, network = small_network("MSRA", seed=2)
    theirs = {caffe2_name(name): weight.numpy() for name, weight in backbone_file(source).items()}
    if folded:
        theirs = {name: value for name, value in theirs.items() if "_running_" not in name}
    content = {"blobs": {**theirs, "fc1000_w": np.ones(3), "conv1_w_momentum": np.ones(3)}}
    (tmp_path / "R-50.pkl").write_bytes(pickle.dumps(content, protocol=2))
    report = load_checkpoint(network, tmp_path / "R-50.pkl")

    pixels = 255 * torch.rand(1, 3, 32, 32)
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD))
    bgr = (pixels - mean).flip(1)
    weights = {name: torch.from_numpy(value) for name, value in theirs.items()}
    expected = F.conv2d(bgr, weights["conv1_w"], stride=2, padding=3)
    scale, shift = (weights[f"res_conv1_bn_{name}"].view(-1, 1, 1) for name in ("gamma", "beta"))
    if not folded:
        moments = (weights[f"res_conv1_bn_running_{name}"].view(-1, 1, 1) for name in ("mean", "var"))
        average, variance = moments
        expected = (expected - average) / (variance + 1e-5).sqrt()
    expected = expected * scale + shift
    body = network.backbone.body
    torch.testing.assert_close(body.bn1(body.conv1((pixels - mean) / std)), expected, rtol=1e-4, atol=1e-3)
    assert report.skipped == ["fc1000_w"]
    assert "BGR" in capsys.readouterr().out


def test_msra_weights_ask_for_their_stride(tmp_path, capsys):
    _, network = small_network("ResNet-50")
    theirs = {caffe2_name(name): weight.numpy() for name, weight in backbone_file(network).items()}
    (tmp_path / "R-50.pkl").write_bytes(pickle.dumps(theirs))
    load_checkpoint(network, tmp_path / "R-50.pkl")
    assert "STRIDE_IN_1X1" in capsys.readouterr().out


@pytest.fixture
def offered(monkeypatch):
    """timm's models with drawn weights in the place of the downloaded ones."""
    build = timm.create_model

    def create_model(name, pretrained=False, **options):
        return build(name, pretrained=False, **options)

    monkeypatch.setattr(timm, "create_model", create_model)


FULL_WIDTH = ["MODEL.RESNETS.RES2_OUT_CHANNELS", "64"]


def test_timms_pretrained_backbone_says_what_was_loaded(offered, capsys):
    _, network = small_network("ResNet-18", overrides=FULL_WIDTH)
    before = network.backbone.body.conv1.weight.clone()
    load_checkpoint(network, "timm://resnet18.tv_in1k")
    assert not torch.equal(network.backbone.body.conv1.weight, before)
    said = capsys.readouterr().out
    assert "Weights: timm://resnet18.tv_in1k, backbone (timm)" in said
    assert re.search(r"loaded +\d+  backbone", said)


@pytest.mark.parametrize("name", ["resnet34", "seresnet18", "resnet50"])
@pytest.mark.slow
def test_timms_weights_of_a_larger_backbone_are_refused(offered, name):
    _, network = small_network("ResNet-18", overrides=FULL_WIDTH)
    with pytest.raises(UserError, match="another backbone") as raised:
        load_checkpoint(network, f"timm://{name}")
    assert "\n" not in str(raised.value)


def test_a_download_of_timms_that_fails_without_a_word_is_refused_in_a_line(monkeypatch):
    _, network = small_network("ResNet-18")

    def fail(*_, **__):
        raise TimeoutError

    monkeypatch.setattr(timm, "create_model", fail)
    with pytest.raises(UserError, match=r"timm://resnet18: cannot be loaded \(TimeoutError\)"):
        load_checkpoint(network, "timm://resnet18")


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".pth", ".pkl"])
def test_swin(tmp_path, suffix):
    """The authors' file of tensors, and the same pickled as Mask2Former's script does it."""
    _, source = small_network("Swin", seed=1)
    _, network = small_network("Swin", seed=2)
    model = {**backbone_file(source), "head.weight": torch.ones(2, 3), "norm.bias": torch.ones(2)}
    model["layers.0.blocks.1.attn_mask"] = torch.ones(2)
    model["layers.0.blocks.0.attn.relative_position_index"] = torch.ones(2, dtype=torch.int64)
    path = tmp_path / f"swin{suffix}"
    if suffix == ".pth":
        torch.save({"model": model}, path)
    else:
        path.write_bytes(pickle.dumps({"model": model, "matching_heuristics": True}))
    report = load_checkpoint(network, path)
    assert_same_backbone(network, source)
    assert sorted(report.skipped) == ["head.weight", "norm.bias"]


@pytest.mark.slow
def test_transformers_weights_as_they_are_in_memory(tmp_path):
    library = pytest.importorskip("transformers")
    from sim_m2f.weights.transformers import transformers_config

    cfg, network = small_network("Swin")
    config = library.Mask2FormerConfig.from_dict(transformers_config(cfg, ["a", "b", "c"]))
    theirs = library.Mask2FormerForUniversalSegmentation(config)
    torch.save(theirs.state_dict(), tmp_path / "pytorch_model.bin")
    load_checkpoint(network, tmp_path, complete=True)
    assert torch.equal(network.sem_seg_head.predictor.class_embed.weight, theirs.class_predictor.weight)


def test_a_checkpoint_that_contains_itself_ends(tmp_path):
    _, network = small_network("ResNet-18")
    content = {}
    content["model"] = content
    (tmp_path / "model.pkl").write_bytes(pickle.dumps(content))
    with pytest.raises(UserError, match="nothing in common"):
        load_checkpoint(network, tmp_path / "model.pkl")


def test_shards(tmp_path):
    _, source = small_network("ResNet-18", seed=1)
    _, network = small_network("ResNet-18", seed=2)
    weights = source.state_dict()
    names = sorted(weights)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in parts.items():
        save_file({name: weights[name] for name in part}, tmp_path / file)
    index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    load_checkpoint(network, tmp_path, complete=True)
    assert_same_weights(network, source)


def test_another_number_of_classes_leaves_the_class_head_as_it_was(tmp_path, capsys):
    _, source = small_network("ResNet-18", seed=1, overrides=["MODEL.SEM_SEG_HEAD.NUM_CLASSES", "80"])
    _, network = small_network("ResNet-18", seed=2)
    before = network.sem_seg_head.predictor.class_embed.weight.clone()
    torch.save({"model": source.state_dict()}, tmp_path / "model.pth")
    report = load_checkpoint(network, tmp_path / "model.pth")
    said = capsys.readouterr().out
    assert "re-initialised" in said
    assert "for 3 classes, the file has 80" in said
    assert len(report.reshaped) == 2
    assert torch.equal(network.sem_seg_head.predictor.class_embed.weight, before)
    mask_embed = source.sem_seg_head.predictor.mask_embed.layers[0].weight
    assert torch.equal(network.sem_seg_head.predictor.mask_embed.layers[0].weight, mask_embed)


class Payload:
    """Unpickled by a careless reader, it creates a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


class ForgedDtype:
    """Unpickled, a dtype of objects that says of itself, by its flags, that it holds none."""

    def __reduce__(self):
        return np.dtype, ("O", False, True), (3, "|", None, None, None, -1, -1, 0)


class ForgedPointer:
    """Unpickled by a careless reader, the object at an address that the file gives."""

    def __reduce__(self):
        return multiarray.scalar, (ForgedDtype(), id(None).to_bytes(8, sys.byteorder))


class ObjectBuffer:
    """The same without a dtype of its own: NumPy's array takes the bytes of a buffer as objects."""

    def __reduce__(self):
        return np.ndarray, ((1,), "O", id(None).to_bytes(8, sys.byteorder))


def wrong_checkpoint(kind, folder):
    """A wrong file of the kind in the folder, and the path to give."""
    path = folder / f"{kind.replace(' ', '_')}.pkl"
    if kind == "truncated":
        torch.save({"weight": torch.zeros(1000)}, path)
        path.write_bytes(path.read_bytes()[:2000])
    elif kind == "truncated pickle":
        path.write_bytes(pickle.dumps({"model": {"weight": np.zeros(1000)}})[:-500])
    elif kind == "web page":
        path.write_text("<!DOCTYPE html>\n<html><body>Sign in</body></html>")
    elif kind == "text with a brace":
        path.write_text("var x = {};")  # the brace is where safetensors has one
    elif kind == "another architecture":
        torch.save(torchvision.models.resnet34().state_dict(), path)
    elif kind == "malicious pickle":
        path.write_bytes(pickle.dumps({"model": Payload(folder / "ran")}))
    elif kind == "malicious torch file":
        torch.save({"model": Payload(folder / "ran")}, path)
    elif kind == "malicious old torch file":
        torch.save({"model": Payload(folder / "ran")}, path, _use_new_zipfile_serialization=False)
    elif kind == "forged pointer":
        path.write_bytes(pickle.dumps({"model": ForgedPointer()}))
    elif kind == "forged pointer in a torch file":
        torch.save({"model": ForgedPointer()}, path)
    elif kind == "empty":
        path.touch()
    elif kind == "directory":
        path.mkdir()
    elif kind == "not there":
        return folder / "not_there.pkl"
    elif kind == "unreadable":
        path.touch()
        return path / "below_a_file.pkl"
    elif kind == "another model":
        path = path.with_suffix(".safetensors")
        save_file({"bert.encoder.layer.0.weight": torch.zeros(3)}, path)
    elif kind == "pointer":
        path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n")
    return path


WRONG = {
    "truncated": "damaged or cut short",
    "truncated pickle": "damaged or cut short",
    "text with a brace": "is no file of weights",
    "web page": "is a web page",
    "another architecture": "of another backbone",
    "malicious pickle": "asks to run posix.mkdir",
    "malicious torch file": "asks to run posix.mkdir",
    "malicious old torch file": "asks to run posix.mkdir",
    "forged pointer": "asks to run numpy.dtype('O')",
    "forged pointer in a torch file": "asks to run numpy.dtype('O')",
    "empty": "is empty",
    "directory": "a folder without model.safetensors",
    "not there": "No such file or directory",
    "unreadable": "Not a directory",
    "another model": "nothing in common",
    "pointer": "pointer of Git LFS",
}


@pytest.fixture(scope="module")
def network():
    """ResNet-18 with torchvision's widths."""
    return small_network("ResNet-18", overrides=["MODEL.RESNETS.RES2_OUT_CHANNELS", "64"])[1]


@pytest.mark.parametrize("kind", WRONG)
@pytest.mark.slow
def test_a_wrong_checkpoint_is_refused_in_one_line(tmp_path, network, kind):
    before = {name: weight.clone() for name, weight in network.state_dict().items()}
    path = wrong_checkpoint(kind, tmp_path)
    with pytest.raises(UserError) as raised:
        load_checkpoint(network, path)
    said = str(raised.value)
    assert WRONG[kind] in said
    assert str(path) in said
    assert "\n" not in said
    assert not (tmp_path / "ran").exists()
    assert all(torch.equal(weight, before[name]) for name, weight in network.state_dict().items())


def test_wrong_classes_are_refused_where_all_weights_are_wanted(tmp_path):
    _, source = small_network("ResNet-18", overrides=["MODEL.SEM_SEG_HEAD.NUM_CLASSES", "80"])
    _, network = small_network("ResNet-18")
    torch.save(source.state_dict(), tmp_path / "model.pth")
    with pytest.raises(UserError, match=r"class_embed.*NUM_CLASSES"):
        load_checkpoint(network, tmp_path / "model.pth", complete=True)


def test_the_payload_would_run_elsewhere(tmp_path):
    """The malicious pickles of these tests are real ones."""
    pickle.loads(pickle.dumps(Payload(tmp_path / "ran")))
    assert (tmp_path / "ran").is_dir()


@pytest.mark.parametrize("protocol", range(6))
def test_arrays_of_every_pickle_protocol(tmp_path, protocol):
    content = {
        "a": np.arange(6.0).reshape(2, 3),
        "b": [np.float32(2), ("text", None, 3)],
        "c": np.array([True]),
        "d": np.arange(3, dtype=">i4"),
    }
    (tmp_path / "arrays.pkl").write_bytes(pickle.dumps(content, protocol=protocol))
    read = read_pickle(tmp_path / "arrays.pkl")
    np.testing.assert_array_equal(read["a"], content["a"])
    assert read["b"] == content["b"]
    assert read["c"].tolist() == [True]
    assert read["d"].tolist() == [0, 1, 2]


@pytest.mark.parametrize("write", [lambda content, file: file.write(pickle.dumps(content)), torch.save])
def test_bytes_of_a_file_are_never_objects(tmp_path, write):
    with (tmp_path / "buffer.pth").open("wb") as file:
        write({"a": ObjectBuffer()}, file)
    assert read_weight_file(tmp_path / "buffer.pth")["a"].dtype.kind == "f"


FLOAT = np.dtype("f8")


@pytest.mark.parametrize("forged", [((FLOAT, (9,)), None, None), (None, ("x",), {"x": (FLOAT, 99)})])
def test_fields_beyond_the_end_of_an_array_are_ignored(tmp_path, forged):
    class Dtype:
        def __reduce__(self):
            return np.dtype, ("f8", False, True), (3, "<", *forged, -1, -1, 0)

    class Array:
        def __reduce__(self):
            state = 1, (1,), Dtype(), False, np.array([2.0]).tobytes()
            return multiarray._reconstruct, (np.ndarray, (0,), b"b"), state

    (tmp_path / "array.pkl").write_bytes(pickle.dumps(Array()))
    read = read_pickle(tmp_path / "array.pkl")
    assert read.dtype.subdtype is read.dtype.fields is None
    assert read.tolist() == [2.0]


def test_numpys_numbers_in_a_torch_file(tmp_path):
    content = {"a": np.arange(3, dtype=">f4"), "b": np.float64(2), "c": np.array([True]), "d": np.array([1j])}
    torch.save(content, tmp_path / "numbers.pth")
    read = read_weight_file(tmp_path / "numbers.pth")
    assert [np.asarray(value).tolist() for value in read.values()] == [[0, 1, 2], 2, [True], [1j]]
