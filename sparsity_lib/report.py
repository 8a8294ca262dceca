"""Numbers, tables and figures of a notebook, shown live, pasted by the book, and recorded for other machines.

A notebook opens with `start("claws")`. Then, in a cell tagged `remove-output` (the book pastes the result
where the text wants it, a live notebook and the committed file show it in place):

    glue_table("tab-ppl", ["method", "perplexity"], [["CATS", 18.3], ["CLAWS", 17.1]], "Perplexity.")
    glue_figure("fig-ppl", fig)
    glue_number("ppl-claws", 17.1, ".1f")

and in the text

    :::{glue:md} tab-ppl                      :::{glue:figure} fig-ppl
    :format: myst                             :name: fig-ppl
    :::                                       :alt: Perplexity against density, one curve a method.
                                              Caption, with {glue:text}`ppl-claws` in it.
                                              :::
    as {numref}`tab-ppl` and {numref}`fig-ppl` show, {glue:text}`ppl-claws` ...

Floating-point numbers are written as `<span class="num">..</span>` in tables and quoted in glued numbers:
`tests/nbval_sanitize.cfg` blanks exactly these before nbval compares text, and each is recorded with its
tolerance instead (records.py). Whole numbers and words are compared as text.
"""

from __future__ import annotations

import base64
import html
import io
import math
import numbers
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from . import style
from .errors import SparsityError, refuse
from .records import Records
from .verdicts import Verdict

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Pixels per inch of figures: 7 in wide ones are sharp on a dense screen and stay near 100 kB.
DPI = 160
#: The relative tolerance of a shown number for which the author grants no other.
RTOL = 0.01
_current: Records | None = None


@dataclass(frozen=True)
class Number:
    """A measured value for a table cell or the text: how to write it, how far another machine may be off.

    low, high: the ends of its interval, if it has one. fmt: a format spec for each of the three.
    """

    value: float
    fmt: str = ".2f"
    low: float | None = None
    high: float | None = None
    rtol: float = RTOL
    atol: float = 0.0

    def __str__(self) -> str:
        text = format(self.value, self.fmt)
        if self.low is None or self.high is None:
            return text
        return f"{text} [{format(self.low, self.fmt)}, {format(self.high, self.fmt)}]"

    def record(self, key: str) -> None:
        """Add the value, and the ends of its interval, to the notebook's record."""
        ends = {"": self.value, " low": self.low, " high": self.high}
        for suffix, value in ends.items():
            if value is not None:
                _records().add(key + suffix, value, rtol=self.rtol, atol=self.atol)


def start(name: str) -> Records:
    """Open the record of the notebook `name`; everything glued after this is recorded in it."""
    global _current
    _current = Records(name)
    return _current


def _records() -> Records:
    if _current is None:
        raise SparsityError("no record is open. Fix: call report.start('name of the notebook') in its first cell.")
    return _current


def _show(data: dict[str, Any], metadata: dict[str, Any] | None = None) -> None:
    from IPython.display import display

    display(data, raw=True, metadata=metadata or {})


def _glue(name: str, data: dict[str, Any], *, hidden: bool) -> None:
    """What myst_nb.glue emits, without needing myst_nb where the book is not built."""
    prefix = "application/papermill.record/" if hidden else ""
    bundle = {prefix + kind: value for kind, value in data.items()}
    _show(bundle, {"scrapbook": {"name": name, "mime_prefix": prefix}})


def glue_number(
    name: str, value: float, fmt: str = ".2f", *, low: float | None = None, high: float | None = None,
    rtol: float = RTOL, atol: float = 0.0,
) -> None:
    """Make a number available to the text as {glue:text}`name`, and record it.

    With `low` and `high` the text reads '17.10 [16.80, 17.40]'. Raises SparsityError for NaN and infinities
    and where the format writes letters (units belong to the text).
    """
    number = Number(_float(name, value), fmt, low, high, rtol, atol)
    text = str(number)
    if any(letter.isalpha() and letter != "e" for letter in text):
        raise refuse(f"format of {name}", fmt, "one that writes digits only", "put the unit into the text")
    number.record(name)
    _glue(name, {"text/plain": repr(text)}, hidden=True)


def _float(name: str, value: Any) -> float:
    if not isinstance(value, numbers.Real) and hasattr(value, "item"):
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not math.isfinite(value):
        raise refuse(name, value, "a finite number")
    return value if isinstance(value, int) else float(value)


def glue_table(
    name: str, columns: Sequence[str], rows: Iterable[Sequence[Any]], caption: str, *, fmt: str = ".2f",
    rtol: float = RTOL, atol: float = 0.0,
) -> None:
    """Show a table, and make it available to the text as a numbered one called `name`.

    Cells: texts and whole numbers (compared as text), floats and `Number`s (written with `fmt` or their own
    format, recorded under 'name: the row's first one or two cells, column'), None (a dash). Raises SparsityError for a
    row of another length than `columns`, for NaN, and for an empty table or caption.
    """
    rows = [list(row) for row in rows]
    if not rows or not caption.strip():
        raise SparsityError(f"table {name} needs at least one row and a caption.")
    numeric = [all(_is_number(row[at]) for row in rows if len(row) > at) for at in range(len(columns))]
    named = 1 if len({str(row[0]) for row in rows if row}) == len(rows) else 2  # cells that tell a row from the others
    lines = [_row(columns), "|" + "|".join("---:" if right else "---" for right in numeric) + "|"]
    for row in rows:
        if len(row) != len(columns):
            raise SparsityError(f"table {name}: the row {row!r} has {len(row)} cells, the header {len(columns)}.")
        words = [str(cell) for cell in row[:named]]
        keys = [f"{name}: {', '.join(words)}, {column}" for column in columns]
        lines.append(_row([_cell(*pair, fmt, rtol, atol) for pair in zip(keys, row, strict=True)]))
    body = "\n".join(lines)
    _show({"text/markdown": f"{caption}\n\n{body}", "text/plain": f"table {name}"})
    block = f":::{{table}} {' '.join(caption.split())}\n:name: {name}\n:align: center\n\n{body}\n:::"
    _glue(name, {"text/markdown": block, "text/plain": f"table {name}"}, hidden=True)


def _is_number(cell: Any) -> bool:
    return cell is None or isinstance(cell, Number | numbers.Real) or hasattr(cell, "item")


def _row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def _cell(key: str, cell: Any, fmt: str, rtol: float, atol: float) -> str:
    if cell is None:
        return "–"
    if isinstance(cell, str | bool):
        return html.escape(str(cell), quote=False)  # names of a reader's own models end up here
    if not isinstance(cell, Number):
        value = _float(key, cell)
        if isinstance(value, int):
            return str(value)
        cell = Number(value, fmt, rtol=rtol, atol=atol)
    _float(key, cell.value)
    cell.record(key)
    return f'<span class="num">{html.escape(str(cell))}</span>'


def glue_figure(name: str, figure: Figure, *, dpi: int = DPI) -> None:
    """Show a figure, and make it available to the text as {glue:figure}; closes it.

    The alt text stands with the caption, in the directive (a test asks for it). The PNG is the same byte for
    byte on each run of one machine.
    """
    import matplotlib.pyplot as plt

    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi, facecolor="white", metadata={"Software": None})
    plt.close(figure)
    image = base64.b64encode(style.compact(buffer.getvalue())).decode()
    _glue(name, {"image/png": image, "text/plain": f"figure {name}"}, hidden=False)


def glue_verdicts(name: str, verdicts: Sequence[Verdict], caption: str, *, fmt: str = ".2f",
                  rtol: float = 0.1, atol: float = 0.0) -> None:
    """A table of verdicts; the words of each are also recorded, so that another outcome elsewhere is noticed."""
    rows = []
    for verdict in verdicts:
        _records().add(f"{name}: {verdict.claim}, verdict", verdict.outcome)
        number = None if verdict.number is None else Number(
            verdict.number, fmt, verdict.low, verdict.high, rtol, atol)
        rows.append([verdict.claim, verdict.words, verdict.experiment, number, f"**{verdict.outcome}**",
                     verdict.because])
    columns = ["claim", "the paper", "our experiment", "our number [95% interval]", "verdict", "because"]
    glue_table(name, columns, rows, caption)
