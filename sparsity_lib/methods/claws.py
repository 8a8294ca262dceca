"""CLAWS: Calibration-Aware Activation Sparsity for Instruction-Tuned LLMs (2026, abstract only)."""

from sparsity_lib.errors import unknown
from sparsity_lib.parts.saliency import Saliency
from sparsity_lib.parts.select import TopK
from sparsity_lib.recipe import Recipe, Rule
from sparsity_lib.sites import GATE

#: Readings of "Fisher-calibrated": the literal one first, then robust ones.
VARIANTS = {
    "fisher": Saliency("rms"),
    "fisher_skip_first": Saliency("rms", skip_first=True),
    "mean": Saliency("mean"),
    "median": Saliency("median"),
    "sqrt": Saliency("rms", power=0.5),
    "product": Saliency("product_rms"),
}


def claws(density: float = 0.5, *, variant: str = "fisher", token_share: float = 1.0) -> Recipe:
    """Keep, of each token, the top K = density * width neurons by |g_j| * c_j.

    c_j is a static saliency from calibration gradients. The abstract does not give its formula; from
    dL ~ g_j dL/dg_j the natural one is c_j = sqrt(E[(dL/dg_j)^2]) (`fisher`), beside which `VARIANTS`
    keeps robust readings. Execution is CATS': gate dense, W_up rows and W_down columns skipped.
    """
    if variant not in VARIANTS:
        raise unknown("variant", variant, VARIANTS)
    name = "claws" if variant == "fisher" else f"claws_{variant}"
    return Recipe(name, (Rule(GATE, TopK(density), VARIANTS[variant]),), token_share)
