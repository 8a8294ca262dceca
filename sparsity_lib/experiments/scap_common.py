"""What the experiments of the SCAP and TEAL chapters share: recipes from plain points, what is counted, int8 weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sparsity_lib.accounting import Account
from sparsity_lib.errors import refuse, unknown
from sparsity_lib.methods import cats, scap
from sparsity_lib.parts.select import Threshold
from sparsity_lib.parts.shift import Shift
from sparsity_lib.parts.transforms import Identity
from sparsity_lib.recipe import Recipe, Rule
from sparsity_lib.sites import DOWN_IN, IN_PROJ_IN, OUT_PROJ_IN


def recipe_of(point: Mapping[str, Any]) -> Recipe:
    """The recipe of a point in plain data, sparsities by group.

    {"method": "cats", "gate": s}, {"method": "scap", "up": s, "down": s, "attention": s, "center": by} (the last two may be
    missing), {"method": "mixer", "in": s, "out": s} for Mamba2's two projections, or {"method": "down", "down": s, "center":
    by}, which prunes inputs of the down projection alone.
    """
    if point["method"] == "cats":
        return cats(kept(point["gate"]))
    center = point.get("center", "none")
    if point["method"] == "scap":
        attention = None if point.get("attention") is None else kept(point["attention"])
        return scap(up=kept(point["up"]), down=kept(point["down"]), attention=attention, center_down=center)
    if point["method"] == "mixer":
        sites = ((IN_PROJ_IN, point["in"]), (OUT_PROJ_IN, point["out"]))
        return Recipe("scap", tuple(Rule(site, Threshold(kept(sparsity))) for site, sparsity in sites))
    if point["method"] == "down":
        shift = Identity() if center == "none" else Shift(center)
        name = "scap" if center == "none" else "scap_centered"
        return Recipe(name, (Rule(DOWN_IN, Threshold(kept(point["down"])), transform=shift),))
    raise unknown("method of a point", point["method"], ("scap", "cats", "down", "mixer"))


def kept(sparsity: float) -> float:
    """The density that goes with a target sparsity, free of the last digits of 1 - 0.3."""
    return round(1 - sparsity, 6)


def ffn_target(point: Mapping[str, Any]) -> float:
    """Share of the FFN's weights that a point is meant to skip: 2/3 up + 1/3 down for SCAP, 2/3 of the gate's for CATS."""
    if point["method"] == "cats":
        return 2 / 3 * point["gate"]
    return 2 / 3 * point["up"] + 1 / 3 * point["down"]


def shares(counted: Account) -> dict[str, Any]:
    """What a point left unread: of all weights, of the FFN's and of all linears', and by kind of site and by layer."""
    return {
        "skipped": counted.skipped, "ffn": counted.paper_counts["ffn"], "linears": counted.paper_counts["linears"],
        "sites": counted.site_sparsity, "layers": counted.layer_sparsity,
    }


def rounded(weight: Tensor, bits: int = 8) -> Tensor:
    """A weight [out, in] to whole steps of its rows' largest magnitude and back: symmetric, one scale an output channel.

    q = round(w / s), s = max |w| / (2**(bits - 1) - 1); nothing is calibrated.
    """
    if bits not in range(2, 17):
        raise refuse("bits", bits, "a whole number from 2 to 16")
    most = 2 ** (bits - 1) - 1
    scale = weight.float().abs().amax(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny) / most
    return ((weight.float() / scale).round().clamp(-most, most) * scale).to(weight.dtype)


@torch.no_grad()
def quantise(model: nn.Module, bits: int = 8) -> nn.Module:
    """Round every linear layer's weights to `bits` bits in place, the head and its table left out; returns the model."""
    head = model.get_output_embeddings()
    for module in model.modules():
        if isinstance(module, nn.Linear) and module is not head:
            module.weight.copy_(rounded(module.weight, bits))
    return model
