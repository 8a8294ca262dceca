"""What the N:M experiments share: points in plain data, and what each does to a model while it is measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

from sparsity_lib.accounting import account
from sparsity_lib.errors import refuse, unknown
from sparsity_lib.evaluate.quality import Change
from sparsity_lib.experiments import common
from sparsity_lib.experiments.scap_common import shares
from sparsity_lib.fit import fit_many
from sparsity_lib.install import installed
from sparsity_lib.methods.nm import nm, unstructured
from sparsity_lib.parts.nm import NofM, pattern_of
from sparsity_lib.parts.select import TopK
from sparsity_lib.plan import Plan
from sparsity_lib.recipe import Recipe
from sparsity_lib.sweep import kept_open
from sparsity_lib.train.repairs import RepairRecipe, train_repairs
from sparsity_lib.weights import WeightPruning, prune_weights, pruned_weights

#: The patterns of the study, and what they are measured against: half of a token's inputs, wherever they lie.
PATTERNS = ("2:4", "4:8", "8:16", "16:32")
UNSTRUCTURED = "50%"
#: Learned repairs: the paper takes 256 sequences of 512 tokens; this is an eighth of them.
REPAIRS = {"sequences": 64, "length": 256, "learning_rate": 1e-3}
DTYPE = "bfloat16"

Point = Mapping[str, Any]


def point(pattern: str, *, on: str = "activations", **options: Any) -> dict[str, Any]:
    """A point in plain data: what is pruned, by which pattern ("8:16", or "50%" for a share of the whole token or row), and
    how; options are those of `methods.nm.nm`, or for weights the score."""
    if on not in ("activations", "weights"):
        raise unknown("on", on, ("activations", "weights"))
    return {"on": on, "pattern": pattern, **options}


def density(pattern: str) -> float:
    """Share that a pattern keeps."""
    if pattern.endswith("%"):
        return float(pattern[:-1]) / 100
    n, m = pattern_of(pattern)
    return n / m


def recipe_of(point: Point) -> Recipe:
    """The recipe of a point on activations."""
    if point["on"] != "activations":
        raise refuse("on", point["on"], "activations, where a recipe is wanted")
    options = {key: value for key, value in point.items() if key not in ("on", "pattern")}
    pattern = point["pattern"]
    return unstructured(density(pattern), **options) if pattern.endswith("%") else nm(*pattern_of(pattern), **options)


def pruning_of(point: Point) -> WeightPruning:
    """Which weights a point on weights keeps."""
    pattern = point["pattern"]
    select = TopK(density(pattern)) if pattern.endswith("%") else NofM(*pattern_of(pattern))
    return WeightPruning(select, point["score"])


def learned(point: Point) -> bool:
    """Whether a point has something to be trained."""
    return point.get("transform") == "lpts" or "ls" in point.get("repair", ())


class Bench:
    """A model fitted in float32 and run in bfloat16, under one point after another."""

    def __init__(self, name: str, text: Mapping[str, int]) -> None:
        from sparsity_lib.assets.models import load_model

        self.fitted, self.tokenizer = load_model(name)
        self.model, _ = load_model(name, dtype=common.dtype_named(DTYPE))
        self.ids = common.evaluation_ids(self.tokenizer, **text)
        self.more: dict[int, dict[str, Any]] = {}

    def changes(self, points: Sequence[Point]) -> list[Plan | Change]:
        """What `evaluate` takes, for every point; plans are fitted together, learned repairs trained one by one."""
        self.more = {}  # another item's points had other places
        places = [i for i, p in enumerate(points) if p["on"] == "activations"]
        recipes = [recipe_of(points[i]) for i in places]
        fitted = fit_many(recipes, self.fitted, self.tokenizer, **common.CALIBRATION) if places else []
        plans = dict(zip(places, fitted, strict=True))
        for i, plan in plans.items():
            if learned(points[i]):
                made = train_repairs(self.fitted, plan, self.tokenizer, recipe=RepairRecipe(**REPAIRS))
                plans[i] = made.plan
                self.more[i] = {"before": made.before, "after": made.after}
        return [plans[i] if i in plans else self._pruned(p) for i, p in enumerate(points)]

    def _pruned(self, point: Point) -> Change:
        """Statistics of the float32 model would need its weights twice: those of the model that runs are as good."""
        return partial(pruned_weights, self.model, pruning_of(point), self.tokenizer, **common.CALIBRATION)

    def within(self, change: Plan | Change) -> AbstractContextManager:
        """The context in which the running model is changed."""
        return change() if callable(change) else installed(self.model, change)

    def shares(self, point: Point, change: Plan | Change) -> dict[str, Any]:
        """What a point leaves out of all weights read, and by kind of site where it prunes activations."""
        if callable(change):
            pruned = prune_weights(self.model, pruning_of(point), self.tokenizer, **common.CALIBRATION)
            try:
                return {"skipped": pruned.skipped}
            finally:
                pruned.restore()
        with installed(self.model, change):
            return shares(account(self.model, ids=self.ids[:4]))


@kept_open
def bench_for(name: str, text: Mapping[str, int]) -> Bench:
    """The one bench that is kept open."""
    return Bench(name, text)
