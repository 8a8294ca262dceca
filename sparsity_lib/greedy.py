"""Share a sparsity budget among the sites of each block by what raising it costs (TEAL, arXiv 2408.14690, algorithm 1).

For each block by itself, on the dense model's hidden states: raise the sparsity of the site whose next step moves the
block's output least, until the block's average reaches the target. Every target below is met on the way, so one run gives
a `Path` from which recipes at several targets are read.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sparsity_lib.allocation import Allocation
from sparsity_lib.attach import attach
from sparsity_lib.blocks import Blocks
from sparsity_lib.checks import fraction
from sparsity_lib.collectors import Collector
from sparsity_lib.errors import SparsityError, refuse, unknown
from sparsity_lib.fit import calibration_stream, fit_many
from sparsity_lib.fitting import Fitting, collect, fit_step
from sparsity_lib.install import installed_on
from sparsity_lib.plan import Plan
from sparsity_lib.progress import track
from sparsity_lib.recipe import Recipe
from sparsity_lib.sites import GATE, HEAD_IN, KINDS, Site, SiteMap, find_sites
from sparsity_lib.sparsifier import Sparsifier

#: How far a block's output Y [tokens, outputs] is from the dense block's: what a step is judged by.
ERRORS = {
    "all": "L2 norm of all entries (the paper's)",
    "outputs": "L2 norm over tokens, mean over outputs (the released code's)",
    "tokens": "L2 norm over outputs by that of the dense output, mean over tokens: every token counts the same",
}
#: Text if nothing else is said: 4 sequences of 256 tokens. A block is run some fifty times on all of it.
TOKENS, LENGTH = 1024, 256


@dataclass(frozen=True)
class Path:
    """The steps of a greedy allocation, block by block.

    Parameters
    ----------
    recipe
        What was allocated; its densities say nothing.
    shares
        [layers, groups]: share of a block's weights that a group of layers reading one site holds; groups as the rules.
    levels
        [layers, steps + 1, groups]: sparsity of every site after each step, from 0; NaN after a block's last step.
    errors
        [layers, steps, groups]: what the block's output would move by (see `ERRORS`) if this step were the group's; the
        smallest was taken. NaN where the group had nothing left to give.
    described
        Step, highest level, kind of error and text; plain data.
    """

    recipe: Recipe
    shares: Tensor
    levels: Tensor
    errors: Tensor
    described: dict[str, Any] = field(default_factory=dict)

    @property
    def groups(self) -> tuple[str, ...]:
        """Kinds of sites in the order of the tensors' last axis."""
        return tuple(rule.site for rule in self.recipe.rules)

    @property
    def reached(self) -> float:
        """The highest target that every block has reached."""
        return float(self._sparsity().nan_to_num(0).amax(1).min())

    def _sparsity(self) -> Tensor:
        """Weight-averaged sparsity of each block after each step, [layers, steps + 1]."""
        return (self.levels * self.shares[:, None]).sum(-1)

    def at(self, target: float) -> Tensor:
        """Sparsity of each group in each block [layers, groups] where the block's average is `target`.

        A target between two steps shortens the second: the one group that it raises goes as far as needed.

        Raises
        ------
        SparsityError
            If the run ended before the target.
        """
        fraction("target", target, zero=True, one=False)
        if target > self.reached + 1e-6:
            raise refuse("target", target, f"at most {self.reached:.3f}, where this run ended", "run it with a higher target")
        found = []
        for levels, sparsity in zip(self.levels, self._sparsity(), strict=True):
            last = int((sparsity.nan_to_num(math.inf) >= target - 1e-6).nonzero()[0, 0])
            if last == 0 or abs(float(sparsity[last]) - target) < 1e-6:
                found.append(levels[last])
                continue
            before, after = sparsity[last - 1], sparsity[last]
            found.append(torch.lerp(levels[last - 1], levels[last], (target - before) / (after - before)))
        return torch.stack(found)

    def recipe_at(self, target: float) -> Recipe:
        """The recipe whose blocks each leave a share `target` of their weights unread."""
        densities = (1 - self.at(target)).tolist()
        by_site = {kind: tuple(round(layer[i], 6) for layer in densities) for i, kind in enumerate(self.groups)}
        rules = tuple(rule.with_density(round(sum(by_site[rule.site]) / len(densities), 6)) for rule in self.recipe.rules)
        return dataclasses.replace(self.recipe, rules=rules, allocation=Allocation(by_site))

    def plans(self, targets: Sequence[float], model: nn.Module, tokenizer=None, **options) -> list[Plan]:
        """Plans at several targets, fitted in shared passes (options: `fit_many`'s), each with the whole path inside."""
        fitted = fit_many([self.recipe_at(target) for target in targets], model, tokenizer, **options)
        kept = {f"greedy.{name}": getattr(self, name).float() for name in ("shares", "levels", "errors")}
        return [
            dataclasses.replace(
                plan, tensors={**plan.tensors, **kept},
                calibration={**plan.calibration, "greedy": {"target": target, **self.described}},
            )
            for target, plan in zip(targets, fitted, strict=True)
        ]

    @staticmethod
    def of(plan: Plan) -> Path:
        """The path that a plan was read from (`plans`), after any save and load.

        Raises
        ------
        SparsityError
            If the plan has none.
        """
        described = dict(plan.calibration.get("greedy", {}))
        names = [f"greedy.{name}" for name in ("shares", "levels", "errors")]
        if not described or any(name not in plan.tensors for name in names):
            raise SparsityError(f"The plan of {plan.recipe.method!r} holds no greedy path. Fix: make it by Path.plans.")
        described.pop("target")
        recipe = dataclasses.replace(plan.recipe, allocation=None)
        return Path(recipe, *(plan.tensors[name] for name in names), described)


def greedy(
    recipe: Recipe, model: nn.Module, tokenizer=None, *, target: float = 0.6, step: float = 0.05, highest: float = 0.95,
    error: str = "all", ids: Tensor | None = None, batches=None, tokens: int = TOKENS, length: int = LENGTH,
    source: str | None = None, seed: int = 0, batch_size: int = 4,
) -> Path:
    """Allocate `recipe`'s sparsity within each block of `model`, up to `target`.

    Parameters
    ----------
    recipe
        Rules at inputs of linear layers, without repairs; scores that need no gradient.
    target
        Sparsity of every block's linear layers, averaged over their weights, at which the run ends.
    step
        What one step adds to that average: a group holding a share w of the block's weights is raised by step / w.
    highest
        Sparsity that no site exceeds; the last step of a group is cut there.
    error
        A name of `ERRORS`. A channel or a first token that is many times as large as the others rules "all".
    ids, batches, tokens, length, source, seed, batch_size
        Calibration text, as for `fit_many`.

    Raises
    ------
    SparsityError
        If a number is out of range, the model is sparse already, or the recipe is of another kind.
    """
    fraction("target", target, one=False)
    fraction("step", step, one=False)
    fraction("highest", highest, one=False)
    if not isinstance(error, str) or error not in ERRORS:
        raise unknown("error", error, ERRORS)
    if target > highest:
        raise refuse("target", target, f"at most highest = {highest}, which no site exceeds")
    if installed_on(model) is not None:
        raise SparsityError("An allocation of a sparse model was asked for. Fix: uninstall(model) first.")
    if any(rule.site in (GATE, HEAD_IN) or rule.repair for rule in recipe.rules) or recipe.allocation is not None:
        raise SparsityError(
            f"{recipe.method!r} has a gate or head site, a repair or an allocation. "
            "Fix: rules at inputs of the blocks' layers, without these."
        )
    stream, text = calibration_stream(tokenizer, ids, batches, tokens, length, source, seed, batch_size)
    sites = find_sites(model)
    jobs = [Fitting(rule, site) for rule, site in recipe.placed(sites)]
    for job in jobs:
        job.rule.check(job.site)
    found = []
    with Blocks(model, stream, sites) as blocks:
        for layer in track(range(sites.layers), desc="allocating blocks", unit="block"):
            own = [job for job in jobs if job.site.layer == layer]
            found.append(_Search(blocks, own, recipe, sites, step, highest, error).run(target))
            if layer + 1 < sites.layers:
                blocks.advance()
    recipe = dataclasses.replace(recipe, method=f"{recipe.method}_greedy")
    shares = torch.tensor([shares for shares, _, _ in found], dtype=torch.float64)
    levels, errors = (torch.nn.utils.rnn.pad_sequence([torch.tensor(one[i], dtype=torch.float64) for one in found],
                                                      batch_first=True, padding_value=math.nan) for i in (1, 2))
    return Path(recipe, shares, levels, errors, {"step": step, "highest": highest, "error": error, "text": text})


def output_error(found: Sequence[Tensor], dense: Sequence[Tensor], kind: str) -> float:
    """The error of a name in `ERRORS`, over batches of outputs [..., tokens, outputs]."""
    square: Any = 0.0
    for own, base in zip(found, dense, strict=True):
        apart = (own - base).double().square()
        if kind == "all":
            square += float(apart.sum())
        elif kind == "outputs":
            square = square + apart.flatten(0, -2).sum(0)
        else:
            size = base.double().square().sum(-1).clamp_min(1e-300)
            square += float((apart.sum(-1) / size).sqrt().sum())
    if kind == "tokens":
        return square / sum(base[..., 0].numel() for base in dense)
    return math.sqrt(square) if kind == "all" else float(square.sqrt().mean())


def weight_shares(sites: SiteMap, layer: int, kinds: Sequence[str]) -> list[float]:
    """Share of one block's weights (its linear layers that read any of these sites) behind each kind of site."""
    linears = {linear.name: linear.weights for linear in sites.linears}
    found = {kind: sites.sites.get((layer, kind)) for kind in kinds}
    weights = [0 if site is None else sum(linears[reader] for reader in site.column_readers) for site in found.values()]
    return [weight / sum(weights) for weight in weights]


class _Search:
    """The greedy loop in one block."""

    def __init__(
        self, blocks: Blocks, jobs: list[Fitting], recipe: Recipe, sites: SiteMap, step: float, highest: float, error: str
    ) -> None:
        self.blocks, self.step, self.highest, self.error = blocks, step, highest, error
        kinds = [rule.site for rule in recipe.rules]
        self.shares = weight_shares(sites, blocks.layer, kinds)
        self.dense = blocks.outputs()
        for number in range(2):  # transform and score; the selection is fitted anew for every level
            fit_step(blocks, jobs, number)
        collectors = collect(blocks, jobs, 2)
        self.groups: list[_Group | None] = [None] * len(kinds)
        for job, collector in zip(jobs, collectors, strict=True):
            self.groups[kinds.index(job.site.kind)] = _Group(job, collector, recipe.token_share, blocks.device)

    def run(self, target: float) -> tuple[list[float], list[list[float]], list[list[float]]]:
        """Shares, levels after each step (the first: none), and errors of each step's candidates."""
        model = self.blocks.model
        present = sorted((g for g in self.groups if g is not None), key=lambda g: KINDS.index(g.site.kind))
        handles = [attach(model, group.site, group.sparsifier) for group in present]
        levels, errors = [[0.0] * len(self.groups)], []
        try:
            while sum(w * level for w, level in zip(self.shares, levels[-1], strict=True)) < target - 1e-9:
                errors.append([self._error(i, levels[-1]) for i in range(len(self.groups))])
                best = min((e, i) for i, e in enumerate(errors[-1]) if not math.isnan(e))[1]
                levels.append([self._next(i, level) if i == best else level for i, level in enumerate(levels[-1])])
                self.groups[best].set(levels[-1][best])
        finally:
            for handle in handles:
                handle.remove()
        return self.shares, levels, errors

    def _next(self, number: int, level: float) -> float:
        return min(level + self.step / self.shares[number], self.highest)

    def _error(self, number: int, levels: list[float]) -> float:
        """How far the block's output moves if this group takes its next step, NaN where it has none."""
        group, level = self.groups[number], levels[number]
        if group is None or level >= self.highest - 1e-9:
            return math.nan
        group.set(self._next(number, level))
        error = output_error(self.blocks.outputs(), self.dense, self.error)
        group.set(level)
        return error


class _Group:
    """One site whose sparsity can be set."""

    def __init__(self, job: Fitting, collector: Collector | None, token_share: float, device: torch.device) -> None:
        self.job, self.collector = job, collector
        self.site: Site = job.site
        self.sparsifier = Sparsifier(job.rule, job.site, token_share, device)
        self.sparsifier.fill(job.tensors)
        self.sparsifier.enabled = False

    def set(self, sparsity: float) -> None:
        self.sparsifier.enabled = sparsity > 0
        if sparsity > 0:
            rule = self.job.rule.with_density(1 - sparsity)
            self.sparsifier.rule = rule
            self.sparsifier.fill(rule.select.fit(self.collector, self.site))
