"""Figures of the chapters on SCAP and TEAL."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from sparsity_lib import style
from sparsity_lib.evaluate.bootstrap import Interval
from sparsity_lib.experiments.claws_report import short

CENTER_LOOKS = {
    "none": ("not centred", style.GRAY, "x", (0, (1, 1.5))), "mean": ("on the mean", style.BLUE, "v", (0, (4, 2))),
    "median": ("on the median", style.GREEN, "s", (0, (4, 1.5, 1, 1.5))), "mode": ("on the mode", style.ORANGE, "P", "-"),
}
PLACES = {"up_in": "inputs of up", "before": "before the activation", "down_in": "inputs of down"}
Curves = Mapping[str, Mapping[str, Sequence[tuple[float, Interval]]]]


def fronts(found: Curves, others: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]] | None = None) -> Figure:
    """KL against the share of the FFN skipped along each method's front, a panel a model.

    Parameters
    ----------
    found
        model -> method -> [(FFN sparsity, KL), ...].
    others
        model -> method -> [(FFN sparsity, mean KL), ...], the points that are on no front, drawn faintly.
    """
    figure, panels = style.figure(1, len(found), height=3.4, sharey=True, squeeze=False)
    for axes, (model, methods) in zip(panels[0], found.items(), strict=True):
        for method, points in methods.items():
            style.line(axes, method, *_xy(points), **_band(points), markersize=4)
            beside = (others or {}).get(model, {}).get(method, ())
            axes.plot([100 * s for s, _ in beside], [k for _, k in beside], linestyle="none", marker=".",
                      color=style.look(method).color, alpha=0.3)
        axes.set(title=short(model), xlabel="FFN weights skipped (%)", yscale="log")
    panels[0][0].set_ylabel("KL to the dense model (nats per token)")
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


def centring(found: Curves, labels: Mapping[str, str] | None = None) -> Figure:
    """Loss against the sparsity of the down projection's inputs, a panel a network, a line a centre."""
    rows = -(-len(found) // 2)
    figure, panels = style.figure(rows, min(2, len(found)), height=2.8, sharex=True, squeeze=False)
    for axes, (network, centers) in zip(panels.flat, found.items(), strict=False):
        for center, points in centers.items():
            label, color, marker, line = CENTER_LOOKS[center]
            x, y = _xy(points)
            axes.plot(x, y, color=color, marker=marker, linestyle=line, label=label, markersize=4)
            axes.fill_between(x, *_band(points).values(), color=color, alpha=0.15, linewidth=0)
        axes.set(title=(labels or {}).get(network, network), yscale="log")
    for axes in panels.flat[len(found):]:
        axes.set_visible(False)
    for axes in panels.flat[max(0, len(found) - panels.shape[1]):len(found)]:  # the lowest of each column
        axes.tick_params(labelbottom=True)
        axes.set_xlabel("inputs of down dropped (%)")
    for row in panels:
        row[0].set_ylabel("loss against the\ndense network")
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


def distributions(found: Mapping[str, Mapping[str, Any]], layers: int = 4) -> Figure:
    """Histograms of what enters and leaves activations: a row a network, a panel a place, a line for each of some layers."""
    figure, panels = style.figure(len(found), len(PLACES), height=2.1, squeeze=False)
    for row, (network, places) in zip(panels, found.items(), strict=True):
        for axes, (place, title) in zip(row, PLACES.items(), strict=True):
            if place not in places:
                axes.set_visible(False)
                continue
            edges = np.array(places[place]["edges"])
            shares = places[place]["shares"]
            chosen = np.unique(np.linspace(0, len(shares) - 1, min(layers, len(shares))).round().astype(int))
            for shade, layer in zip(np.linspace(0.3, 1, len(chosen)), chosen, strict=True):
                height = np.array(shares[layer]) / np.diff(edges)
                axes.stairs(height, edges, color=style.BLUE, alpha=shade, linewidth=1.1)
                axes.axvline(places[place]["mode"][layer], color=style.RED, alpha=0.5 * shade, linewidth=0.8)
            axes.set(title=f"{short(network)}: {title}", yticks=[])
            axes.title.set_fontsize(8.5)
    return figure


def targets(points: Mapping[int, Sequence[tuple[float, str, float]]], layers: int = 6) -> Figure:
    """Actual against target sparsity, a panel for each of some layers, a marker a task or text."""
    chosen = np.unique(np.linspace(0, len(points) - 1, min(layers, len(points))).round().astype(int))
    columns = min(3, len(chosen))
    figure, panels = style.figure(-(-len(chosen) // columns), columns, height=2.2, sharex=True, sharey=True, squeeze=False)
    for axes, layer in zip(panels.flat, chosen, strict=False):
        axes.plot([0, 100], [0, 100], color=style.BLACK, linewidth=0.8)
        for target, text, actual in points[layer]:
            color, marker = (style.BLUE, "^") if text.startswith("text of") else (style.ORANGE, "o")
            axes.plot(100 * target, 100 * actual, color=color, marker=marker, markersize=3.5, linestyle="none", alpha=0.7)
        axes.set(title=f"layer {layer}", xlim=(0, 100), ylim=(0, 100))
    for axes in panels[-1]:
        axes.set_xlabel("target (%)")
    for row in panels:
        row[0].set_ylabel("dropped (%)")
    handles = [panels[0][0].plot([], [], color=c, marker=m, linestyle="none", label=label)[0]
               for label, c, m in (("a task", style.ORANGE, "o"), ("running text", style.BLUE, "^"))]
    figure.legend(handles=handles, loc="outside lower center", ncols=2)
    return figure


def beams(data: Mapping[str, Any], site: str = "down_in") -> Figure:
    """Share that every sequence of a batch skips against the number decoded together, with what independence would give."""
    figure, axes = style.figure(height=3.0)
    looks = {"beams": ("beams of one text", style.ORANGE, "o"), "texts": ("different texts", style.BLUE, "s")}
    for kind, widths in data.items():
        label, color, marker = looks[kind]
        x = sorted(int(w) for w in widths)
        skipped = [100 * (1 - np.mean(widths[str(w)][site]["needed"])) for w in x]
        chance = [100 * (1 - widths[str(w)][site]["by_chance"]) for w in x]
        axes.plot(x, skipped, color=color, marker=marker, label=label)
        axes.plot(x, chance, color=color, linestyle=(0, (1, 1.5)), label=f"{label}, if independent")
    axes.set(xscale="log", xlabel="sequences decoded together", ylabel="skipped by all of them (%)", xticks=x, xticklabels=x)
    axes.minorticks_off()
    axes.legend()
    return figure


def allocation(found: Curves) -> Figure:
    """KL against the share of all weights skipped for TEAL's allocations and thresholds, a panel a model."""
    looks = {
        "uniform": ("uniform", style.PURPLE, "h", "-"), "greedy": ("greedy", style.PURPLE, "D", (0, (4, 2))),
        "greedy, by output": ("greedy, by output", style.RED, "s", (0, (4, 1.5, 1, 1.5))),
        "uniform, symmetric": ("uniform, symmetric quantile", style.SKY, "v", (0, (1, 1.5))),
    }
    figure, panels = style.figure(1, len(found), height=3.2, sharey=True, squeeze=False)
    for axes, (model, ways) in zip(panels[0], found.items(), strict=True):
        for way, points in ways.items():
            label, color, marker, line = looks[way]
            (x, y), band = _xy(points), _band(points)
            axes.errorbar(x, y, yerr=[np.subtract(y, band["low"]), np.subtract(band["high"], y)], color=color, marker=marker,
                          linestyle=line, label=label, markersize=4, capsize=2.5)
        axes.set(title=short(model), xlabel="weights skipped (% of all weights)", yscale="log")
    panels[0][0].set_ylabel("KL to the dense model (nats per token)")
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


def thresholds(found: Mapping[str, tuple[Tensor, Sequence[float]]]) -> Figure:
    """Histograms of some activations, a panel a site, with the thresholds of several sparsities as lines on both sides of zero.

    Parameters
    ----------
    found
        site -> (activations of any shape, thresholds from low to high).
    """
    figure, panels = style.figure(1, len(found), height=2.6, squeeze=False)
    for axes, (title, (x, levels)) in zip(panels[0], found.items(), strict=True):
        x = x.float().flatten().numpy()
        end = float(np.quantile(np.abs(x), 0.98))
        axes.hist(x, bins=np.linspace(-end, end, 81), density=True, color=style.SKY, alpha=0.6)
        for shade, level in zip(np.linspace(0.4, 1, len(levels)), levels, strict=True):
            for side in (-level, level):
                axes.axvline(side, color=style.ORANGE, alpha=shade, linewidth=1.2)
        axes.set(title=title, xlabel="activation", yticks=[])
    return figure


def shifted(x: Tensor, center: float) -> Figure:
    """A distribution with its centre (left), and the share of entries within a threshold of zero and of the centre (right)."""
    figure, (left, right) = style.figure(1, 2, height=2.7)
    x = x.float().flatten().numpy()
    left.hist(x, bins=np.linspace(*np.quantile(x, [0.002, 0.98]), 91), density=True, color=style.SKY, alpha=0.6)
    left.axvline(center, color=style.RED, linewidth=1.2, label="peak")
    left.axvline(0, color=style.BLACK, linewidth=0.8, linestyle=":", label="zero")
    left.set(xlabel="activation", yticks=[], title="what enters the down projection")
    left.legend()
    levels = np.linspace(0, 4 * float(np.quantile(np.abs(x), 0.25)), 81)
    for name, place in (("none", 0.0), ("mode", center)):
        label, color, _, line = CENTER_LOOKS[name]
        apart = np.sort(np.abs(x - place))
        right.plot(levels, 100 * np.searchsorted(apart, levels) / len(apart), color=color, linestyle=line, label=label)
    right.set(xlabel="threshold", ylabel="dropped (%)", ylim=(0, 100), title="share within the threshold")
    right.legend()
    return figure


def training(found: Sequence[Any]) -> Figure:
    """Loss against the share of the FFN skipped: the network with its SiLU under SCAP, and the one with ReLUs."""
    figure, axes = style.figure(height=3.0)
    looks = {"plain": ("SiLU, pruned by SCAP", style.ORANGE, "p", "-"),
             "relufied": ("two ReLUs, the same training", style.BLUE, "o", "")}
    for network, (label, color, marker, line) in looks.items():
        own = sorted((p for p in found if p.network == network), key=lambda p: p.ffn.value)
        axes.plot([100 * p.ffn.value for p in own], [p.loss().value for p in own], color=color, marker=marker, linestyle=line,
                  label=label)
        for place, point in enumerate(own if network == "relufied" else ()):
            above = place % 2  # neighbours lie close: their names go to opposite sides
            axes.annotate(point.what, (100 * point.ffn.value, point.loss().value), xytext=(0, 7 if above else -7),
                          textcoords="offset points", fontsize=7.5, ha="center", va="bottom" if above else "top", color=color)
    axes.set(xlabel="FFN weights skipped (%)", ylabel="loss (nats per token)", xlim=(-5, 105))
    axes.margins(y=0.2)
    axes.legend(loc="upper left")
    return figure


def blocks(found: Mapping[str, Mapping[float, Interval]]) -> Figure:
    """Milliseconds of one FFN block against the share of its weights skipped, CATS' way and SCAP's, with torch's dense block."""
    figure, axes = style.figure(height=2.8)
    for method in ("cats", "scap"):
        points = found[method]
        value, low, high = ([getattr(i, name) for i in points.values()] for name in ("value", "low", "high"))
        style.line(axes, method, [100 * s for s in points], value, low=low, high=high)
    axes.axhline(found["dense"][0.0].value, **style.look("dense").options(label="dense, torch"))
    axes.set(xlabel="FFN weights skipped (%)", ylabel="one block (ms)", ylim=(0, None))
    axes.legend()
    return figure


def _xy(points: Sequence[tuple[float, Interval]]) -> tuple[list[float], list[float]]:
    return [100 * s for s, _ in points], [i.value for _, i in points]


def _band(points: Sequence[tuple[float, Interval]]) -> dict[str, list[float]]:
    return {"low": [i.low for _, i in points], "high": [i.high for _, i in points]}
