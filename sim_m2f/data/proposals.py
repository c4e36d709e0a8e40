"""Masks from elsewhere for the annotations of a data set, with a confidence each: read beside its boxes."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from sim_m2f.data.coco import CocoData, ImageRecord, load_json, refuse
from sim_m2f.data.segmentation import segmentation_problem
from sim_m2f.errors import UserError


def with_proposals(data: CocoData, path: Path) -> CocoData:
    """The data set with the masks that a COCO JSON has for its annotations, by their ids.

    Args:
        data: as read; its own segmentations stay what they are.
        path: a JSON whose "annotations" have a "segmentation" and a "score", as ``sim-m2f propose`` and
            ``label`` write it. Annotations of other ids are passed over.

    Raises:
        UserError: the file is no such JSON, has masks for none of the annotations, or a mask has a fault.
    """
    annotations = load_json(path, data.limits).get("annotations")
    if not isinstance(annotations, list):
        raise UserError(f"{path}: has no list 'annotations'; give the file that sim-m2f propose has written")
    records = [item for item in annotations if isinstance(item, dict) and isinstance(item.get("id"), int)]
    given = {item["id"]: item for item in records}
    problems: list[str] = []
    images = [_of_image(image, given, path, problems) for image in data.images]
    refuse(problems)
    if not any(any(image.proposals or []) for image in images):
        fault = f"has no mask for an annotation of {data.annotations_file}"
        raise UserError(f"{path}: {fault}; let sim-m2f propose make them of that file")
    return replace(data, images=images)


def _of_image(
    image: ImageRecord, given: dict[int, dict[str, Any]], path: Path, problems: list[str]
) -> ImageRecord:
    """An image with its proposals; notes what is wrong with them."""
    proposals: list[tuple[Any, float] | None] = []
    for number in image.annotation_ids:
        item = given.get(number, {})
        shape, score = item.get("segmentation"), item.get("score")
        fault = None
        if not shape:
            pass
        elif item.get("image_id") != image.id:
            fault = f"belongs to image id {item.get('image_id')}, not {image.id}; make the file anew"
        elif not isinstance(score, int | float) or not 0 <= score <= 1:
            fault = f"has score {score!r}; write a confidence from 0 to 1"
        elif problem := segmentation_problem(shape, image.height, image.width):
            fault = f"segmentation {problem}"
        if fault:
            problems.append(f"{path}: annotation id {number}: {fault}")
        proposals.append((shape, score or 0.0) if shape else None)
    return replace(image, proposals=proposals)
