"""The page that shows a run: one HTML file with its images inside, for any screen and for paper."""

import base64
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from PIL import Image

from sim_m2f.engine.coco_metrics import KINDS, SUMMARY

MAX_LEGEND = 16  # predictions named under an image
HEADINGS = ("AP", "AP50", "AP75", "small", "medium", "large")


@dataclass(frozen=True)
class Example:
    """An image of the contact sheet: caption, panels by title, and (colour, text) of each prediction."""

    caption: str
    panels: dict[str, Image.Image]
    predictions: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Evolution:
    """How the method sees a training image: (step, figure) in order, and the last step's single objects."""

    caption: str
    rows: Sequence[tuple[str, Image.Image]]
    objects: Image.Image


@dataclass(frozen=True)
class Page:
    """What the page shows; empty parts are left out.

    ``metrics`` are in percent (NaN where unknown), ``curves`` are two PNG files, for light and for dark
    screens, ``config`` is YAML text.
    """

    title: str
    subtitle: str
    metrics: dict[str, float]
    class_names: Sequence[str]
    examples: Sequence[Example]
    curves: tuple[bytes, bytes] | None = None
    evolutions: Sequence[Evolution] = ()
    config: str = ""


def render(page: Page) -> str:
    """The page as self-contained HTML."""
    sections = [
        _headline(page.metrics),
        _section("Images", _images(page.examples)) if page.examples else "",
        _section("Average precision", _summary(page.metrics)) if page.metrics else "",
        _section("Average precision by class", _classes(page)) if page.metrics else "",
        _section("Training", _curves(*page.curves)) if page.curves else "",
        _section("The method", _method(page.evolutions)) if page.evolutions else "",
        _configuration(page.config) if page.config else "",
    ]
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escape(page.title)}</title>
<style>{_STYLE}</style>
</head>
<body>
<header><h1>{escape(page.title)}</h1><p>{escape(page.subtitle)}</p></header>
{"".join(sections)}
</body>
</html>
"""


def _section(title: str, body: str) -> str:
    return f"<section><h2>{title}</h2>{body}</section>\n"


def _configuration(text: str) -> str:
    return f"<details><summary>Configuration</summary><pre>{escape(text)}</pre></details>\n"


def _number(value: float | None) -> str:
    return "–" if value is None or math.isnan(value) else f"{value:.1f}"


def _ratio(metrics: dict[str, float], name: str) -> str:
    masks, filled = metrics.get(f"segm/{name}", math.nan), metrics.get(f"boxfill/{name}", math.nan)
    return f"{masks / filled:.2f}×" if filled > 0 and not math.isnan(masks) else "–"


def _headline(metrics: dict[str, float]) -> str:
    facts = [
        (_number(metrics[f"{kind}/AP"]), f"AP of the {name}")
        for kind, name in KINDS.items()
        if f"{kind}/AP" in metrics
    ]
    if "boxfill/AP" in metrics:
        facts.append((_ratio(metrics, "AP"), "masks / box fill"))
    cards = "".join(f"<div><b>{value}</b><span>{label}</span></div>" for value, label in facts)
    return f'<div class="cards">{cards}</div>' if cards else ""


def _images(examples: Sequence[Example]) -> str:
    figures = "".join(map(_figure, examples))
    return (
        "<p>One colour per annotated object; a prediction wears the colour of the box that it overlaps most "
        "(IoU at least 0.5), another one where there is none. <span>A click enlarges.</span></p>"
        f'<div class="images">{figures}</div>'
    )


def _figure(example: Example) -> str:
    caption = escape(example.caption)
    panels = "".join(
        f'<span><small>{escape(title)}</small><img src="{_jpeg(panel)}" alt="{caption}"></span>'
        for title, panel in example.panels.items()
    )
    legend = "".join(
        f'<li><i style="background:{colour}"></i>{escape(text)}</li>'
        for colour, text in example.predictions[:MAX_LEGEND]
    )
    if len(example.predictions) > MAX_LEGEND:
        legend += f"<li>and {len(example.predictions) - MAX_LEGEND} more</li>"
    return (
        '<figure><label><input type="checkbox" aria-label="enlarge">'
        f'<span class="panels">{panels}</span></label>'
        f"<figcaption>{caption}<ul>{legend}</ul></figcaption></figure>"
    )


def _summary(metrics: dict[str, float]) -> str:
    rows = [
        (name, [_number(metrics[f"{kind}/{column}"]) for column in SUMMARY])
        for kind, name in KINDS.items()
        if f"{kind}/AP" in metrics
    ]
    if "boxfill/AP" in metrics:
        rows.append(("masks / box fill", [_ratio(metrics, column) for column in SUMMARY]))
    body = "".join(
        f"<tr><th>{name}</th>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>" for name, cells in rows
    )
    heads = "".join(f"<th>{name}</th>" for name in ("", *HEADINGS))
    note = "In percent, as COCO computes it. Small, medium, large: below 32², to 96², above 96² pixels."
    if "boxfill/AP" in metrics:
        note += " Box fill: the same detections with each mask replaced by its own filled box."
    table = f"<table><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table>"
    return f'<div class="wide">{table}</div><p>{note}</p>'


def _classes(page: Page) -> str:
    kinds = [kind for kind in KINDS if f"{kind}/AP" in page.metrics]
    heads = "".join(f"<th>{KINDS[kind]}</th>" for kind in kinds)
    rows = "".join(_class_row(name, page.metrics, kinds) for name in page.class_names)
    note = f"Bar: {KINDS[kinds[0]]}." + (" Mark: box fill." if "boxfill" in kinds else "")
    return (
        f'<div class="wide"><table class="classes"><thead><tr><th></th><th></th>{heads}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div><p>{note} – where no object of the class is annotated.</p>"
    )


def _class_row(name: str, metrics: dict[str, float], kinds: Sequence[str]) -> str:
    values = {kind: metrics.get(f"{kind}/AP-{name}", math.nan) for kind in kinds}
    known = {kind: 0.0 if math.isnan(value) else value for kind, value in values.items()}
    mark = f'<u style="left:{known["boxfill"]:.1f}%"></u>' if known.get("boxfill") else ""
    bar = f'<div class="bar"><i style="width:{known[kinds[0]]:.1f}%"></i>{mark}</div>'
    cells = "".join(f"<td>{_number(value)}</td>" for value in values.values())
    return f"<tr><th>{escape(name)}</th><td>{bar}</td>{cells}</tr>"


def _curves(light: bytes, dark: bytes) -> str:
    return (
        f'<picture><source media="screen and (prefers-color-scheme: dark)" srcset="{_data("png", dark)}">'
        f'<img class="curves" src="{_data("png", light)}" alt="average precision and losses"></picture>'
        "<p>Faint: as logged; bold: running mean.</p>"
    )


def _method(evolutions: Sequence[Evolution]) -> str:
    return _METHOD + "".join(map(_evolution, evolutions))


def _evolution(evolution: Evolution) -> str:
    caption = escape(evolution.caption)
    figures = [*evolution.rows, (f"objects, {evolution.rows[-1][0]}", evolution.objects)]
    images = "".join(
        f'<img src="{_jpeg(figure)}" alt="{caption}, {escape(text)}">' for text, figure in figures
    )
    return f'<div class="method wide"><h3>{caption}</h3>{images}</div>'


def _jpeg(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=90, subsampling=0)
    return _data("jpeg", buffer.getvalue())


def _data(kind: str, content: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


_METHOD = """
<p>Some training images as the method sees them, from the first steps to the last. The prototypes of the
annotated class give the semantic mask M<sub>S</sub>, which cannot tell objects of one class apart. The
teacher's masks of an object, weighted by class probability times the IoU of their box and the annotated one,
give its instance mask M<sub>I</sub>. Their blend M becomes the labels that the student learns. L0, L1 ... are
the masks of the object's query after each decoder layer, +1, +2 ... those of further queries that claim the
same object.</p>
"""
_STYLE = """
:root {
  --ink: #1c2024; --soft: #667078; --line: #dfe3e7; --paper: #fff; --card: #f4f6f8; --accent: #2f7fd6;
}
@media screen and (prefers-color-scheme: dark) {
  :root {
    --ink: #e6eaee; --soft: #98a2ac; --line: #2c333a; --paper: #15191d; --card: #1e242a; --accent: #5aa2ee;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; max-width: 1280px; padding: 1.5rem clamp(.8rem, 3vw, 2.5rem) 3rem;
  background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif;
}
h1 { font-size: clamp(1.4rem, 4vw, 2rem); line-height: 1.2; margin: 0; }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; }
p { margin: .4rem 0; }
header p, section > p { color: var(--soft); font-size: .92rem; }
.cards {
  display: grid; grid-template-columns: repeat(auto-fit, minmax(8rem, 1fr)); gap: .8rem; margin: 1.2rem 0;
}
.cards div { background: var(--card); border-radius: 10px; padding: .8rem 1rem; }
.cards b { display: block; font-size: 1.9rem; line-height: 1.15; font-variant-numeric: tabular-nums; }
.cards div:first-child b { color: var(--accent); }
.cards span { color: var(--soft); font-size: .85rem; }
.images {
  display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 34rem), 1fr)); gap: 1.4rem 1.6rem;
  margin-top: .8rem;
}
figure { margin: 0; break-inside: avoid; min-width: 0; }
figure:has(:checked) { grid-column: 1 / -1; }
figure label { cursor: zoom-in; }
figure:has(:checked) label { cursor: zoom-out; }
figure input { position: absolute; opacity: 0; }
figure:has(:focus-visible) .panels { outline: 2px solid var(--accent); }
.panels { display: grid; grid-auto-flow: column; grid-auto-columns: minmax(0, 1fr); gap: 4px; }
.panels small {
  display: block; color: var(--soft); font-size: .78rem;
  white-space: nowrap; overflow: hidden; text-overflow: ellipsis;
}
.panels img { width: 100%; display: block; border-radius: 4px; }
figcaption { color: var(--soft); font-size: .8rem; margin-top: .25rem; overflow-wrap: anywhere; }
figcaption ul { display: inline; list-style: none; margin: 0; padding: 0; }
figcaption li { display: inline-block; margin-left: .7rem; color: var(--ink); }
figcaption i { display: inline-block; width: .65em; height: .65em; border-radius: 50%; margin-right: .3em; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .6rem; text-align: right; white-space: nowrap; }
tr { border-bottom: 1px solid var(--line); }
th { font-weight: 500; } thead th { color: var(--soft); font-size: .85rem; }
tbody th { text-align: left; } tbody tr:first-child th, tbody tr:first-child td { font-weight: 600; }
table.classes tbody tr:first-child th, table.classes tbody tr:first-child td { font-weight: inherit; }
table.classes td:nth-child(2) { width: 60%; min-width: 6rem; }
.bar { position: relative; height: .7rem; background: var(--card); border-radius: 3px; }
.bar i { display: block; height: 100%; background: var(--accent); border-radius: 3px; }
.bar u { position: absolute; top: -3px; bottom: -3px; width: 2px; background: var(--ink); }
.bar, .bar i, .bar u, .cards div, figcaption i {
  print-color-adjust: exact; -webkit-print-color-adjust: exact;
}
.curves { width: 100%; max-width: 1200px; }
h3 { font-size: 1rem; margin: 1.2rem 0 .4rem; }
.method img { width: 100%; min-width: 46rem; display: block; border-radius: 6px; margin-bottom: 6px; }
details { margin-top: 2.2rem; } summary { cursor: pointer; font-weight: 600; }
pre { background: var(--card); border-radius: 8px; padding: .8rem 1rem; overflow-x: auto; font-size: .8rem; }
@media (max-width: 40rem) { figure:has(:checked) .panels { grid-auto-flow: row; } }
@media print {
  body { max-width: none; font-size: 12px; padding: 0; }
  .images { grid-template-columns: 1fr 1fr; }
  tr, .curves { break-inside: avoid; } h2 { break-after: avoid; } figure input, p span { display: none; }
}
"""
