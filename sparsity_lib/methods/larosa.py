"""LaRoSA: Layerwise Rotated Sparse Activation (Liu et al. 2025, arXiv 2507.01299)."""

from torch import nn

from sparsity_lib.accounting import weights_per_token
from sparsity_lib.checks import fraction, positive
from sparsity_lib.errors import SparsityError
from sparsity_lib.parts.select import TopK
from sparsity_lib.parts.transforms import Rotate
from sparsity_lib.recipe import Recipe, Rule
from sparsity_lib.sites import DOWN_IN, O_IN, QKV_IN, UP_IN, find_sites


def larosa(
    density: float = 0.5, *, inputs: float = 1.0, outputs: float = 1.0, damping: float = 0.01, token_share: float = 1.0
) -> Recipe:
    """Top-k on the rotated inputs of q, k, v and gate, up; plain top-k on the inputs of o and down.

        z = Q^T x, Q the eigenvectors of sum x x^T;   x' = Q topk(z)

    The sparsity s = 1 - density is multiplied by `inputs` at the rotated sites and by `outputs` at the
    other two (the paper searches such coefficients per model; its release ships 0.8 and 1.2). Each
    site has its own Q here; the release shares one between the two sites of a block.
    """
    sparsity = 1 - fraction("density", density)
    for name, value in (("inputs", inputs), ("outputs", outputs)):
        positive(name, value)
        if sparsity * value >= 1:
            raise SparsityError(
                f"density = {density} with {name} = {value} leaves nothing. Fix: a larger density or smaller coefficient."
            )
    rotated, plain = TopK(1 - sparsity * inputs), TopK(1 - sparsity * outputs)
    rules = (
        Rule(QKV_IN, rotated, transform=Rotate(damping)),
        Rule(O_IN, plain),
        Rule(UP_IN, rotated, transform=Rotate(damping)),
        Rule(DOWN_IN, plain),
    )
    return Recipe("larosa", rules, token_share)


def density_for_share(make, model: nn.Module, share: float, *, transforms: bool = False) -> float:
    """The density at which `make(density)` leaves `share` of all of the model's weights unread.

    This is how methods with different sites are compared: at an equal share of weights skipped. With `transforms`, rotations
    that run for every token count as read.

    Raises
    ------
    SparsityError
        If no density above 0 skips that much.
    """
    sites, total = find_sites(model), weights_per_token(model)
    low, high = _lowest_density(make), 1.0
    if make(low).skipped(sites, total, transforms=transforms) < share:
        raise SparsityError(f"A share of {share:.3f} of all weights cannot be skipped by this method on this model.")
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if make(middle).skipped(sites, total, transforms=transforms) > share else (low, middle)
    return (low + high) / 2


def _lowest_density(make) -> float:
    """The smallest density in steps of half a percent that the method accepts: coefficients above 1 forbid some."""
    for step in range(1, 200):
        try:
            make(step / 200)
        except SparsityError:
            continue
        return step / 200
    return 1.0
