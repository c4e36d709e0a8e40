"""The annotated objects as box prompts of the network, and their losses without matching."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from sim_m2f.draws import uniform
from sim_m2f.structures import Prompts, Target
from sim_m2f.supervision.layers import Layers
from sim_m2f.supervision.matcher import Match
from sim_m2f.supervision.targets import Targets


def annotated_prompts(
    targets: Sequence[Target],
    size: tuple[int, int],
    device: torch.device,
    classes: int = 1,
    box_noise: float = 0.0,
    label_noise: float = 0.0,
) -> Prompts:
    """A prompt per object, in the order of the targets; noise is drawn by the targets' seeds.

    Args:
        targets: per image {"labels": (N,) int64, "boxes": (N, 4) float xyxy in pixels of the input}.
        size: (H, W) of the network's input.
        device: where the prompts are wanted.
        classes: C, of which a random label is one.
        box_noise: most that each side moves, in shares of the box's width or height.
        label_noise: share of the labels that are replaced by random ones.
    """
    share = torch.tensor([size[1], size[0], size[1], size[0]])
    each_boxes = [target["boxes"].reshape(-1, 4).cpu().float() / share for target in targets]
    each_labels = [target["labels"].reshape(-1).cpu() for target in targets]
    if box_noise or label_noise:
        for i, target in enumerate(targets):
            drawn = uniform([target.get("seed")], "prompts", len(each_labels[i]), 6)[0]
            lengths = (each_boxes[i][:, 2:] - each_boxes[i][:, :2]).repeat(1, 2)
            each_boxes[i] = (each_boxes[i] + (2 * drawn[:, :4] - 1) * box_noise * lengths).clamp(0, 1)
            random = (drawn[:, 4] * classes).long()
            each_labels[i] = torch.where(drawn[:, 5] < label_noise, random, each_labels[i])
    if not any(map(len, each_labels)):  # one any prompt, so that the network computes in every step the same
        each_boxes = [boxes.new_zeros(1, 4) for boxes in each_boxes]
        each_labels = [labels.new_zeros(1) for labels in each_labels]
    boxes = pad_sequence(each_boxes, batch_first=True)
    labels = pad_sequence(each_labels, batch_first=True)
    return Prompts(boxes.to(device, non_blocking=True), labels.to(device, non_blocking=True))


def prompt_queries(objects: Targets) -> Tensor:
    """(T,) int64: the prompted query of each object, the n-th one of an image for its n-th object."""
    position = torch.cat([torch.arange(count) for count in objects.counts])
    return position.to(objects.labels.device, non_blocking=True)


def match_prompts(layers: Layers, objects: Targets) -> Match:
    """Every object belongs to its prompted query in every layer; called as a ``Matcher`` is."""
    query = prompt_queries(objects).expand(len(layers.logits), -1)
    return Match(query, torch.ones_like(query, dtype=torch.bool))
