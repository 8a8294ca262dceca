"""A recipe says what is done: plain data with a JSON round trip, fitted to no model yet.

    at this SITE, after this TRANSFORM, rank the entries by this SCORE, SELECT some,
    read only their weights, and REPAIR what was lost.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from sparsity_lib.allocation import Allocation
from sparsity_lib.checks import fraction
from sparsity_lib.errors import SparsityError, refuse, unknown
from sparsity_lib.parts import from_json
from sparsity_lib.parts.base import Repair, Score, Select, Transform
from sparsity_lib.parts.scores import Magnitude
from sparsity_lib.parts.transforms import Identity
from sparsity_lib.sites import DOWN_IN, GATE, HEAD_IN, KINDS, Site, SiteMap


@dataclass(frozen=True)
class Rule:
    """What happens at one kind of site, in every block."""

    site: str
    select: Select
    score: Score = Magnitude()
    transform: Transform = Identity()
    repair: tuple[Repair, ...] = ()
    #: Roles of the layers it holds for ("q", "up"), where several read the site; empty: all of them.
    readers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.site not in KINDS:
            raise unknown("site", self.site, KINDS)
        for name in ("repair", "readers"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for name, role in (("select", Select), ("score", Score), ("transform", Transform)):
            if not isinstance(getattr(self, name), role):
                raise refuse(name, getattr(self, name), f"a {role.__name__} part")
        for piece in self.parts():
            if piece.only_sites and self.site not in piece.only_sites:
                raise refuse(f"site of {piece.role} {piece.kind!r}", self.site, f"one of {sorted(piece.only_sites)}")
        if self.select.only_scores and self.score.kind not in self.select.only_scores:
            allowed = f"one of {sorted(self.select.only_scores)}"
            raise refuse(f"score of a selection by {self.select.kind!r}", self.score.kind, allowed)
        if self.score.of_prompt and not self.select.any_density:
            raise refuse(f"selection by the score {self.score.kind!r}", self.select.kind, "one that is not fitted", "topk")
        kinds = [piece.kind for piece in self.repair]
        if len(set(kinds)) < len(kinds):
            raise refuse("repair", kinds, "each kind once")
        if self.readers and self.site == GATE:
            raise refuse("readers of the gate site", self.readers, "none: its neurons are dropped whole")

    def parts(self) -> tuple:
        """In the order in which they are fitted."""
        return (self.transform, self.score, self.select, *self.repair)

    def with_density(self, density: float) -> Rule:
        """The same rule with its selection at `density`."""
        return dataclasses.replace(self, select=self.select.with_density(density))

    def check(self, site: Site) -> None:
        for piece in self.parts():
            piece.check(site)

    def shapes(self, site: Site) -> dict[str, tuple[int, ...]]:
        """Names and shapes of all tensors the rule keeps at `site`."""
        return {name: shape for piece in self.parts() for name, shape in piece.shapes(site).items()}

    def to_json(self) -> dict[str, Any]:
        data = {
            "site": self.site,
            "transform": self.transform.to_json(),
            "score": self.score.to_json(),
            "select": self.select.to_json(),
            "repair": [piece.to_json() for piece in self.repair],
        }
        return {**data, "readers": list(self.readers)} if self.readers else data

    @staticmethod
    def from_json(data: object) -> Rule:
        known = ("site", "transform", "score", "select", "repair", "readers")
        if not isinstance(data, Mapping):
            raise refuse("rule", data, f"an object with {', '.join(known)}")
        for name in data:
            if name not in known:
                raise unknown("field of a rule", name, known)
        if "site" not in data or "select" not in data:
            raise SparsityError('A rule lacks its "site" or its "select". Fix: name both.')
        if not isinstance(data.get("repair", ()), (list, tuple)):
            raise refuse("repair", data["repair"], "a list of repairs")
        readers = data.get("readers", ())
        if not isinstance(readers, (list, tuple)) or not all(isinstance(role, str) for role in readers):
            raise refuse("readers", readers, 'a list of roles, as in ["q", "k"]')
        return Rule(
            site=data["site"],
            select=from_json("select", data["select"]),
            score=from_json("score", data.get("score", {"kind": "magnitude"})),
            transform=from_json("transform", data.get("transform", {"kind": "identity"})),
            repair=tuple(from_json("repair", piece) for piece in data.get("repair", ())),
            readers=tuple(readers),
        )


@dataclass(frozen=True)
class Recipe:
    """A method: its rules, and the share of each sequence's tokens they apply to.

    Parameters
    ----------
    method
        The name shown in tables and figures ("claws").
    rules
        At most one for each kind of site.
    token_share
        The last `token_share` of every sequence is sparsified (1: all tokens, the book's default;
        TEAL's own evaluation: 0.5). Tokens generated one at a time are always sparsified.
    allocation
        Densities by layer in place of some rules' own; None: every layer has its rule's.
    """

    method: str
    rules: tuple[Rule, ...]
    token_share: float = 1.0
    allocation: Allocation | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "rules", tuple(self.rules))
        if not isinstance(self.method, str) or not self.method:
            raise refuse("method", self.method, "a name")
        if not self.rules:
            raise SparsityError("A recipe needs at least one rule. Fix: say what happens at which site.")
        kinds = [rule.site for rule in self.rules]
        for kind in set(kinds):
            if kinds.count(kind) > 1:
                raise SparsityError(f"The recipe has {kinds.count(kind)} rules for site {kind!r}. Fix: keep one.")
        if GATE in kinds and DOWN_IN in kinds:
            raise SparsityError(
                "The recipe drops the down projection's inputs twice, by 'gate' and by 'down_in'. Fix: keep one of them."
            )
        fraction("token_share", self.token_share)
        if self.token_share < 1 and HEAD_IN in kinds:
            raise refuse("token_share with a rule at the head", self.token_share, "1",
                         "the head is given single tokens, which have lost their place in the sequence")
        for rule in self.rules:
            if rule.score.of_prompt and self.token_share == 1:
                raise refuse(f"token_share with the score {rule.score.kind!r}", self.token_share,
                             "less than 1: it ranks by the first part of each sequence, which stays dense", "token_share=0.5")
        if not isinstance(self.allocation, (Allocation, type(None))):
            raise refuse("allocation", self.allocation, "an Allocation or None")
        for kind in self.allocation.densities if self.allocation else ():
            if kind not in kinds:
                raise refuse("site of the allocation", kind, f"one that the recipe has a rule for: {', '.join(kinds)}")

    def placed(self, sites: SiteMap) -> Iterator[tuple[Rule, Site]]:
        """Every site that the recipe touches, with the rule as it stands there: the layer's own density in its selection.

        Raises
        ------
        SparsityError
            If the model lacks a kind of site, or has another number of layers than the allocation.
        """
        if self.allocation is not None:
            self.allocation.check(sites.layers)
        for rule in self.rules:
            for site in sites.of_kind(rule.site):
                site = sites.narrowed(site, rule.readers) if rule.readers else site
                site = sites.whole(site) if rule.score.beforehand else site
                density = None if self.allocation is None else self.allocation.density(site)
                yield (rule if density is None else rule.with_density(density)), site

    def with_density(self, density: float) -> Recipe:
        """The same recipe with every selection at `density`.

        Raises
        ------
        SparsityError
            If rules or layers have different densities, whose proportions would be lost.
        """
        fraction("density", density)
        if self.allocation is not None:
            raise SparsityError(
                f"The layers of {self.method!r} have densities of their own, one number cannot stand for them. "
                "Fix: allocate anew, or drop the allocation (dataclasses.replace(recipe, allocation=None))."
            )
        if len({rule.select.density for rule in self.rules}) > 1:
            raise SparsityError(
                f"The rules of {self.method!r} have different densities, one number cannot stand for them. "
                "Fix: make the recipe anew, as in recipes.larosa(density, inputs=..., outputs=...)."
            )
        return dataclasses.replace(self, rules=tuple(rule.with_density(density) for rule in self.rules))

    def skipped(self, sites: SiteMap, all_weights: int, *, transforms: bool = False) -> float:
        """Share of all weights this recipe leaves unread by design (measured shares: `account`).

        All densities are taken as met exactly; `all_weights` is `accounting.weights_per_token`. With `transforms`, what they
        read for a token (a rotation that is not absorbed) counts as read, as what repairs read always does.
        """
        column: dict[str, float] = {}
        row: dict[str, float] = {}
        added = 0
        for rule, site in self.placed(sites):
            added += sum(piece.weights_read(site) for piece in rule.repair)
            added += rule.transform.weights_read(site) if transforms else 0
            density = rule.select.kept(site.width)
            column.update(dict.fromkeys(site.column_readers, density))
            row.update(dict.fromkeys(site.row_readers, density))
        left = sum(linear.weights * (1 - column.get(linear.name, 1) * rows_read(linear, row)) for linear in sites.readable)
        return (left - added) / all_weights

    def to_json(self) -> dict[str, Any]:
        data = {
            "method": self.method,
            "rules": [rule.to_json() for rule in self.rules],
            "token_share": self.token_share,
        }
        return data if self.allocation is None else {**data, "allocation": self.allocation.to_json()}

    def dumps(self) -> str:
        return json.dumps(self.to_json(), sort_keys=True)

    @staticmethod
    def from_json(data: object) -> Recipe:
        """Read a recipe from JSON text or from its plain data.

        Raises
        ------
        SparsityError
            If anything in it is unknown, missing or out of range.
        """
        if isinstance(data, (str, bytes)):
            try:
                data = json.loads(data)
            except (ValueError, RecursionError) as error:
                raise SparsityError(f"The recipe is not JSON: {error}.") from None
        known = ("method", "rules", "token_share", "allocation")
        if not isinstance(data, Mapping):
            raise refuse("recipe", data, f"an object with {', '.join(known)}")
        for name in data:
            if name not in known:
                raise unknown("field of a recipe", name, known)
        if not isinstance(data.get("rules"), (list, tuple)):
            raise refuse("rules", data.get("rules"), "a list of rules")
        rules = tuple(Rule.from_json(rule) for rule in data["rules"])
        shared = data.get("allocation")
        allocation = None if shared is None else Allocation(shared)
        return Recipe(data.get("method", ""), rules, data.get("token_share", 1.0), allocation)


def rows_read(linear, row: Mapping[str, float]) -> float:
    """Share of a linear's rows read, where only the up half of a fused gate-and-up matrix can be skipped."""
    density = row.get(linear.name, 1.0)
    return (1 + density) / 2 if linear.role == "gate_up" else density
