"""Rows and curves of the CWIC chapter: schedules, TEAL and dense networks beside them, ablations, tasks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from sparsity_lib.evaluate.bench_result import BenchmarkResult
from sparsity_lib.evaluate.bootstrap import Interval, ratio_interval
from sparsity_lib.evaluate.quality import Quality, difference
from sparsity_lib.experiments.claws_report import cell, points
from sparsity_lib.experiments.cwic_ablations import ABLATIONS, PUBLISHED
from sparsity_lib.report import Number

Run = Mapping[str, Any]
#: Ratios at which the chapter compares.
AT = (2.0, 3.0, 4.0, 5.0, 6.0)
#: How far below a ratio a run may end and still be compared there, as a share of it.
NEAR = 0.03
#: TEAL where its rule is carried on to the head: its name, and the ways there are of it, by calibration text.
HEADED = "TEAL, head included"
HEADED_WAYS = ("head", "head, training text")
#: Milestones of an ablation that lie further apart, ratio over ratio, say nothing about what is between them.
APART = 2.2


def quality(point: Mapping[str, Any]) -> Quality:
    """The stored sums of a milestone or point."""
    return Quality.from_json(point["quality"])


def pooled(found: Iterable[Quality]) -> Quality:
    """The mean over runs on the same sequences: what is left is the spread between sequences."""
    found = list(found)
    nll, kl, agree = (np.mean([getattr(q, name) for q in found], axis=0) for name in ("nll", "kl", "agree"))
    return Quality(tuple(nll), tuple(kl), tuple(agree), found[0].tokens)


def at_ratio(points: Sequence[Mapping[str, Any]], ratio: float) -> Quality | None:
    """Sums at a measured ratio, in a line between the nearest points below and above; None outside of them.

    A hundredth beyond the last point counts as that point.
    """
    known = sorted(points, key=lambda p: p["ratio"])
    if not known or ratio > known[-1]["ratio"] * 1.01 or ratio < known[0]["ratio"]:
        return None
    for low, high in zip(known, known[1:], strict=False):
        if low["ratio"] <= ratio <= high["ratio"]:
            share = (ratio - low["ratio"]) / max(high["ratio"] - low["ratio"], 1e-12)
            a, b = quality(low), quality(high)
            mixed = ([(1 - share) * x + share * y for x, y in zip(getattr(a, name), getattr(b, name), strict=True)]
                     for name in ("nll", "kl", "agree"))
            return Quality(*map(tuple, mixed), a.tokens)
    return quality(known[-1])


def curve_points(run: Run, teal: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """A run's milestones and the dense model, which is where every run starts."""
    return [{"ratio": 1.0, "quality": teal["dense"]}, *run["milestones"]]


def runs_of(data: Mapping[str, Any], loss: str) -> list[Run]:
    """The seeds of one loss's schedule on the small network."""
    return [run for name, run in sorted(data["runs"].items()) if name.startswith(f"{loss} ")]


def pooled_at(runs: Sequence[Run], teal: Mapping[str, Any], ratio: float) -> Quality | None:
    """Mean over seeds at one measured ratio; None where a seed does not reach it."""
    found = [at_ratio(curve_points(run, teal), ratio) for run in runs]
    return None if None in found or not found else pooled(found)


def near(runs: Sequence[Run], ratio: float) -> float:
    """Where runs are compared at a ratio: there, or where they end if that is at most `NEAR` of it below.

    A target is met on training text; on another text masks may keep a little more.
    """
    end = min(run["milestones"][-1]["ratio"] for run in runs)
    return min(ratio, end) if end >= (1 - NEAR) * ratio else ratio


def ways(data: Mapping[str, Any]) -> dict[str, list[Run]]:
    """Name of a way in tables -> its runs, the schedules first; of either model."""
    named = {"active": "CWIC, active parameters", "flops": "CWIC, FLOPs", "3x all": "CWIC, to 3x", "all 6x": "CWIC, to 6x",
             "thresholds 2x": "thresholds alone, to 2x", "3x thresholds": "thresholds alone, to 3x",
             "thresholds 3x": "thresholds alone, to 3x", "3x lora": "thresholds and LoRA, to 3x",
             "lora 3x": "thresholds and LoRA, to 3x"}
    found = {}
    for key, name in named.items():
        runs = runs_of(data, key) if key in ("active", "flops") else [data["runs"][key]] if key in data["runs"] else []
        if runs:
            found[name] = runs
    return found


def teal_at(data: Mapping[str, Any], ratio: float, way: str = "greedy") -> Quality | None:
    """TEAL at a measured ratio of the whole model."""
    teal = data["teal"].get(way)
    return None if teal is None else at_ratio([{"ratio": 1.0, "quality": teal["dense"]}, *teal["points"]], ratio)


def beside_head(data: Mapping[str, Any], headed: Mapping[str, Any]) -> dict[str, Any]:
    """A model's runs, and TEAL with the head as a further site (`cwic_head`: calibration text -> points) among its ways."""
    return {**data, "teal": {**data["teal"], **headed}}


def best_teal(data: Mapping[str, Any], ratio: float, of: Iterable[str] = ("uniform", "greedy")) -> Quality | None:
    """The better of both allocations, or of other ways, by its loss."""
    found = [q for q in (teal_at(data, ratio, way) for way in of) if q is not None]
    return min(found, key=lambda q: sum(q.nll)) if found else None


def headed_teal(data: Mapping[str, Any], ratio: float) -> Quality | None:
    """TEAL with the head as a further site, on the better calibration text of both."""
    return best_teal(data, ratio, HEADED_WAYS)


def dense_of(data: Mapping[str, Any]) -> Quality:
    """The dense model's sums."""
    return Quality.from_json(data["teal"]["uniform"]["dense"])


def rows(data: Mapping[str, Any], ratios: Sequence[float] = AT) -> list[list[Any]]:
    """Ratio, way, KL, loss above the dense model's, and KL less that of TEAL with the head (paired).

    A way that ends a little below a ratio is compared where it ends.
    """
    found = []
    for ratio in ratios:
        reached = []
        for name, runs in ways(data).items():
            at = near(runs, ratio)
            reached.append((at, name, pooled_at(runs, data["teal"]["uniform"], at)))
        reached += [(ratio, "TEAL, the better allocation", best_teal(data, ratio)), (ratio, HEADED, headed_teal(data, ratio))]
        for at, name, own in reached:
            if own is None:
                continue
            rival = None if name == HEADED else headed_teal(data, at)
            gap = None if rival is None else cell(difference(own, rival), "+z.3f", atol=0.01)
            extra = cell(difference(own, dense_of(data), "nll"), "z.2f", atol=0.01)
            where = f"{ratio:g}x" if abs(at - ratio) < 0.005 else f"{at:.2f}x"
            found.append([where, name, cell(own.divergence(), ".3f"), extra, gap])
    return found


def text_gap(data: Mapping[str, Any], ratio: float = 3.0) -> Interval:
    """KL of TEAL with the head on the text that CWIC was trained on, less that on the book's calibration text (paired)."""
    own, other = (teal_at(data, ratio, way) for way in reversed(HEADED_WAYS))
    return difference(own, other)


def rate_rows(rates: Mapping[str, Run], smol: Mapping[str, Any], ratio: float = 3.0) -> list[list[Any]]:
    """What is trained beside thresholds, at which rate; KL near a ratio that both reach, and less that of thresholds alone."""
    alone, dense, found = [smol["runs"]["thresholds 3x"]], smol["teal"]["uniform"], []
    for name, each in rates.items():
        at = min(near([each], ratio), near(alone, ratio))
        own, other = pooled_at([each], dense, at), pooled_at(alone, dense, at)
        mode, _, rate = name.partition(" ")
        gap = None if own is None or other is None else cell(difference(own, other), "+z.3f", atol=0.01)
        found.append([{"all": "all weights", "lora": "low-rank adapters"}[mode], rate, f"{at:.2f}x",
                      None if own is None else cell(own.divergence(), ".3f"), gap])
    return found


def frontiers(data: Mapping[str, Any]) -> dict[str, list[tuple[float, Interval]]]:
    """Way -> [(ratio, loss)]: what `figures.cwic.frontier` draws; dense networks of fewer weights as "smaller dense"."""
    found: dict[str, list[tuple[float, Interval]]] = {}
    start = (1.0, loss(dense_of(data)))
    for name, runs in ways(data).items():
        own = [(r, q) for r in AT if (q := pooled_at(runs, data["teal"]["uniform"], r)) is not None]
        found[name] = [start, *((r, loss(q)) for r, q in own)]
    for way, name in (("uniform", "TEAL"), ("greedy", "TEAL, greedy"), ("head", HEADED)):
        if way in data["teal"]:
            found[name] = [start, *((p["ratio"], loss(quality(p))) for p in data["teal"][way]["points"])]
    if "twins" in data:
        found["smaller dense"] = sorted(((t["ratio"], loss(quality(t))) for t in data["twins"].values()), key=lambda p: p[0])
    return found


def loss(found: Quality) -> Interval:
    """Nats a token."""
    return ratio_interval(found.nll, found.tokens)


def training_curves(data: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Mapping[str, Sequence[float]]]:
    """Label -> steps, ratio, target, KL and the head's ratio along training: what `figures.cwic.training` draws."""
    return {label: data["runs"][name]["curve"] for name, label in names.items() if name in data["runs"]}


def twin_rows(data: Mapping[str, Any], way: str = "active") -> list[list[Any]]:
    """Dense network, its ratio, its loss, CWIC's at that ratio, and the dense one's less CWIC's (paired)."""
    found = []
    for name, twin in sorted(data["twins"].items()):
        own, other = pooled_at(runs_of(data, way), data["teal"]["uniform"], twin["ratio"]), quality(twin)
        gap = None if own is None else cell(difference(other, own, "nll"), "+z.3f", atol=0.01)
        mine = None if own is None else cell(loss(own), ".2f")
        found.append([name, f"{twin['weights']:,}", cell(loss(other), ".2f"), mine, gap])
    return found


def ablation(data: Mapping[str, Any], name: str, ratio: float | None = None) -> tuple[Quality, Quality] | None:
    """An ablation's mean over its seeds and the unchanged runs' over the same seeds: at a measured ratio, or at the end.

    None where one of them does not get that far, or was stopped by a loss that is not finite.
    """
    seeds = sorted(data[name])
    both = [[of_run(data[which][seed], ratio) for seed in seeds] for which in (name, ABLATIONS[name][0])]
    if any(q is None for found in both for q in found):
        return None
    return pooled(both[0]), pooled(both[1])


def of_run(run: Run, ratio: float | None) -> Quality | None:
    """A run's sums at a measured ratio, or at its end.

    None at a ratio below which the run ends, wherever it has been on the way, and between milestones that are far `APART`.
    """
    if ratio is not None:
        points = run["milestones"]
        if not points or points[-1]["ratio"] * 1.01 < ratio:
            return None
        known = [p["ratio"] for p in points]
        below, above = max((r for r in known if r <= ratio), default=1.0), min((r for r in known if r >= ratio), default=ratio)
        return at_ratio(points, ratio) if above / below < APART else None
    return quality(run["milestones"][-1]) if run["milestones"] and run["stopped"] is None else None


def times_kl(pair: tuple[Quality, Quality]) -> Interval:
    """KL of the first over KL of the second, paired over sequences."""
    return ratio_interval(pair[0].kl, pair[1].kl)


def ablation_rows(data: Mapping[str, Any], names: Sequence[str], ratio: float = 3.0) -> list[list[Any]]:
    """Change, seeds, ratio at the end and KL there; KL over the unchanged runs' at one ratio and at 6x; the paper's score at
    the first less its unchanged one's, in points."""
    found = []
    for name in names:
        runs, base = data[name], ABLATIONS[name][0]
        ends = [run["milestones"][-1]["ratio"] for run in runs.values() if run["milestones"]]
        end, middle, last = (ablation(data, name, at) for at in (None, ratio, AT[-1]))
        unchanged = name == base
        published = None
        if name in PUBLISHED and not unchanged:
            published = Number(PUBLISHED[name][round(ratio) - 2] - PUBLISHED[base][round(ratio) - 2], "+.1f")
        found.append([
            "nothing" if unchanged else name.removeprefix("flops, "), len(runs),
            Number(float(np.mean(ends)), ".2f", rtol=0.05) if ends else None,
            None if end is None else Number(end[0].divergence().value, ".3f"),
            *(None if pair is None or unchanged else cell(times_kl(pair), ".2f") for pair in (middle, last)), published])
    return found


def of_loss(version: str) -> list[str]:
    """The ablations of one version, what is unchanged first."""
    return [name for name, (base, _, _) in ABLATIONS.items() if base == version]


def task_rows(data: Mapping[str, Any], order: Sequence[str], group: str) -> list[list[Any]]:
    """Point, times fewer weights, mean of the group's tasks in percent, that less dense and less TEAL at the same ratio."""
    results = {name: BenchmarkResult.from_dict(data[name]["result"]) for name in order}
    rows = []
    for name in order:
        beside = f"teal {name.rpartition('-')[2]}"
        rows.append([
            name, Number(data[name]["ratio"], ".2f"), Number(100 * results[name].score(group).mean, ".1f"),
            None if name == "dense" else points(results[name], results["dense"], group),
            points(results[name], results[beside], group) if beside in results and "cwic" in name else None])
    return rows
