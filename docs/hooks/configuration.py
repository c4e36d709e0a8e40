"""Adds every key of sim_m2f/config/defaults.py to the page configuration.md: name, default, comment."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mkdocs.structure.pages import Page

DEFAULTS = Path(__file__).resolve().parents[2] / "sim_m2f/config/defaults.py"
SECTION = re.compile(r"# -{20,} (?P<title>.+)")
KEY = re.compile(r"_C\.(?P<name>[\w.]+) = (?P<default>.+?)(?:  # (?P<comment>.+))?")


@dataclass(frozen=True)
class Key:
    """One key: the section it stands in, its group, its name there, default and meaning as in the source."""

    section: str
    group: str
    name: str
    default: str
    meaning: str


def read_keys(source: str) -> Iterator[Key]:
    """The keys in the order of the source; a key's comment is behind it, or in the lines right above it."""
    section, above = "general", ""
    for line in source.splitlines():
        if title := SECTION.fullmatch(line):
            section, above = title["title"], ""
        elif line.startswith("# "):
            above += line[1:]
        else:
            key = KEY.fullmatch(line)
            if key and key["default"] != "CfgNode()":
                meaning = f"{key['comment'] or ''}{above}".strip()
                group, _, name = key["name"].rpartition(".")
                yield Key(section, group or "Without a group", name, key["default"], meaning)
            above = ""


def reference() -> str:
    """The tables, one per group of keys, under a heading per section."""
    lines = []
    for section, keys in groupby(read_keys(DEFAULTS.read_text(encoding="utf-8")), lambda key: key.section):
        lines += [f"\n## {section.capitalize()}"]
        for group, members in groupby(keys, lambda key: key.group):
            lines += [f"\n### {group}\n", "| key | default | meaning |", "|---|---|---|"]
            lines += [f"| `{key.name}` | `{key.default}` | {key.meaning} |" for key in members]
    return "\n".join(lines)


def on_page_markdown(markdown: str, page: "Page", **_: object) -> str:
    return markdown + reference() if page.file.src_uri == "configuration.md" else markdown
