"""Differences between this network and other implementations of Mask2Former that got the same weights.

    python benchmarks/equality.py [--networks R-50 Swin-T]

prints a table and writes benchmarks/results/equality_*.json. Compared are Hugging Face's implementation and,
where `detectron2` and `mask2former` are importable, the original, at full size with random weights: class and
mask logits after every decoder layer, instances at the images' own size, and the losses of mask supervision
at the same points with their gradients. The masked attention takes the other network's masks, so that a pixel
at its threshold does not hide the rest; how many pixels would differ is counted.
"""

import argparse
import importlib.util
import itertools
import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sim_m2f
from sim_m2f.config import CfgNode
from sim_m2f.files import atomic_write
from sim_m2f.modeling import mask_decoder, position
from sim_m2f.modeling.postprocess import instances
from sim_m2f.supervision.mask_criterion import MaskCriterion
from sim_m2f.weights.detectron2 import detectron2_checkpoint
from sim_m2f.weights.transformers import write_transformers

Layers = list[dict[str, Tensor]]
NETWORKS = {"R-50": "mask_R50_bs16_50ep", "Swin-T": "sim_swin_tiny"}
ORIGINAL_FILES = {
    "R-50": "maskformer2_R50_bs16_50ep.yaml",
    "Swin-T": "swin/maskformer2_swin_tiny_bs16_50ep.yaml",
}
# Sizes of two images each, (height, width); a batch is padded to the larger one, in multiples of 32.
SIZES = ([(128, 160), (128, 160)], [(224, 180), (150, 192)])
LOSSES = {"loss_ce": "loss_cross_entropy", "loss_mask": "loss_mask", "loss_dice": "loss_dice"}


def random_network(cfg: CfgNode, seed: int = 0) -> nn.Module:
    """The network of ``cfg`` with weights of no special value, norms and their statistics included."""
    network = sim_m2f.build_model(cfg).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
        network.sem_seg_head.predictor.class_embed.weight *= 5  # probabilities that differ, so that ranks do
        for name, buffer in network.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                buffer += 0.1 * torch.rand(buffer.shape, generator=generator)
    return network


def random_images(sizes: list[tuple[int, int]], seed: int = 0) -> Tensor:
    """(B, 3, H, W) of normal noise in the sizes given, zero on the padding."""
    height, width = (-(-max(side) // 32) * 32 for side in zip(*sizes, strict=True))
    images = torch.zeros(len(sizes), 3, height, width)
    generator = torch.Generator().manual_seed(seed)
    for image, (h, w) in zip(images, sizes, strict=True):
        image[:, :h, :w] = torch.randn(3, h, w, generator=generator)
    return images


def as_layers(outputs: dict[str, Any]) -> Layers:
    """Class and mask logits of every layer, the last layer's last."""
    return [*outputs["aux_outputs"], {name: outputs[name] for name in ("pred_logits", "pred_masks")}]


def transformers_model(network: nn.Module, cfg: CfgNode) -> nn.Module:
    """Hugging Face's model with the weights of ours."""
    from transformers import Mask2FormerForUniversalSegmentation

    names = [f"class {label}" for label in range(cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES)]
    with tempfile.TemporaryDirectory() as folder:
        write_transformers(Path(folder), network.state_dict(), cfg, names)
        return Mask2FormerForUniversalSegmentation.from_pretrained(folder).eval()


def transformers_outputs(model: nn.Module, images: Tensor) -> dict[str, Any]:
    """The outputs of Hugging Face's model in the form of ours."""
    found = model(pixel_values=images, output_auxiliary_logits=True)
    keys = {"pred_logits": "class_queries_logits", "pred_masks": "masks_queries_logits"}
    earlier = [{ours: layer[theirs] for ours, theirs in keys.items()} for layer in found.auxiliary_logits]
    return {**{ours: found[theirs] for ours, theirs in keys.items()}, "aux_outputs": earlier}


def original_cfg(network: str) -> Any:
    """The original's configuration, from its own file."""
    import mask2former
    from detectron2.config import get_cfg
    from detectron2.projects.deeplab import add_deeplab_config

    cfg = get_cfg()
    add_deeplab_config(cfg)
    mask2former.add_maskformer2_config(cfg)
    root = Path(mask2former.__file__).parents[1] / "configs/coco/instance-segmentation"
    cfg.merge_from_file(str(root / ORIGINAL_FILES[network]))
    cfg.MODEL.DEVICE, cfg.MODEL.WEIGHTS = "cpu", ""
    return cfg


def original_model(network: nn.Module, name: str, cfg: CfgNode) -> nn.Module:
    """The original's model with the weights of ours."""
    from detectron2.modeling import build_model

    model = build_model(original_cfg(name)).eval()
    model.load_state_dict(detectron2_checkpoint(network.state_dict(), cfg)["model"])
    return model


def original_outputs(model: nn.Module, images: Tensor) -> dict[str, Any]:
    return model.sem_seg_head(model.backbone(images))


def output_differences(own: Layers, other: Layers) -> list[dict]:
    """The largest difference of class and mask logits after each layer, and the largest of their values."""
    return [
        {
            name: {
                "difference": (a[name] - b[name]).abs().max().item(),
                "largest": b[name].abs().max().item(),
            }
            for name in ("pred_logits", "pred_masks")
        }
        for a, b in zip(own, other, strict=True)
    ]


@torch.no_grad()
def instance_differences(
    outputs: dict[str, Tensor], other: dict[str, Tensor], sizes: list[tuple[int, int]], top_k: int = 100
) -> dict[str, float]:
    """Instances of two outputs: largest difference of scores, shares of other labels and of other pixels."""
    enlarged = [(2 * h + 1, 2 * w - 1) for h, w in sizes]
    found = zip(*(instances(each, sizes, enlarged, top_k) for each in (outputs, other)), strict=True)
    compared = [
        (
            (a["scores"] - b["scores"]).abs().max().item(),
            (a["labels"] != b["labels"]).float().mean().item(),
            (a["masks"] != b["masks"]).float().mean().item(),
        )
        for a, b in found
    ]
    return dict(zip(("scores", "labels", "pixels"), map(max, zip(*compared, strict=True)), strict=True))


@contextmanager
def same_attention(layers: Layers, images: Tensor) -> Iterator[dict[str, int]]:
    """Inside, our decoder attends to the pixels of ``layers``, another network's predictions.

    In float32 two ways to compute the same logit differ by their rounding, and where it lies at the threshold
    of the masked attention, by a whole pixel. The value yielded counts the pixels seen and those that differ.
    """
    counts = {"pixels": 0, "different": 0}
    own = mask_decoder._attention_mask
    height, width = images.shape[-2:]
    masks = (
        attended(layer["pred_masks"], (height // stride, width // stride))
        for layer, stride in zip(layers[:-1], itertools.cycle((32, 16, 8)), strict=False)
    )

    def attention_mask(embedding: Tensor, features: Tensor, _: Tensor | None) -> Tensor:
        mask = next(masks)
        counts["pixels"] += mask.numel()
        counts["different"] += int((own(embedding, features) != mask).sum())
        return mask

    with mock.patch.object(mask_decoder, "_attention_mask", attention_mask):
        yield counts


def attended(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """(B, Q, h * w): where the resized mask is at least one half, or everywhere if it is nowhere.

    As the others compute it: the sigmoid of a logit just below 0 is one half in float32.
    """
    mask = F.interpolate(logits, size, mode="bilinear", align_corners=False).sigmoid().flatten(2) >= 0.5
    return mask | ~mask.any(-1, keepdim=True)


@contextmanager
def double_precision() -> Iterator[None]:
    """Inside, positions are computed in float64 too, and not taken from the cache."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    with mock.patch.object(position, "_cached", position._encoded):
        yield
    torch.set_default_dtype(before)


@contextmanager
def same_points(number: int = 65536) -> Iterator[None]:
    """Inside, every mask is compared at the same points, in whatever order an implementation draws them."""
    points = torch.rand(number, 2, generator=torch.Generator().manual_seed(1))

    def rand(*shape: int, device: Any = None, **_: Any) -> Tensor:
        return points[: shape[-2]].to(device).expand(shape).contiguous()

    with mock.patch("torch.rand", rand):
        yield


def random_targets(images: Tensor, classes: int, objects: int = 4) -> list[dict[str, Tensor]]:
    """Overlapping rectangles with a hole each."""
    generator = torch.Generator().manual_seed(2)
    height, width = images.shape[-2:]
    targets = []
    for number in range(objects, objects + len(images)):
        masks = torch.zeros(number, height, width, dtype=torch.bool)
        corners = torch.rand(number, 2, generator=generator)
        for mask, (y, x) in zip(masks, corners.tolist(), strict=True):
            top, left = int(y * height / 2), int(x * width / 2)
            mask[top : top + height // 3, left : left + width // 3] = True
            mask[top + 5 : top + 9, left + 5 : left + 11] = False
        labels = torch.randint(classes, (number,), generator=generator)
        boxes = torch.zeros(number, 4)
        targets.append({"labels": labels, "masks": masks, "boxes": boxes})
    return targets


def leaves(layers: Layers) -> Layers:
    """Copies that gradients can be taken with respect to."""
    return [
        {name: value.detach().clone().requires_grad_() for name, value in layer.items()} for layer in layers
    ]


def our_losses(
    cfg: CfgNode, layers: Layers, targets: list[dict[str, Tensor]], images: Tensor
) -> dict[str, Tensor]:
    with same_points():
        losses, _ = MaskCriterion(cfg)({**layers[-1], "aux_outputs": layers[:-1]}, targets, images)
    return losses


def transformers_losses(
    criterion: nn.Module, layers: Layers, targets: list[dict[str, Tensor]]
) -> dict[str, Tensor]:
    """Hugging Face's losses, weighted, each summed over the layers, under our names."""
    earlier = [
        {"class_queries_logits": layer["pred_logits"], "masks_queries_logits": layer["pred_masks"]}
        for layer in layers[:-1]
    ]
    masks, labels = [target["masks"].float() for target in targets], [target["labels"] for target in targets]
    with same_points():
        found = criterion(layers[-1]["pred_masks"], layers[-1]["pred_logits"], masks, labels, earlier)
    return {
        ours: criterion.weight_dict[theirs]
        * sum(loss for name, loss in found.items() if name.startswith(theirs))
        for ours, theirs in LOSSES.items()
    }


def original_losses(
    criterion: nn.Module, layers: Layers, targets: list[dict[str, Tensor]]
) -> dict[str, Tensor]:
    """The original's losses, weighted, each summed over the layers."""
    with same_points():
        found = criterion({**layers[-1], "aux_outputs": layers[:-1]}, targets)
    return {
        ours: sum(criterion.weight_dict[name] * loss for name, loss in found.items() if name.startswith(ours))
        for ours in LOSSES
    }


def loss_differences(
    cfg: CfgNode, theirs: Callable[[Layers, list], dict[str, Tensor]], outputs: dict[str, Any], images: Tensor
) -> dict[str, float]:
    """Largest relative difference of a loss, and of a gradient in units of the largest gradient."""
    targets = random_targets(images, cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES)
    own, other = leaves(as_layers(outputs)), leaves(as_layers(outputs))
    losses, expected = our_losses(cfg, own, targets, images), theirs(other, targets)
    sum(losses.values()).backward()
    sum(expected.values()).backward()
    pairs = [
        (a[name].grad, b[name].grad)
        for a, b in zip(own, other, strict=True)
        for name in ("pred_logits", "pred_masks")
    ]
    return {
        "loss": max(abs(losses[name] / expected[name] - 1).item() for name in LOSSES),
        "gradient": max(((a - b).abs().max() / b.abs().max()).item() for a, b in pairs),
    }


def compare(name: str, sizes: list[tuple[int, int]], against: str) -> dict[str, Any]:
    """All differences of one network at one pair of sizes."""
    root = Path(__file__).parents[1]
    cfg = sim_m2f.get_cfg()
    cfg.merge_from_file(root / f"configs/coco/{NETWORKS[name]}.yaml")
    network, images = random_network(cfg), random_images(sizes)
    if against == "transformers":
        model = transformers_model(network, cfg)
        run, losses = transformers_outputs, transformers_losses
    else:
        model = original_model(network, name, cfg)
        run, losses = original_outputs, original_losses
    with torch.no_grad():
        other = run(model, images)
        with same_attention(as_layers(other), images) as attention:
            outputs = network(images)
    layers = output_differences(as_layers(outputs), as_layers(other))
    return {
        "network": name,
        "against": against,
        "sizes": sizes,
        "layers": layers,
        "class_logits": max(layer["pred_logits"]["difference"] for layer in layers),
        "mask_logits": max(layer["pred_masks"]["difference"] for layer in layers),
        "attention": attention,
        "instances": instance_differences(outputs, other, sizes),
        "losses": loss_differences(cfg, lambda x, y: losses(model.criterion, x, y), other, images),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"), help="folder")
    args = parser.parse_args()
    importable = {"transformers": "transformers", "the original": "mask2former"}
    others = [name for name, module in importable.items() if importlib.util.find_spec(module)]
    values = "class logits | mask logits | scores | pixels | losses | gradients | attention"
    print(f"| network | against | h x w | {values} |\n" + "|---" * 10 + "|", flush=True)
    for name in args.networks:
        rows: list[dict[str, Any]] = []
        for sizes, against in itertools.product(SIZES, others):
            rows.append(compare(name, sizes, against))
            print(as_line(rows[-1]), flush=True)
            with atomic_write(args.output / f"equality_{name}.json") as file:
                json.dump({"torch": torch.__version__, "rows": rows}, file, indent=1)


def as_line(row: dict[str, Any]) -> str:
    """A row of the table in Markdown."""
    values = [row["class_logits"], row["mask_logits"], row["instances"]["scores"], row["instances"]["pixels"]]
    shown = ", ".join(f"{height} x {width}" for height, width in row["sizes"])
    numbers = " | ".join(f"{value:.1e}" for value in (*values, *row["losses"].values()))
    attention = "{different} of {pixels}".format(**row["attention"])
    return f"| {row['network']} | {row['against']} | {shown} | {numbers} | {attention} |"


if __name__ == "__main__":
    main()
