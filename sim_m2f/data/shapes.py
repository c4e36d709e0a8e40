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

from sim_m2f.data import shapes_paint as paint
from sim_m2f.data.segmentation import encode_masks
from sim_m2f.errors import UserError
from sim_m2f.files import cache_folder, write_file
from sim_m2f.progress import progress

VERSION = "shapes-v1"
SPLITS = {"train": 2000, "val": 200}
CLASSES = tuple(paint.LOOKS)

DIAMETER = (36, 84)  # of the circle around an object, pixels
CAMOUFLAGED = 0.08  # share of the objects that are placed freely
SAME_CLASS_OVERLAP, SAME_COLOUR = 0.1, 0.1  # shares of the images; free placement adds to the first
MIN_VISIBLE_SHARE, MIN_VISIBLE_PIXELS = 0.35, 60
TRIES = 40  # placements that are tried before an object is left out


@dataclass
class Shape:
    """One object; lengths in pixels, arrays (SIZE, SIZE)."""

    name: str  # one of CLASSES
    centre: np.ndarray
    diameter: float
    alpha: np.ndarray  # share of each pixel that it covers, float in 0..1
    visible: np.ndarray  # what no later object hides, bool
    area: float  # of the whole shape, also beyond the image's edge
    colour: np.ndarray | None = None  # RGB; None: camouflaged

    @property
    def mask(self) -> np.ndarray:
        return self.alpha >= 0.5


def make_shape(rng: np.random.Generator, name: str, centre: np.ndarray, diameter: float) -> Shape:
    turn = paint.rotation(rng.uniform(0, 2 * math.pi)) * diameter / 2
    polygons = [polygon @ turn + centre for polygon in paint.LOOKS[name].outline(rng)]
    alpha = paint.coverage(polygons)
    area = paint.polygon_area(polygons[0]) - sum(map(paint.polygon_area, polygons[1:]))
    return Shape(name, centre, diameter, alpha, alpha >= 0.5, area)


class Scene:
    """A painted image: each object over the earlier ones, none of which may vanish under it."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng
        self.canvas = paint.background(rng)
        self.shapes: list[Shape] = []
        draw = rng.random()
        if draw < SAME_CLASS_OVERLAP + SAME_COLOUR:
            self.add_alone(may_hide=False)
            self.add_same_class_overlap() if draw < SAME_CLASS_OVERLAP else self.add_same_colour()
        for _ in range(rng.integers(1, 4) - len(self.shapes)):
            self.add_alone()

    def fits(self, new: Shape) -> bool:
        pairs = [(shape.visible & ~new.mask, shape.area) for shape in self.shapes]
        pairs.append((new.visible, new.area))
        return all(mask.sum() >= max(MIN_VISIBLE_PIXELS, MIN_VISIBLE_SHARE * area) for mask, area in pairs)

    def add(self, shape: Shape, fill: np.ndarray) -> None:
        self.canvas = self.canvas + shape.alpha[..., None] * (fill - self.canvas)
        for earlier in self.shapes:
            earlier.visible &= ~shape.mask
        self.shapes.append(shape)

    def anywhere(self) -> Shape:
        diameter = self.rng.uniform(*DIAMETER)
        centre = self.rng.uniform(0.3 * diameter, paint.SIZE - 0.3 * diameter, 2)
        return make_shape(self.rng, CLASSES[self.rng.integers(len(CLASSES))], centre, diameter)

    def beside(self, other: Shape, name: str, near: float, far: float) -> Shape:
        """A shape of similar size, its centre ``near`` to ``far`` mean diameters from that of the other."""
        diameter = np.clip(other.diameter * self.rng.uniform(0.75, 1.3), *DIAMETER)
        angle = self.rng.uniform(0, 2 * math.pi)
        distance = self.rng.uniform(near, far) * (diameter + other.diameter) / 2
        centre = other.centre + distance * np.array([math.cos(angle), math.sin(angle)])
        return make_shape(self.rng, name, centre, diameter)

    def add_alone(self, may_hide: bool = True) -> None:
        """A shape that stands out from what lies under it, or a camouflaged one that overlaps no other."""
        hide = may_hide and self.rng.random() < CAMOUFLAGED
        for _ in range(TRIES):
            shape = self.anywhere()
            overlaps = any((shape.mask & other.mask).any() for other in self.shapes)
            if (hide and overlaps) or not self.fits(shape):
                continue
            if hide:
                return self.add(shape, paint.camouflage(self.rng, shape.name, self.canvas, shape.mask))
            shape.colour = paint.contrasting_colour(self.rng, shape.name, self.canvas[shape.mask])
            return self.add(shape, paint.class_fill(self.rng, shape.name, shape.colour))

    def add_same_class_overlap(self) -> None:
        """Over the first shape, a second of its class: half the time of a similar colour."""
        first = self.shapes[0]
        for _ in range(TRIES):
            shape = self.beside(first, first.name, 0.4, 0.85)
            if (shape.mask & first.mask).sum() >= 20 and self.fits(shape):
                shape.colour = paint.contrasting_colour(self.rng, shape.name, self.canvas[shape.mask])
                if self.rng.random() < 0.5:
                    shift = self.rng.choice([-1, 1]) * self.rng.uniform(25, 45)
                    shape.colour = np.clip(first.colour + shift, 5, 250).astype(np.float32)
                return self.add(shape, paint.class_fill(self.rng, shape.name, shape.colour))

    def add_same_colour(self) -> None:
        """Beside the first shape, one of another class and of the same mean colour, at most 3 pixels away."""
        first = self.shapes[0]
        reach = binary_dilation(first.mask, iterations=3)
        name = CLASSES[(CLASSES.index(first.name) + self.rng.integers(1, len(CLASSES))) % len(CLASSES)]
        for _ in range(TRIES):
            shape = self.beside(first, name, 0.6, 1.1)
            overlap = (shape.mask & first.mask).sum()
            if (shape.mask & reach).any() and overlap <= 0.08 * shape.area and self.fits(shape):
                assert first.colour is not None  # it was placed where nothing may hide
                shape.colour = first.colour
                return self.add(shape, paint.fill(self.rng, paint.LOOKS[shape.name].texture, shape.colour))

    def tags(self) -> list[str]:
        pairs = [(a, b) for i, a in enumerate(self.shapes) for b in self.shapes[:i]]
        present = {
            "camouflage": any(shape.colour is None for shape in self.shapes),
            "same_class_overlap": any(a.name == b.name and (a.mask & b.mask).sum() >= 20 for a, b in pairs),
            "same_colour": any(a.colour is not None and a.colour is b.colour for a, b in pairs),
        }
        return [tag for tag, is_there in present.items() if is_there]


def annotate(shape: Shape, image_id: int) -> dict:
    """The shape as a COCO annotation, without its id."""
    (segmentation,) = encode_masks(shape.visible[None])
    return {
        "image_id": image_id,
        "category_id": CLASSES.index(shape.name) + 1,
        "bbox": coco_mask.toBbox(segmentation).astype(int).tolist(),
        "area": int(coco_mask.area(segmentation)),
        "iscrowd": 0,
        "segmentation": segmentation,
        "camouflage": shape.colour is None,
    }


def write_image(folder: Path, split: str, number: int) -> tuple[dict, list[dict]]:
    """Paint image ``number`` (from 1) of a split; returns its COCO record and annotations."""
    scene = Scene(np.random.default_rng([list(SPLITS).index(split), number]))
    name = f"{number:06d}.png"
    pixels = np.clip(np.rint(scene.canvas), 0, 255).astype(np.uint8)
    Image.fromarray(pixels).save(folder / split / name, compress_level=1)
    image = {"id": number, "file_name": name, "width": paint.SIZE, "height": paint.SIZE, "tags": scene.tags()}
    return image, [annotate(shape, number) for shape in scene.shapes]


def write_split(folder: Path, split: str) -> None:
    (folder / split).mkdir(parents=True)
    count = SPLITS[split]
    with ProcessPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        written = pool.map(partial(write_image, folder, split), range(1, count + 1), chunksize=25)
        shown = progress(written, f"shapes {split}", count)
        images, annotations = zip(*shown, strict=True)
    data = {
        "info": {"description": f"{VERSION} {split}"},
        "categories": [{"id": i, "name": name} for i, name in enumerate(CLASSES, 1)],
        "images": images,
        "annotations": [{"id": i, **item} for i, item in enumerate(chain.from_iterable(annotations), 1)],
    }
    write_file(folder / "annotations" / f"{split}.json", json.dumps(data))


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
