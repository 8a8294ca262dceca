"""What the experiments of the SCAP and TEAL chapters share: recipes from plain points, what is counted, int8 weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sparsity_lib.accounting import Account
from sparsity_lib.errors import unknown
from sparsity_lib.methods import cats
from sparsity_lib.parts.select import Threshold
from sparsity_lib.recipe import Recipe, Rule
from sparsity_lib.sites import DOWN_IN, UP_IN


def recipe_of(point: Mapping[str, Any]) -> Recipe:
    """The recipe of a point in plain data: {"method": "scap", "up": s, "down": s} or {"method": "cats", "gate": s}; sparsities."""
    if point["method"] == "cats":
        return cats(round(1 - point["gate"], 6))
    if point["method"] == "scap":
        sites = ((UP_IN, point["up"]), (DOWN_IN, point["down"]))
        return Recipe("scap", tuple(Rule(site, Threshold(round(1 - s, 6))) for site, s in sites if s))
    raise unknown("method of a point", point["method"], ("scap", "cats"))


def ffn_target(point: Mapping[str, Any]) -> float:
    """Share of the FFN's weights that a point is meant to skip: 2/3 up + 1/3 down for SCAP, 2/3 of the gate's for CATS."""
    if point["method"] == "cats":
        return 2 / 3 * point["gate"]
    return 2 / 3 * point["up"] + 1 / 3 * point["down"]


def shares(counted: Account) -> dict[str, Any]:
    """What a point left unread: of all weights, of the FFN's, and by kind of site and by layer."""
    return {
        "skipped": counted.skipped, "ffn": counted.paper_counts["ffn"], "linears": counted.paper_counts["linears"],
        "sites": counted.site_sparsity, "layers": counted.layer_sparsity,
    }
