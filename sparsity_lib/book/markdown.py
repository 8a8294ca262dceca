"""MyST text from plain values: tables, numbers, links to the book's labels and pages."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import nbformat
import yaml

from sparsity_lib import project
from sparsity_lib.report import Number

_NAMED = re.compile(r"^:name:\s*(\S+)\s*$|\{glue:md\}\s+(tab-\S+)|^\(([\w-]+)\)=\s*$", re.MULTILINE)
_TITLE = re.compile(r"^# +(.+?)\s*$", re.MULTILINE)


def cell(value: object) -> str:
    """A table cell: measured numbers marked as the chapters mark them, None as a dash, anything else as it is."""
    if value is None:
        return "–"
    if isinstance(value, Number):
        return f'<span class="num">{html.escape(str(value))}</span>'
    return str(value).replace("|", "\\|").replace("\n", " ")


def table(columns: Sequence[str], rows: Iterable[Sequence[object]], caption: str = "", name: str = "") -> str:
    """A table; with a caption and a name it is numbered and can be referred to. Columns of numbers are set to the right."""
    rows = [list(row) for row in rows]
    right = [bool(rows) and all(row[i] is None or isinstance(row[i], int | float | Number) for row in rows)
             for i in range(len(columns))]
    lines = [line(columns), "|" + "|".join("---:" if each else "---" for each in right) + "|", *map(line, rows)]
    body = "\n".join(lines) + "\n"
    return f":::{{table}} {caption}\n:name: {name}\n:align: center\n\n{body}:::\n" if caption else body


def line(cells: Iterable[object]) -> str:
    """A row of a table."""
    return "| " + " | ".join(map(cell, cells)) + " |"


def number(value: float, low: float | None = None, high: float | None = None) -> Number:
    """A number with three significant digits by the largest of the three, never more than three after the point."""
    largest = max(abs(v) for v in (value, low, high) if v is not None)
    digits = 3 if largest == 0 else min(3, max(0, 2 - math.floor(math.log10(largest))))
    return Number(value, f"z.{digits}f", low, high)


def plain(text: str) -> str:
    """A text of somebody else as the letters it has: neither HTML nor markup."""
    return re.sub(r"([\\`*_{}\[\]$])", r"\\\1", html.escape(text, quote=False))


def whole(text: str) -> str:
    """A text that is not broken into lines."""
    return f'<span class="num">{html.escape(text)}</span>'


def listed(names: Iterable[str]) -> str:
    """"A", "A and B", "A, B and C"."""
    *first, last = names
    return f"{', '.join(first)} and {last}" if first else last


def plural(count: int, noun: str) -> str:
    """"1 claim", "2 claims"."""
    return f"{count} {noun}" + ("" if count == 1 else "s")


def contents() -> dict[str, Any]:
    """The table of contents."""
    return yaml.safe_load((project.root() / "_toc.yml").read_text())


def file_of(page: str) -> Path | None:
    """The file of a page as the table of contents names it: Markdown or a notebook; None where it is not there."""
    paths = (project.root() / f"{page}{suffix}" for suffix in (".md", ".ipynb"))
    return next((path for path in paths if path.exists()), None)


def pages() -> list[str]:
    """The pages of the book in order, as the table of contents names them; those that are there."""
    toc = contents()
    return [page for page in (toc["root"], *_walk(toc.get("parts", ())), *_walk(toc.get("chapters", ()))) if file_of(page)]


def chapters() -> list[str]:
    """The notebooks among the pages, by name, in the book's order."""
    return [page.removeprefix("notebooks/") for page in pages() if page.startswith("notebooks/")]


def _walk(entries: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    for entry in entries:
        if "file" in entry:
            yield entry["file"]
        for below in ("chapters", "sections"):
            yield from _walk(entry.get(below, ()))


@cache
def source(page: str) -> str:
    """The text of a page: a Markdown file, or the Markdown cells of a notebook."""
    path = file_of(page)
    if path is None or path.suffix == ".md":
        return "" if path is None else path.read_text()
    notebook = nbformat.read(path, as_version=4)
    return "\n\n".join(c.source for c in notebook.cells if c.cell_type == "markdown")


def title(page: str) -> str:
    """A page's first heading; its name where it has none."""
    found = _TITLE.search(source(page))
    return found[1] if found else page


@cache
def labels() -> dict[str, str]:
    """Label of a figure, table or place -> the page that has it."""
    return {next(g for g in groups if g): page for page in pages() for groups in _NAMED.findall(source(page))}


def reference(label: str) -> str:
    """A link to a numbered figure or table; its bare name where the book does not have it (yet)."""
    return f"{{numref}}`{label}`" if label in labels() else f"`{label}`"


def link(page: str, text: str = "") -> str:
    """A link to a page from anywhere in the book; the bare text where the page is not there (yet)."""
    return f"{{doc}}`{text or title(page)} </{page}>`" if page in pages() else text or page
