"""Figures of the N:M chapter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter
from torch import Tensor

from sparsity_lib import style
from sparsity_lib.evaluate.bootstrap import Interval
from sparsity_lib.experiments.claws_report import short

#: Score -> label, colour, marker.
SCORES = {
    "act": ("|x|", style.PURPLE, "*"), "clact": ("CLACT", style.BLUE, "v"), "amber": ("Amber", style.ORANGE, "s"),
    "wina": ("|x| times column norm", style.SKY, "^"), "gradient": ("|x| times gradient", style.RED, "D"),
}
Points = Sequence[tuple[str, Interval]]


def groups(x: Tensor, mask: Tensor, m: int) -> Figure:
    """One token's first channels as bars, kept ones dark, with a line between groups of `m`."""
    figure, axes = style.figure(height=2.4)
    size, kept = x.numpy(), mask.numpy()
    axes.bar(np.arange(len(size))[kept], size[kept], color=style.PURPLE, label="kept")
    axes.bar(np.arange(len(size))[~kept], size[~kept], color=style.GRAY, alpha=0.45, label="dropped")
    for edge in range(m, len(size), m):
        axes.axvline(edge - 0.5, color=style.BLACK, linewidth=0.8)
    axes.set(xlabel="channel", ylabel="activation", xlim=(-0.5, len(size) - 0.5))
    axes.legend(ncols=2, loc="lower right", bbox_to_anchor=(1, 1))
    return figure


def patterns(found: Mapping[str, Mapping[str, Points]]) -> Figure:
    """KL by pattern, a panel a model, a line a score.

    Parameters
    ----------
    found
        model -> score -> [(pattern, KL), ...].
    """
    figure, panels = style.figure(1, len(found), height=3.2, sharey=True, squeeze=False)
    for axes, (model, scores) in zip(panels[0], found.items(), strict=True):
        for score, points in scores.items():
            label, color, marker = SCORES[score]
            names, values = [name for name, _ in points], [i.value for _, i in points]
            spread = [[i.value - i.low for _, i in points], [i.high - i.value for _, i in points]]
            axes.errorbar(range(len(names)), values, yerr=spread, color=color, marker=marker, label=label, capsize=2)
        axes.set_xticks(range(len(names)), names)
        axes.set(title=short(model), xlabel="pattern", yscale="log")
        _plain(axes)
    panels[0][0].set_ylabel("KL to the dense model\n(nats per token)")
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
    return figure


def against_weights(found: Mapping[str, Mapping[str, Points]]) -> Figure:
    """KL by pattern for pruned activations and weights, a panel a model: model -> "nm", "wanda" or "magnitude" -> points."""
    figure, panels = style.figure(1, len(found), height=3.2, sharey=True, squeeze=False)
    for axes, (model, methods) in zip(panels[0], found.items(), strict=True):
        for method, points in methods.items():
            names, values = [name for name, _ in points], [i.value for _, i in points]
            style.line(axes, method, range(len(names)), values, low=[i.low for _, i in points], high=[i.high for _, i in points])
        axes.set_xticks(range(len(names)), names)
        axes.set(title=short(model), xlabel="pattern", yscale="log")
        _plain(axes)
    panels[0][0].set_ylabel("KL to the dense model\n(nats per token)")
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def energy(found: Mapping[str, Mapping[str, Mapping[str, Sequence[float]]]], laws: Mapping[str, Mapping[str, float]],
           order: Sequence[str]) -> Figure:
    """Share of the square norm that each pattern keeps: medians and ranges over layers by site, with the laws' own as lines.

    Parameters
    ----------
    found
        model -> site -> pattern -> share by layer.
    laws
        name of a distribution -> pattern -> share.
    """
    figure, panels = style.figure(1, len(found), height=3.2, sharey=True, squeeze=False)
    for axes, (model, sites) in zip(panels[0], found.items(), strict=True):
        for place, (site, shares) in enumerate(sites.items()):
            label, color, marker = style.SITES[site]
            x = np.arange(len(order)) + (place - 1.5) * 0.12
            values = np.array([[np.median(shares[p]), np.min(shares[p]), np.max(shares[p])] for p in order])
            spread = [values[:, 0] - values[:, 1], values[:, 2] - values[:, 0]]
            axes.errorbar(x, 100 * values[:, 0], yerr=100 * np.array(spread), color=color, marker=marker, linestyle="none",
                          label=label, capsize=2, markersize=4)
        for (law, kept), line in zip(laws.items(), ("-", "--"), strict=False):
            share = [100 * kept[p] for p in order]
            axes.plot(range(len(order)), share, color=style.BLACK, linestyle=line, linewidth=1, label=law)
        axes.set_xticks(range(len(order)), order)
        axes.set(title=short(model), xlabel="pattern")
    panels[0][0].set_ylabel("square norm kept (%)")
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


#: Model of a cost -> label of its axis.
COSTS = {
    "bits": "metadata\n(bits an element)", "comparators": "comparators\nan element",
    "choices": "weights a multiplier\nchooses from",
}


def _plain(axes: Axes) -> None:
    """Decimals along a logarithmic axis that spans one power of ten or less."""
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 4, 6)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def trade(found: Mapping[str, Mapping[str, Sequence[tuple[str, float, Interval]]]]) -> Figure:
    """KL against what a pattern costs, a panel a model of cost, a line a model: cost -> model -> [(pattern, cost, KL), ...]."""
    figure, panels = style.figure(1, len(found), height=3.2, sharey=True, squeeze=False)
    looks = ((style.PURPLE, "o", (5, 4), "left"), (style.GREEN, "s", (-5, -4), "right"))  # names above one line, below the other
    for axes, (cost, models) in zip(panels[0], found.items(), strict=True):
        for (model, points), (color, marker, away, side) in zip(models.items(), looks, strict=False):
            x, values = [c for _, c, _ in points], [i.value for *_, i in points]
            spread = [[i.value - i.low for *_, i in points], [i.high - i.value for *_, i in points]]
            axes.errorbar(x, values, yerr=spread, color=color, marker=marker, label=short(model), capsize=2)
            for pattern, at, i in points:
                axes.annotate(pattern, (at, i.value), xytext=away, textcoords="offset points", fontsize=7.5, ha=side,
                              va="bottom" if side == "left" else "top")
        axes.set(xlabel=COSTS[cost], yscale="log")
        _plain(axes)
        axes.margins(x=0.22, y=0.1)
    panels[0][0].set_ylabel("KL to the dense model\n(nats per token)")
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


def mask_costs(found: Mapping[str, Mapping[str, Sequence[tuple[int, float]]]]) -> Figure:
    """Microseconds a token against channels, on logarithmic axes: way ("ours", "torch") -> pattern -> [(channels, us), ...]."""
    figure, axes = style.figure(height=3.2)
    colors = (style.BLUE, style.GREEN, style.PURPLE, style.RED)
    for way, line, words in (("torch", ":", "topk and scatter"), ("ours", "-", "one pass")):
        for (pattern, points), color in zip(found[way].items(), colors, strict=True):
            label = f"{words}, {pattern}"
            axes.plot(*zip(*points, strict=True), color=color, linestyle=line, marker="o", markersize=3.5, label=label)
    axes.set(xscale="log", yscale="log", xlabel="channels", ylabel="microseconds a token")
    widths = [width for width, _ in found["ours"]["2:4"]]
    axes.set_xticks(widths, [str(width) for width in widths])
    axes.minorticks_off()
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure
