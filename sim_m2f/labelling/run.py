"""Masks for every annotated box of a data set, image by image: read, labelled, noted, and put together."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from torch import nn

from sim_m2f.data.catalog import DatasetSource
from sim_m2f.data.coco import CocoData, ImageRecord, load_json, read_coco, read_mask, xyxy
from sim_m2f.data.formats.base import Record, images_of, write_list
from sim_m2f.data.formats.registry import WRITERS, refuse_shared_files
from sim_m2f.data.segmentation import JUST_BOXES, encode_masks, mostly_boxes
from sim_m2f.errors import UserError, image_problem
from sim_m2f.files import atomic_write
from sim_m2f.labelling.journal import Journal
from sim_m2f.labelling.masks import SIGNS, ellipse, label, overlaps, without_overlaps
from sim_m2f.labelling.quality import Quality, fitted, held_back_scores, summary
from sim_m2f.progress import progress
from sim_m2f.segmenter import Segmenter


class Masker(Protocol):
    """Whoever makes the masks of a data set's boxes."""

    def identity(self, source: DatasetSource) -> str:
        """Changes with anything that changes all masks: not with the annotations, nor with scores alone."""

    def scored(self, label: dict[str, Any]) -> dict[str, Any]:
        """The fields of one object as they are written, from those that ``labelling`` gave."""

    def labelling(self, data: CocoData) -> Callable[[ImageRecord], dict[int, Any]]:
        """What gives, of an image, the fields to add to each annotation by its id; UserError if it cannot."""


def fingerprint(source: DatasetSource, network: nn.Module | None, *choices: object) -> str:
    """Another text for another folder of images, network or choice."""
    digest = hashlib.sha256()
    for weight in network.state_dict().values() if network else ():
        digest.update(weight.detach().cpu().contiguous().numpy().tobytes())
    digest.update(repr((source.image_root.resolve(), *choices)).encode())
    return digest.hexdigest()


@dataclass(frozen=True)
class Labeller:
    """A network, its scores, whether colours correct its masks, whether those of a class may overlap."""

    model: Segmenter
    quality: Quality
    colors: bool
    keep_overlaps: bool

    def identity(self, source: DatasetSource) -> str:
        """Changes with anything that changes all masks: a calibration may end a digit aside each time."""
        choices = self.colors, self.keep_overlaps, self.model.cfg.dump()
        return fingerprint(source, self.model, self.model.class_names, *choices)

    def scored(self, label: dict[str, Any]) -> dict[str, Any]:
        """See ``Masker``."""
        (score,) = self.quality.score(np.array([[label["signs"][name] for name in SIGNS]]))
        return label | {"score": round(float(score), 4)}

    def labelling(self, data: CocoData) -> Callable[[ImageRecord], dict[int, Any]]:
        """See ``Masker``.

        Raises:
            UserError: the network knows no boxes, or has no such class.
        """
        self.model.require_prompts()
        return partial(self._labels, data, matching_classes(data, self.model.class_names))

    def _labels(self, data: CocoData, classes: np.ndarray, image: ImageRecord) -> dict[int, Any]:
        """Masks and signs of an image; ``classes`` (C,) are the network's, by those of the data."""
        pixels = data.read_image(image)
        found = label(self.model, pixels, image.boxes, classes[image.labels], self.colors)
        masks = found.masks
        if not self.keep_overlaps:
            masks = without_overlaps(masks, image.boxes, image.labels)
        rows = zip(image.annotation_ids, mask_fields(masks), found.signs.round(4).tolist(), strict=True)
        return {
            number: fields | {"signs": dict(zip(SIGNS, signs, strict=True))} for number, fields, signs in rows
        }


def label_set(masker: Masker, source: DatasetSource, output: Path, formats: Sequence[str] = ()) -> None:
    """Write ``output``: the annotations as they are, each with its mask, its score and what comes with it.

    Memory holds the boxes, never all masks. What a stopped call with the same network and options has done is
    not done again, but for images whose boxes have changed.

    Args:
        masker: who makes the masks.
        source: a COCO JSON and its images; crowd regions stay as they are.
        output: file to write; beside it, until all is done, lies what is done.
        formats: of ``WRITERS``, written beside it.

    Raises:
        UserError: the data have a fault, the network has no such class or knows no boxes, two images would
            share a file of a format, a file cannot be written, or images cannot be decoded or take too much
            memory: one line each, after all others are done and noted.
    """
    data = read_coco(source, read_masks=False)
    refuse_shared_files(source.annotations, (image.file_name for image in data.images), formats)
    labels = masker.labelling(data)
    digests = {image.id: image_digest(data, image) for image in data.images}
    journal = Journal(output.with_suffix(".progress.jsonl"), masker.identity(source), digests)
    with_boxes = [image for image in data.images if len(image.labels)]
    waiting = [image for image in with_boxes if image.id not in journal]
    problems = []
    for image in progress(waiting, "label", len(with_boxes), done=len(journal)):
        try:
            found = labels(image)
        except Exception as error:
            problems.append(image_problem(error, data.image_root / image.file_name))
        else:
            journal.add(image.id, found)
    if problems:
        raise UserError("\n".join([*problems, "all other images are labelled; the same command goes on"]))
    content = load_json(source.annotations, source.limits)
    sizes = {image.id: (image.height, image.width) for image in data.images}
    masks = partial(with_mask, sizes=sizes, journal=journal, scored=masker.scored)
    with atomic_write(output) as file:
        head = {key: value for key, value in content.items() if key != "annotations"}
        file.write(json.dumps(head)[:-1] + ', "annotations": ')
        write_list(file, map(masks, content.get("annotations", [])))
        file.write("}\n")
    for name in formats:
        labelled = ((image, list(map(masks, own))) for image, own in images_of(content))
        WRITERS[name].write(output.parent, content["categories"], labelled)
    journal.remove()


def check_set(source: DatasetSource, names: list[str], formats: Sequence[str]) -> None:
    """Tell faults of what is to be labelled before a calibration takes its time; ``names`` of the classes.

    Raises:
        UserError: the data have a fault, the network has no such class, or two images would share a file.
    """
    data = read_coco(source, read_masks=False)
    matching_classes(data, names)
    refuse_shared_files(source.annotations, (image.file_name for image in data.images), formats)


def image_digest(data: CocoData, image: ImageRecord) -> str:
    """Another text for other boxes, classes or ids on an image, or another file or size of it."""
    names = [data.class_names[label] for label in image.labels]
    own = image.file_name, image.height, image.width, image.boxes.tolist(), names, image.annotation_ids
    return hashlib.sha256(repr(own).encode()).hexdigest()[:16]


def with_mask(
    annotation: Record,
    sizes: dict[int, tuple[int, int]],
    journal: Journal,
    scored: Callable[[dict[str, Any]], dict[str, Any]],
) -> Record:
    """An annotation with its mask; one without area gets the pixel in its middle, a crowd stays as it is."""
    number, image = str(annotation["id"]), annotation["image_id"]
    if image in journal and number in journal.labels(image):
        return annotation | scored(journal.labels(image)[number])
    if annotation.get("iscrowd"):
        return annotation
    mask = ellipse(np.array(xyxy(annotation["bbox"])), *sizes[image])
    return annotation | mask_fields(mask[None])[0] | {"score": 0.0}


def mask_fields(masks: np.ndarray) -> list[dict[str, Any]]:
    """What annotations say of their masks (N, H, W) bool."""
    areas = masks.sum((1, 2)).tolist()
    return [{"segmentation": rle, "area": area} for rle, area in zip(encode_masks(masks), areas, strict=True)]


def matching_classes(data: CocoData, names: list[str]) -> np.ndarray:
    """(C,) the network's label of each class of the data, by name; -1 of one without objects that it lacks.

    Raises:
        UserError: the network has no class of an object's name.
    """
    used = {label for image in data.images for label in image.labels.tolist()}
    unknown = [data.class_names[label] for label in sorted(used) if data.class_names[label] not in names]
    if unknown:
        known = f"the network knows {', '.join(names[:10])}"
        raise UserError(f"{data.annotations_file}: no class {unknown[0]!r}; {known}; rename the category")
    return np.array([names.index(name) if name in names else -1 for name in data.class_names], np.int64)


@dataclass(frozen=True)
class Compared:
    """Masks of N validation boxes beside the true ones.

    Attributes:
        signs: (N, 4), see ``Labels``.
        ious: (N,) IoU with the true mask.
        images: (N,) int64, whose they are, numbered from 0.
    """

    signs: np.ndarray
    ious: np.ndarray
    images: np.ndarray

    @cached_property
    def scores(self) -> np.ndarray:
        """(N,) by weights from the other half of the images."""
        return held_back_scores(self.signs, self.ious, self.images)


def compared(model: Segmenter, source: DatasetSource) -> dict[bool, Compared]:
    """Masks of validation boxes with colours (True) and without.

    Args:
        model: a network that learned from prompts.
        source: a COCO JSON in which every object has a segmentation.

    Raises:
        UserError: the data have a fault, no object, or boxes for masks.
    """
    data = read_coco(source, read_masks=True)
    classes = matching_classes(data, model.class_names)
    images = [image for image in data.images if len(image.labels)]
    if not images:
        raise UserError(f"{source.annotations}: no object to compare masks with; give another --val")
    if mostly_boxes(
        pair for image in images for pair in zip(image.segmentations or [], image.boxes, strict=True)
    ):
        raise UserError(f"{source.annotations}: {JUST_BOXES}; give true masks, or leave --val out")
    signs: dict[bool, list[np.ndarray]] = {True: [], False: []}
    ious: dict[bool, list[np.ndarray]] = {True: [], False: []}
    for image in progress(images, "calibrate", len(images)):
        pixels = data.read_image(image)
        truth = np.stack([read_mask(data, image, index) for index in range(len(image.labels))])
        for colors in (True, False):
            found = label(model, pixels, image.boxes, classes[image.labels], colors)
            signs[colors].append(found.signs)
            ious[colors].append(overlaps(encode_masks(found.masks), encode_masks(truth)).diagonal())
    numbers = np.repeat(np.arange(len(images)), [len(image.labels) for image in images])
    return {key: Compared(np.concatenate(signs[key]), np.concatenate(ious[key]), numbers) for key in signs}


def calibrated(
    model: Segmenter, source: DatasetSource, colors: bool | None = None
) -> tuple[Quality, Compared]:
    """Scores fitted to validation masks, with or without colours as asked for, else as the masks are better.

    Returns:
        the scores, and what they were fitted to; for other arguments and errors see ``compared``.
    """
    found = compared(model, source)
    means = {colored: float(each.ious.mean()) for colored, each in found.items()}
    colors = means[True] >= means[False] if colors is None else colors
    best = found[colors]
    measured = summary(best.scores, best.ious)
    measured |= {f"mIoU {'with' if key else 'without'} colours": 100 * mean for key, mean in means.items()}
    return Quality(fitted(best.signs, best.ious), colors, measured), best
