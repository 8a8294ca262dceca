"""SCAP: Statistical Calibrated Activation Pruning (Chua et al. 2024, arXiv 2412.07174)."""

from __future__ import annotations

from torch import nn

from sparsity_lib.checks import fraction
from sparsity_lib.errors import unknown
from sparsity_lib.parts.select import Threshold
from sparsity_lib.parts.shift import CENTERS, Shift
from sparsity_lib.parts.transforms import Identity
from sparsity_lib.recipe import Recipe, Rule
from sparsity_lib.sites import DOWN_IN, O_IN, QKV_IN, UP_IN, find_sites


def scap(
    density: float = 0.5, *, up: float | None = None, down: float | None = None, attention: float | None = None,
    center_up: str = "none", center_down: str = "none", token_share: float = 1.0,
) -> Recipe:
    """Drop inputs of linear layers near a centre m, with one density for each of two groups (equations 2 and 6):

        Pruner(x) = x where |x - m| > t, else m;   t = the (1 - density)-quantile of |x - m| on calibration text

    The paper's target sparsities are 1 - `up` for the inputs of the up and gate projections and 1 - `down` for those of
    the down projection, both `density` where left out. `center_up` and `center_down` are "none" (m = 0), "mean",
    "median" or "mode"; `parts.shift.fold` puts m into the layers' biases. The paper centres only where the FFN has no
    gate (see `scap_for`). `attention` adds the inputs of the attention projections, uncentred.

    The release calibrates one layer after the other on activations that are sparse already: fit(..., sequential=True).
    """
    fraction("density", density)
    groups = {QKV_IN: (attention, "none"), O_IN: (attention, "none"), UP_IN: (density if up is None else up, center_up),
              DOWN_IN: (density if down is None else down, center_down)}
    names = {QKV_IN: "attention", O_IN: "attention", UP_IN: "up", DOWN_IN: "down"}
    rules = []
    for site, (share, center) in groups.items():
        if share is not None:
            rules.append(Rule(site, Threshold(fraction(names[site], share)), transform=_centered(names[site], center)))
    method = "scap" if all(r.transform.kind == "identity" for r in rules) else "scap_centered"
    return Recipe(method, tuple(rules), token_share)


def _centered(group: str, center: str) -> Identity | Shift:
    if center == "none":
        return Identity()
    if not isinstance(center, str) or center not in CENTERS:
        raise unknown(f"center_{group}", center, ["none", *CENTERS])
    return Shift(center)


def scap_centered(density: float = 0.5, *, token_share: float = 1.0, **options) -> Recipe:
    """`scap` with the down projection's inputs centred on their mode."""
    return scap(density, token_share=token_share, **{"center_down": "mode", **options})


def scap_for(model: nn.Module, density: float = 0.5, **options) -> Recipe:
    """`scap` as the paper sets it up for `model`: down inputs are centred on their mode where the FFN has no gate."""
    gated = any(linear.role in ("gate", "gate_up") for linear in find_sites(model).linears)
    return scap(density, **{"center_down": "none" if gated else "mode", **options})
