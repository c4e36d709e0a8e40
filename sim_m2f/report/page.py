"""The page that shows a run: one HTML file with its images inside, for any screen and for paper."""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image

from sim_m2f.engine.coco_metrics import KINDS, SUMMARY

COLUMNS = dict(zip(SUMMARY, ("AP", "AP50", "AP75", "small", "medium", "large"), strict=True))


@dataclass(frozen=True)
class Example:
    """An image of the contact sheet: caption, panels by title, and (colour, text) of each prediction."""

    caption: str
    panels: dict[str, Image.Image]
    predictions: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Evolution:
    """How the method sees a training image: (step, figure) in order, and single objects of the last step."""

    caption: str
    rows: Sequence[tuple[str, Image.Image]]
    objects: Image.Image | None


@dataclass(frozen=True)
class Page:
    """What the page shows; empty parts are left out.

    ``metrics`` are in percent (None where unknown), ``labelled`` are annotated boxes with their masks,
    ``reliability`` plots the scores of such masks, ``config`` is YAML text.
    """

    title: str
    subtitle: str
    metrics: Mapping[str, float | None] = field(default_factory=dict)
    class_names: Sequence[str] = ()
    labelled: Sequence[Example] = ()
    reliability: Image.Image | None = None
    examples: Sequence[Example] = ()
    curves: Image.Image | None = None
    evolutions: Sequence[Evolution] = ()
    config: str = ""


def render(page: Page) -> str:
    """The page as self-contained HTML."""
    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["embedded"] = _embedded
    kinds = {kind: name for kind, name in KINDS.items() if f"{kind}/AP" in page.metrics}
    return environment.get_template("page.html.j2").render(page=page, kinds=kinds, columns=COLUMNS)


def _embedded(image: Image.Image, kind: str = "jpeg") -> str:
    """The image as an address that holds it."""
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, kind, quality=90, subsampling=0)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
