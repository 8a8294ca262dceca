"""What the comparison's experiments share: every method by name at a share of all weights, and one bench for all of them.

What a rotation reads for every token counts as read here: its budget buys as many weights as any other method's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor, nn

from sparsity_lib.accounting import Account, account, weights_per_token
from sparsity_lib.errors import SparsityError, unknown
from sparsity_lib.evaluate.quality import Change
from sparsity_lib.experiments import common
from sparsity_lib.experiments.scap_common import shares as counted_shares
from sparsity_lib.fit import calibration_stream, fit_many
from sparsity_lib.install import installed
from sparsity_lib.methods import METHODS, teal_greedy, with_head
from sparsity_lib.methods.larosa import density_for_share
from sparsity_lib.overheads import overheads
from sparsity_lib.parts.select import TopK
from sparsity_lib.passes import Text
from sparsity_lib.plan import Plan
from sparsity_lib.recipe import Recipe
from sparsity_lib.sites import SiteMap, find_sites
from sparsity_lib.sweep import kept_open
from sparsity_lib.weights import WeightPruning, input_rms, pruned_weights

#: Methods whose masks are taken at the gate, at the inputs of linears, at these and the head; what prunes weights.
GATE_SIDE = ("cats", "claws", "gaussian", "griffin", "oracle", "random")
INPUT_SIDE = ("scap", "teal", "inputs_topk", "gaussian_inputs", "larosa", "wina", "rsparse", "nm")
WITH_HEAD = ("teal_head", "wina_head", "larosa_head")
WEIGHTS = ("magnitude", "wanda")
GREEDY = "teal_greedy"
#: No methods, but what methods lie between.
BOUNDS = ("oracle", "random")
#: Those whose share follows no density: it is found by counting on some calibration text.
BY_COUNTING = ("gaussian", "gaussian_inputs")
EVERY_METHOD = (*GATE_SIDE, *INPUT_SIDE, GREEDY, *WITH_HEAD, *WEIGHTS)
#: Text of the greedy search, which runs each block some sixty times on all of it.
SEARCH = {"tokens": 512, "length": 256}
DTYPE = "bfloat16"

Make = Callable[[float], Recipe]


class Point(NamedTuple):
    """One method at one share: what is done to a model, and in plain data what that is; or why it cannot be."""

    share: float
    change: Plan | Change | None
    about: dict[str, Any]


def maker(method: str, **options: Any) -> Make:
    """The recipe of a method by density."""
    if method in WITH_HEAD:
        plain = METHODS[method.removesuffix("_head")]
        return lambda density: with_head(plain(density, **options))
    if method not in METHODS:
        raise unknown("method", method, (*METHODS, *WITH_HEAD))
    return partial(METHODS[method], **options)


def density_at(method: str, share: float, model: nn.Module, ids: Tensor, **options: Any) -> float:
    """The density at which a method leaves `share` of all weights unread, its dense tokens counted.

    ids: some calibration text, for those whose share has to be counted.

    Raises
    ------
    SparsityError
        If no density skips that much.
    """
    make = maker(method, **options)
    share = share / make(0.5).token_share
    if method not in BY_COUNTING:
        return density_for_share(make, model, share, transforms=True)
    low, high = 0.005, 1.0

    def found(density: float) -> float:
        plan = Plan(make(density), {}, _widths(make(density), model))
        with installed(model, plan):
            return account(model, ids=ids).skipped

    if found(low) < share:
        raise SparsityError(f"A share of {share:.3f} of all weights cannot be skipped by this method on this model.")
    for _ in range(7):
        middle = (low + high) / 2
        low, high = (middle, high) if found(middle) > share else (low, middle)
    return (low + high) / 2


def _widths(recipe: Recipe, model: nn.Module) -> dict[str, int]:
    return Plan.empty(recipe, model).widths


class Bench(common.Opened):
    """A model fitted in float32 and run in bfloat16, on one evaluation text."""

    def __init__(self, name: str, text: Mapping[str, int]) -> None:
        super().__init__(name, DTYPE)
        self.name = name
        self.ids = common.evaluation_ids(self.tokenizer, **text)

    def counting_ids(self) -> Tensor:
        """A little calibration text, for shares that have to be counted."""
        from sparsity_lib.assets.texts import token_sequences

        return token_sequences(self.tokenizer, "calibration", tokens=256, length=256, seed=1)

    def points(self, method: str, shares: Sequence[float], **options: Any) -> list[Point]:
        """A method at every share, fitted in shared passes."""
        calibration = {**common.CALIBRATION, **options.pop("calibration", {})}
        if method in WEIGHTS:
            return [self._pruned(method, share, calibration) for share in shares]
        if method == GREEDY:
            return self._greedy(shares, calibration)
        found: list[tuple[float, Recipe | str]] = []
        ids = self.counting_ids()
        for share in shares:
            try:
                found.append((share, maker(method, **options)(density_at(method, share, self.model, ids, **options))))
            except SparsityError as error:
                found.append((share, str(error)))
        recipes = [recipe for _, recipe in found if isinstance(recipe, Recipe)]
        plans = fit_many(recipes, self.fitted, self.tokenizer, **calibration) if recipes else []
        return points_of(found, plans)

    def _greedy(self, shares: Sequence[float], calibration: Mapping[str, Any]) -> list[Point]:
        one = METHODS["teal"](0.5).skipped(*_sites_and_weights(self.model)) / 0.5  # what the blocks' weights are of all
        targets = {share: share / one for share in shares}
        path = teal_greedy(self.fitted, self.tokenizer, target=min(0.9, max(targets.values())), **SEARCH)
        reached = [share for share, target in targets.items() if target <= path.reached]
        found = path.plans([targets[s] for s in reached], self.fitted, self.tokenizer, **calibration)
        plans = dict(zip(reached, found, strict=True))
        return [Point(s, plans[s], {"recipe": plans[s].recipe.to_json()}) if s in plans
                else Point(s, None, {"reason": f"The search ended at a share of {one * path.reached:.3f}."}) for s in shares]

    def _pruned(self, method: str, share: float, calibration: Mapping[str, Any]) -> Point:
        sites, total = _sites_and_weights(self.model)
        sparsity = share * total / sum(linear.weights for linear in sites.linears)
        if sparsity > 0.98:
            return Point(share, None, {"reason": f"A share of {share:.3f} is more than the blocks' weights are."})
        pruning = WeightPruning(TopK(1 - sparsity), method)
        rms = self.once(["rms", dict(calibration)], lambda: self._rms(**calibration)) if method == "wanda" else None
        return Point(share, partial(pruned_weights, self.model, pruning, rms=rms), {"pruning": pruning.to_json()})

    def _rms(self, tokens: int, length: int, seed: int = 0, source: str | None = None) -> dict[str, Tensor]:
        """Wanda's statistics, of the model that runs: those of the float32 one would need its weights twice."""
        stream, _ = calibration_stream(self.tokenizer, None, None, tokens, length, source, seed, 1)
        return input_rms(Text(self.model, stream), list(find_sites(self.model).sites.values()))

    def within(self, point: Point) -> AbstractContextManager:
        """The context in which the running model is changed."""
        return point.change() if callable(point.change) else installed(self.model, point.change)

    def shares(self, point: Point) -> dict[str, Any]:
        """What a point leaves out of all weights read, and what it adds."""
        if callable(point.change):
            sites, total = _sites_and_weights(self.model)
            kept = point.change.args[1].select.kept  # the same share of every row: nothing has to be pruned to count it
            zeros = sum(linear.weights * (1 - kept(linear.inputs)) for linear in sites.linears)
            return {"skipped": zeros / total, "extra": overheads(None, self.model).to_json()}
        with installed(self.model, point.change):
            counted = account(self.model, ids=self.ids[:2])
        recipe, found = point.change.recipe, counted_shares(counted)
        return {**found, "skipped": charged(counted, recipe), "rotations_free": found["skipped"],
                "repair_weights": counted.repair_weights, "dense_weights": counted.dense_weights,
                "extra": overheads(recipe, self.model).to_json()}


def charged(counted: Account, recipe: Recipe) -> float:
    """The share skipped of all weights, less what rotations read for the tokens that are made sparse."""
    return counted.skipped - recipe.token_share * counted.transform_weights / counted.dense_weights


def _sites_and_weights(model: nn.Module) -> tuple[SiteMap, int]:
    return find_sites(model), weights_per_token(model)


def points_of(wanted: Sequence[tuple[float, Recipe | str]], plans: Iterable[Plan]) -> list[Point]:
    """Points of recipes, whose plans come in the same order, or of the reasons why there are none."""
    plans = iter(plans)
    return [Point(share, next(plans), {"recipe": recipe.to_json()}) if isinstance(recipe, Recipe)
            else Point(share, None, {"reason": recipe}) for share, recipe in wanted]


@kept_open
def bench_for(name: str, text: Mapping[str, int]) -> Bench:
    """The one bench that is kept open."""
    return Bench(name, text)
