"""Figures of the TEAL chapter that no other chapter needs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from sparsity_lib import style
from sparsity_lib.evaluate.bootstrap import Interval
from sparsity_lib.experiments.claws_report import short


def levels(found: Mapping[str, Mapping[str, Sequence[float]]], target: float | None = None) -> Figure:
    """The sparsity that the greedy search chose, by layer, a panel a model, a line a site; the uniform one as a dotted line.

    Parameters
    ----------
    found
        model -> site -> sparsity by layer.
    """
    figure, panels = style.figure(1, len(found), height=3.0, sharey=True, squeeze=False)
    for axes, (model, sites) in zip(panels[0], found.items(), strict=True):
        for site, layers in sites.items():
            label, color, marker = style.SITES[site]
            axes.plot(range(len(layers)), [100 * v for v in layers], color=color, marker=marker, markersize=3.5, label=label)
        if target is not None:
            axes.axhline(100 * target, color=style.GRAY, linestyle=":", label="uniform")
        axes.set(title=short(model), xlabel="layer", ylim=(0, 100))
    panels[0][0].set_ylabel("inputs dropped (%)")
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
    return figure


def sides(found: Mapping[str, tuple[Tensor, float, float]]) -> Figure:
    """Histograms of activations, a panel a site, with the quantile of |x| and the release's symmetric threshold on both sides.

    Parameters
    ----------
    found
        site -> (activations of any shape, quantile of |x|, quantile of x at 0.5 + s/2).
    """
    figure, panels = style.figure(1, len(found), height=2.6, squeeze=False)
    for axes, (title, (x, exact, symmetric)) in zip(panels[0], found.items(), strict=True):
        x = x.float().flatten().numpy()
        end = float(np.quantile(np.abs(x), 0.97))
        axes.hist(x, bins=np.linspace(-end, end, 81), density=True, color=style.SKY, alpha=0.6)
        looks = ((exact, style.BLACK, "-", "quantile of |x|"), (symmetric, style.RED, "--", "symmetric"))
        for level, color, line, label in looks:
            axes.axvline(-level, color=color, linestyle=line, linewidth=1.2)
            axes.axvline(level, color=color, linestyle=line, linewidth=1.2, label=label)
        axes.set(title=title, xlabel="activation", yticks=[])
    panels[0][-1].legend()
    return figure


def token_shares(found: Mapping[float, Interval], papers: Mapping[float, str]) -> Figure:
    """KL over all tokens against the share of each sequence's tokens that is sparse, with the papers that evaluate so."""
    figure, axes = style.figure(height=2.7)
    value, low, high = ([getattr(i, name) for i in found.values()] for name in ("value", "low", "high"))
    style.line(axes, "teal", [100 * s for s in found], value, low=low, high=high)
    for share, who in papers.items():
        side, offset = ("left", 4) if share < 0.3 else ("right", -4)
        axes.annotate(who, (100 * share, found[share].value), xytext=(offset, 9), textcoords="offset points", fontsize=8, ha=side)
    axes.set(xlabel="tokens of each sequence that are sparse, from its end (%)", ylabel="KL to the dense model\n(nats per token)",
             ylim=(0, None))
    return figure
