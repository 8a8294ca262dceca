"""One look for every figure: a method has one colour, marker and line for the whole book.

Colours start from Okabe and Ito's palette, which colour-blind readers can tell apart, darkened where needed
to reach a contrast of 3 to 1 on white; where two methods share a hue, marker and line differ. Figures keep
their white ground in dark mode too (the page rounds its corners), so one image serves both.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .errors import unknown

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Width of the book's text column in inches, and the height that suits one row of panels.
WIDTH, HEIGHT = 7.0, 3.6


@dataclass(frozen=True)
class Look:
    """How one method is drawn."""

    label: str
    color: str
    marker: str
    linestyle: Any = "-"

    def options(self, **changes: Any) -> dict[str, Any]:
        """Keyword arguments for `Axes.plot`."""
        return {"label": self.label, "color": self.color, "marker": self.marker, "linestyle": self.linestyle, **changes}


BLACK, GRAY, BLUE, SKY = "#000000", "#6E6E6E", "#0072B2", "#2C8FC9"
GREEN, ORANGE, RED, PURPLE, OLIVE, BROWN = "#00815D", "#B97700", "#C44E00", "#B0578D", "#7A7A00", "#7B4A2B"
_DASH, _DOT, _MIX, _LONG = (0, (4, 2)), (0, (1, 1.5)), (0, (4, 1.5, 1, 1.5)), (0, (8, 2))

LOOKS: dict[str, Look] = {
    "dense": Look("dense", BLACK, "", _DASH),
    "oracle": Look("oracle |h|", GRAY, "^", _DASH),
    "random": Look("random", GRAY, "x", _DOT),
    "magnitude": Look("weight magnitude", GRAY, "s", _MIX),
    "cats": Look("CATS", BLUE, "o"),
    "claws": Look("CLAWS", RED, "D"),
    "claws_fisher_skip_first": Look("CLAWS, first token left out", RED, "P", _LONG),
    "claws_mean": Look("CLAWS, mean |grad|", RED, "v", _DASH),
    "claws_median": Look("CLAWS, median |grad|", RED, "<", _DOT),
    "claws_sqrt": Look("CLAWS, square root of c", RED, ">", _MIX),
    "claws_product": Look("CLAWS, weighted by |g|", RED, "s", _LONG),
    "gate_topk": Look("top-k on |g|", BLUE, "v", _DASH),
    "larosa": Look("LaRoSA", GREEN, "s"),
    "inputs_topk": Look("top-k on inputs", GREEN, "o", _DOT),
    "larosa_coefficients": Look("LaRoSA, coefficients", GREEN, "v", _DASH),
    "teal": Look("TEAL", PURPLE, "h"),
    "teal_greedy": Look("TEAL, greedy allocation", PURPLE, "D", _DASH),
    "scap": Look("SCAP", ORANGE, "p"),
    "scap_centered": Look("SCAP, centred on the mode", ORANGE, "P", _DASH),
    "wina": Look("WINA", SKY, "v", _DASH),
    "rsparse": Look("R-Sparse", BROWN, "<", _DASH),
    "griffin": Look("GRIFFIN", OLIVE, ">", _DASH),
    "gaussian": Look("Gaussian top-k", OLIVE, "d", _DOT),
    "gaussian_inputs": Look("Gaussian top-k on inputs", OLIVE, "h", _LONG),
    "teal_head": Look("TEAL, head included", PURPLE, "s", _MIX),
    "wina_head": Look("WINA, head included", SKY, "s", _MIX),
    "larosa_head": Look("LaRoSA, head included", GREEN, "D", _MIX),
    "spread": Look("this book's search", BLACK, "*"),
    "nm": Look("N:M activations", PURPLE, "*", _DASH),
    "unstructured": Look("unstructured activations", PURPLE, "o", _DOT),
    "wanda": Look("Wanda weights", GRAY, "X", _LONG),
    "cwic": Look("CWIC", BLUE, "*", _MIX),
}
#: Kind of site -> label, colour, marker.
SITES = {
    "qkv_in": ("inputs of q, k, v", BLUE, "o"), "o_in": ("inputs of o", GREEN, "s"),
    "up_in": ("inputs of gate and up", ORANGE, "^"), "down_in": ("inputs of down", PURPLE, "D"),
}
#: Method -> colour.
COLORS: dict[str, str] = {name: look.color for name, look in LOOKS.items()}

SETTINGS: dict[str, Any] = {
    "figure.facecolor": "white", "savefig.facecolor": "white", "figure.dpi": 110, "savefig.bbox": "standard",
    "figure.constrained_layout.use": True, "font.family": "DejaVu Sans", "font.size": 9.5, "axes.titlesize": 10.5,
    "axes.labelsize": 9.5, "legend.fontsize": 8.5, "legend.frameon": False, "axes.spines.top": False,
    "axes.spines.right": False, "axes.grid": True, "grid.color": "#D9D9D9", "grid.linewidth": 0.6,
    "axes.axisbelow": True, "lines.linewidth": 1.6, "lines.markersize": 5, "svg.hashsalt": "sparsity",
    "svg.fonttype": "none", "axes.prop_cycle": None,
}


def look(method: str) -> Look:
    """The look of a method; raises SparsityError with the nearest match for one that has none."""
    if method not in LOOKS:
        raise unknown("method", method, LOOKS)
    return LOOKS[method]


def use() -> None:
    """Set the book's style for every figure drawn after this."""
    import matplotlib as mpl
    from cycler import cycler

    colors = [BLUE, RED, GREEN, ORANGE, PURPLE, SKY, BROWN, OLIVE]
    mpl.rcParams.update({**SETTINGS, "axes.prop_cycle": cycler(color=colors)})


def figure(rows: int = 1, columns: int = 1, *, height: float = HEIGHT, **options: Any) -> tuple[Figure, Any]:
    """A figure as wide as the page with `rows` x `columns` axes, each row `height` inches high."""
    import matplotlib.pyplot as plt

    use()
    return plt.subplots(rows, columns, figsize=(WIDTH, height * rows), **options)


def line(
    axes: Axes, method: str, x: Any, y: Any, *, low: Any = None, high: Any = None, **changes: Any,
) -> None:
    """Draw one method's curve in its look, with its interval as a band where `low` and `high` are given."""
    style = look(method)
    axes.plot(x, y, **style.options(**changes))
    if low is not None and high is not None:
        axes.fill_between(x, low, high, color=style.color, alpha=0.15, linewidth=0)


def compact(png: bytes) -> bytes:
    """A picture (PNG) in 256 colours, which is a third of the size for lines and text; as it was where that would show."""
    import io

    import numpy as np
    from PIL import Image

    with Image.open(io.BytesIO(png)) as picture:
        full = picture.convert("RGB")
    few = full.quantize(256, dither=Image.Dither.NONE)
    error = np.abs(np.asarray(full, dtype=int) - np.asarray(few.convert("RGB"), dtype=int)).mean()
    if error > 0.5:  # of 255
        return png
    buffer = io.BytesIO()
    few.save(buffer, "PNG", optimize=True)
    return min(buffer.getvalue(), png, key=len)
