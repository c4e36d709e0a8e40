"""The same weights in Mask2Former itself: every layer's outputs and the instances agree.

Runs where the original is importable with detectron2 (its checkout on PYTHONPATH). Its deformable attention
is once ours, through the drop-in module, and once its own formulation in PyTorch.
"""

from pathlib import Path

import MultiScaleDeformableAttention as msda  # noqa: N813
import pytest
import torch

from sim_m2f import build_model, get_cfg
from sim_m2f.modeling.postprocess import instances
from sim_m2f.weights.detectron2 import detectron2_checkpoint

mask2former = pytest.importorskip("mask2former")
CONFIGS = Path(mask2former.__file__).parents[1] / "configs/coco/instance-segmentation"
NETWORKS = {"R-50": "maskformer2_R50_bs16_50ep.yaml", "Swin-T": "swin/maskformer2_swin_tiny_bs16_50ep.yaml"}
TOLERANCE = 1e-4


def original_network(config: Path):
    from detectron2.config import get_cfg as detectron2_cfg
    from detectron2.modeling import build_model as build_original
    from detectron2.projects.deeplab import add_deeplab_config

    cfg = detectron2_cfg()
    add_deeplab_config(cfg)
    mask2former.add_maskformer2_config(cfg)
    cfg.merge_from_file(str(config))
    cfg.MODEL.DEVICE = "cpu"
    return build_original(cfg).eval()


def disturb(network) -> None:
    """Random numbers everywhere, also where the initial weights are zero; norms keep the scale."""
    with torch.no_grad():
        for name, tensor in network.state_dict().items():
            if name.endswith("running_var"):
                tensor.uniform_(1, 2)
            elif tensor.is_floating_point():
                spread = tensor.std().item() if tensor.numel() > 1 else 0.0
                tensor.add_(0.1 * max(spread, 0.1) * torch.randn(tensor.shape))


@pytest.fixture(scope="module", params=NETWORKS)
def networks(request):
    """The original and ours with the same weights; what is exported for it lacks nothing and has no more."""
    torch.manual_seed(0)
    config = CONFIGS / NETWORKS[request.param]
    cfg = get_cfg()
    cfg.merge_from_file(config)
    network = build_model(cfg).eval()
    disturb(network)
    original = original_network(config)
    original.load_state_dict(detectron2_checkpoint(network.state_dict(), cfg)["model"], strict=True)
    return original, network


def agree(name: str, ours: torch.Tensor, theirs: torch.Tensor) -> None:
    difference = ((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1)).item()
    print(f"{name}: {difference:.1e}")
    assert difference < TOLERANCE, name


@pytest.mark.parametrize("attention", ["drop-in", "its own"])
@pytest.mark.parametrize("size", [(96, 160), (203, 131), (256, 320)])
def test_every_layer_and_the_instances_agree(networks, size, attention, monkeypatch):
    original, network = networks
    if attention == "its own":
        monkeypatch.delattr(msda, "ms_deform_attn_forward")  # it then computes in PyTorch
    height, width = size
    image = torch.randint(0, 256, (3, height, width)).float()
    images = (image - original.pixel_mean) / original.pixel_std
    images = torch.nn.functional.pad(images, (0, -width % 32, 0, -height % 32))[None]
    with torch.no_grad():
        theirs = original.sem_seg_head(original.backbone(images))
        ours = network(images)
        (found,) = original([{"image": image, "height": 2 * height, "width": width // 2}])
    assert len(ours["aux_outputs"]) == len(theirs["aux_outputs"]) == 9
    for i, (layer, same) in enumerate(
        zip([*ours["aux_outputs"], ours], [*theirs["aux_outputs"], theirs], strict=True)
    ):
        for name in ("pred_logits", "pred_masks"):
            agree(f"layer {i}, {name}", layer[name], same[name])

    expected = found["instances"]
    (result,) = instances(ours, [size], [(2 * height, width // 2)], len(expected))
    order = expected.scores.sort(descending=True, stable=True).indices
    agree("scores", result["scores"], expected.scores[order])
    confident = result["scores"].diff().abs() > 1e-5  # neighbours that rounding cannot exchange
    kept = torch.cat([confident, confident.new_ones(1)]) & torch.cat([confident.new_ones(1), confident])
    assert torch.equal(result["labels"][kept], expected.pred_classes[order][kept])
    differing = result["masks"][kept] != expected.pred_masks[order][kept].bool()
    print(f"{int(kept.sum())} instances compared, share of differing pixels {differing.float().mean():.1e}")
    assert differing.float().mean() < 1e-4
