"""A large image seen as overlapping tiles, whose objects are put together again.

For images of many small objects, as of nuclei: a tile shows as few of them as a training crop does.
"""

import itertools
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor

from sim_m2f.geometry import extent
from sim_m2f.structures import STRIDE, LayerOutputs, Outputs, Predictions, Prompts

OVERLAP = 0.25  # least share of a tile that its neighbour sees too: objects up to this size are whole in one
BATCH = 8  # tiles that the network sees together
OUTSIDE = -10.0  # mask logit outside of the tile
LEAST_SCORE = 0.02  # of a query that counts
MOST = 400  # queries of an image, before duplicates go; twice as many as objects that are wanted, if more
DUPLICATE = 0.5  # two masks are one object when they share more of the smaller one; of two classes, of both


def tiled(
    network: Callable[..., Outputs],
    images: Tensor,
    tile: int,
    prompts: Prompts | None = None,
    objects: int = 0,
) -> Predictions:
    """The last layer's outputs for one image, tile by tile where it is larger than one.

    A mask that an inner border of its tile cuts is left out where a neighbour sees it whole, that is, where
    it ends within OVERLAP of this border. Of two masks that cover each other one stays: one that its tile
    does not cut before one that it does, else that of the higher score. Masks of two classes have to cover
    each other both: a part of a thing, as a nucleus of a cell, stays with the whole. A prompted box goes to
    the tile in whose middle it lies.

    Args:
        network: ``Mask2Former``.
        images: (1, 3, H, W), as the network takes it.
        tile: side of a tile in pixels, a multiple of 32; 0 takes every image as a whole.
        prompts: boxes whose masks are wanted, in shares of the whole image.
        objects: so many of the image are wanted.

    Returns:
        "pred_logits" (1, K, C+1), "pred_masks" (1, K, H/4, W/4), and with prompts "prompted", the same of the
        N boxes; K is as large as it has to be, at least 1. The network's own outputs where there is one tile.
    """
    height, width = images.shape[-2:]
    if not tile or max(height, width) <= tile:
        given = {"prompts": prompts} if prompts else {}
        return cast(Predictions, network(images, auxiliary=False, **given))
    corners = tile_corners(height, width, tile)
    sides = min(tile, height), min(tile, width)
    crops = torch.cat([images[..., y : y + sides[0], x : x + sides[1]] for y, x in corners.tolist()])
    corners = corners.to(images.device)
    placed = _tile_of_boxes(prompts, corners, sides, (height, width)) if prompts else None
    parts: list[Outputs] = []
    for start in range(0, len(crops), BATCH):
        part = slice(start, start + BATCH)
        own = {"prompts": Prompts(placed[0].boxes[part], placed[0].labels[part])} if placed else {}
        parts.append(network(crops[part], auxiliary=False, **own))
    logits = torch.cat([part["pred_logits"].float() for part in parts])
    masks = torch.cat([part["pred_masks"].float() for part in parts])
    canvas = height // STRIDE, width // STRIDE
    outputs: Predictions = {**_joined(logits, masks, corners // STRIDE, canvas, max(MOST, 2 * objects))}
    if placed:
        tiles, places = placed[1]
        logits = torch.cat([part["prompted"]["pred_logits"].float() for part in parts])[tiles, places]
        masks = torch.cat([part["prompted"]["pred_masks"].float() for part in parts])[tiles, places]
        full = _on_canvas(masks, corners[tiles] // STRIDE, canvas)
        outputs["prompted"] = {"pred_logits": logits[None], "pred_masks": full[None]}
    return outputs


def tile_corners(height: int, width: int, tile: int) -> Tensor:
    """(n, 2) int64: top and left of the tiles, evenly spread, multiples of 4 pixels."""
    lines = []
    for length in (height, width):
        free = max(length - tile, 0)
        count = 1 + -int(-free // (tile * (1 - OVERLAP)))
        lines.append((torch.linspace(0, free, count) / STRIDE).round().long() * STRIDE)
    return torch.cartesian_prod(*lines)


def _tile_of_boxes(
    prompts: Prompts, corners: Tensor, sides: tuple[int, int], size: tuple[int, int]
) -> tuple[Prompts, tuple[Tensor, Tensor]]:
    """The boxes as prompts of the tiles, and for each box its tile and its place among the tile's prompts."""
    (height, width), boxes = size, prompts.boxes[0]
    pixels = boxes * boxes.new_tensor([width, height, width, height])
    side = boxes.new_tensor(sides).flip(0)
    origin = corners.flip(1).to(boxes)
    middle = (pixels[:, :2] + pixels[:, 2:]) / 2
    tiles = ((middle[:, None] - origin - side / 2) / side).abs().amax(-1).argmin(1)
    chosen = tiles[:, None] == torch.arange(len(corners), device=tiles.device)
    places = chosen.cumsum(0)[torch.arange(len(tiles)), tiles] - 1
    most = max(int(chosen.sum(0).max()) if len(boxes) else 0, 1)
    own = boxes.new_zeros(len(corners), most, 4)
    labels = prompts.labels.new_zeros(len(corners), most)
    own[tiles, places] = ((pixels - origin[tiles].repeat(1, 2)) / side.repeat(2)).clamp(0, 1)
    labels[tiles, places] = prompts.labels[0]
    return Prompts(own, labels), (tiles, places)


def _joined(
    logits: Tensor, masks: Tensor, corners: Tensor, canvas: tuple[int, int], most: int
) -> LayerOutputs:
    """The queries of all tiles, those that show one object reduced to one.

    Args:
        logits: (n, Q, C+1) of n tiles.
        masks: (n, Q, h, w) logits.
        corners: (n, 2) top and left of the tiles in pixels of the masks.
        canvas: height and width of the whole.
        most: queries that are looked at, those of the highest scores.
    """
    inside = masks > 0
    area = inside.sum((2, 3))
    confidence = (masks.sigmoid() * inside).sum((2, 3)) / area.clamp(min=1)
    score = logits.softmax(-1)[..., :-1].amax(-1) * confidence
    cut, rest = _cut(inside, corners, canvas)
    rank = (score - cut.float()).masked_fill((score < LEAST_SCORE) | (area == 0) | rest, -2.0).flatten()
    order = rank.argsort(descending=True)[: max(1, min(most, int((rank > -2).sum())))]
    tiles, queries = order // masks.shape[1], order % masks.shape[1]
    areas, kinds = area[tiles, queries], logits[tiles, queries][:, :-1].argmax(-1)
    shared = _shared(inside[tiles, queries], tiles, corners)
    smaller, union = torch.minimum(areas[:, None], areas), areas[:, None] + areas - shared
    same = shared > DUPLICATE * smaller.where(kinds[:, None] == kinds, union)
    kept = torch.ones(len(order), dtype=torch.bool)
    for index, duplicates in enumerate(same.cpu()):
        if kept[index]:
            kept[index + 1 :] &= ~duplicates[index + 1 :]
    kept = kept.to(masks.device)
    tiles, queries = tiles[kept], queries[kept]
    full = _on_canvas(masks[tiles, queries], corners[tiles], canvas)
    return {"pred_logits": logits[tiles, queries][None], "pred_masks": full[None]}


def _shared(inside: Tensor, tiles: Tensor, corners: Tensor) -> Tensor:
    """(K, K) float32: how many pixels two masks share.

    Args:
        inside: (K, h, w) bool, each mask in its tile.
        tiles: (K,) 0..n-1, which tile that is.
        corners: (n, 2) top and left of the tiles in pixels of the masks.
    """
    height, width = inside.shape[-2:]
    shared = torch.zeros(len(inside), len(inside), device=inside.device)
    own = [(tiles == tile).nonzero()[:, 0] for tile in range(len(corners))]
    parts = zip(corners.tolist(), own, [inside[index].float() for index in own], strict=True)
    for ((y, x), first, one), ((other_y, other_x), second, other) in itertools.product(parts, repeat=2):
        down, right = other_y - y, other_x - x
        if abs(down) < height and abs(right) < width:
            here = one[:, max(down, 0) : height + down, max(right, 0) : width + right].flatten(1)
            there = other[:, max(-down, 0) : height - down, max(-right, 0) : width - right].flatten(1)
            with torch.autocast(inside.device.type, enabled=False):  # 16 bits would round counts of pixels
                shared[first[:, None], second] = here @ there.T
    return shared


def _cut(inside: Tensor, corners: Tensor, canvas: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """(n, Q) bool: whether a mask reaches an inner border of its tile; and ends within OVERLAP of it."""
    height, width = inside.shape[-2:]
    size = corners.new_tensor([height, width])
    inner = torch.stack([corners > 0, corners + size < corners.new_tensor(canvas)], dim=-1)[:, None]
    top, bottom = extent(inside.any(-1))
    left, right = extent(inside.any(-2))
    to_border = torch.stack([top, height - bottom, left, width - right], dim=-1).unflatten(-1, (2, 2))
    beyond = torch.stack([bottom, height - top, right, width - left], dim=-1).unflatten(-1, (2, 2))
    reaches = (to_border == 0) & inner
    rest = reaches & (beyond < OVERLAP * size[:, None])
    return reaches.flatten(2).any(-1), rest.flatten(2).any(-1)


def _on_canvas(masks: Tensor, corners: Tensor, canvas: tuple[int, int]) -> Tensor:
    """(K, *canvas): mask logits (K, h, w) at their corners (K, 2), ``OUTSIDE`` elsewhere."""
    full = masks.new_full((len(masks), *canvas), OUTSIDE)
    height, width = masks.shape[-2:]
    for (y, x), mask, own in zip(corners.tolist(), masks, full, strict=True):
        own[y : y + height, x : x + width] = mask
    return full
