"""The embedded data set ``shapes``: procedural images as COCO JSON and PNG, the same from every run.

Eight classes that their boxes fit badly, before cluttered backgrounds. Masks are modal: an object owns the
pixels that no later object covers. So that hard subsets can be scored apart, an image has ``tags`` (some of
"camouflage", "same_class_overlap", "same_colour") and an annotation ``camouflage`` (true or false).
"""

import json
import math
import os
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask
from scipy.ndimage import binary_dilation
from tqdm import tqdm

from sim_m2f.data import shapes_paint as paint
from sim_m2f.data.segmentation import encode_masks
from sim_m2f.errors import UserError
from sim_m2f.files import atomic_write, cache_folder

VERSION = "shapes-v1"
SPLITS = {"train": 2000, "val": 200}
CLASSES = tuple(paint.LOOKS)

DIAMETER = (36, 84)  # of the circle around an object, pixels
CAMOUFLAGED = 0.08  # share of the objects that are placed freely
SAME_CLASS_OVERLAP, SAME_COLOUR = 0.1, 0.1  # shares of the images; free placement adds to the first
MIN_VISIBLE_SHARE, MIN_VISIBLE_PIXELS = 0.35, 60
TRIES = 40  # placements that are tried before an object is left out


@dataclass
class Thing:
    """One object; lengths in pixels, arrays (SIZE, SIZE)."""

    label: int
    centre: np.ndarray
    diameter: float
    alpha: np.ndarray  # share of each pixel that it covers, float in 0..1
    visible: np.ndarray  # what no later object hides, bool
    area: float  # of the whole shape, also beyond the image's edge
    colour: np.ndarray | None = None  # RGB; None: camouflaged

    @property
    def name(self) -> str:
        return CLASSES[self.label]

    @property
    def mask(self) -> np.ndarray:
        return self.alpha >= 0.5


def make_thing(rng: np.random.Generator, label: int, centre: np.ndarray, diameter: float) -> Thing:
    turn = paint.rotation(rng.uniform(0, 2 * math.pi)) * diameter / 2
    polygons = [polygon @ turn + centre for polygon in paint.LOOKS[CLASSES[label]].outline(rng)]
    alpha = paint.coverage(polygons)
    area = paint.polygon_area(polygons[0]) - sum(map(paint.polygon_area, polygons[1:]))
    return Thing(label, centre, diameter, alpha, alpha >= 0.5, area)


class Scene:
    """An image while it is painted: each object over the earlier ones, none of which may vanish under it."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng
        self.canvas = paint.background(rng)
        self.things: list[Thing] = []

    def fits(self, new: Thing) -> bool:
        pairs = [(thing.visible & ~new.mask, thing.area) for thing in self.things]
        pairs.append((new.visible, new.area))
        return all(mask.sum() >= max(MIN_VISIBLE_PIXELS, MIN_VISIBLE_SHARE * area) for mask, area in pairs)

    def add(self, thing: Thing, fill: np.ndarray) -> None:
        self.canvas = self.canvas + thing.alpha[..., None] * (fill - self.canvas)
        for earlier in self.things:
            earlier.visible &= ~thing.mask
        self.things.append(thing)

    def anywhere(self) -> Thing:
        diameter = self.rng.uniform(*DIAMETER)
        centre = self.rng.uniform(0.3 * diameter, paint.SIZE - 0.3 * diameter, 2)
        return make_thing(self.rng, int(self.rng.integers(len(CLASSES))), centre, diameter)

    def beside(self, other: Thing, label: int, near: float, far: float) -> Thing:
        """A thing of similar size, its centre ``near`` to ``far`` mean diameters from that of the other."""
        diameter = np.clip(other.diameter * self.rng.uniform(0.75, 1.3), *DIAMETER)
        angle = self.rng.uniform(0, 2 * math.pi)
        distance = self.rng.uniform(near, far) * (diameter + other.diameter) / 2
        centre = other.centre + distance * np.array([math.cos(angle), math.sin(angle)])
        return make_thing(self.rng, label, centre, diameter)

    def add_alone(self, may_hide: bool = True) -> None:
        """A thing that stands out from what lies under it, or a camouflaged one that overlaps no other."""
        hide = may_hide and self.rng.random() < CAMOUFLAGED
        for _ in range(TRIES):
            thing = self.anywhere()
            overlaps = any((thing.mask & other.mask).any() for other in self.things)
            if (hide and overlaps) or not self.fits(thing):
                continue
            if hide:
                return self.add(thing, paint.camouflage(self.rng, thing.name, self.canvas, thing.mask))
            thing.colour = paint.contrasting_colour(self.rng, thing.name, self.canvas[thing.mask])
            return self.add(thing, paint.class_fill(self.rng, thing.name, thing.colour))

    def add_same_class_overlap(self) -> None:
        """Over the first thing, a second of its class: half the time of a similar colour."""
        first = self.things[0]
        for _ in range(TRIES):
            thing = self.beside(first, first.label, 0.4, 0.85)
            if (thing.mask & first.mask).sum() >= 20 and self.fits(thing):
                thing.colour = paint.contrasting_colour(self.rng, thing.name, self.canvas[thing.mask])
                if self.rng.random() < 0.5:
                    shift = self.rng.choice([-1, 1]) * self.rng.uniform(25, 45)
                    thing.colour = np.clip(first.colour + shift, 5, 250).astype(np.float32)
                return self.add(thing, paint.class_fill(self.rng, thing.name, thing.colour))

    def add_same_colour(self) -> None:
        """Beside the first thing, one of another class and of the same mean colour, at most 3 pixels away."""
        first = self.things[0]
        reach = binary_dilation(first.mask, iterations=3)
        label = (first.label + int(self.rng.integers(1, len(CLASSES)))) % len(CLASSES)
        for _ in range(TRIES):
            thing = self.beside(first, label, 0.6, 1.1)
            overlap = (thing.mask & first.mask).sum()
            if (thing.mask & reach).any() and overlap <= 0.08 * thing.area and self.fits(thing):
                assert first.colour is not None  # it was placed where nothing may hide
                thing.colour = first.colour
                return self.add(thing, paint.fill(self.rng, paint.LOOKS[thing.name].texture, thing.colour))

    def tags(self) -> list[str]:
        pairs = [(a, b) for i, a in enumerate(self.things) for b in self.things[:i]]
        present = {
            "camouflage": any(thing.colour is None for thing in self.things),
            "same_class_overlap": any(a.label == b.label and (a.mask & b.mask).sum() >= 20 for a, b in pairs),
            "same_colour": any(a.colour is not None and a.colour is b.colour for a, b in pairs),
        }
        return [tag for tag, is_there in present.items() if is_there]


def make_scene(rng: np.random.Generator) -> Scene:
    scene = Scene(rng)
    draw = rng.random()
    if draw < SAME_CLASS_OVERLAP + SAME_COLOUR:
        scene.add_alone(may_hide=False)
        scene.add_same_class_overlap() if draw < SAME_CLASS_OVERLAP else scene.add_same_colour()
    for _ in range(rng.integers(1, 4) - len(scene.things)):
        scene.add_alone()
    return scene


def annotate(thing: Thing, image_id: int) -> dict:
    """The thing as a COCO annotation, without its id."""
    (segmentation,) = encode_masks(thing.visible[None])
    return {
        "image_id": image_id,
        "category_id": int(thing.label) + 1,
        "bbox": coco_mask.toBbox(segmentation).astype(int).tolist(),
        "area": int(coco_mask.area(segmentation)),
        "iscrowd": 0,
        "segmentation": segmentation,
        "camouflage": thing.colour is None,
    }


def write_image(folder: Path, split: str, number: int) -> tuple[dict, list[dict]]:
    """Paint image ``number`` (from 1) of a split; returns its COCO record and annotations."""
    scene = make_scene(np.random.default_rng([list(SPLITS).index(split), number]))
    name = f"{number:06d}.png"
    pixels = np.clip(np.rint(scene.canvas), 0, 255).astype(np.uint8)
    Image.fromarray(pixels).save(folder / split / name, compress_level=1)
    image = {"id": number, "file_name": name, "width": paint.SIZE, "height": paint.SIZE, "tags": scene.tags()}
    return image, [annotate(thing, number) for thing in scene.things]


def write_split(folder: Path, split: str) -> None:
    (folder / split).mkdir(parents=True)
    count = SPLITS[split]
    with ProcessPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        written = pool.map(partial(write_image, folder, split), range(1, count + 1), chunksize=25)
        results = list(tqdm(written, f"shapes {split}", count, unit="image", disable=None))
    annotations = chain.from_iterable(annotations for _, annotations in results)
    data = {
        "info": {"description": f"{VERSION} {split}"},
        "categories": [{"id": i, "name": name} for i, name in enumerate(CLASSES, 1)],
        "images": [image for image, _ in results],
        "annotations": [{"id": i, **annotation} for i, annotation in enumerate(annotations, 1)],
    }
    with atomic_write(folder / "annotations" / f"{split}.json") as file:
        json.dump(data, file)


def write_shapes(folder: str | Path) -> Path:
    """Write annotations/{train,val}.json, train/*.png and val/*.png into ``folder``; returns it.

    The folder appears at once, complete; a set that is there already is kept as it is.

    Raises:
        UserError: the folder holds something else, or cannot be written to.
    """
    folder = Path(folder)
    marker = folder / f"{VERSION}.complete"
    if marker.is_file():
        return folder
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: is not empty and not the shapes set; delete it or choose another folder")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as draft:
            complete = Path(draft) / "set"
            for split in SPLITS:
                write_split(complete, split)
            (complete / marker.name).touch()
            complete.rename(folder)
    except OSError as error:
        if not marker.is_file():  # else another process was faster
            reason = error.strerror or error
            raise UserError(f"{folder}: cannot be written ({reason}); choose another folder") from error
    return folder


def cached_shapes() -> Path:
    """The set's folder in the cache, ``$SIM_M2F_CACHE`` (default ~/.cache/sim_m2f); written on first use."""
    return write_shapes(cache_folder() / VERSION)
