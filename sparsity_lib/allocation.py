"""An allocation shares the budget among layers: one density a layer, where a rule alone has one for all of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sparsity_lib.checks import fraction
from sparsity_lib.errors import SparsityError, refuse, unknown
from sparsity_lib.sites import KINDS, Site


@dataclass(frozen=True)
class Allocation:
    """Densities that take the place of the rules' own at some kinds of sites.

    Parameters
    ----------
    densities
        Kind of site -> the share of entries kept in each layer, (0, 1], from the first layer to the last. A layer
        without such a site has a number too, which nothing reads.
    """

    densities: Mapping[str, tuple[float, ...]]

    def __post_init__(self) -> None:
        if not isinstance(self.densities, Mapping) or not self.densities:
            raise refuse("allocation", self.densities, "densities by site, not empty", 'write {"down_in": [0.5, 0.4]}')
        checked = {}
        for kind, values in self.densities.items():
            if kind not in KINDS:
                raise unknown("site of an allocation", kind, KINDS)
            if not isinstance(values, (list, tuple)) or not values:
                raise refuse(f"allocation of {kind}", values, "a list with one density a layer")
            checked[kind] = tuple(fraction(f"density of {kind} in layer {i}", value) for i, value in enumerate(values))
        object.__setattr__(self, "densities", checked)

    def __hash__(self) -> int:
        return hash(tuple(sorted(self.densities.items())))

    def density(self, site: Site) -> float | None:
        """What is kept at one site, or None where the rule's own density holds."""
        values = self.densities.get(site.kind)
        if values is None:
            return None
        if site.layer >= len(values):
            self.check(site.layer + 1)
        return values[site.layer]

    def check(self, layers: int) -> None:
        """Raise SparsityError unless there is one density for each of a model's layers."""
        for kind, values in self.densities.items():
            if len(values) != layers:
                raise SparsityError(
                    f"The allocation has {len(values)} densities for {kind}; this model has {layers} layers. "
                    "Fix: allocate for this model."
                )

    def to_json(self) -> dict[str, Any]:
        return {kind: list(values) for kind, values in self.densities.items()}
