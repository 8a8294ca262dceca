"""Draw the picture of the start page and the README from stored runs: what skipping costs and brings.

book/_static/hero.png has its two panels side by side; hero-narrow.png, for phones, one below the other.
"""

from __future__ import annotations

import io
import sys

import matplotlib.pyplot as plt
import numpy as np

from sparsity_lib import project, results, style
from sparsity_lib.bench.timing import by_length
from sparsity_lib.book.curves import curves
from sparsity_lib.errors import command_line
from sparsity_lib.experiments.claws_report import short

MODEL = "smollm2-135m-instruct"
#: Curves of the left panel, by the names of `book.curves`.
SHOWN = ("random neurons", "cats neurons", "claws neurons", "scap ffn", "teal_greedy inputs", "larosa inputs",
         "teal_head head", "spread head")
MARKS = {"smollm2-135m-instruct": ("o", style.BLUE), "gemma3-270m": ("s", style.GREEN), "Llama-3.2-1B": ("^", style.ORANGE),
         "Llama-3.2-3B": ("D", style.PURPLE)}


#: File -> rows and columns of panels, inches of the picture's width and of a row's height.
SHAPES = {"hero.png": (1, 2, style.WIDTH, 4.1), "hero-narrow.png": (2, 1, 3.9, 3.9)}


def quality(axes: plt.Axes) -> None:
    """KL against the share of weights skipped, a curve a method."""
    for name in (name for name in SHOWN if name in curves()[MODEL]):
        curve = curves()[MODEL][name]
        columns = np.array([[100 * p.skipped, p.kl.value, p.kl.low, p.kl.high] for p in curve.points]).T
        style.line(axes, curve.method, *columns[:2], low=columns[2], high=columns[3])
    axes.set(yscale="log", xlabel="weights skipped (% of all weights)", ylabel="KL to the dense model (nats per token)",
             title="what it costs", xlim=(0, None))
    _legend(axes)


def speed(axes: plt.Axes) -> None:
    """Times as fast as the dense decoder against the share of bytes left unread, over prompts, a mark a model."""
    furthest = 0.0
    measured = results.load("bench/decode").data
    for model, (marker, color) in MARKS.items():
        settings = measured[model]
        points = [(100 * (1 - p["bytes"]["sparse"] / p["bytes"]["dense"]), p["ratio"])
                  for name, each in settings.items() if name not in ("dense", "baselines")
                  for p in by_length(each["prompts"]).values()]
        x, y = zip(*points, strict=True)
        furthest = max(furthest, *x)
        axes.plot(x, y, marker, color=color, label=short(model))
    line = np.linspace(0, furthest + 3, 50)
    axes.plot(line, 1 / (1 - line / 100), color=style.BLACK, linestyle=(0, (4, 2)), label="saved bytes alone")
    axes.set(xlabel="bytes left unread (% of all bytes)", ylabel="times as fast as dense decoding", title="what it brings",
             xlim=(0, None))
    _legend(axes)


def _legend(axes: plt.Axes) -> None:
    """Below the panel, where it hides nothing."""
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.19), ncols=2)


@command_line("the pictures are drawn anew by the next build")
def main() -> int:
    """Write both pictures; returns the exit code."""
    for name, (rows, columns, width, height) in SHAPES.items():
        figure, (first, second) = style.figure(rows, columns, height=height)
        figure.set_size_inches(width, rows * height)
        quality(first)
        speed(second)
        target = project.root() / "book" / "_static" / name
        drawn = io.BytesIO()
        figure.savefig(drawn, dpi=150, facecolor="white", metadata={"Software": None})
        plt.close(figure)
        project.write_atomic(target, drawn.getvalue())  # a build may be copying the one of before
        print(target.relative_to(project.root()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
