"""Rows, fronts and verdicts of the SCAP chapter: its grid and tasks beside CATS, and the speed of the pair it compares."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import geometric_mean
from typing import Any

import numpy as np

from sparsity_lib import results
from sparsity_lib.assets.smallnets import SMALL
from sparsity_lib.bench.timing import by_length
from sparsity_lib.evaluate.benchmarks import BenchmarkResult
from sparsity_lib.evaluate.bootstrap import Interval, ratio_interval
from sparsity_lib.evaluate.quality import Quality
from sparsity_lib.experiments.claws_report import cell, label, perplexity, points, short
from sparsity_lib.experiments.common import MODELS
from sparsity_lib.experiments.scap_common import ffn_target
from sparsity_lib.experiments.scap_slips import FASTER, Speed, printed_speed
from sparsity_lib.pareto import front, front_gap, sparsity_gain
from sparsity_lib.report import Number
from sparsity_lib.verdicts import Verdict, effect

Point = Mapping[str, Any]
#: Models and networks, places and centres as the book names them, one after the other.
ORDER = (MODELS[0], "smollm2 int8", *MODELS[1:], "minilm-l6", *SMALL, "qkv_in", "o_in", "up_in", "before", "down_in",
         "none", "mean", "median", "mode")


def arranged(data: Mapping[str, Any], first: Sequence[str]) -> dict[str, Any]:
    """The same entries, those named in `first` in that order and before the others: kept results are sorted by name."""
    return {name: data[name] for name in (*(n for n in first if n in data), *(n for n in data if n not in first))}


def stored(name: str) -> results.Result:
    """A kept result with models and networks in the order of the book, at every depth."""
    found = results.load(name)
    return found._replace(data=_in_order(found.data))


def _in_order(value: Any) -> Any:
    return {k: _in_order(v) for k, v in arranged(value, ORDER).items()} if isinstance(value, dict) else value


def of_method(found: Mapping[str, Any], method: str) -> list[Point]:
    """The points of one method, by rising FFN sparsity."""
    return sorted((p for p in found["points"] if p["method"] == method), key=lambda p: p["ffn"])


@dataclass(frozen=True)
class Curve:
    """One method's points: FFN sparsity [points], summed KL [points, sequences], predicted tokens [sequences]."""

    ffn: np.ndarray
    kl: np.ndarray
    tokens: np.ndarray

    @staticmethod
    def of(found: Sequence[Point]) -> Curve:
        return Curve(np.array([p["ffn"] for p in found]), np.array([p["quality"]["kl"] for p in found], dtype=float),
                     np.array(found[0]["quality"]["tokens"], dtype=float))

    def mean(self) -> np.ndarray:
        """KL in nats per token, [points]."""
        return self.kl.sum(1) / self.tokens.sum()


def on_front(found: Sequence[Point]) -> list[Point]:
    """Those of one method's points that none of its others beats in both FFN sparsity and KL."""
    curve = Curve.of(found)
    return [found[i] for i in front(curve.ffn, -curve.mean())]


def quality(point: Point) -> Quality:
    """The stored sums of a point."""
    return Quality.from_json(point["quality"])


def named(point: Point) -> str:
    """A point in words: the paper's target sparsities."""
    if point["method"] == "cats":
        return f"{label('cats')} {100 * point['gate']:.0f}%"
    return f"{label('scap')} {100 * point['up']:.0f}/{100 * point['down']:.0f}%"


def grid_rows(data: Mapping[str, Any], every: bool = False) -> list[list[Any]]:
    """Model, point, what is met at up, down, in the FFN, of all weights (%), perplexity, KL; fronts only, or `every` point."""
    rows = []
    for model, found in data.items():
        dense = Quality.from_json(found["dense"])
        rows.append([short(model), label("dense"), None, None, Number(0.0, ".1f"), Number(0.0, ".1f"), perplexity(dense), None])
        for method in ("cats", "scap"):
            chosen = of_method(found, method)
            for point in chosen if every else on_front(chosen):
                kinds = ("gate", "gate") if method == "cats" else ("up_in", "down_in")
                met = (*(point["sites"][kind] for kind in kinds), point["ffn"], point["skipped"])
                rows.append([short(model), named(point), *(Number(100 * share, ".1f") for share in met),
                             perplexity(quality(point)), cell(quality(point).divergence(), ".3f")])
    return rows


def fronts(data: Mapping[str, Any]) -> dict[str, dict[str, list[tuple[float, Interval]]]]:
    """model -> method -> [(FFN sparsity, KL)] along its front: what `figures.scap.fronts` draws."""
    return {
        model: {m: [(p["ffn"], quality(p).divergence()) for p in on_front(of_method(found, m))] for m in ("cats", "scap")}
        for model, found in data.items()
    }


def gap_rows(data: Mapping[str, Any], slack: float = 0.01) -> list[list[Any]]:
    """For every CATS point: model, its FFN sparsity (%), its KL, SCAP's least KL there minus it, and how much sparser SCAP goes
    at that KL (points). SCAP's point may be `slack` less sparse, as actual sparsities miss their targets by that much."""
    rows = []
    for model, found in data.items():
        scap, cats = Curve.of(of_method(found, "scap")), of_method(found, "cats")
        for point in cats:
            own = np.array(point["quality"]["kl"], dtype=float)
            if point["ffn"] > scap.ffn.max() + slack:
                continue
            gap = front_gap(scap.ffn, scap.kl, scap.tokens, own, point["ffn"], slack=slack)
            gain = sparsity_gain(scap.ffn, scap.kl, scap.tokens, own, point["ffn"])
            rows.append([short(model), named(point), Number(100 * point["ffn"], ".1f"),
                         cell(quality(point).divergence(), ".3f"), cell(gap, "+z.3f"), in_points(gain)])
    return rows


def in_points(found: Interval, fmt: str = "+z.1f") -> Number:
    """An interval of shares as a cell in percentage points."""
    return Number(100 * found.value, fmt, 100 * found.low, 100 * found.high, rtol=0.05, atol=0.2)


def task_rows(data: Mapping[str, Any], group: str) -> list[list[Any]]:
    """Model, point, FFN sparsity while the tasks ran (%), score, standard error, change relative to dense (%, the dense score
    as the denominator), and the paired difference to CATS at the same target FFN sparsity in points."""
    rows = []
    for model, stored in data.items():
        results = [BenchmarkResult.from_dict(found["result"]) for found in stored]
        dense = next(r for r, found in zip(results, stored, strict=True) if found["point"] is None)
        for result, found in zip(results, stored, strict=True):
            score, point = result.score(group), found["point"]
            row = [short(model), label("dense") if point is None else named(point),
                   Number(0.0 if point is None else 100 * found["shares"]["ffn"], ".1f"), 100 * score.mean, 100 * score.stderr]
            if point is None:
                rows.append([*row, None, None])
                continue
            lost, base = points(result, dense, group), 100 * dense.score(group).mean
            value, low, high = (100 * x / base for x in (lost.value, lost.low, lost.high))
            relative = Number(value, "+z.1f", low, high, rtol=0.05, atol=0.3)
            pair = partner(point, stored) if point["method"] == "scap" else None
            rows.append([*row, relative, None if pair is None else points(result, results[pair], group)])
    return rows


def partner(point: Point, stored: Sequence[Mapping[str, Any]]) -> int | None:
    """Where in `stored` CATS is meant to skip as much of the FFN as `point`, or None."""
    for place, found in enumerate(stored):
        other = found["point"]
        if other is not None and other["method"] == "cats" and abs(ffn_target(other) - ffn_target(point)) < 0.005:
            return place
    return None


def speeds(decode: Mapping[str, Any]) -> dict[str, Speed]:
    """Model -> times as fast as our dense decoder with CATS' and with SCAP's setting, geometric means over prompts."""
    return {
        model: Speed(*(geometric_mean(p["ratio"] for p in found[s]["prompts"].values()) for s in ("cats", "scap")))
        for model, found in decode.items()
    }


def decode_rows(decode: Mapping[str, Any]) -> list[list[Any]]:
    """Model, method, percent faster than dense after each prompt, what the bytes allow after the shortest and after the longest
    one, in percent; the paper first."""
    rows = [["Mistral-7B, the paper", name, *(Number(v, ".1f") for v in FASTER[name].values()), None, None] for name in FASTER]
    for model, found in decode.items():
        for setting in ("cats", "scap"):
            each = list(by_length(found[setting]["prompts"]).values())
            allowed = [Number(100 * (p["bytes"]["dense"] / p["bytes"]["sparse"] - 1), ".1f") for p in (each[0], each[-1])]
            faster = [Number(100 * (p["ratio"] - 1), ".1f", rtol=0.05, atol=3) for p in each]
            rows.append([short(model), label(setting), *faster, *allowed])
    return rows


def verdict_front(data: Mapping[str, Any], model: str) -> Verdict:
    """S1 by KL: how much sparser SCAP's front goes at the KL of CATS at half of the neurons."""
    scap = Curve.of(of_method(data[model], "scap"))
    point = next(p for p in of_method(data[model], "cats") if p["gate"] == 0.5)
    gain = sparsity_gain(scap.ffn, scap.kl, scap.tokens, np.array(point["quality"]["kl"], dtype=float), point["ffn"])
    return effect(
        f"S1, {short(model)}", "at equal quality 48.5% of the FFN skipped against CATS' 33.3%",
        "points of FFN sparsity that SCAP goes beyond CATS (33% of the FFN) at its KL to the dense model",
        number=100 * gain.value, low=100 * gain.low, high=100 * gain.high, published=15.2)


def verdict_tasks(data: Mapping[str, Any], model: str, group: str, ffn: float = 0.467) -> Verdict:
    """S1 by tasks: SCAP minus CATS at an equal share of the FFN, in points of the seven tasks' mean."""
    stored = data[model]
    place = next(i for i, f in enumerate(stored)
                 if f["point"] and f["point"]["method"] == "scap" and abs(ffn_target(f["point"]) - ffn) < 0.005)
    own, other = (BenchmarkResult.from_dict(stored[i]["result"]) for i in (place, partner(stored[place]["point"], stored)))
    number = points(own, other, group)
    return effect(
        f"S1, {short(model)}, seven tasks", "74.2 against 72.5 with 48.5% and 46.7% of the FFN skipped (Mistral-7B)",
        f"mean of seven tasks in points, SCAP minus CATS, both meant to skip {ffn:.1%} of the FFN",
        number=number.value, low=number.low, high=number.high, published=1.7)


def verdict_groups(data: Mapping[str, Any], model: str, sparsity: float = 0.5) -> Verdict:
    """S4: KL with a share of up's inputs dropped over KL with that share of down's dropped, each alone."""
    grid = {(p["up"], p["down"]): np.array(p["quality"]["kl"]) for p in of_method(data[model], "scap")}
    found = ratio_interval(grid[sparsity, 0.0], grid[0.0, sparsity])
    return effect(
        f"S4, {short(model)}", "down's inputs are more prunable than up's: ten points more of up's cost 3.4 points of score, of "
        "down's 1.2 (table 5)",
        f"KL with {sparsity:.0%} of up's inputs dropped over KL with {sparsity:.0%} of down's dropped",
        number=found.value, low=found.low, high=found.high, published=3.4 / 1.2, null=1.0)


def verdict_decode(decode: Mapping[str, Any], model: str) -> Verdict:
    """S2: how many times as fast SCAP's setting decodes as CATS', as a ratio of speeds."""
    ratios = [decode[model]["scap"]["prompts"][n]["ratio"] / p["ratio"] for n, p in decode[model]["cats"]["prompts"].items()]
    return effect(
        f"S2, {short(model)}", "27.1% faster than dense against CATS' 17.7%, called 1.5 times; as a ratio of speeds 1.08",
        "our decoder with SCAP's 47% of the FFN skipped over the same with CATS' 33%, range over prompts",
        number=geometric_mean(ratios), low=min(ratios), high=max(ratios), published=round(printed_speed().of_speeds, 3), null=1.0)


def verdict_length(decode: Mapping[str, Any], model: str) -> Verdict:
    """S2, second part: speed over dense after the longest prompt over that after the shortest, both methods."""
    ratios = []
    for setting in ("cats", "scap"):
        each = [p["ratio"] for p in by_length(decode[model][setting]["prompts"]).values()]
        ratios.append(each[-1] / each[0])
    published = geometric_mean((1 + FASTER[m][2048] / 100) / (1 + FASTER[m][256] / 100) for m in FASTER)
    return effect(
        f"S2, prompts, {short(model)}", "gains shrink with the prompt: 30.4 to 25.5% and 19.9 to 16.4% from 256 to 2048 tokens",
        "speed over dense after 2048 tokens over that after 256, range over both methods",
        number=geometric_mean(ratios), low=min(ratios), high=max(ratios), published=published, null=1.0)


def verdict_kernel(decode: Mapping[str, Any], model: str) -> Verdict:
    """S7: share of what the bytes allow that SCAP's setting reaches, over that of CATS'."""
    reached = []
    for setting in ("cats", "scap"):
        each = by_length(decode[model][setting]["prompts"]).values()
        reached.append([p["ratio"] * p["bytes"]["sparse"] / p["bytes"]["dense"] for p in each])
    ratios = [scap / cats for cats, scap in zip(*reached, strict=True)]
    return effect(
        f"S7, {short(model)}", "at equal FFN sparsity its SwiGLU is as fast as CATS' or marginally faster",
        "speed reached over speed that the bytes allow, SCAP's setting over CATS'; 0.95 or more counts as as fast",
        number=geometric_mean(ratios), low=min(ratios), high=max(ratios), published=1.0, null=0.95)
