"""Figures of the comparison."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from sparsity_lib import style
from sparsity_lib.evaluate.bootstrap import Interval
from sparsity_lib.experiments.claws_report import short

Points = Mapping[str, Mapping[str, Sequence[tuple[float, Interval]]]]


def picture(found: Points) -> Figure:
    """KL against measured decode speed, a panel a model: model -> method -> [(times dense, KL)]; below and right is better."""
    figure, panels = style.figure(1, len(found), height=5.0, sharey=True, squeeze=False)
    for axes, (model, methods) in zip(panels[0], found.items(), strict=True):
        for method, points in methods.items():
            style.line(axes, method, [x for x, _ in points], [k.value for _, k in points],
                       markersize=9 if method == "spread" else 4.5)
        axes.axvline(1, color=style.BLACK, linewidth=0.8, linestyle=":")
        axes.set(title=short(model), xlabel="measured decode speed (times dense)", yscale="log")
    panels[0][0].set_ylabel("KL to the dense model (nats per token)")
    _legend(figure, panels)
    return figure


def curves(found: Points) -> Figure:
    """KL against the share of all weights skipped, a panel a model, a line a method with its band."""
    figure, panels = style.figure(1, len(found), height=4.4, sharey=True, squeeze=False)
    for axes, (model, methods) in zip(panels[0], found.items(), strict=True):
        for method, points in methods.items():
            value, low, high = ([getattr(k, name) for _, k in points] for name in ("value", "low", "high"))
            style.line(axes, method, [100 * s for s, _ in points], value, low=low, high=high, markersize=4)
        axes.set(title=short(model), xlabel="weights skipped (% of all weights)", yscale="log")
    panels[0][0].set_ylabel("KL to the dense model (nats per token)")
    _legend(figure, panels)
    return figure


def counted(found: Mapping[str, Mapping[str, Mapping[str, Sequence]]], names: Mapping[str, str]) -> Figure:
    """The same masks under several counts: model -> count -> method -> [(share, KL)]; a row a model, a panel a count."""
    columns = len(next(iter(found.values())))
    figure, panels = style.figure(len(found), columns, height=2.7, sharey=True, squeeze=False)
    for row, (model, counts) in zip(panels, found.items(), strict=True):
        for axes, (count, methods) in zip(row, counts.items(), strict=True):
            for method, points in methods.items():
                style.line(axes, method, [100 * s for s, _ in points], [k.value for _, k in points], markersize=4)
            axes.set(xlabel=f"skipped (% of {names[count]})", yscale="log", title=short(model))
        row[0].set_ylabel("KL to the dense model\n(nats per token)")
    _legend(figure, panels)
    return figure


def _legend(figure: Figure, panels) -> None:
    """Every method once, whichever panel has it."""
    known = {}
    for axes in panels[0]:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            known.setdefault(label, handle)
    wide = max(map(len, known), default=0) > 20  # four such labels do not fit side by side
    figure.legend(known.values(), known.keys(), loc="outside lower center", ncols=3 if wide else 4)


def effects(found: Mapping[str, Mapping[str, Sequence[tuple[str, Interval, float]]]]) -> Figure:
    """KL with one thing of the protocol changed: model -> method -> [(what, KL, share)]; a panel a model, a group a change."""
    figure, panels = style.figure(1, len(found), height=3.4, sharey=True, squeeze=False)
    for axes, (model, methods) in zip(panels[0], found.items(), strict=True):
        names = list(dict.fromkeys(name for points in methods.values() for name, *_ in points))
        for offset, (method, points) in enumerate(methods.items()):
            look = style.look(method)
            x = np.array([names.index(name) for name, *_ in points]) + 0.1 * (offset - (len(methods) - 1) / 2)
            value, low, high = (np.array([getattr(k, n) for _, k, _ in points]) for n in ("value", "low", "high"))
            axes.errorbar(x, value, yerr=[value - low, high - value], color=look.color, marker=look.marker, linestyle="",
                          label=look.label, capsize=2)
        axes.set_xticks(range(len(names)), names, rotation=25, ha="right")
        axes.set(title=short(model), yscale="log")
    panels[0][0].set_ylabel("KL to the dense model\n(nats per token)")
    _legend(figure, panels)
    return figure


def allocation(found: Mapping[str, Mapping[str, Sequence[float]]]) -> Figure:
    """Density of every site by layer that a shared budget chose: model -> kind of site -> densities by layer."""
    figure, panels = style.figure(1, len(found), height=3.0, sharey=True, squeeze=False)
    for axes, (model, sites) in zip(panels[0], found.items(), strict=True):
        for kind, densities in sites.items():
            if kind == "head_in":
                axes.axhline(densities[-1], color=style.BLACK, linestyle=":", label="inputs of the head")
                continue
            label, color, marker = style.SITES[kind]
            axes.plot(densities, color=color, marker=marker, markersize=3.5, label=label)
        axes.set(title=short(model), xlabel="layer", ylim=(0, 1.02))
    panels[0][0].set_ylabel("share of inputs kept")
    _legend(figure, panels)
    return figure


def growth(found: Mapping[str, Mapping[str, Sequence[float]]]) -> Figure:
    """Relative difference of hidden states after every block: model -> method -> differences; a panel a model."""
    figure, panels = style.figure(1, len(found), height=3.8, sharey=True, squeeze=False)
    for axes, (model, methods) in zip(panels[0], found.items(), strict=True):
        for method, differences in methods.items():
            style.line(axes, method, range(1, len(differences) + 1), differences, markersize=3.5)
        axes.set(title=short(model), xlabel="block", yscale="log")
    panels[0][0].set_ylabel("relative difference\nof hidden states")
    _legend(figure, panels)
    return figure
