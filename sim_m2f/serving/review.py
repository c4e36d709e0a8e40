"""The review of a labelled set: its objects worst first, decisions on disk as they are made, an export."""

import dataclasses
import hashlib
import json
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from sim_m2f.data.catalog import DatasetSource
from sim_m2f.data.coco import load_json, read_coco, xyxy
from sim_m2f.data.dataset import decoded
from sim_m2f.data.formats.base import Record
from sim_m2f.errors import UserError
from sim_m2f.files import write_file
from sim_m2f.labelling.journal import Journal
from sim_m2f.labelling.run import Labeller, matching_classes
from sim_m2f.report.labelled import MASKS

FOLDER = "reviewed"  # beside masks.json
OPEN, ACCEPTED, REJECTED = "open", "accepted", "rejected"


class Review:
    """Decisions about the masks of a labelled set; another process goes on with them.

    Args:
        labeller: gives redrawn boxes their masks.
        source: masks.json of ``label`` or ``fit``, and its images. Crowd regions and boxes of zero area are
            not reviewed. Decisions belong to exactly this file: for another one the review begins anew.

    Raises:
        UserError: the file has a fault, its classes are not the network's, there is nothing to review, or
            the folder cannot be written to.
    """

    def __init__(self, labeller: Labeller, source: DatasetSource) -> None:
        self.labeller, self.data = labeller, read_coco(source, read_masks=True, some_masks=True)
        matching_classes(self.data, labeller.model.class_names)
        self.content = load_json(source.annotations, source.limits)
        self.image_of = {number: image for image in self.data.images for number in image.annotation_ids}
        self.records = {each["id"]: each for each in self.content.get("annotations", [])}
        for number in self.image_of:
            if type(self.score(number)) not in (int, float):
                fault = f"annotation id {number}: score is {self.score(number)!r}, not a number"
                raise UserError(f"{source.annotations}: {fault}; correct it or leave it out")
        if not self.image_of:
            raise UserError(f"{source.annotations}: no object to review; give another labelled set")
        self.order = sorted(self.image_of, key=self.score)
        self.folder, self.lock = source.annotations.parent / FOLDER, threading.Lock()
        identity = hashlib.sha256(source.annotations.read_bytes()).hexdigest()
        self.journal = Journal(self.folder / f"{identity[:16]}.jsonl", identity)
        noted = (self.journal.labels(image) for image in list(self.journal.places))
        self.changes = {int(number): change for labels in noted for number, change in labels.items()}

    def score(self, number: int) -> Any:
        """Of an annotation's own mask; 1 where the file has none."""
        return self.records[number].get("score", 1.0)

    def decision(self, number: int) -> str:
        """``OPEN``, ``ACCEPTED`` or ``REJECTED``."""
        return str(self.changes.get(number, {}).get("decision", OPEN))

    def record(self, number: int) -> Record:
        """An annotation as it stands, with its "decision"."""
        return self.records[number] | {"decision": OPEN} | self.changes.get(number, {})

    def target(self, number: int) -> tuple[np.ndarray, int]:
        """An object's box (4,) xyxy, within its image, and its class, as they were before the review."""
        image = self.image_of[number]
        place = image.annotation_ids.index(number)
        return image.boxes[place], int(image.labels[place])

    def title(self, number: int) -> str:
        """Class and id."""
        return f"{self.data.class_names[self.target(number)[1]]} {number}"

    def box(self, number: int) -> np.ndarray:
        """(4,) xyxy as it stands."""
        return np.array(xyxy(self.record(number)["bbox"]))

    def mask(self, number: int) -> np.ndarray | None:
        """(H, W) bool as it stands; None for an object without one.

        Raises:
            UserError: it cannot be decoded.
        """
        image, segmentation = self.image_of[number], self.record(number).get("segmentation")
        if not segmentation:
            return None
        return decoded(self.data, image, image.annotation_ids.index(number), segmentation).astype(bool)

    def counts(self) -> Counter[str]:
        """How many objects are accepted, rejected and open."""
        return Counter(map(self.decision, self.order))

    def next_open(self, number: int | None = None) -> int:
        """The first open object behind another one, or of all; where none is open, the same, or the worst."""
        start = 0 if number is None else self.order.index(number) + 1
        behind = self.order[start:] + self.order[:start]
        still = (each for each in behind if self.decision(each) == OPEN)
        return next(still, self.order[0] if number is None else number)

    def neighbour(self, number: int, step: int) -> int:
        """The object so many places behind another one; behind the last comes the first."""
        return self.order[(self.order.index(number) + step) % len(self.order)]

    def decide(self, number: int, decision: str) -> None:
        """Note ``ACCEPTED`` or ``REJECTED``.

        Raises:
            UserError: the disk is full.
        """
        self._note(number, {"decision": decision})

    def redraw(self, number: int, box: np.ndarray) -> None:
        """Give an object another box (4,) xyxy in pixels of its image, its mask and score; it is open again.

        Raises:
            UserError: the network knows no boxes, the image cannot be decoded, or the disk is full.
        """
        label = np.array([self.target(number)[1]])
        alone = dataclasses.replace(
            self.image_of[number], boxes=box[None], labels=label, annotation_ids=[number], segmentations=None
        )
        mask = self.labeller.scored(self.labeller.labelling(self.data)(alone)[number])
        bbox = [*box[:2].tolist(), *(box[2:] - box[:2]).tolist()]
        self._note(number, mask | {"bbox": bbox, "decision": OPEN})

    def export(self) -> Path:
        """Write reviewed/masks.json: the set as it stands, every reviewed object with its "decision".

        A rejected object keeps its box and loses its mask, as ``MODEL.SIM.SUPERVISION mixed`` takes it.

        Returns:
            the path.

        Raises:
            UserError: it cannot be written; an earlier one is as it was.
        """
        path = self.folder / MASKS
        annotations = [
            self._exported(each["id"]) if each["id"] in self.image_of else each
            for each in self.content["annotations"]
        ]
        write_file(path, json.dumps(self.content | {"annotations": annotations}))
        return path

    def _exported(self, number: int) -> Record:
        record = self.record(number)
        if record["decision"] != REJECTED:
            return record
        width, height = record["bbox"][2:]
        kept = {key: value for key, value in record.items() if key not in ("segmentation", "signs", "score")}
        return kept | {"area": width * height}

    def _note(self, number: int, change: dict[str, Any]) -> None:
        image = self.image_of[number]
        with self.lock:
            own = {each: self.changes[each] for each in image.annotation_ids if each in self.changes}
            own[number] = own.get(number, {}) | change
            self.journal.add(image.id, own)
            self.changes[number] = own[number]
