"""From the rules of a plan to the selections that the compiled operators carry out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import torch
from torch import Tensor

from sparsity_lib.errors import SparsityError, refuse
from sparsity_lib.ops.reference import WIDEST_GROUP
from sparsity_lib.parts.select import Gaussian, Threshold, TopK
from sparsity_lib.plan import Plan
from sparsity_lib.recipe import Recipe, Rule
from sparsity_lib.sites import DOWN_IN, GATE, HEAD_IN, O_IN, QKV_IN, UP_IN, SiteMap

#: Sites of a block by the names of structures.Layer.
PLACES = {QKV_IN: "at_qkv", O_IN: "at_o", UP_IN: "at_up", GATE: "at_gate", DOWN_IN: "at_down"}


@dataclass(frozen=True)
class Choice:
    """What one site keeps: by threshold or the k largest of |z - shift| * scale, z = Q^T x where there is a rotation Q.

    threshold: one number, or [width]. group: the k largest of every so many consecutive entries. repair: what is kept is then
    given the variance of all (VAR). refine: at the head, the share of outputs that are then computed from all inputs.
    law: one of `parts.select.LAWS`, where the threshold counts the scores' own deviations. with_sign: z - shift in the place
    of its size. low_rank: U [out, r] and V [r, in] of each matrix behind the site, W ~ U V, through which goes what is dropped.

    The projection then multiplies z - shift by W Q, and W Q shift goes to the bias: what the layer computes stays the same.
    A low rank product is taken of all inputs, and off the matrix: W z' + U V (z - z') = (W - U V) z' + U V z.
    """

    threshold: float | Tensor = 0.0
    k: int | None = None
    scale: Tensor | None = None
    shift: Tensor | None = None
    rotation: Tensor | None = None
    group: int | None = None
    repair: bool = False
    refine: float = 0.0
    law: str | None = None
    with_sign: bool = False
    low_rank: tuple[tuple[Tensor, Tensor], ...] = ()

    def check(self, site: str, width: int) -> None:
        """Raise SparsityError where a tensor does not fit the site's width."""
        for name, shape in (("scale", (width,)), ("shift", (width,)), ("rotation", (width, width)), ("threshold", (width,))):
            tensor = getattr(self, name)
            if isinstance(tensor, Tensor) and tuple(tensor.shape) != shape:
                raise refuse(f"{name} of site {site}", tuple(tensor.shape), str(shape))
        if self.group is not None and not (1 <= self.group <= WIDEST_GROUP and 1 <= (self.k or 0) <= self.group):
            raise refuse(f"pattern at site {site}", f"{self.k}:{self.group}", f"N:M with 1 <= N <= M <= {WIDEST_GROUP}")
        if self.refine and site != HEAD_IN:
            raise refuse(f"refine at site {site}", self.refine, "0: outputs are refined at the head only")
        if self.refine and self.shift is not None:
            raise SparsityError("The decoder refines no outputs that a shift has moved. Fix: leave the shift or refine out.")
        if (self.repair or self.low_rank) and site == GATE:
            raise SparsityError("The decoder does not repair the gate's output. Fix: leave the repair out.")
        if self.low_rank and (self.repair or self.shift is not None):
            raise SparsityError("A low rank product stands alone in the decoder. Fix: leave the shift or the other repair out.")
        if site == GATE and (self.shift is not None or self.rotation is not None):
            raise SparsityError("The gate's output is neither shifted nor rotated by the decoder. Fix: install(model, plan).")

    def absorbed(self, weights: Sequence[Tensor], bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Weight and bias [out] of the projection behind this site, whose matrices [out, in] are joined: W Q, and b + W Q shift.

        Columns for what a low rank product gives come after the inputs'.
        """
        dtype = weights[0].dtype
        if self.low_rank:
            weights = [w.float() - left @ right for w, (left, right) in zip(weights, self.low_rank, strict=True)]
        weight = torch.cat(list(weights)) if len(weights) > 1 else weights[0]
        if self.rotation is not None:
            weight = (weight.float() @ self.rotation).to(dtype)
        if self.shift is not None:
            moved = weight.float() @ self.shift
            bias = moved if bias is None else bias.float() + moved
        if self.low_rank:
            weight = torch.cat([weight.float(), torch.block_diag(*(left for left, _ in self.low_rank))], dim=1).to(dtype)
        return weight, bias

    def lowering(self) -> Tensor | None:
        """V [r, in] of all matrices, one after the other, None without a low rank product."""
        return torch.cat([right for _, right in self.low_rank]) if self.low_rank else None


def choice_of(rule: Rule, tensors: Mapping[str, Tensor], width: int) -> Choice:
    """The selection of one rule at one site of `width` entries; `tensors` by the names of the rule's parts.

    Raises
    ------
    SparsityError
        If a part has no compiled counterpart (the oracle, some repairs).
    """
    if rule.readers:
        raise SparsityError(f"The decoder drops inputs for all readers of site {rule.site}. Fix: install(model, plan).")
    scales = {"magnitude": None, "saliency": "saliency", "column_norm": "norm", "amber": "norm", "value": None}
    known = ("identity", "rotate", "shift")
    repairs = ("variance", "refine", "low_rank")
    odd_repairs = [p for p in rule.repair if p.kind not in repairs]
    if rule.transform.kind not in known or odd_repairs or rule.score.kind not in scales:
        odd = next(p.kind for p in (rule.transform, *odd_repairs, rule.score) if p.kind not in (*known, *scales))
        raise SparsityError(f"The compiled operators have no {odd!r} (site {rule.site}). Fix: install(model, plan) computes it.")
    name = scales[rule.score.kind]
    scale = None if name is None else tensors[name].float().contiguous()
    moved = {
        "rotation": tensors["rotation"] if rule.transform.kind == "rotate" else None,
        "shift": tensors["shift"].float().expand(width).contiguous() if rule.transform.kind == "shift" else None,
        "repair": any(piece.kind == "variance" for piece in rule.repair),
        "refine": next((piece.share for piece in rule.repair if piece.kind == "refine"), 0.0),
        "low_rank": _low_rank(rule, tensors),
        "with_sign": rule.score.kind == "value",
    }
    if rule.score.kind == "value" and not isinstance(rule.select, Threshold | Gaussian):
        raise SparsityError(f"The compiled operators rank sizes, not values (site {rule.site}). Fix: select by thresholds.")
    if isinstance(rule.select, TopK):
        return Choice(k=rule.select.count(width), scale=scale, **moved)
    if isinstance(rule.select, Threshold):
        return Choice(threshold=float(tensors["threshold"]), scale=scale, **moved)
    if isinstance(rule.select, Gaussian):
        density, normal = rule.select.density, NormalDist()
        if density == 1:
            return Choice(k=width, scale=scale, **{**moved, "with_sign": False})
        level = 1 - density if rule.select.law == "normal" else 1 - density / 2
        return Choice(threshold=normal.inv_cdf(level), law=rule.select.law, scale=scale, **moved)
    if rule.select.kind == "n_of_m":
        return Choice(k=rule.select.n, group=rule.select.m, scale=scale, **moved)
    raise SparsityError(f"The compiled operators do not select by {rule.select.kind!r}. Fix: install(model, plan) computes it.")


def _low_rank(rule: Rule, tensors: Mapping[str, Tensor]) -> tuple[tuple[Tensor, Tensor], ...]:
    if not any(piece.kind == "low_rank" for piece in rule.repair):
        return ()
    count = sum(name.startswith("left_") for name in tensors)
    return tuple((tensors[f"left_{i}"].float(), tensors[f"right_{i}"].float()) for i in range(count))


def planned(plan: Plan, sites: SiteMap) -> Callable[[int, str, int], Choice | None]:
    """(layer, site, width) -> what a plan keeps there; None where it has no rule."""
    check_sites(plan.recipe)
    rules = {(placed.layer, placed.kind): rule for rule, placed in plan.recipe.placed(sites)}

    def choose(layer: int, site: str, width: int) -> Choice | None:
        if (layer, site) not in rules:
            return None
        start = f"{layer}.{site}."
        tensors = {name.removeprefix(start): t for name, t in plan.tensors.items() if name.startswith(start)}
        return choice_of(rules[layer, site], tensors, width)

    return choose


def check_sites(recipe: Recipe) -> None:
    """Raise SparsityError for sites that the decoder does not drop together."""
    sites = {rule.site for rule in recipe.rules}
    if UP_IN in sites and GATE in sites:
        raise SparsityError("The decoder drops an FFN's inputs or its neurons, not both. Fix: leave 'up_in' or 'gate' out.")


def check_once(site: str, choice: Choice | None) -> None:
    """Raise SparsityError where a rule is asked for in front of a granular projection."""
    if choice is not None:
        fix = f"no choice at {site}, or a model converted without this projection"
        raise SparsityError(f"At site {site} stripes drop inputs already, each by its own thresholds. Fix: {fix}.")
