"""MyST text from plain values: tables, numbers, links to the book's labels."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Iterable, Sequence
from functools import cache

import nbformat
import yaml

from sparsity_lib import project
from sparsity_lib.report import Number

_NAMED = re.compile(r"^:name:\s*(\S+)\s*$|\{glue:md\}\s+(tab-\S+)|^\(([\w-]+)\)=\s*$", re.MULTILINE)


def cell(value: object) -> str:
    """A table cell: measured numbers marked as the chapters mark them, None as a dash, anything else as it is."""
    if value is None:
        return "–"
    if isinstance(value, Number):
        return f'<span class="num">{html.escape(str(value))}</span>'
    return str(value).replace("|", "\\|").replace("\n", " ")


def table(
    columns: Sequence[str], rows: Iterable[Sequence[object]], caption: str = "", name: str = "", style: str = "",
) -> str:
    """A table; with a caption and a name it is numbered and can be referred to. `style`: its CSS class."""
    rows = [list(row) for row in rows]
    right = [bool(rows) and all(row[i] is None or isinstance(row[i], int | float | Number) for row in rows)
             for i in range(len(columns))]
    lines = [line(columns), "|" + "|".join("---:" if each else "---" for each in right) + "|", *map(line, rows)]
    body = "\n".join(lines)
    options = (f":name: {name}\n" if name else "") + (f":class: {style}\n" if style else "")
    if caption:
        return f":::{{table}} {caption}\n{options}:align: center\n\n{body}\n:::\n"
    return f":::{{div}} {style}\n\n{body}\n:::\n" if style else body + "\n"


def line(cells: Iterable[object]) -> str:
    """A row of a table."""
    return "| " + " | ".join(map(cell, cells)) + " |"


def number(value: float, low: float | None = None, high: float | None = None) -> Number:
    """A number with three significant digits by the largest of the three, never more than three after the point."""
    largest = max(abs(v) for v in (value, low, high) if v is not None)
    digits = 3 if largest == 0 else min(3, max(0, 2 - math.floor(math.log10(largest))))
    return Number(value, f".{digits}f", low, high)


@cache
def labels() -> dict[str, str]:
    """Label of a figure, table or place -> the page that has it, for the pages of the table of contents."""
    found = {}
    for page in pages():
        for groups in _NAMED.findall(source(page)):
            found[next(g for g in groups if g)] = page
    return found


def pages() -> list[str]:
    """The pages of the book in order, as the table of contents names them."""
    contents = yaml.safe_load((project.root() / "_toc.yml").read_text())
    found = [contents["root"]]

    def walk(entries: Iterable[dict]) -> None:
        for entry in entries:
            if "file" in entry:
                found.append(entry["file"])
            walk(entry.get("chapters", entry.get("sections", ())))

    walk(contents.get("parts", contents.get("chapters", ())))
    return found


def source(page: str) -> str:
    """The text of a page: a Markdown file, or the Markdown cells of a notebook."""
    path = project.root() / page
    if (markdown := path.with_name(path.name + ".md")).exists():
        return markdown.read_text()
    notebook = nbformat.read(path.with_name(path.name + ".ipynb"), as_version=4)
    return "\n".join(c.source for c in notebook.cells if c.cell_type == "markdown")


def reference(label: str) -> str:
    """A link to a numbered figure or table; its bare name where the book does not have it (yet)."""
    return f"{{numref}}`{label}`" if label in labels() else f"`{label}`"


def plural(count: int, noun: str) -> str:
    """"1 claim", "2 claims"."""
    return f"{count} {noun}" + ("" if count == 1 else "s")
