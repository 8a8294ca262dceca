"""Figures of the CATS and CLAWS chapter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from sparsity_lib import style
from sparsity_lib.evaluate.bootstrap import Interval
from sparsity_lib.figures.foundations import MODEL_LOOKS
from sparsity_lib.observe import Reordering


def blind_spot(overlap: Mapping[str, Sequence[float]], chance: float) -> Figure:
    """Overlap of each score's mask with the oracle's, layer by layer."""
    figure, axes = style.figure(height=2.9)
    for method, values in overlap.items():
        style.line(axes, method, range(len(values)), values, markersize=3.5)
    axes.axhline(chance, color=style.GRAY, linestyle=":", label="two random masks")
    axes.set(xlabel="layer", ylabel="overlap with the oracle's mask\n(Jaccard)", ylim=(0, 1))
    axes.legend(loc="lower left", ncols=2)
    return figure


def gradients(by_position: Mapping[str, Tensor], shown: int = 32) -> Figure:
    """Root mean square gradient at the gate by position in the sequence, relative to the median position; a panel a model."""
    figure, panels = style.figure(1, len(by_position), height=2.7, sharey=True, squeeze=False)
    for axes, (model, sizes) in zip(panels[0], by_position.items(), strict=True):
        relative = (sizes / sizes[:, 1:].median(1, keepdim=True).values).numpy()[:, :shown]
        color, _ = MODEL_LOOKS.get(model, (style.GRAY, "o"))
        band = np.quantile(relative, [0.1, 0.9], axis=0)
        axes.fill_between(range(relative.shape[1]), *band, color=color, alpha=0.2, linewidth=0)
        axes.plot(np.median(relative, axis=0), color=color, marker="o", markersize=3)
        axes.set(xlabel="position in the sequence (0: first token)", title=model, yscale="log")
    panels[0][0].set_ylabel("size of dL/dg, relative to\nthe median position")
    return figure


def sweep(
    quality: Mapping[str, Mapping[str, Sequence[tuple[float, Interval]]]], limits: Mapping[str, float] | None = None
) -> Figure:
    """KL against the share of all weights skipped, a panel a model, a line a method with its 95% band.

    Parameters
    ----------
    quality
        model -> method -> [(share skipped, KL interval), ...].
    """
    figure, panels = style.figure(1, len(quality), height=3.6, sharey=True, squeeze=False)
    for axes, (model, methods) in zip(panels[0], quality.items(), strict=True):
        for method, points in methods.items():
            share = [100 * s for s, _ in points]
            value, low, high = ([getattr(i, name) for _, i in points] for name in ("value", "low", "high"))
            style.line(axes, method, share, value, low=low, high=high, markersize=4)
        axes.set(title=model, xlabel="weights skipped (% of all weights)", yscale="log")
    panels[0][0].set_ylabel("KL to the dense model (nats per token)")
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4)
    return figure


def ratios(found: Mapping[str, Mapping[str, Mapping[float, Interval]]]) -> Figure:
    """KL of CLAWS over another method's KL by density, a panel a model, a line for each other method; below 1 CLAWS is closer.

    Parameters
    ----------
    found
        other method -> model -> density -> ratio.
    """
    models = list(next(iter(found.values())))
    figure, panels = style.figure(1, len(models), height=2.9, sharey=True, squeeze=False)
    for axes, model in zip(panels[0], models, strict=True):
        axes.axhline(1, color=style.BLACK, linewidth=0.8)
        for offset, (other, by_model) in enumerate(found.items()):
            look, points = style.look(other), by_model[model]
            x = np.array(list(points)) + 0.008 * (offset - (len(found) - 1) / 2)
            value, low, high = (np.array([getattr(i, n) for i in points.values()]) for n in ("value", "low", "high"))
            axes.errorbar(
                x, value, yerr=[value - low, high - value], color=look.color, marker=look.marker, linestyle=look.linestyle,
                capsize=2.5, markersize=4, label=f"CLAWS over {look.label}",
            )
        axes.set(xlabel="FFN density", title=model)
        axes.invert_xaxis()
    panels[0][0].set_ylabel("KL of CLAWS over\nthat of the other")
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


def reorderings(found: Mapping[str, Sequence[Reordering]], labels: Mapping[str, str]) -> Figure:
    """How much of the top-k mask the multiplier leaves in place (left) and how much it varies (right), by layer and basis."""
    figure, (overlap, spread) = style.figure(1, 2, height=3.0)
    looks = [(style.RED, "D"), (style.GREEN, "s"), (style.BLUE, "o"), (style.ORANGE, "p")]
    for (basis, items), (color, marker) in zip(found.items(), looks, strict=False):
        layers = [item.layer for item in items]
        overlap.plot(layers, [item.jaccard for item in items], color=color, marker=marker, markersize=3.5, label=labels[basis])
        spread.plot(layers, [item.p90_p10 for item in items], color=color, marker=marker, markersize=3.5, label=labels[basis])
    overlap.set(xlabel="layer", ylabel="overlap of the masks with and\nwithout c (Jaccard)", ylim=(0, 1.02))
    spread.set(xlabel="layer", ylabel="spread of c (90th over\n10th percentile)", ylim=(1, None))
    handles, names = overlap.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=2)
    return figure


def stability(found: Sequence[Mapping], variants: Sequence[str]) -> Figure:
    """KL and rank correlation of the saliency against calibration size (lines), other seeds and sources beside them."""
    figure, (kl, rank) = style.figure(1, 2, height=3.4)
    largest = max(item["tokens"] for item in found)
    line = [item for item in found if item["source"] is None and item["seed"] == 0]
    rest = [item for item in found if item not in line]
    for number, variant in enumerate(variants):
        method = "claws" if variant == "fisher" else f"claws_{variant}"
        look, shift = style.look(method), 1.08 ** number  # readings side by side, not on top of each other
        drawn = {"color": look.color, "marker": look.marker, "markersize": 4}
        value, low, high = (np.array(each) for each in zip(*(item["kl"][variant] for item in line), strict=True))
        kl.errorbar(
            [item["tokens"] * shift for item in line], value, yerr=[value - low, high - value], label=look.label,
            linestyle=look.linestyle, elinewidth=0.6, **drawn,
        )
        own = [item for item in line if item["tokens"] < largest]
        rank.plot([i["tokens"] * shift for i in own], [i["spearman"][variant] for i in own], linestyle=look.linestyle, **drawn)
        beside = [item["tokens"] * 1.25 * 1.15 ** number for item in rest]
        for axes, y in ((kl, [i["kl"][variant][0] for i in rest]), (rank, [i["spearman"][variant] for i in rest])):
            axes.plot(beside, y, linestyle="none", markerfacecolor="none", markeredgewidth=0.7, **drawn)
    kl.set(xscale="log", xlabel="calibration tokens", ylabel="KL to the dense model\n(nats per token)")
    rank.set(xscale="log", xlabel="calibration tokens", ylabel=f"rank correlation with\nc from {largest:,} tokens")
    handles, labels = kl.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(variants))
    return figure


def recovery(losses: Mapping[str, Mapping[str, Sequence[float]]], window: int = 5) -> Figure:
    """Training loss of the LoRA recovery, a thin line a seed, smoothed over a few steps."""
    figure, axes = style.figure(height=2.8)
    kernel = np.ones(window) / window
    for method, seeds in losses.items():
        smooth = np.array([np.convolve(values, kernel, mode="valid") for values in seeds.values()])
        steps = np.arange(smooth.shape[1]) + window
        for row in smooth:
            axes.plot(steps, row, color=style.look(method).color, linewidth=0.6, alpha=0.6)
        look = style.look(method)
        axes.plot(steps, smooth.mean(0), color=look.color, label=f"{look.label}, mean of {len(smooth)} seeds")
    axes.set(xlabel="step", ylabel="KL to the dense model on\ntraining text (nats per token)", yscale="log")
    axes.legend()
    return figure
