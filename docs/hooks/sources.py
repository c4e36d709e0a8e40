"""Files of the repository that a page links to become pages of the site, under source/."""

import json
import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

DOCS = Path(__file__).resolve().parents[1]
ROOT = DOCS.parent
LINK = re.compile(r"(?<=\]\()(\.\./[^)#]+)")


def linked(link: str, page: str) -> str | None:
    """The path in the repository of the file that a link on a page names, if it lies outside of docs/."""
    file = (DOCS / page).parent.joinpath(link).resolve()
    return file.relative_to(ROOT).as_posix() if file.is_file() and DOCS not in file.parents else None


def as_markdown(name: str) -> str:
    """A file of the repository as a page: a notebook's cells, or the text as it is."""
    text = (ROOT / name).read_text(encoding="utf-8")
    if name.endswith(".ipynb"):
        cells = [(cell["cell_type"], "".join(cell["source"])) for cell in json.loads(text)["cells"]]
        return "\n\n".join(f"```python\n{body}\n```" if kind == "code" else body for kind, body in cells)
    kind = {"yaml": "yaml", "py": "python", "json": "json", "sh": "bash", "h": "cpp"}.get(name.split(".")[-1])
    return f"# {posixpath.basename(name)}\n\n`{name}`\n\n````{kind or 'text'}\n{text}\n````\n"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for page in files.documentation_pages():
        for link in LINK.findall(page.content_string):
            name = linked(link, page.src_uri)
            if name and f"source/{name}.md" not in files.src_uris:
                files.append(File.generated(config, f"source/{name}.md", content=as_markdown(name)))
    return files


def on_page_markdown(markdown: str, page: Page, **_: object) -> str:
    here = page.file.src_uri

    def to_site(match: re.Match[str]) -> str:
        name = linked(match[0], here)
        return posixpath.relpath(f"source/{name}.md", posixpath.dirname(here)) if name else match[0]

    return LINK.sub(to_site, markdown)
