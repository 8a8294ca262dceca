"""Figures of the first chapter: what a token reads, what can be gained, how skewed activations are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from sparsity_lib import style

PARTS = {"attention": style.BLUE, "ffn": style.ORANGE, "head": style.GREEN, "rest": style.GRAY}
#: Colours of the two embedded models, wherever models rather than methods are compared.
MODEL_LOOKS = {"smollm2-135m-instruct": (style.BLUE, "o"), "gemma3-270m": (style.RED, "D")}
#: Gini coefficient of |z| for a Gaussian z: what no skewness beyond the bell curve would give.
GAUSSIAN_GINI = np.sqrt(2) - 1
#: That of the product of two independent Gaussians, by simulation.
GAUSSIAN_PRODUCT_GINI = 0.571


def weights_read(parts: Mapping[str, Mapping[str, int]]) -> Figure:
    """Stacked bars: the share of a token's weight reads that goes to attention, FFN, head and the rest, a bar a model."""
    figure, axes = style.figure(height=0.42 * len(parts) + 1.3)
    names = list(parts)
    left = np.zeros(len(names))
    for part, color in PARTS.items():
        share = np.array([parts[n][part] / sum(parts[n].values()) for n in names]) * 100
        axes.barh(names, share, left=left, color=color, label=part, height=0.62)
        for y, (start, width) in enumerate(zip(left, share, strict=True)):
            if width > 6:
                axes.text(start + width / 2, y, f"{width:.0f}", ha="center", va="center", color="white", fontsize=8.5)
        left += share
    axes.set(xlabel="share of the weights read for one token (%)", xlim=(0, 100))
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    figure.legend(loc="outside upper center", ncols=4)
    return figure


def speed_limits(ffn_share: Mapping[str, float], linear_share: Mapping[str, float]) -> Figure:
    """What skipped bytes allow: one block (left) and whole models (right), against the sparsity of the site.

    Parameters
    ----------
    ffn_share, linear_share
        Model -> share of a token's weight reads in the FFN, and in all linears of the blocks.
    """
    figure, (block, whole) = style.figure(1, 2, height=3.1, sharey=True)
    sparsity = np.linspace(0, 0.9, 91)
    inputs, rows = 1 / (1 - sparsity), 1 / (1 / 3 + 2 / 3 * (1 - sparsity))
    block.plot(sparsity, inputs, color=style.GREEN, label="one layer, inputs dropped")
    block.plot(sparsity, rows, color=style.BLUE, linestyle="--", label="GLU, rows dropped, gate dense")
    for model, share in linear_share.items():
        color = MODEL_LOOKS.get(model, (style.GRAY, "o"))[0]
        whole.plot(sparsity, 1 / (1 - share * sparsity), color=color, label=f"{model}: inputs")
        left = 1 - ffn_share[model] * 2 / 3 * sparsity
        whole.plot(sparsity, 1 / left, color=color, linestyle="--", label=f"{model}: GLU rows")
    for axes, title in ((block, "one block"), (whole, "whole model, head dense")):
        axes.set(xlabel="sparsity of the site", title=title, ylim=(0.9, 4.2), xlim=(0, 0.9))
        axes.legend(loc="upper left")
    block.set_ylabel("largest possible speed-up of decoding")
    return figure


def skewness(
    curves: Mapping[str, tuple[np.ndarray, np.ndarray]], ginis: Mapping[str, Mapping[str, Sequence[float]]]
) -> Figure:
    """Lorenz curves of |g| (left), and Gini coefficients of |g| and of |h| = |g u| layer by layer (right), a colour a model."""
    figure, (lorenz, gini) = style.figure(1, 2, height=3.3)
    lorenz.plot([0, 1], [0, 1], color=style.GRAY, linestyle=":", label="all equal")
    for model, (share, held) in curves.items():
        color, marker = MODEL_LOOKS.get(model, (style.GRAY, "o"))
        lorenz.plot(share, held, color=color, label=model)
        for kind, what, linestyle in (("down_in", "|h|", "--"), ("gate", "|g|", "-")):
            depth = np.linspace(0, 1, len(ginis[model][kind]))
            gini.plot(depth, ginis[model][kind], color=color, marker=marker, markersize=3.5, linestyle=linestyle,
                      label=f"{what}, {model}")
    gini.axhline(GAUSSIAN_GINI, color=style.GRAY, linestyle=":", label="Gaussian")
    lorenz.set(xlabel="share of neurons, smallest |g| first", ylabel="share of the sum of |g|", xlim=(0, 1), ylim=(0, 1))
    gini.set(xlabel="depth (0 first layer, 1 last)", ylabel="Gini coefficient", ylim=(0.25, 1.15), yticks=(0.4, 0.6, 0.8, 1.0))
    lorenz.legend(loc="upper left")
    gini.legend(loc="upper left", fontsize=7.5)
    return figure
