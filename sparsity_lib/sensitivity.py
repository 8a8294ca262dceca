"""Share a budget of weights among all sites of all layers, the head included, by what dropping entries there costs.

To second order, dropping d from the activation x of a site changes the model's predictions by

    KL ~ 1/2 E[(g^T d)^2],   g = dL/dx, L the next-token loss summed over a sequence's tokens

(the Fisher information taken with the text's own next tokens). One forward and backward pass gives this for every site and
every sparsity at once; the head's KL is measured as it is. `Curves.allocate` then takes, wherever it is cheapest, the next
piece of the curves' convex hulls until the budget is met.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sparsity_lib import lm
from sparsity_lib.accounting import weights_per_token
from sparsity_lib.allocation import Allocation
from sparsity_lib.attach import attach
from sparsity_lib.by_block import final_states, text_of
from sparsity_lib.checks import fraction
from sparsity_lib.errors import SparsityError, refuse
from sparsity_lib.fit import calibration_stream
from sparsity_lib.install import head_of, installed_on
from sparsity_lib.parts.select import TopK
from sparsity_lib.plan import Plan
from sparsity_lib.progress import track
from sparsity_lib.recipe import Recipe, Rule
from sparsity_lib.sites import GATE, HEAD_IN, Site, find_sites

#: Sparsities at which costs are taken, from 0 on.
LEVELS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
#: Text if nothing else is said, and of which of its tokens the head's predictions are compared.
TOKENS, LENGTH, EVERY = 2048, 256, 16


@dataclass(frozen=True)
class Curves:
    """What each site costs at each sparsity.

    Parameters
    ----------
    recipe
        What was measured; its densities say nothing.
    levels
        Sparsities, rising from 0.
    costs
        "LAYER.SITE" -> nats per token at each level, from 0.
    weights
        "LAYER.SITE" -> weights that a token reads because of the site's entries, all kept.
    fixed
        Weights that the recipe's repairs and transforms read on top whatever is dropped.
    total
        Weights that the dense model reads for a token, head included.
    described
        The text; plain data.
    """

    recipe: Recipe
    levels: tuple[float, ...]
    costs: Mapping[str, tuple[float, ...]]
    weights: Mapping[str, int]
    fixed: int
    total: int
    described: Mapping[str, Any] = field(default_factory=dict)

    def at(self, share: float) -> dict[str, float]:
        """Sparsity of each site with which `share` of all weights is skipped at the least cost.

        Raises
        ------
        SparsityError
            If the highest level everywhere skips less.
        """
        fraction("share", share, zero=True, one=False)
        wanted = share * self.total + (self.fixed if share else 0)
        found = dict.fromkeys(self.costs, 0.0)
        for _, name, low, high in sorted(piece for each in self.costs for piece in self._pieces(each)):
            if wanted <= 1e-9 * self.total:
                break
            saved = (high - low) * self.weights[name]
            found[name] = low + (high - low) * min(1.0, wanted / saved)
            wanted -= saved
        if wanted > 1e-6 * self.total:
            most = max(self.levels) * sum(self.weights.values()) - self.fixed
            raise refuse("share", share, f"at most {most / self.total:.3f}, all sites at sparsity {max(self.levels)}")
        return found

    def _pieces(self, name: str) -> list[tuple[float, str, float, float]]:
        """Pieces of one curve's lower convex hull: (nats per weight skipped, site, from, to), from flat to steep."""
        hull: list[tuple[float, float]] = []
        for point in zip(self.levels, self.costs[name], strict=True):
            while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-1], point):
                hull.pop()
            hull.append(point)
        return [(_slope(a, b) / self.weights[name], name, a[0], b[0]) for a, b in zip(hull, hull[1:], strict=False)]

    def allocate(self, share: float) -> Recipe:
        """The recipe that skips `share` of all weights, each site at its own density."""
        sparsity, layers = self.at(share), 1 + max(int(name.partition(".")[0]) for name in self.costs)
        by_site = {
            rule.site: tuple(round(1 - sparsity.get(f"{i}.{rule.site}", 0.0), 6) for i in range(layers))
            for rule in self.recipe.rules
        }
        rules = tuple(rule.with_density(_mean(by_site[rule.site], rule, sparsity)) for rule in self.recipe.rules)
        name = f"{self.recipe.method}_spread"
        return dataclasses.replace(self.recipe, method=name, rules=rules, allocation=Allocation(by_site))


def _slope(a: tuple[float, float], b: tuple[float, float]) -> float:
    return (b[1] - a[1]) / (b[0] - a[0])


def _mean(densities: Sequence[float], rule: Rule, sparsity: Mapping[str, float]) -> float:
    """The density that a rule shows, of the layers that have its site."""
    own = [d for i, d in enumerate(densities) if f"{i}.{rule.site}" in sparsity]
    return round(sum(own) / len(own), 6)


def curves(
    plan: Plan, model: nn.Module, tokenizer=None, *, levels: Sequence[float] = LEVELS, every: int = EVERY,
    ids: Tensor | None = None, tokens: int = TOKENS, length: int = LENGTH, source: str | None = None, seed: int = 0,
    known: Curves | None = None,
) -> Curves:
    """Measure the cost of every site that `plan`'s recipe has rules for.

    Parameters
    ----------
    plan
        Fitted to `model` at any density; its selections are taken as top-k. No gate sites; repairs at the head only.
    every
        The head's predictions are compared for every n-th token.
    ids, tokens, length, source, seed
        Calibration text, as for `fit`.
    known
        Curves of the same blocks, levels and text: only what they lack (the head, or another rule there) is measured.

    Raises
    ------
    SparsityError
        If the model is sparse, the recipe of another kind, the levels do not rise from 0 to below 1, or `known` has others,
        another text or other rules at the blocks.
    """
    if installed_on(model) is not None:
        raise SparsityError("The costs of a sparse model were asked for. Fix: uninstall(model) first.")
    levels = _levels(levels)
    for rule in plan.recipe.rules:
        if rule.site == GATE or (rule.repair and rule.site != HEAD_IN):
            raise refuse("rule", f"{rule.site} with {[p.kind for p in rule.repair]}",
                         "an input of linear layers, without repairs but at the head")
    stream, text = calibration_stream(tokenizer, ids, None, tokens, length, source, seed, 1)
    sites = find_sites(model)
    placed = list(plan.recipe.placed(sites))
    weights = {linear.name: linear.weights for linear in sites.readable}
    in_blocks = [(rule, site) for rule, site in placed if site.kind != HEAD_IN]
    if known is None:
        costs = _block_costs(in_blocks, plan, model, stream, levels)
    else:
        _check_known(known, plan.recipe, levels, text)
        costs = {site.name: known.costs[site.name] for _, site in in_blocks}
    for rule, site in placed:
        if site.kind == HEAD_IN:
            costs[site.name] = _head_costs(rule, site, plan, model, stream, levels, every)
    return Curves(
        plan.recipe, levels, costs, {site.name: sum(weights[r] for r in site.column_readers) for _, site in placed},
        sum(piece.weights_read(site) for rule, site in placed for piece in (rule.transform, *rule.repair)),
        weights_per_token(model), text)


def _levels(levels: Sequence[float]) -> tuple[float, ...]:
    found = tuple(fraction("level", level, zero=True, one=False) for level in levels)
    if len(found) < 2 or found[0] != 0 or any(a >= b for a, b in zip(found, found[1:], strict=False)):
        raise refuse("levels", tuple(levels), "at least two sparsities, rising from 0 to below 1")
    return found


def _check_known(known: Curves, recipe: Recipe, levels: tuple[float, ...], text: Mapping[str, Any]) -> None:
    def blocks(of: Recipe) -> list[tuple[Any, ...]]:  # all of a rule that costs depend on: its selection is taken as top-k
        return [(rule.site, rule.readers, rule.transform, rule.score) for rule in of.rules if rule.site != HEAD_IN]

    for what, own, wanted in (("levels", known.levels, levels), ("text", dict(known.described), dict(text)),
                              ("rules at the blocks", blocks(known.recipe), blocks(recipe))):
        if own != wanted:
            raise refuse(f"{what} of the known costs", own, str(wanted), "measure anew, without known")


def _block_costs(
    placed: Sequence[tuple[Rule, Site]], plan: Plan, model: nn.Module, stream: Sequence[Tensor], levels: Sequence[float]
) -> dict[str, tuple[float, ...]]:
    taps = {site.name: _Cost(rule, site, plan, levels) for rule, site in placed}
    handles = [attach(model, site, taps[site.name]) for _, site in placed]
    try:
        text_of(model, stream).run(needs_grad=True, desc="costs of dropping")
    finally:
        for handle in handles:
            handle.remove()
    if unseen := [name for name, tap in taps.items() if not tap.tokens]:
        raise SparsityError(f"No gradient of the loss comes to the sites {', '.join(unseen)}. Fix: a recipe without them.")
    return {name: tap.result() for name, tap in taps.items()}


class _Cost:
    """A tap that adds up 1/2 (g^T d)^2 at every level."""

    def __init__(self, rule: Rule, site: Site, plan: Plan, levels: Sequence[float]) -> None:
        self.rule, self.width = rule, site.width
        start = f"{site.name}."
        self.tensors = {name.removeprefix(start): t for name, t in plan.tensors.items() if name.startswith(start)}
        self.dropped = [site.width - TopK(1 - level).count(site.width) if level else 0 for level in levels]
        self.total, self.tokens = torch.zeros(len(levels), dtype=torch.float64), 0

    def __call__(self, x: Tensor) -> Tensor:
        if x.requires_grad:
            value = x.detach()
            x.register_hook(lambda grad: self.add(value, grad.detach()))
        return x

    def add(self, x: Tensor, grad: Tensor) -> None:
        transform = self.rule.transform
        tensors = transform.of_token(x, self.tensors)
        z, gradient = transform.forward(x, tensors), transform.gradient(grad, tensors)
        order = self.rule.score(z, tensors).argsort(dim=-1)  # what goes first comes first
        lost = (z * gradient).gather(-1, order).double().cumsum(-1).flatten(0, -2)
        for i, count in enumerate(self.dropped):
            if count:
                self.total[i] += 0.5 * lost[:, count - 1].square().sum().cpu()
        self.tokens += len(lost)

    def result(self) -> tuple[float, ...]:
        return tuple((self.total / self.tokens).tolist())


@torch.no_grad()
def _head_costs(
    rule: Rule, site: Site, plan: Plan, model: nn.Module, stream: Sequence[Tensor], levels: Sequence[float], every: int
) -> tuple[float, ...]:
    """Mean KL of the head alone at every level, on every n-th token."""
    states = track(final_states(model, stream), desc="head", total=len(stream))
    hidden = torch.cat([each.flatten(0, 1)[::every] for each in states])
    total = torch.zeros(len(levels), dtype=torch.float64)
    plans = [Plan(Recipe("head", (dataclasses.replace(rule, select=TopK(1 - level)),)), plan.tensors, plan.widths)
             for level in levels]
    heads = [head_of(model, each) for each in plans]
    for piece in lm.chunks(len(hidden), model):
        dense = lm.logits(model, hidden[piece]).log_softmax(-1)
        for i, level in enumerate(levels):
            if level:
                with heads[i]():
                    own = lm.logits(model, hidden[piece]).log_softmax(-1)
                total[i] += float((dense.exp() * (dense - own)).sum())
    return tuple((total / len(hidden)).clamp_min(0).tolist())
