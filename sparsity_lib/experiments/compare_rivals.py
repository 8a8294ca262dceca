"""Rivals of the search's recipe: published methods put side by side, a share each, without its one budget; and its neighbours.

At the head SVD-softmax's two readings on rotated inputs, in the blocks one of the papers' methods. How many of the head's inputs
the first reading keeps is tried on calibration text, anew for every model, method and share.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from math import inf
from typing import Any

from sparsity_lib.accounting import weights_per_token
from sparsity_lib.errors import SparsityError
from sparsity_lib.evaluate.quality import evaluate
from sparsity_lib.experiments import common, compare_search
from sparsity_lib.experiments.compare_common import DTYPE, GREEDY, SEARCH, Bench, Point, bench_for
from sparsity_lib.experiments.compare_quality import measured
from sparsity_lib.experiments.compare_search import COSTS, HEAD_EVERY, JUDGED, JUDGED_EVERY
from sparsity_lib.experiments.scap_grid import EVERY, TEXT
from sparsity_lib.fit import fit
from sparsity_lib.methods import METHODS
from sparsity_lib.methods.head import head_rule
from sparsity_lib.methods.larosa import density_for_share
from sparsity_lib.methods.spread import REFINE
from sparsity_lib.parts.transforms import Rotate
from sparsity_lib.plan import Plan
from sparsity_lib.recipe import Recipe, Rule
from sparsity_lib.sites import find_sites

#: Thresholds meet a share within a few hundredths, so the shares that are compared lie between others.
SHARES = (0.3, 0.4, 0.5, 0.6, 0.7)
#: In the blocks: nothing, so that the head has to save all; and the best of the papers' methods.
BLOCKS = ("dense", "teal", "wina", "inputs_topk", GREEDY)
#: Share of the head's inputs that its first reading keeps.
PREVIEWS = (1 / 16, 1 / 8, 1 / 4)
#: Heads read once, which `compare_quality` has for TEAL, WINA and LaRoSA.
READ_ONCE = ("inputs_topk", GREEDY)
#: Shares of the vocabulary on either side of what the search had; on calibration text, beside its own.
WORDS = (0.01, REFINE, 0.04)


def run(checkpoint) -> tuple[Any, dict, list[int]]:
    """Items a model: a rival at all shares; the recipe without both of its main parts; its neighbours. After the search."""
    best = compare_search.current()
    wanted: list[tuple[dict[str, Any], Callable[[dict], Any]]] = []
    for name in common.MODELS:
        shared = {"model": name, "shares": SHARES, "text": TEXT, "every": EVERY[name], "dtype": DTYPE,
                  "calibration": common.CALIBRATION}
        for method, again in [*((m, True) for m in BLOCKS), *((m, False) for m in READ_ONCE)]:
            wanted.append(({**shared, "method": method, "again": again, **({"search": SEARCH} if method == GREEDY else {}),
                            **({"previews": PREVIEWS, "judged": JUDGED, "judged_every": JUDGED_EVERY[name]} if again else {})},
                           rival))
        plain = {**shared, "shares": compare_search.SHARES, "candidate": neither(best), "costs": COSTS,
                 "head_every": HEAD_EVERY[name]}
        around = {"model": name, "candidates": [{**best, "refine": words} for words in WORDS], "shares": compare_search.SHARES,
                  "fitted": compare_search.FITTED, "costs": COSTS, "judged": JUDGED, "head_every": HEAD_EVERY[name],
                  "every": JUDGED_EVERY[name], "dtype": DTYPE}
        wanted += [(plain, compare_search.held_out), (around, words_around)]
    items = checkpoint.items([(params, partial(compute, params)) for params, compute in wanted])
    data: dict[str, Any] = {}
    for (params, compute), found in zip(wanted, items, strict=True):
        own = data.setdefault(params["model"], {"methods": {}})
        if compute is rival:
            own["methods"][f"{params['method']}_{'again' if params['again'] else 'head'}"] = found["points"]
            own.update(dense=found["dense"], ids=found["ids"])
        elif compute is words_around:
            own["words"] = found
        else:
            own["neither"] = found["points"]
    return data, {"blocks": BLOCKS, "read_once": READ_ONCE, "previews": PREVIEWS, "shares": SHARES, "words": WORDS,
                  "judged": JUDGED, "text": TEXT, "every": EVERY, "dtype": DTYPE, "calibration": common.CALIBRATION,
                  "candidate": best}, [0, 5, 9]


def neither(best: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe with neither its second reading nor its shared budget."""
    return {**{key: value for key, value in best.items() if key != "refine"}, "head": "inputs", "allocation": "uniform"}


def words_around(params: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The recipe with other shares of the vocabulary read in full, judged as the search judges: a fit for each."""
    return [row for each in params["candidates"] for row in compare_search.search({**params, "candidates": [each]})]


def rival(params: Mapping[str, Any]) -> dict[str, Any]:
    """One method in the blocks with a head that is read twice, or once, at every share on evaluation text."""
    bench = bench_for(params["model"], params["text"])
    if params["method"] == "dense":
        points = alone(bench, params["shares"], params["calibration"])
    else:
        points = beside(bench, params["method"], params["shares"], params.get("previews", (None,)), params["calibration"])
    return measured(bench, kept(bench, points, params), params["every"])


def head_of(preview: float | None, density: float) -> Rule:
    """The head's rule: read twice; or once, by size and at a density like the blocks'."""
    return head_rule(density) if preview is None else head_rule(preview, transform=Rotate(), refine=REFINE)


def alone(bench: Bench, shares: Sequence[float], calibration: Mapping[str, Any]) -> list[Point]:
    """Dense blocks: the first reading keeps as much as leaves the share unread."""
    def make(density: float) -> Recipe:
        return Recipe("head read twice", (head_of(density, density),))

    fitted = fit(make(0.5), bench.fitted, bench.tokenizer, **calibration)
    points = []
    for share in shares:
        try:
            recipe = make(density_for_share(make, bench.model, share, transforms=True))
            points.append(Point(share, replace(fitted, recipe=recipe), {"recipe": recipe.to_json()}))
        except SparsityError as error:
            points.append(Point(share, None, {"reason": str(error)}))
    return points


def beside(
    bench: Bench, method: str, shares: Sequence[float], previews: Sequence[float | None], calibration: Mapping[str, Any]
) -> list[Point]:
    """Points of every preview at every share: the blocks skip what the head leaves to be skipped."""
    sites, total = find_sites(bench.model), weights_per_token(bench.model)
    blocks, head = (METHODS["teal"](0.5).skipped(sites, total), Recipe("head", (head_of(None, 0.5),)).skipped(sites, total))
    wanted: list[tuple[float, float, Rule]] = []  # share of all, what of it the blocks skip, the head's rule
    for preview in previews:
        for share in shares:
            rule = head_of(preview, max(0.005, 1 - share / (2 * (blocks + head))))
            left = share - Recipe("head", (rule,)).skipped(sites, total, transforms=True)
            if left > 0:  # else this head by itself skips more
                wanted.append((share, left, rule))
    fitted = fit(Recipe("head", (wanted[0][2],)), bench.fitted, bench.tokenizer, **calibration)
    points = bench.points(method, [left for _, left, _ in wanted], calibration=calibration)
    found = []
    for (share, _, rule), point in zip(wanted, points, strict=True):
        plan = point.change and joined(point.change, fitted, rule)
        found.append(Point(share, plan, {"recipe": plan.recipe.to_json()} if plan else point.about))
    return found


def joined(blocks: Plan, head: Plan, rule: Rule) -> Plan:
    """A plan with the head's rule as well; whatever density it has, its statistics are the same."""
    recipe = replace(blocks.recipe, method=f"{blocks.recipe.method}, head", rules=(*blocks.recipe.rules, rule))
    return Plan(recipe, {**blocks.tensors, **head.tensors}, {**blocks.widths, **head.widths}, blocks.calibration)


def kept(bench: Bench, points: Sequence[Point], params: Mapping[str, Any]) -> list[Point]:
    """One point a share: where there are several, the one with the least KL on calibration text."""
    from sparsity_lib.assets.texts import token_sequences

    possible = {str(i): point.change for i, point in enumerate(points) if point.change is not None}
    kls: dict[int, float] = {}
    if len(points) > len(params["shares"]):
        ids = token_sequences(bench.tokenizer, "calibration", **params["judged"])
        found = evaluate(bench.model, possible, ids, every=params["judged_every"])
        kls = {int(i): found[i].divergence().value for i in possible}
    best = []
    for share in params["shares"]:
        own = [i for i, point in enumerate(points) if point.share == share]
        if own:
            best.append(points[min(own, key=lambda i: (kls.get(i, inf), i))])
        else:
            best.append(Point(share, None, {"reason": "The head by itself skips more, with every preview that was tried."}))
    return best
