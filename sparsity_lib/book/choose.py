"""Which method to use, answered from the stored curves."""

from __future__ import annotations

from sparsity_lib.book.curves import BOUNDS, PARTS, Curve, Point, curves
from sparsity_lib.book.markdown import listed, table
from sparsity_lib.book.speeds import speed
from sparsity_lib.claims import page
from sparsity_lib.experiments.claws_report import short
from sparsity_lib.report import Number

#: Shares of all weights skipped at which methods are ranked.
SHARES = (0.05, 0.10, 0.15, 0.20, 0.25, 0.30, 0.40, 0.50)
#: A stretch of shares that is shorter than this is not worth a word.
STRETCH = 0.03
CAPTION = (
    "What stays closest to the dense model at a share of all weights skipped, by the stored runs. Several names: their 95% "
    "intervals reach the first one's. Speed: of the first of them whose execution was measured. A dash: nothing was measured.")
Ranked = list[tuple[Curve, Point]]


def ranked(model: str, skipped: float) -> Ranked:
    """Methods that were measured around a share of weights skipped, from the least KL on; bounds left out."""
    found = [(curve, point) for curve in curves()[model].values() if curve.method not in BOUNDS and curve.sites not in PARTS
             and (point := curve.at(skipped)) is not None]
    return sorted(found, key=lambda pair: pair[1].kl.value)


def level(found: Ranked) -> Ranked:
    """Those of a ranking whose KL interval reaches the first one's."""
    return [(curve, point) for curve, point in found if point.kl.low <= found[0][1].kl.high]


def named(curve: Curve) -> str:
    """A method as a sentence can hold it."""
    return curve.label.replace(", ", " with ")


def ranking() -> str:
    """A table: model and share; the methods that no other is ahead of, their KL, the decoder's speed, and what comes next."""
    rows = []
    for model in curves():
        for skipped in SHARES:
            if len(found := ranked(model, skipped)) < 2:
                continue
            best, kl = level(found), found[0][1].kl
            fast = next((s for curve, _ in best if (s := speed(model, curve.method, skipped)) is not None), None)
            behind = next(((curve, point) for curve, point in found[len(best):]), None)
            rows.append([
                short(model), f"{skipped:.0%}", f"**{listed(named(curve) for curve, _ in best)}**",
                Number(kl.value, ".3f", kl.low, kl.high), None if fast is None else Number(fast, ".2f"),
                None if behind is None else f"{named(behind[0])}, {behind[1].kl.value / kl.value:.1f} times as far"])
    columns = [
        "model", "weights skipped", "closest", "KL of the first (nats per token)", "decoding, times as fast as dense", "next"]
    return table(columns, rows, CAPTION, "tab-choose")


def advice() -> str:
    """A sentence a model: from where to where no other method is ahead of each."""
    return " ".join(found for model in curves() if (found := _stretches(model)))


def _stretches(model: str) -> str:
    spans: list[tuple[str, float, float]] = []
    for skipped in (s / 100 for s in range(1, 100)):
        found = ranked(model, skipped)
        for curve, _ in level(found) if len(found) > 1 else ():
            name, start = named(curve), skipped
            for before in [span for span in spans if span[0] == name and skipped - span[2] < 0.015]:
                spans.remove(before)
                start = before[1]
            spans.append((name, start, skipped))
    kept = [f"{name} from {low:.0%} to {high:.0%}" for name, low, high in sorted(spans, key=lambda span: span[1:])
            if high - low >= STRETCH]
    return f"On {short(model)} nothing is ahead of {listed(kept)} of all weights skipped." if kept else ""


def trained() -> str:
    """A paragraph on thresholds that are learned, which cost training: what claim A1 has come to."""
    found = next(judged for judged in page.judged()["CWIC, active parameters"] if judged.claim.id == "A1")
    start = "With training, thresholds can be learned (CWIC). Whether they are then ahead of TEAL is [claim A1](#claim-a1): "
    return f"{start}{page.badge(found.outcome)}.\n"
