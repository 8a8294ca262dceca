"""Statistical top-k as in Gemma 3n: a threshold from each token's own mean and deviation, nothing sorted or calibrated."""

from sparsity_lib.parts.scores import Magnitude, Value
from sparsity_lib.parts.select import Gaussian
from sparsity_lib.recipe import Recipe, Rule
from sparsity_lib.sites import DOWN_IN, GATE, O_IN, QKV_IN, UP_IN


def gaussian(density: float = 0.5, *, token_share: float = 1.0) -> Recipe:
    """Keep gate activations g_j > mean_j(g) + std_j(g) * Phi^-1(1 - density), of each token by itself.

    Gemma 3n takes the moments before the activation, subtracts the threshold from what is kept, and was trained so; here the
    rule is applied after the activation to a model that was not. What is kept in fact depends on g's law (`account`).
    """
    return Recipe("gaussian", (Rule(GATE, Gaussian(density), Value()),), token_share)


def gaussian_inputs(density: float = 0.5, *, token_share: float = 1.0) -> Recipe:
    """The same idea at the inputs of all linears, which lie around zero: |x_i| > rms(x) * Phi^-1(1 - density / 2)."""
    select = Gaussian(density, "half_normal")
    rules = tuple(Rule(site, select, Magnitude()) for site in (QKV_IN, O_IN, UP_IN, DOWN_IN))
    return Recipe("gaussian_inputs", rules, token_share)
