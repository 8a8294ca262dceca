"""R-Sparse: Rank-Aware Activation Sparsity (Zhang et al. 2025, arXiv 2504.19449)."""

from __future__ import annotations

from sparsity_lib.errors import unknown
from sparsity_lib.methods.wina import SELECTIONS
from sparsity_lib.parts.repairs import LowRank
from sparsity_lib.parts.scores import ColumnNorm
from sparsity_lib.recipe import Recipe, Rule
from sparsity_lib.sites import DOWN_IN, O_IN, QKV_IN, UP_IN


def rsparse(
    density: float = 0.5, *, rank_share: float = 0.05, select: str = "threshold", aware: bool = False, token_share: float = 1.0
) -> Recipe:
    """Keep inputs with a large |x_i| ||W[:, i]||; the others reach the output through a low-rank stand-in of W:

        y = W x' + U S V^T (x - x'),   U S V^T the singular value decomposition of W cut at rank_share of its rank

    The product is read for every token: a layer [out, in] reads density * out * in + rank * (out + in) weights, and
    `account` counts both. The paper searches density and rank for each layer; here they are the same everywhere. `select`
    is "threshold" or "topk"; `aware` fits the product to what is dropped (`parts.repairs.LowRank`).
    """
    if not isinstance(select, str) or select not in SELECTIONS:
        raise unknown("select", select, SELECTIONS)
    chosen, repair = SELECTIONS[select](density), (LowRank(rank_share, aware),)
    rules = tuple(Rule(site, chosen, ColumnNorm(), repair=repair) for site in (QKV_IN, O_IN, UP_IN, DOWN_IN))
    return Recipe("rsparse", rules, token_share)
