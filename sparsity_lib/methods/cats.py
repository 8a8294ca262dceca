"""CATS: Contextually-Aware Thresholding for Sparsity (Lee et al. 2024, arXiv 2404.08763)."""

from sparsity_lib.parts.select import Threshold
from sparsity_lib.recipe import Recipe, Rule
from sparsity_lib.sites import GATE


def cats(density: float = 0.5, *, token_share: float = 1.0) -> Recipe:
    """Keep gate activations above one threshold a layer (the paper's equation 5):

        CATS_t(g) = g where |g| >= t, else 0;   t = the (1 - density)-quantile of |g| on calibration text

    The gate projection stays dense; rows of W_up and columns of W_down of dropped neurons are not
    read, so a density d skips 2/3 (1 - d) of the FFN. The released code takes the quantile from a
    histogram with fixed bins on [-2, 2]; ours has bins relative to the value, at any scale.
    """
    return Recipe("cats", (Rule(GATE, Threshold(density)),), token_share)
