"""Which method to use, answered from the stored curves."""

from __future__ import annotations

from sparsity_lib import style
from sparsity_lib.book.curves import BOUNDS, Point, at, curves, speed
from sparsity_lib.book.markdown import table
from sparsity_lib.experiments.claws_report import short
from sparsity_lib.report import Number

#: Shares of all weights skipped at which methods are ranked.
SHARES = (0.10, 0.15, 0.20, 0.30, 0.40)


def ranked(model: str, skipped: float) -> list[tuple[str, Point]]:
    """Methods that were measured around a share of weights skipped, from the least KL on, bounds left out."""
    found = [(method, point) for method, points in curves()[model].items()
             if method not in BOUNDS and (point := at(points, skipped)) is not None]
    return sorted(found, key=lambda pair: pair[1].kl.value)


def level(found: list[tuple[str, Point]]) -> list[str]:
    """Those whose KL interval reaches the best one's."""
    best = found[0][1].kl
    return [method for method, point in found if point.kl.low <= best.high]


def names(methods: list[str]) -> str:
    """Methods as a reader knows them."""
    return ", ".join(style.look(m).label for m in methods)


def ranking() -> str:
    """A table: model and share; the methods that nothing beats there, their KL, the decoder's speed, and what comes behind."""
    rows = []
    for model in curves():
        for skipped in SHARES:
            found = ranked(model, skipped)
            if len(found) < 2:
                continue
            best, (method, point) = level(found), found[0]
            behind = [(m, p) for m, p in found if m not in best]
            other = f"{names([behind[0][0]])}, {behind[0][1].kl.value / point.kl.value:.1f} times its KL" if behind else None
            fast = speed(model, method, skipped)
            rows.append([short(model), f"{skipped:.0%}", f"**{names(best)}**",
                         Number(point.kl.value, ".3f", point.kl.low, point.kl.high), None if fast is None else Number(fast, ".2f"),
                         other])
    return table(["model", "weights skipped", "closest to the dense model", "KL of the first (nats per token)", "times as fast", "next"],
                 rows, "What to use at a share of all weights skipped, by the stored runs. Several names: their 95% intervals reach "
                 "each other. Times as fast: our CPU decoder, where that share was measured.", "tab-choose")


def advice() -> str:
    """A sentence or two: where the first place changes hands, model by model."""
    parts = []
    for model in curves():
        first: list[tuple[str, float, float]] = []
        for skipped in [s / 100 for s in range(5, 61)]:
            found = ranked(model, skipped)
            if len(found) < 3:
                continue
            if first and first[-1][0] == found[0][0]:
                first[-1] = (first[-1][0], first[-1][1], skipped)
            else:
                first.append((found[0][0], skipped, skipped))
        spans = [f"{names([m])} from {low:.0%} to {high:.0%}" for m, low, high in first if high - low >= 0.02]
        if spans:
            parts.append(f"On {short(model)} the least KL is that of {', then '.join(spans)} of all weights skipped")
    return ". ".join(parts) + "."
