"""ONNX: one file for images of several sizes, run by onnxruntime on a CPU, with the network's own masks."""

import pytest
import torch
from other_networks import CLASSES, small_network

from sim_m2f import cli
from sim_m2f.errors import UserError
from sim_m2f.modeling.deformable_attention import MSDeformAttn
from sim_m2f.segmenter import Segmenter
from sim_m2f.weights.onnx import GridSampleAttention, onnx_bytes


def test_grid_sample_attention_is_the_attention():
    attention = MSDeformAttn(32, levels=3, heads=8, points=4)
    torch.nn.init.normal_(attention.sampling_offsets.weight, std=0.5)
    torch.nn.init.normal_(attention.attention_weights.weight, std=0.5)
    portable = GridSampleAttention(32, levels=3, heads=8, points=4)
    portable.load_state_dict(attention.state_dict())
    shapes = [(3, 5), (6, 9), (12, 17)]
    pixels = sum(height * width for height, width in shapes)
    query, source = torch.randn(2, pixels, 32), torch.randn(2, pixels, 32)
    arguments = query, torch.rand(1, pixels, 1, 2), source, shapes
    torch.testing.assert_close(portable(*arguments), attention(*arguments), rtol=1e-4, atol=1e-5)


def test_a_backbone_that_cannot_be_exported_is_refused_in_a_line():
    pytest.importorskip("onnxscript")
    _, network = small_network("ResNet-18")

    class DataDependent(torch.nn.Module):
        def forward(self, x):
            return x if x.sum().item() > 0 else -x

    network.backbone.body.act1 = DataDependent()
    with pytest.raises(UserError, match="backbone resnet18: cannot be exported to ONNX") as raised:
        onnx_bytes(network)
    assert "\n" not in str(raised.value)


def test_the_command_writes_the_network(tmp_path):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    cfg, network = small_network("ResNet-18")
    Segmenter(network, cfg, CLASSES).save_pretrained(tmp_path / "trained")
    output = str(tmp_path / "network.onnx")
    assert cli.main(["export", str(tmp_path / "trained"), "--format", "onnx", "--output", output]) == 0
    session = runtime.InferenceSession(output, providers=["CPUExecutionProvider"])
    images = torch.randn(1, 3, 64, 96)
    (masks,) = session.run(["pred_masks"], {"images": images.numpy()})
    with torch.no_grad():
        expected = network(images)["pred_masks"]
    torch.testing.assert_close(torch.from_numpy(masks), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("backbone", ["ResNet-18", "Swin"])
def test_onnxruntime_gives_the_same_masks_at_every_size(backbone):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    _, network = small_network(backbone)
    session = runtime.InferenceSession(onnx_bytes(network), providers=["CPUExecutionProvider"])
    for size in ((96, 128), (64, 160), (224, 96)):
        images = torch.randn(1, 3, *size)
        with torch.no_grad():
            expected = network(images)
        logits, masks = session.run(["pred_logits", "pred_masks"], {"images": images.numpy()})
        torch.testing.assert_close(torch.from_numpy(logits), expected["pred_logits"], rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(torch.from_numpy(masks), expected["pred_masks"], rtol=1e-3, atol=1e-3)
