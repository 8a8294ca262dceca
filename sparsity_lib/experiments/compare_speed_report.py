"""Measured decode speed: rows, the one picture's points, and what two methods lose in equal time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sparsity_lib.evaluate.bootstrap import RESAMPLES, Interval, median_of_groups, resample
from sparsity_lib.experiments import compare_granular
from sparsity_lib.experiments.claws_report import cell, label, short
from sparsity_lib.experiments.compare_report import SINGLE, SLACK, Curve, at_share, best_single, curve
from sparsity_lib.experiments.compare_search_report import ASKED, held_out, over_best
from sparsity_lib.report import Number
from sparsity_lib.verdicts import Verdict, effect, kept

Data = Mapping[str, Any]


def speed_rows(speed: Data) -> list[list[Any]]:
    """Model, method and share; weights skipped (%), tokens a second, times dense, what the bytes predict: of what was run."""
    rows = []
    for model, found in speed.items():
        for row in found:
            if "ratio" in row:
                predicted = row["bytes"]["dense"] / row["bytes"]["sparse"]
                rows.append([short(model), at_share(row), Number(100 * row["skipped"], ".0f"),
                             Number(1 / row["sparse"], ".0f", rtol=0.3),
                             cell(median_of_groups(row["ratios"])[0], ".2f", rtol=0.2), Number(predicted, ".2f")])
    return rows


def not_run_rows(speed: Data) -> list[list[Any]]:
    """Methods that the decoder cannot run at any share, and why not at the least."""
    ran = {row["method"] for found in speed.values() for row in found if "ratio" in row}
    reasons = {row["method"]: row["reason"] for found in speed.values() for row in reversed(found) if row["method"] not in ran}
    return [[label(method), reasons[method]] for method in sorted(reasons)]


def picture(speed: Data, quality: Data, search: Data) -> dict[str, dict[str, list[tuple[float, Interval]]]]:
    """model -> method -> [(times the dense decoder's speed, KL)]: quality against measured decode speed.

    Both of tokens that are made sparse. A method that leaves a share of each sequence dense was compared at the share that it
    skips over all tokens, of whose KL the dense ones have none.
    """
    found: dict[str, dict[str, list[tuple[float, Interval]]]] = {}
    for model, rows in speed.items():
        for row in rows:
            if "ratio" not in row:
                continue
            if row["method"] == "spread":
                own = held_out(search, model, "chosen", row["share"])
                kl = None if own is None else own.divergence()
            elif row["method"] == compare_granular.METHOD:
                own = compare_granular.at_share(quality[model]["methods"].get(row["method"], ()), row["share"])
                kl = None if own is None else own.divergence()
            else:
                known, part = curve(quality, model, row["method"]), row["token_share"]
                kl = None if known is None else known.kl_at(row["skipped"] * part)
                kl = None if kl is None else Interval(*(each / part for each in (kl.value, kl.low, kl.high)))
            if kl is not None:
                found.setdefault(model, {}).setdefault(row["method"], []).append((row["ratio"], kl))
    return {model: {method: sorted(points, key=lambda p: p[0]) for method, points in methods.items()}
            for model, methods in found.items()}


def time_at(rows: Sequence[Data], share: float) -> tuple[float, np.ndarray] | None:
    """A token's time over the dense decoder's with `share` of all weights skipped, and bootstrap draws of it.

    Methods do not meet a share exactly, and more skipped is less read: time lies on a line between
    a method's measured shares, and the dense decoder's at none. None beyond them.
    """
    found = [row for row in rows if "ratio" in row]
    if not found or not 0 <= share <= max(row["skipped"] for row in found) + SLACK:
        return None
    shares, medians, drawn = _lines(found)
    return float(np.interp(share, shares, medians)), np.array([np.interp(share, shares, each) for each in drawn.T])


def _lines(rows: Sequence[Data]) -> tuple[list[float], np.ndarray, np.ndarray]:
    """Shares [points], rising from 0; times over dense [points], and draws of them [points, resamples]."""
    found = sorted(rows, key=lambda row: row["skipped"])
    # of one share all methods were timed in the same builds: equal seeds draw the same ones
    times = [median_of_groups(1 / np.asarray(row["ratios"]), seed=round(1e4 * row["share"])) for row in found]
    return ([0.0, *(row["skipped"] for row in found)], np.array([1.0, *(each.value for each, _ in times)]),
            np.array([np.ones(RESAMPLES), *(draws for _, draws in times)]))


def share_at_time(rows: Sequence[Data], times: np.ndarray, draws: bool = False) -> np.ndarray:
    """Shares at which a method takes `times` (over dense, [n]); with `draws`, each in a resample of its own ([resamples]).

    Along the same line as `time_at`, whose last piece goes on: times fall as shares rise, but for noise, which is ironed out.
    """
    shares, medians, drawn = _lines(rows)
    lines = np.broadcast_to(medians, (len(times), len(medians))) if not draws else drawn.T
    found = []
    for line, time in zip(lines, times, strict=True):
        falling = np.minimum.accumulate(line)
        falling = falling - 1e-9 * np.arange(len(line))  # strictly: else there is no one share
        slope = (falling[-1] - falling[-2]) / (shares[-1] - shares[-2])
        beyond = shares[-1] + (time - falling[-1]) / slope
        found.append(beyond if time < falling[-1] else np.interp(-time, -falling, shares))
    return np.array(found)


def at_equal_time(
    search: Data, quality: Data, speed: Data, model: str, share: float, methods: Sequence[str] = SINGLE
) -> tuple[str, float, Interval] | None:
    """The chosen candidate beside the best single method in equal time; None where that was not measured.

    Returns
    -------
    tuple
        The best single method at `share`; the share at which the candidate is as fast, at least `share`; its KL there over the
        other's at `share`. The interval holds what times and texts leave open.
    """
    best = best_single(quality, model, share, methods)
    line = Curve.of(search["models"][model]["held out"]["chosen"]["points"])
    own, other = ([row for row in speed[model] if row["method"] == method and "ratio" in row] for method in ("spread", best))
    taken = time_at(other, share) if other else None
    if best is None or line is None or not own or taken is None:
        return None
    needed = np.maximum(share, share_at_time(own, np.array([taken[0]])))
    drawn = np.maximum(share, share_at_time(own, taken[1], draws=True))
    if max(needed[0], np.quantile(drawn, 0.975)) > line.shares[-1] + SLACK:  # quality is not known there
        return None
    base = curve(quality, model, best).at(share)
    index = resample(len(base))
    sums = np.log(np.maximum(line.kl[:, index].sum(-1), 1e-12))  # [points, resamples]
    ratios = [np.exp(np.interp(s, line.shares, logs)) for s, logs in zip(drawn, sums.T, strict=True)] / base[index].sum(-1)
    value = np.exp(np.interp(needed[0], line.shares, np.log(np.maximum(line.kl.sum(1), 1e-12)))) / base.sum()
    low, high = np.quantile(ratios, [0.025, 0.975])
    return best, float(needed[0]), Interval(float(value), min(float(low), float(value)), max(float(high), float(value)))


def equal_time_rows(search: Data, quality: Data, speed: Data, shares: Sequence[float]) -> list[list[Any]]:
    """Model, share, best single method, its KL; the share at which the search's recipe is as fast, and the KLs' ratio."""
    rows = []
    for model in search["models"]:
        for share in shares:
            found = at_equal_time(search, quality, speed, model, share)
            if found is not None:
                best, own, ratio = found
                kl = curve(quality, model, best).kl_at(share)
                rows.append([short(model), f"{100 * share:.0f}%", label(best), cell(kl, ".3f"),
                             Number(100 * own, ".1f", atol=2), cell(ratio, ".2f")])
    return rows


def by_round(speed: Data, model: str, share: float, method: str) -> Interval:
    """The search's recipe's speed over a method's, both made for a share, round by round of the same builds."""
    own, other = (next(row for row in speed[model] if row["method"] == m and row["share"] == share) for m in ("spread", method))
    return median_of_groups(np.asarray(own["ratios"]) / np.asarray(other["ratios"]))[0]  # the dense decoder cancels


def verdict_equal_time(search: Data, quality: Data, speed: Data, model: str, share: float) -> Verdict | None:
    """Whether the search's KL is a quarter below the best single method's at no higher decode time; None where unmeasured."""
    found = at_equal_time(search, quality, speed, model, share)
    if found is None:
        return None
    best, own, ratio = found
    return effect(
        f"search in equal time, {100 * share:.0f}%, {short(model)}", "a quarter less KL at no higher measured decode time",
        f"KL of the search's recipe with {100 * own:.1f}% of all weights skipped over that of {label(best)} with "
        f"{100 * share:.0f}%, which takes as long", number=ratio.value, low=ratio.low, high=ratio.high, published=ASKED, null=1.0)


def verdict_speed(search: Data, quality: Data, speed: Data, model: str, share: float, margin: float = 0.03) -> Verdict | None:
    """Whether the search's recipe decodes no slower than the best single method, both in times dense; None where unmeasured."""
    found = over_best(search, quality, model, share)
    if found is None:
        return None
    own, other = (time_at([row for row in speed[model] if row["method"] == method], share) for method in ("spread", found[0]))
    if own is None or other is None:
        return None
    low, high = np.quantile(1 / own[1] - 1 / other[1], [0.025, 0.975])
    number = 1 / own[0] - 1 / other[0]
    return kept(
        f"search's speed, {100 * share:.0f}%, {short(model)}", "at no higher measured decode time",
        f"times dense of the search's recipe minus that of {label(found[0])}, both at {100 * share:.0f}%; {margin:g} is allowed",
        number=number, low=min(float(low), number), high=max(float(high), number), margin=margin)
