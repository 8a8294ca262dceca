"""GRIFFIN: Gating by Repetition In Feedforward Intermediate Neurons (Dong et al. 2024, arXiv 2404.01365)."""

from sparsity_lib.parts.scores import Relative
from sparsity_lib.parts.select import TopK
from sparsity_lib.recipe import Recipe, Rule
from sparsity_lib.sites import GATE


def griffin(density: float = 0.5, *, token_share: float = 0.5) -> Recipe:
    """Keep, for the rest of a sequence, the K neurons that fired most in its first part (the paper's equations 4 to 6):

        s_j = || h_tj / ||h_t|| ||_2 over prompt tokens t;   h = g * u

    Neurons are left out whole, so a density d skips (1 - d) of the FFN, the gate included. Of every sequence the first
    1 - `token_share` is the prompt: dense, and counted as such. Generated tokens keep the prompt's neurons.
    """
    return Recipe("griffin", (Rule(GATE, TopK(density), Relative()),), token_share)
