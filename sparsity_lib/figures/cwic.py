"""Figures of the CWIC chapters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from sparsity_lib import style
from sparsity_lib.evaluate.bootstrap import Interval

#: Way -> colour, marker, line.
WAYS: dict[str, tuple[str, str, Any]] = {
    "CWIC, active parameters": (style.BLUE, "*", "-"), "CWIC, FLOPs": (style.SKY, "o", "-"),
    "CWIC, to 3x": (style.BLUE, "s", "--"), "CWIC, to 6x": (style.BLUE, "*", "-"),
    "thresholds alone, to 2x": (style.ORANGE, "v", ":"), "thresholds alone, to 3x": (style.ORANGE, "^", "--"),
    "thresholds and LoRA, to 3x": (style.GREEN, "P", "--"),
    "TEAL": (style.PURPLE, "h", "-"), "TEAL, greedy": (style.PURPLE, "D", "--"), "TEAL, head included": (style.PURPLE, "s", "-."),
    "smaller dense": (style.BLACK, "x", ":"),
}
#: Matrices in the order of a block.
ROLES = {"q": (style.BLUE, "o"), "k": (style.SKY, "v"), "v": (style.RED, "D"), "o": (style.GREEN, "s"),
         "gate": (style.ORANGE, "^"), "ffn": (style.PURPLE, "p")}


def frontier(panels: Mapping[str, Mapping[str, Sequence[tuple[float, Interval]]]]) -> Figure:
    """Loss against the ratio of weights read, a panel a model: model -> way -> [(ratio, loss in nats), ...]."""
    figure, found = style.figure(1, len(panels), height=3.6, squeeze=False)
    for axes, (model, ways) in zip(found[0], panels.items(), strict=True):
        own = [i.value for points in ways.values() for r, i in points if r <= 2.1]
        for way, points in ways.items():
            color, marker, line = WAYS[way]
            x, y = [r for r, _ in points], [i.value for _, i in points]
            axes.plot(x, y, color=color, marker=marker, linestyle=line, label=way, markersize=4)
            axes.fill_between(x, [i.low for _, i in points], [i.high for _, i in points], color=color, alpha=0.12, linewidth=0)
        top = max(i.value for name, points in ways.items() if not name.startswith("TEAL") for _, i in points)
        axes.set(title=model, xlabel="times fewer weights read", ylim=(min(own) - 0.1, max(top, min(own)) + 0.8))
    found[0][0].set_ylabel("loss (nats per token)")
    handles = {label: handle for axes in found[0] for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=3)
    return figure


def training(curves: Mapping[str, Mapping[str, Sequence[float]]]) -> Figure:
    """Ratio, its target and the head's over the steps, and KL against the ratio, a colour a run."""
    figure, (left, right) = style.figure(1, 2, height=3.2)
    for (name, run), color in zip(curves.items(), (style.BLUE, style.RED, style.GREEN), strict=False):
        left.plot(run["step"], run["ratio"], color=color, label=name)
        left.plot(run["step"], run["target"], color=color, linestyle="--", linewidth=0.9)
        left.plot(run["step"], run["head_ratio"], color=color, linestyle=":", linewidth=1.2)
        right.plot(run["ratio"], run["kl"], color=color, marker=".", linestyle="none", label=name)
    left.set(xlabel="step", ylabel="ratio (dashed: target, dotted: head)")
    right.set(xlabel="ratio", ylabel="KL to the teacher\n(nats per token, in training)")
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def by_layer(models: Mapping[str, Mapping[str, Sequence[float]]]) -> Figure:
    """Share of the weights read by matrix and layer, a panel a model: model -> role -> share by layer."""
    figure, panels = style.figure(1, len(models), height=3.2, sharey=True, squeeze=False)
    for axes, (model, density) in zip(panels[0], models.items(), strict=True):
        for role, (color, marker) in ROLES.items():
            label = "up and down" if role == "ffn" else role
            axes.plot(range(len(density[role])), 100 * np.asarray(density[role]), color=color, marker=marker, markersize=3.5,
                      label=label)
        axes.set(title=model, xlabel="layer")
    panels[0][0].set_ylabel("weights read (%)")
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=6)
    return figure


def maps(tables: Mapping[str, Sequence[Sequence[float]]], *, xlabel: str, ylabels: Mapping[str, str], edges: int | None = None,
         height: float = 1.3) -> Figure:
    """Frequencies in percent as images, one a row: title -> [row][column]; `edges` draws a line after so many columns."""
    figure, panels = style.figure(len(tables), 1, height=height, squeeze=False)
    for axes, (title, table) in zip(panels[:, 0], tables.items(), strict=True):
        shown = axes.imshow(np.asarray(table), aspect="auto", cmap="viridis", vmin=0, vmax=100, interpolation="nearest")
        axes.set(title=title, ylabel=ylabels[title])
        axes.grid(False)
        if edges:
            for edge in range(edges, len(table[0]), edges):
                axes.axvline(edge - 0.5, color="white", linewidth=0.8)
    panels[-1, 0].set_xlabel(xlabel)
    figure.colorbar(shown, ax=panels[:, 0], label="passes (%)", shrink=0.9)
    return figure


def vocabulary(models: Mapping[str, Mapping[str, Any]]) -> Figure:
    """How often each stripe of the head is read, along the vocabulary, and how often its tokens occur; a panel a model."""
    figure, panels = style.figure(1, len(models), height=2.9, squeeze=False)
    for axes, (model, found) in zip(panels[0], models.items(), strict=True):
        place = np.linspace(0, 100, len(found["head"]))
        axes.plot(place, 100 * np.asarray(found["head"]), color=style.BLUE, marker=".", label="passes, mean over inputs (%)")
        other = axes.twinx()
        other.plot(place, np.asarray(found["occurrences"]) + 0.5, color=style.GRAY, linestyle="--", label="tokens in text")
        other.set(yscale="log")
        other.spines["right"].set_visible(True)
        axes.set(title=model, xlabel="place in the vocabulary (%)")
    panels[0][0].set_ylabel("passes (%)")
    other.set_ylabel("tokens in text")
    handles = [h for part in (axes, other) for h in part.get_legend_handles_labels()[0]]
    figure.legend(handles, [h.get_label() for h in handles], loc="outside lower center", ncols=2)
    return figure


def questions(models: Mapping[str, Mapping[str, Any]], dense: Mapping[str, int]) -> Figure:
    """Histograms of the weights that a token of an easy and of a challenging question reads, a panel a model."""
    figure, panels = style.figure(1, len(models), height=2.9, squeeze=False)
    for axes, (model, found) in zip(panels[0], models.items(), strict=True):
        shares = {name: 100 * np.asarray(found[name]["read"]) / dense[model] for name in ("ARC-Easy", "ARC-Challenge")}
        edges = np.linspace(min(map(np.min, shares.values())), max(map(np.max, shares.values())), 25)
        for (name, values), (color, line) in zip(shares.items(), ((style.BLUE, "-"), (style.RED, "--")), strict=True):
            axes.hist(values, edges, histtype="step", color=color, linestyle=line, linewidth=1.5, label=name)
            axes.axvline(values.mean(), color=color, linestyle=line, linewidth=0.9)
        axes.set(title=model, xlabel="weights read by a token (%)")
        axes.yaxis.get_major_locator().set_params(integer=True)
    panels[0][0].set_ylabel("questions")
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure
