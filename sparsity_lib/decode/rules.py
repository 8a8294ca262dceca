"""From the rules of a plan to the selections that the compiled operators carry out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from sparsity_lib.errors import SparsityError
from sparsity_lib.parts.select import Threshold, TopK
from sparsity_lib.recipe import Recipe, Rule
from sparsity_lib.sites import DOWN_IN, GATE, O_IN, QKV_IN, UP_IN

#: Sites by the names of structures.Layer.
PLACES = {QKV_IN: "at_qkv", O_IN: "at_o", UP_IN: "at_up", GATE: "at_gate", DOWN_IN: "at_down"}


@dataclass(frozen=True)
class Choice:
    """What one site keeps: by threshold or the k largest of |x| * scale."""

    threshold: float = 0.0
    k: int | None = None
    scale: Tensor | None = None


def choice_of(rule: Rule, tensors: Mapping[str, Tensor], width: int) -> Choice:
    """The selection of one rule at one site of `width` entries; `tensors` by the names of the rule's parts.

    Raises
    ------
    SparsityError
        If a part has no compiled counterpart (a rotation, the oracle, a repair).
    """
    scales = {"magnitude": None, "saliency": "saliency", "column_norm": "norm"}
    if rule.transform.kind != "identity" or rule.repair or rule.score.kind not in scales:
        odd = next(p.kind for p in (rule.transform, *rule.repair, rule.score) if p.kind not in ("identity", *scales))
        raise SparsityError(f"The compiled operators have no {odd!r} (site {rule.site}). Fix: install(model, plan) computes it.")
    name = scales[rule.score.kind]
    scale = None if name is None else tensors[name].float().contiguous()
    if isinstance(rule.select, TopK):
        return Choice(k=rule.select.count(width), scale=scale)
    if isinstance(rule.select, Threshold):
        return Choice(threshold=float(tensors["threshold"]), scale=scale)
    raise SparsityError(f"The compiled operators do not select by {rule.select.kind!r}. Fix: install(model, plan) computes it.")


def check_sites(recipe: Recipe) -> None:
    """Raise SparsityError for sites that the decoder does not drop together."""
    sites = {rule.site for rule in recipe.rules}
    if UP_IN in sites and GATE in sites:
        raise SparsityError("The decoder drops an FFN's inputs or its neurons, not both. Fix: leave 'up_in' or 'gate' out.")
