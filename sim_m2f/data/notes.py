"""What is right in form but will hurt: one line each, told by ``check`` and at the start of every run."""

import functools
import hashlib
import itertools
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np

from sim_m2f.config import CfgNode
from sim_m2f.data.coco import CocoData, ImageRecord

STRIDE = 4  # of masks
HEAD = 1 << 16  # bytes that files of one size are compared by at first
Key = TypeVar("Key")


def notes(cfg: CfgNode, train: Sequence[CocoData], val: Sequence[CocoData] = ()) -> list[str]:
    """Look at the data sets of a run with a configuration; images are not decoded."""
    found = _same_images(train, val)
    if cfg.MODEL.BACKBONE.FREEZE_NORMS and not cfg.MODEL.WEIGHTS:
        advice = "set MODEL.WEIGHTS or MODEL.BACKBONE.FREEZE_NORMS False"
        found.append(f"MODEL.BACKBONE.FREEZE_NORMS: norms are frozen at random weights; {advice}")
    return found + [line for data in train for line in (*_crowded(cfg, data), *_tiny(cfg, data))]


def _same_images(train: Sequence[CocoData], val: Sequence[CocoData]) -> list[str]:
    """Images in both: the same file, or another one of the same content."""
    trained_on = _Files({data.image_root / image.file_name for data in train for image in data.images if val})
    found = []
    for data in val:
        own = [data.image_root / image.file_name for image in data.images]
        shared = list(filter(trained_on.have, own))
        if shared:
            fault = f"{len(shared)} of {len(own)} images are also trained on, such as {shared[0].name}"
            found.append(f"{data.name}: {fault}; its scores will be too good")
    return found


class _Files:
    """Files that others are compared with: by size, if that is equal by what they begin with, then whole."""

    def __init__(self, paths: Iterable[Path]) -> None:
        self.by_size = _grouped(paths, _size)
        self.by_head = functools.cache(lambda size: _grouped(self.by_size[size], _head))
        self.by_content = functools.cache(lambda size, head: _grouped(self.by_head(size)[head], _content))

    def have(self, path: Path) -> bool:
        """Whether the path, or its content, is among them; -1 is the size of what is no file."""
        size = _size(path)
        if size < 0 or size not in self.by_size:
            return False
        if path in self.by_size[size]:
            return True
        head = _head(path)
        return head in self.by_head(size) and _content(path) in self.by_content(size, head)


def _grouped(paths: Iterable[Path], key: Callable[[Path], Key]) -> dict[Key, set[Path]]:
    found: dict[Key, set[Path]] = {}
    for path in paths:
        found.setdefault(key(path), set()).add(path)
    return found


def _size(path: Path) -> int:
    """In bytes; -1 of what is no file, or not there."""
    return os.path.getsize(path) if path.is_file() else -1


def _head(path: Path) -> bytes:
    return _digest(path, parts=1)


def _content(path: Path) -> bytes:
    return _digest(path)


def _digest(path: Path, parts: int | None = None) -> bytes:
    """Of a file, or of its first ``parts`` of HEAD bytes."""
    digest = hashlib.blake2b()
    try:
        with path.open("rb") as file:
            for part in itertools.islice(iter(functools.partial(file.read, HEAD), b""), parts):
                digest.update(part)
    except OSError:
        return os.fsencode(path)  # like no other
    return digest.digest()


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
