"""What every comparison also needs: the score without calibration, the bound and the floor."""

from sparsity_lib.parts.scores import Magnitude, Oracle, Random
from sparsity_lib.parts.select import TopK
from sparsity_lib.recipe import Recipe, Rule
from sparsity_lib.sites import DOWN_IN, GATE, O_IN, QKV_IN, UP_IN


def gate_topk(density: float = 0.5, *, token_share: float = 1.0) -> Recipe:
    """Top-k on |g|: CATS' score with CLAWS' selection, so that the score alone differs from CLAWS."""
    return Recipe("gate_topk", (Rule(GATE, TopK(density), Magnitude()),), token_share)


def oracle(density: float = 0.5, *, token_share: float = 1.0) -> Recipe:
    """Top-k on |h| = |g * u|, as if u were known before its rows are read: the bound of gate-side scores by magnitude."""
    return Recipe("oracle", (Rule(GATE, TopK(density), Oracle()),), token_share)


def inputs_topk(density: float = 0.5, *, token_share: float = 1.0) -> Recipe:
    """Top-k on the inputs of all linears as they are: LaRoSA without its rotation, so that the rotation alone differs."""
    return Recipe("inputs_topk", tuple(Rule(site, TopK(density)) for site in (QKV_IN, O_IN, UP_IN, DOWN_IN)), token_share)


def random(density: float = 0.5, *, seed: int = 0, token_share: float = 1.0) -> Recipe:
    """K neurons drawn anew for each token: the floor."""
    return Recipe("random", (Rule(GATE, TopK(density), Random(seed)),), token_share)
