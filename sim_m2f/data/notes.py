"""What is right in form but will hurt: one line each, told by ``check`` and at the start of every run."""

import functools
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from sim_m2f.config import CfgNode
from sim_m2f.data.coco import CocoData, ImageRecord

STRIDE = 4  # of masks
HEAD = 1 << 16  # bytes that files of one size are compared by


def notes(cfg: CfgNode, train: Sequence[CocoData], val: Sequence[CocoData] = ()) -> list[str]:
    """Look at the data sets of a run with a configuration; images are not decoded."""
    found = _same_images(train, val)
    if cfg.MODEL.BACKBONE.FREEZE_NORMS and not cfg.MODEL.WEIGHTS:
        advice = "set MODEL.WEIGHTS or MODEL.BACKBONE.FREEZE_NORMS False"
        found.append(f"MODEL.BACKBONE.FREEZE_NORMS: norms are frozen at random weights; {advice}")
    return found + [line for data in train for line in (*_crowded(cfg, data), *_tiny(cfg, data))]


def _same_images(train: Sequence[CocoData], val: Sequence[CocoData]) -> list[str]:
    """Images in both, told by their files' sizes and, where these are equal, by what the files begin with."""
    sizes: dict[int, set[Path]] = {}
    for path in {data.image_root / image.file_name for data in train for image in data.images if val}:
        if (size := _size(path)) >= 0:
            sizes.setdefault(size, set()).add(path)
    heads = functools.cache(_head)
    found = []
    for data in val:
        own = [data.image_root / image.file_name for image in data.images]
        shared = []
        for path in own:
            alike = sizes.get(_size(path), set())
            if path in alike or (alike and heads(path) in map(heads, alike)):
                shared.append(path)
        if shared:
            fault = f"{len(shared)} of {len(own)} images are also trained on, such as {shared[0].name}"
            found.append(f"{data.name}: {fault}; its scores will be too good")
    return found


def _size(path: Path) -> int:
    """In bytes; -1 of what is no file, or not there."""
    return os.path.getsize(path) if path.is_file() else -1


def _head(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return hashlib.blake2b(file.read(HEAD)).digest()
    except OSError:
        return os.fsencode(path)  # like no other


def _crowded(cfg: CfgNode, data: CocoData) -> list[str]:
    """More objects in an image, or in the share of it that a crop shows, than there are queries."""
    queries = cfg.MODEL.MASK_FORMER.NUM_OBJECT_QUERIES
    seen = max(cfg.INPUT.MIN_SCALE, 1.0) ** 2 if cfg.TEST.TILE else 1.0
    most = max(data.images, key=lambda image: len(image.labels), default=None)
    count = sum(len(image.labels) / seen > queries for image in data.images)
    if most is None or not count:
        return []
    fault = f"{count} images hold more objects than the network's {queries} queries"
    advice = "raise MODEL.MASK_FORMER.NUM_OBJECT_QUERIES"
    return [f"{data.name}: {fault}, {most.file_name} {len(most.labels)}; {advice}"]


def _tiny(cfg: CfgNode, data: CocoData) -> list[str]:
    """Boxes narrower than a pixel of the masks at the size of tests."""
    total = sum(len(image.labels) for image in data.images)
    tiny = sum(int((_least_sides(cfg, image) < STRIDE).sum()) for image in data.images)
    if not tiny:
        return []
    fault = (
        f"{tiny} of {total} boxes are narrower than {STRIDE} pixels of the network's input, one of its masks"
    )
    return [f"{data.name}: {fault}; raise INPUT.MIN_SIZE_TEST, MAX_SIZE_TEST and IMAGE_SIZE, or take tiles"]


def _least_sides(cfg: CfgNode, image: ImageRecord) -> np.ndarray:
    """(N,) shorter sides of the boxes in pixels of the network's input."""
    short, long = sorted((image.height, image.width))
    scale = min(cfg.INPUT.MIN_SIZE_TEST / short, cfg.INPUT.MAX_SIZE_TEST / long)
    return (image.boxes[:, 2:] - image.boxes[:, :2]).min(1) * (scale or 1.0)
