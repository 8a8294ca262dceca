"""Rows and verdicts of the N:M chapter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sparsity_lib.evaluate.bench_result import BenchmarkResult
from sparsity_lib.evaluate.bootstrap import Interval, ratio_interval, resample
from sparsity_lib.evaluate.quality import Quality, difference
from sparsity_lib.experiments.claws_report import cell, perplexity, points, short
from sparsity_lib.experiments.nm_common import PATTERNS, UNSTRUCTURED
from sparsity_lib.report import Number
from sparsity_lib.verdicts import Verdict, effect, kept, not_testable

EVERY = (*PATTERNS, UNSTRUCTURED)
#: Words of a point's options.
WORDS = {
    "act": "|x|", "clact": "CLACT", "amber": "Amber", "wina": "|x| times column norm", "gradient": "|x| times gradient",
    "spts": "S-PTS", "dpts": "D-PTS", "lpts": "L-PTS", "var": "VAR", "ls": "LS", "low_rank": "low rank",
    "magnitude": "magnitude", "wanda": "Wanda",
}


def all_points(data: Mapping[str, Any], model: str) -> list[Mapping[str, Any]]:
    """Every point of a model, whatever its group."""
    return [p for found in data[model]["groups"].values() for p in found]


def one(data: Mapping[str, Any], model: str, pattern: str, on: str = "activations", **options: Any) -> Mapping[str, Any]:
    """The point with just these options; |x| is the score of activations where none is named."""
    if on == "activations":
        options.setdefault("score", "act")
    for point in all_points(data, model):
        own = {k: v for k, v in point.items() if k in ("score", "transform", "repair", "sites", "dense")}
        if on == "activations":
            own.setdefault("score", "act")
        if (point["on"], point["pattern"], own) == (on, pattern, options):
            return point
    raise KeyError((model, pattern, on, options))


def quality(point: Mapping[str, Any]) -> Quality:
    """The stored sums of a point."""
    return Quality.from_json(point["quality"])


def named(point: Mapping[str, Any]) -> str:
    """What is done beside the pattern."""
    words = [point[key] for key in ("score", "transform") if key in point and (key != "score" or point["score"] != "act")]
    return " + ".join(WORDS[word] for word in [*words, *point.get("repair", ())]) or "nothing"


def score_rows(data: Mapping[str, Any], scores: Sequence[str]) -> list[list[Any]]:
    """Model, pattern, weights skipped (%), perplexity by |x|, and KL by each score."""
    rows = []
    for model in data:
        for pattern in EVERY:
            plain = one(data, model, pattern)
            kls = [cell(quality(one(data, model, pattern, score=score)).divergence(), ".3f") for score in scores]
            skipped = Number(100 * plain["shares"]["skipped"], ".1f")
            rows.append([short(model), pattern, skipped, perplexity(quality(plain)), *kls])
    return rows


def repair_rows(data: Mapping[str, Any], pattern: str) -> list[list[Any]]:
    """Model, what is added to plain |x|, KL, KL less plain's (paired), perplexity; from best to worst."""
    rows = []
    for model in data:
        base = quality(one(data, model, pattern))
        found = [p for p in all_points(data, model)
                 if p["on"] == "activations" and p["pattern"] == pattern and not {"sites", "dense"} & p.keys()]
        for point in sorted(found, key=lambda p: quality(p).divergence().value):
            own = quality(point)
            gap = None if named(point) == "nothing" else cell(difference(own, base), "+z.3f", atol=0.003)
            rows.append([short(model), named(point), cell(own.divergence(), ".3f"), gap, perplexity(own)])
    return rows


def weight_rows(data: Mapping[str, Any]) -> list[list[Any]]:
    """Model, pattern; KL of activations by |x|, of weights by Wanda and by magnitude; Wanda's over the activations' (paired)."""
    rows = []
    for model in data:
        for pattern in EVERY:
            own = quality(one(data, model, pattern))
            others = [quality(one(data, model, pattern, on="weights", score=score)) for score in ("wanda", "magnitude")]
            ratio = cell(ratio_interval(others[0].kl, own.kl), ".2f")
            rows.append([short(model), pattern, *(cell(q.divergence(), ".3f") for q in (own, *others)), ratio])
    return rows


def site_rows(data: Mapping[str, Any]) -> list[list[Any]]:
    """Model, what is pruned, weights skipped (%), KL, KL per percent of all weights skipped."""
    rows = []
    for model in data:
        found = [p for p in all_points(data, model) if {"sites", "dense"} & p.keys()]
        for point in found:
            what = f"{point['sites'][0]} alone" if "sites" in point else f"all but those that read {point['dense'][0]}"
            kl, skipped = quality(point).divergence(), 100 * point["shares"]["skipped"]
            each = cell(Interval(*(v / skipped for v in (kl.value, kl.low, kl.high))), ".4f")
            rows.append([short(model), what, Number(skipped, ".1f"), cell(kl, ".3f"), each])
    return rows


def drops(data: Mapping[str, Any], model: str, coarse: str, fine: str) -> Interval:
    """KL at the coarse pattern over KL at the fine one, paired over sequences."""
    return ratio_interval(*(quality(one(data, model, p)).kl for p in (coarse, fine)))


def relative_drop(stored: Sequence[Mapping[str, Any]], place: int, task: str, group: str = "ranked") -> np.ndarray:
    """1 - score / dense score of a point, the estimate first and then its resamples, paired over documents."""
    dense, own = (BenchmarkResult.from_dict(stored[i][group][task]) for i in (0, place))
    total = np.zeros(1 + len(resample(2)))
    base = np.zeros_like(total)
    members = list(dense.tasks)
    for number, member in enumerate(members):
        metric = next(iter(dense.tasks[member].values))
        a, b = (np.asarray(r.tasks[member].values[metric]) for r in (own, dense))
        drawn = resample(len(a), seed=number)
        total += np.concatenate([[a.mean()], a[drawn].mean(1)]) / len(members)
        base += np.concatenate([[b.mean()], b[drawn].mean(1)]) / len(members)
    return 1 - total / np.maximum(base, 1e-12)


def spread(drawn: np.ndarray) -> Interval:
    """The first entry with the 95% range of the others."""
    low, high = np.quantile(drawn[1:], [0.025, 0.975])
    return Interval(float(drawn[0]), float(min(low, drawn[0])), float(max(high, drawn[0])))


def place_of(stored: Sequence[Mapping[str, Any]], wanted: Mapping[str, Any] | None) -> int:
    """Where a point is in the stored list."""
    return next(i for i, found in enumerate(stored) if found["point"] == wanted)


def task_name(point: Mapping[str, Any] | None) -> str:
    """A point of the tasks in words."""
    if point is None:
        return "dense"
    if point["on"] == "weights":
        return f"weights {point['pattern']}, {WORDS[point['score']]}"
    extra = named(point)
    return f"activations {point['pattern']}" + ("" if extra == "nothing" else f", {extra}")


def task_rows(data: Mapping[str, Any], group: str) -> list[list[Any]]:
    """Model, what is pruned; mean of the ranked tasks (%), relative drop (%), LAMBADA and TriviaQA (%) with their difference to
    the dense model in points."""
    rows = []
    for model, stored in data.items():
        dense = {task: BenchmarkResult.from_dict(r) for task, r in stored[0]["written"].items()}
        for place, found in enumerate(stored):
            mean = BenchmarkResult.from_dict(found["ranked"][group]).score(group).mean
            lost = spread(100 * relative_drop(stored, place, group))
            row = [short(model), task_name(found["point"]), Number(100 * mean, ".1f")]
            row.append(None if place == 0 else cell(lost, ".1f", atol=0.3))
            for task in ("lambada_openai", "triviaqa"):
                own = BenchmarkResult.from_dict(found["written"][task])
                gap = None if place == 0 else points(own, dense[task], task)
                row += [Number(100 * own.score(task).mean, ".1f"), gap]
            rows.append(row)
    return rows


def energy_rows(data: Mapping[str, Any], laws: Mapping[str, Mapping[str, float]]) -> list[list[Any]]:
    """Model and site; share of the square norm kept by each pattern, median over layers (%), then the laws' own rows."""
    rows = [[law, "in theory", *(Number(100 * kept[p], ".1f") for p in EVERY), None] for law, kept in laws.items()]
    for model, sites in data.items():
        for site, found in sites.items():
            shares = [Number(100 * float(np.median(found[p])), ".1f", atol=0.5) for p in EVERY]
            rows.append([short(model), site, *shares, Number(float(np.median(found["kurtosis"])), ".0f")])
    return rows


def verdict_weights(data: Mapping[str, Any], model: str, pattern: str = "8:16") -> Verdict:
    """N1 by KL: pruned weights are further from the dense model than pruned activations."""
    own, other = quality(one(data, model, pattern)), quality(one(data, model, pattern, on="weights", score="wanda"))
    found = ratio_interval(other.kl, own.kl)
    return effect(
        f"N1, {short(model)}", "pruning activations preserves generation better than pruning weights at equal sparsity",
        f"KL with {pattern} weights (Wanda) over KL with {pattern} activations (|x|); that it is larger by a tenth was set here",
        number=found.value, low=found.low, high=found.high, published=1.1, null=1.0)


def verdict_written(data: Mapping[str, Any], model: str, task: str, pattern: str = "8:16") -> Verdict:
    """N1 by what the model writes: activations minus weights, in points."""
    stored = data[model]
    own, other = (stored[place_of(stored, p)]["written"][task] for p in (
        {"on": "activations", "pattern": pattern}, {"on": "weights", "pattern": pattern, "score": "wanda"}))
    found = points(*(BenchmarkResult.from_dict(r) for r in (own, other)), task)
    return effect(
        f"N1, {short(model)}, {task}", "pruning activations preserves generation better than pruning weights at equal sparsity",
        f"{task} in points, {pattern} activations minus {pattern} weights (Wanda); one point was set here",
        number=found.value, low=found.low, high=found.high, published=1.0)


def verdict_parity(data: Mapping[str, Any], model: str, margin: float = 1.0) -> Verdict:
    """N2: 16:32 beside an unstructured half."""
    logs = [quality(one(data, model, p)) for p in (UNSTRUCTURED, "16:32")]
    gap = difference(*logs, "nll")
    value, low, high = (100 * v for v in (gap.value, gap.low, gap.high))
    return kept(
        f"N2, {short(model)}", "16:32 is nearly on par with unstructured sparsity",
        f"loss of unstructured 50% minus loss of 16:32, in hundredths of a nat per token; {margin:g} is allowed",
        number=value, low=low, high=high, margin=margin)


def verdict_ratio(data: Mapping[str, Any], model: str, fine: str, published: float) -> Verdict:
    """N2: how many times closer a finer pattern is than 2:4."""
    found = drops(data, model, "2:4", fine)
    return effect(
        f"N2, {fine}, {short(model)}", f"{fine} loses {published:g} times less than 2:4 (relative drop)",
        f"KL at 2:4 over KL at {fine}, by |x|", number=found.value, low=found.low, high=found.high, published=published, null=1.0)


def verdict_ratio_tasks(data: Mapping[str, Any], model: str, fine: str, published: float, group: str) -> Verdict:
    """The same by the paper's own measure."""
    stored = data[model]
    coarse, own = (relative_drop(stored, place_of(stored, {"on": "activations", "pattern": p}), group) for p in ("2:4", fine))
    # A difference, since a ratio of two drops near zero has no sensible interval.
    found = spread(100 * (coarse - published * own))
    return effect(
        f"N2, {fine}, {short(model)}, tasks", f"{fine} loses {published:g} times less than 2:4 (relative drop)",
        f"relative drop of the seven tasks at 2:4 minus {published:g} times that at {fine}, in percent: above zero, at least so "
        "many times less; one percent was set here",
        number=found.value, low=found.low, high=found.high, published=1.0)


def verdict_repair(data: Mapping[str, Any], model: str, pattern: str = "8:16", **options: Any) -> Verdict:
    """N4: one repair."""
    own, base = quality(one(data, model, pattern, **options)), quality(one(data, model, pattern))
    found = ratio_interval(np.subtract(own.kl, base.kl), base.kl)
    name = named({"score": "act", **options})
    return effect(
        f"N4, {name}, {short(model)}", "light repairs help",
        f"change of KL by {name} at {pattern}, in percent of the unrepaired one; a tenth less was set here",
        number=100 * found.value, low=100 * found.low, high=100 * found.high, published=-10.0)


def verdict_hardware() -> Verdict:
    """N3 needs hardware that does not exist."""
    return not_testable(
        "N3", "8:16 is the better trade of quality against cost of hardware",
        "no unit multiplies 8:16 activations yet; the picture sets quality against bits of metadata, which is a model of cost",
        "make results R=nm_quality")


def verdict_unverified(data: Mapping[str, Any], model: str, group: str) -> Verdict:
    """N6: the summary page's number, for what it is worth."""
    stored = data[model]
    found = spread(100 * relative_drop(stored, place_of(stored, {"on": "activations", "pattern": "8:16"}), group))
    return kept(
        f"N6, {short(model)}", "5.43% lost at 8:16 (a summary of the paper; no row of it could be matched)",
        "relative drop of the seven tasks at 8:16, negative, in percent; 5.43 are allowed",
        number=-found.value, low=-found.high, high=-found.low, margin=5.43)
