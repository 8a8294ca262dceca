"""Figures of the chapter on kernels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from sparsity_lib import style
from sparsity_lib.bench.batch import speed
from sparsity_lib.bench.roofline import Roofline
from sparsity_lib.bench.timing import by_length
from sparsity_lib.figures.foundations import MODEL_LOOKS

#: Engines of the decoding figure: label, colour, marker, line.
ENGINES = {
    "ours, inputs 35%": ("ours, 35% of the inputs", style.GREEN, "s", "-"),
    "ours, inputs 50%": ("ours, 50% of the inputs", style.GREEN, "o", (0, (1, 1.5))),
    "ours dense": ("ours, dense", style.BLACK, "", (0, (4, 2))),
    "llama.cpp": ("llama.cpp, dense", style.BROWN, "^", "-"),
    "torch.compile": ("torch.compile, dense", style.ORANGE, "v", "-"),
    "HF eager": ("Hugging Face, dense", style.GRAY, "x", "-"),
}
_SHAPES = ((style.BLUE, "o"), (style.RED, "D"))


def roofline(found: Roofline) -> Figure:
    """Operations a second against operations a byte, under the two roofs."""
    figure, axes = style.figure(height=3.2)
    x = np.geomspace(0.5, 2 * found.points[-1][0], 200)
    axes.plot(x, np.minimum(x * found.bandwidth, found.peak) / 1e9, color=style.BLACK, linewidth=1.2, label="the two roofs")
    axes.plot(*zip(*((a, b / 1e9) for a, b in found.points), strict=True), color=style.BLUE, marker="o", linestyle=":",
              label="torch's product with 1, 2, 4, ... 512 tokens")
    axes.annotate("one token", (found.points[0][0], found.points[0][1] / 1e9), textcoords="offset points", xytext=(9, -3))
    axes.set(xscale="log", yscale="log", xlabel="operations per byte read", ylabel="operations per second (10⁹)")
    axes.legend(loc="lower right")
    return figure


def latency(data: Mapping[str, Any]) -> Figure:
    """Speed over the best dense product against sparsity, a panel a format, with what the bytes allow."""
    formats = list(dict.fromkeys(name.split()[0] for name in data))
    figure, panels = style.figure(2, -(-len(formats) // 2), height=2.7, sharex=True, sharey=True, squeeze=False)
    for axes, format in zip(panels.flat, formats, strict=False):
        shapes = ((name, found) for name, found in data.items() if name.split()[0] == format)
        for (color, marker), (name, found) in zip(_SHAPES, shapes, strict=False):
            sparsity = [100 * p["sparsity"] for p in found["points"]]
            shape = name.removeprefix(format).strip().replace("x", "×")
            axes.plot(sparsity, [p["speedup"] for p in found["points"]], color=color, marker=marker, label=shape)
            limit = [p["speedup"] / p["share_of_bandwidth"] for p in found["points"]]
            axes.plot(sparsity, limit, color=color, linestyle=":", linewidth=1.1)
        axes.axhline(1, color=style.BLACK, linewidth=0.8)
        axes.set(title=format, yscale="log", yticks=[0.5, 1, 2, 4, 8, 16, 32])
        axes.yaxis.set_major_formatter("{x:g}")
        axes.minorticks_off()
    for axes in panels[-1]:
        axes.set_xlabel("inputs skipped (%)")
    for row in panels:
        row[0].set_ylabel("times as fast as the\nbest dense product")
    panels[0][0].plot([], [], color=style.GRAY, linestyle=":", label="the same bytes at the\nspeed of plain reading")
    panels[0][0].legend(loc="upper left")
    return figure


def blocks(rows: Sequence[tuple[str, float, float]]) -> Figure:
    """(name, speed-up, what the bytes allow) of whole FFN blocks as horizontal bars."""
    figure, axes = style.figure(height=0.32 * len(rows) + 1.0)
    places = np.arange(len(rows))[::-1]
    axes.barh(places, [found for _, found, _ in rows], height=0.62, color=style.RED)
    limits = [limit for *_, limit in rows]
    axes.scatter(limits, places, marker="|", s=170, color=style.BLACK, zorder=3, label="what the bytes allow")
    axes.axvline(1, color=style.BLACK, linewidth=0.8)
    axes.set_yticks(places, [name for name, *_ in rows])
    axes.set(xlabel="times as fast as the best dense block", xlim=(0, 1.04 * max([1.6, *(found for _, found, _ in rows)])))
    axes.grid(axis="y", visible=False)
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0.2)
    return figure


def decoding(data: Mapping[str, Any]) -> Figure:
    """Tokens a second against the length of the context, a panel a model, a line an engine."""
    figure, panels = style.figure(2, -(-len(data) // 2), height=2.6, sharex=True, squeeze=False)
    for axes, (model, found) in zip(panels.flat, data.items(), strict=False):
        points = by_length(found["baselines"]["prompts"])
        for kind, (label, color, marker, line) in ENGINES.items():
            if all(kind in point for point in points.values()):
                rates = [1 / point[kind]["seconds"] for point in points.values()]
                axes.plot(list(points), rates, color=color, marker=marker, linestyle=line, label=label)
        axes.set(title=model, xscale="log", ylim=(0, None))
        axes.set_xticks(list(points), [str(length) for length in points])
        axes.minorticks_off()
    for axes in panels[-1]:
        axes.set_xlabel("tokens before")
    for row in panels:
        row[0].set_ylabel("tokens per second")
    handles, labels = max((axes.get_legend_handles_labels() for axes in panels.flat), key=lambda found: len(found[0]))
    figure.legend(handles, labels, loc="outside lower center", ncols=3)
    return figure


def batches(data: Mapping[str, Any]) -> Figure:
    """Left: what any token of a batch keeps. Right: speed of sparse products over the best dense one."""
    figure, (left, right) = style.figure(1, 2, height=3.0)
    for model, found in data.items():
        color, marker = MODEL_LOOKS.get(model, (style.GRAY, "o"))
        look = {"color": color, "marker": marker}
        for order, line in (("neighbours", "-"), ("strangers", (0, (1, 1.5)))):
            read = by_length(found["read"]["down_in"][order])
            left.plot(list(read), [100 * share for share in read.values()], linestyle=line, label=f"{model}, {order}", **look)
        times = by_length(found["times"]["strangers"])
        for share, line in (("union", "-"), ("own", (0, (4, 2)))):
            speeds = [speed(each, share) for each in times.values()]
            right.plot(list(times), speeds, linestyle=line, label=f"{model}, {share}", **look)
    for axes in (left, right):
        axes.set(xlabel="tokens at once", xscale="log")
        axes.set_xticks([1, 2, 4, 8, 16], ["1", "2", "4", "8", "16"])
        axes.minorticks_off()
    right.axhline(1, color=style.BLACK, linewidth=0.8)
    left.set(ylabel="inputs that any of them keeps (%)", ylim=(45, 102))
    right.set(ylabel="times as fast as torch's\nbest dense product", ylim=(0, None))
    for axes, where in ((left, "lower right"), (right, "upper right")):
        axes.legend(loc=where, fontsize=7.5)
    return figure
