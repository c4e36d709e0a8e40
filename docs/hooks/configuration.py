"""Adds every key of sim_m2f/config/*.yaml to the page configuration.md: name, default, comment."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

if TYPE_CHECKING:
    from mkdocs.structure.pages import Page

FOLDER = Path(__file__).resolve().parents[2] / "sim_m2f/config"
SECTIONS = {"defaults.yaml": "Keys", "without_effect.yaml": "Keys without effect"}


@dataclass(frozen=True)
class Key:
    """One key: its group such as "MODEL.SIM", its name there, default and meaning as in the file."""

    group: str
    name: str
    default: str
    meaning: str


def read_keys(text: str, node: yaml.MappingNode, group: str = "") -> Iterator[Key]:
    """The keys of a node of the file in their order, those of its groups where these stand."""
    lines = text.splitlines()
    for name, value in node.value:
        if isinstance(value, yaml.MappingNode):
            yield from read_keys(text, value, f"{group}.{name.value}".lstrip("."))
        else:
            default = text[value.start_mark.index : value.end_mark.index]
            yield Key(group, name.value, default, comment(lines, name.start_mark.line))


def comment(lines: list[str], at: int) -> str:
    """What stands behind the value in a line, and in the lines of comment right above."""
    above = itertools.takewhile(lambda line: line.startswith("# "), map(str.strip, reversed(lines[:at])))
    behind = lines[at].partition("  # ")[2]
    return " ".join([*([behind] if behind else []), *(line[2:] for line in reversed(list(above)))])


def reference() -> str:
    """A table for every group of keys."""
    lines = []
    for file, title in SECTIONS.items():
        lines += [f"\n## {title}"]
        text = (FOLDER / file).read_text(encoding="utf-8")
        for group, keys in itertools.groupby(read_keys(text, yaml.compose(text)), lambda key: key.group):
            lines += [f"\n### {group or 'Without a group'}\n", "| key | default | meaning |", "|---|---|---|"]
            lines += [f"| `{key.name}` | `{key.default}` | {key.meaning} |" for key in keys]
    return "\n".join(lines)


def on_page_markdown(markdown: str, page: "Page", **_: object) -> str:
    return markdown + reference() if page.file.src_uri == "configuration.md" else markdown
