"""From the rules of a plan to the selections that the compiled operators carry out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from sparsity_lib.errors import SparsityError, refuse
from sparsity_lib.ops.reference import WIDEST_GROUP
from sparsity_lib.parts.select import Threshold, TopK
from sparsity_lib.recipe import Recipe, Rule
from sparsity_lib.sites import DOWN_IN, GATE, HEAD_IN, O_IN, QKV_IN, UP_IN

#: Sites of a block by the names of structures.Layer.
PLACES = {QKV_IN: "at_qkv", O_IN: "at_o", UP_IN: "at_up", GATE: "at_gate", DOWN_IN: "at_down"}


@dataclass(frozen=True)
class Choice:
    """What one site keeps: by threshold or the k largest of |z - shift| * scale, z = Q^T x where there is a rotation Q.

    threshold: one number, or [width]. group: the k largest of every so many consecutive entries. repair: what is kept is then
    given the variance of all (VAR). refine: at the head, the share of outputs that are then computed from all inputs.

    The projection then multiplies z - shift by W Q, and W Q shift goes to the bias: what the layer computes stays the same.
    """

    threshold: float | Tensor = 0.0
    k: int | None = None
    scale: Tensor | None = None
    shift: Tensor | None = None
    rotation: Tensor | None = None
    group: int | None = None
    repair: bool = False
    refine: float = 0.0

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
        if self.repair and site == GATE:
            raise SparsityError("The decoder does not repair the gate's output. Fix: leave the repair out.")
        if site == GATE and (self.shift is not None or self.rotation is not None):
            raise SparsityError("The gate's output is neither shifted nor rotated by the decoder. Fix: install(model, plan).")

    def absorbed(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Weight [out, in] and bias [out] of the projection behind this site: W Q, and b + W Q shift."""
        if self.rotation is not None:
            weight = (weight.float() @ self.rotation).to(weight.dtype)
        if self.shift is not None:
            moved = weight.float() @ self.shift
            bias = moved if bias is None else bias.float() + moved
        return weight, bias


def choice_of(rule: Rule, tensors: Mapping[str, Tensor], width: int) -> Choice:
    """The selection of one rule at one site of `width` entries; `tensors` by the names of the rule's parts.

    Raises
    ------
    SparsityError
        If a part has no compiled counterpart (the oracle, a repair).
    """
    if rule.readers:
        raise SparsityError(f"The decoder drops inputs for all readers of site {rule.site}. Fix: install(model, plan).")
    scales = {"magnitude": None, "saliency": "saliency", "column_norm": "norm", "amber": "norm"}
    known = ("identity", "rotate", "shift")
    repairs = ("variance", "refine")
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
    }
    if isinstance(rule.select, TopK):
        return Choice(k=rule.select.count(width), scale=scale, **moved)
    if isinstance(rule.select, Threshold):
        return Choice(threshold=float(tensors["threshold"]), scale=scale, **moved)
    if rule.select.kind == "n_of_m":
        return Choice(k=rule.select.n, group=rule.select.m, scale=scale, **moved)
    raise SparsityError(f"The compiled operators do not select by {rule.select.kind!r}. Fix: install(model, plan) computes it.")


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
