"""Hugging Face's Mask2Former, learning from boxes: SIMCriterion on its outputs.

    python examples/huggingface_boxes.py

trains a small Mask2FormerForUniversalSegmentation from random weights on the embedded shapes for a few steps.
It needs the package `transformers`. The adapter is ``as_outputs``; the rest is an ordinary training loop.
"""

import argparse
from typing import Any

import torch
from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, ResNetConfig

import sim_m2f
from sim_m2f.data.loader import train_loader
from sim_m2f.pixels import Pixels
from sim_m2f.supervision.criterion import SIMCriterion

NAMES = {"pred_logits": "class_queries_logits", "pred_masks": "masks_queries_logits"}


def as_outputs(found: Any) -> dict[str, Any]:
    """Hugging Face's outputs (with ``output_auxiliary_logits=True``) as the criterion takes them."""
    earlier = [{ours: layer[theirs] for ours, theirs in NAMES.items()} for layer in found.auxiliary_logits]
    last = {ours: found[theirs] for ours, theirs in NAMES.items()}
    return {**last, "mask_features": found.pixel_decoder_last_hidden_state, "aux_outputs": earlier}


def small_model(classes: int) -> Mask2FormerForUniversalSegmentation:
    """A network of a few layers from random weights."""
    backbone = ResNetConfig(
        embedding_size=16,
        hidden_sizes=[16, 32, 64, 128],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    widths = {"feature_size": 64, "mask_feature_size": 64, "hidden_dim": 64, "num_attention_heads": 4}
    layers = {
        "encoder_layers": 1,
        "decoder_layers": 4,
        "encoder_feedforward_dim": 128,
        "dim_feedforward": 128,
    }
    config = Mask2FormerConfig(
        backbone_config=backbone, **widths, **layers, num_queries=16, num_labels=classes
    )
    return Mask2FormerForUniversalSegmentation(config)


def main(arguments: list[str] | None = None) -> list[float]:
    """Train for a few steps; returns the loss of each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config-file", default="configs/shapes/boxinst_R18.yaml", help="data and criterion")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="overrides of the configuration")
    args = parser.parse_args(arguments)
    cfg = sim_m2f.get_cfg()
    cfg.merge_from_file(args.config_file)
    cfg.merge_from_list(args.opts)
    torch.manual_seed(cfg.SEED)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = small_model(cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES).to(device).train()
    criterion, pixels = SIMCriterion(cfg).to(device), Pixels(cfg).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=cfg.SOLVER.BASE_LR)
    totals = []
    for step, batch in zip(range(args.steps), train_loader(cfg), strict=False):
        images = pixels.of_batch(batch["images"], batch["image_sizes"])
        found = model(pixel_values=images, output_auxiliary_logits=True)
        losses, matched = criterion(as_outputs(found), batch["targets"], images)
        total = sum(losses.values())
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        criterion.update(matched)
        totals.append(total.item())
        print(f"step {step}: " + ", ".join(f"{name} {loss.item():.3f}" for name, loss in losses.items()))
    return totals


if __name__ == "__main__":
    main()
