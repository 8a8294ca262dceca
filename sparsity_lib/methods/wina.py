"""WINA: Weight-Informed Neuron Activation (Chen et al. 2025, arXiv 2505.19427)."""

from sparsity_lib.errors import unknown
from sparsity_lib.parts.scores import ColumnNorm
from sparsity_lib.parts.select import Threshold, TopK
from sparsity_lib.recipe import Recipe, Rule
from sparsity_lib.sites import DOWN_IN, O_IN, QKV_IN, UP_IN

SELECTIONS = {"topk": TopK, "threshold": Threshold}


def wina(density: float = 0.5, *, select: str = "topk", token_share: float = 1.0) -> Recipe:
    """Keep, of each token's inputs to every linear layer, the K largest by |x_i| ||W[:, i]||_2 (the paper's equation 4).

    Layers that read the same input share its mask here: W is then their weights stacked. `select` is "topk" or
    "threshold" (TEAL's selection with WINA's score).
    """
    if not isinstance(select, str) or select not in SELECTIONS:
        raise unknown("select", select, SELECTIONS)
    chosen = SELECTIONS[select](density)
    return Recipe("wina", tuple(Rule(site, chosen, ColumnNorm()) for site in (QKV_IN, O_IN, UP_IN, DOWN_IN)), token_share)
