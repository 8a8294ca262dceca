"""TEAL: Training-Free Activation Sparsity in Large Language Models (Liu et al. 2024, arXiv 2408.14690)."""

from __future__ import annotations

from torch import nn

from sparsity_lib.errors import unknown
from sparsity_lib.parts.select import SymmetricThreshold, Threshold
from sparsity_lib.recipe import Recipe, Rule
from sparsity_lib.sites import DOWN_IN, O_IN, QKV_IN, UP_IN

#: Readings of the threshold: the paper's quantile of |x|, and the release's quantile of x, which takes x to be symmetric.
THRESHOLDS = {"quantile": Threshold, "symmetric": SymmetricThreshold}


def teal(density: float = 0.5, *, threshold: str = "quantile", token_share: float = 1.0) -> Recipe:
    """Keep inputs x of all linear layers of a block above one threshold a site (the paper's equations 2 and 3):

        s_t(x) = x where |x| > t, else 0;   t = the (1 - density)-quantile of |x| on calibration text

    The same density everywhere (the paper's uniform allocation). With threshold="symmetric", t is the
    (0.5 + s/2)-quantile of x, s = 1 - density, as the released code reads it (`threshold_gap` shows the difference).
    Q, k and v share an input and a threshold here, as do gate and up.
    """
    if not isinstance(threshold, str) or threshold not in THRESHOLDS:
        raise unknown("threshold", threshold, THRESHOLDS)
    select = THRESHOLDS[threshold](density)
    return Recipe("teal", tuple(Rule(site, select) for site in (QKV_IN, O_IN, UP_IN, DOWN_IN)), token_share)


def teal_greedy(
    model: nn.Module, tokenizer=None, *, target: float = 0.6, threshold: str = "quantile", error: str = "outputs", **options
):
    """The paper's block-wise greedy allocation up to `target` sparsity: a `greedy.Path` (options: those of `greedy`).

        path = teal_greedy(model, tokenizer, target=0.6)
        plans = path.plans([0.25, 0.4, 0.5, 0.6], model, tokenizer)

    `error` is that of the released code by default; the paper prints the norm of the whole output (error="all"), which one
    large channel can rule. The release counts k and v as an eighth of the block's weights whatever the heads; here weights
    are counted.
    """
    from sparsity_lib.greedy import greedy  # greedy fits and installs, which need the recipes' module

    return greedy(teal(threshold=threshold), model, tokenizer, target=target, error=error, **options)


def threshold_gap(model: nn.Module, density: float = 0.5, tokenizer=None, **options) -> dict[str, tuple[float, float]]:
    """Both readings of the threshold at every site: "LAYER.SITE" -> (quantile of |x|, quantile of x).

    Where the second is larger, the released code drops more than it was asked to, and the other way round. Options are
    those of `fit_many`.
    """
    from sparsity_lib.fit import fit_many

    exact, symmetric = fit_many([teal(density, threshold=t) for t in THRESHOLDS], model, tokenizer, **options)
    return {name: (float(exact.tensors[f"{name}.threshold"]), float(symmetric.tensors[f"{name}.threshold"]))
            for name in exact.widths}
