"""Which method to use, answered from the stored curves."""

from __future__ import annotations

from sparsity_lib import results, style
from sparsity_lib.book.curves import BOUNDS, PARTS, TOGETHER, TRAINED, Curve, Point, curves
from sparsity_lib.book.markdown import listed, table
from sparsity_lib.book.speeds import speed
from sparsity_lib.claims import page
from sparsity_lib.evaluate.bench_result import BenchmarkResult
from sparsity_lib.experiments.claws_report import points, short
from sparsity_lib.experiments.compare_report import nine
from sparsity_lib.report import Number

#: Shares of all weights skipped at which methods are ranked.
SHARES = (0.05, 0.10, 0.15, 0.20, 0.25, 0.30, 0.40, 0.50)
TASKS, MANY = "compare_tasks", "compare_tasks_many"
#: A stretch of shares that is shorter than this is not worth a word.
STRETCH = 0.03
#: Shares are tried a hundredth apart; neighbours are no further from each other than this.
STEP = 0.015
#: Shares that were asked for are met about as closely as this.
SLACK = 0.005
LEFT_OUT = (*BOUNDS, *TRAINED)
CAPTION = (
    "Who stays closest to the dense model at a share of all weights skipped, by the stored runs. Where several are named, their "
    "95% intervals overlap with the first one's. Speed: decoding on two CPU cores, by the first of them whose execution was "
    "measured; a dash where none was.")
Ranked = list[tuple[Curve, Point]]


def ranked(model: str, skipped: float) -> Ranked:
    """Methods that were measured around a share of weights skipped, from the least KL on; without bounds and what was trained."""
    known = list(curves()[model].values())
    alike = [curve for curve in known if curve.result in TOGETHER] or known
    found = [(curve, point) for curve in alike if curve.method not in LEFT_OUT and curve.sites not in PARTS
             and (point := _read(curve, skipped)) is not None]
    return sorted(found, key=lambda pair: pair[1].kl.value)


def _read(curve: Curve, skipped: float) -> Point | None:
    """A curve at a share, or at its end where that is no further away than `SLACK`."""
    near = min(max(skipped, curve.points[0].skipped), curve.points[-1].skipped)
    return curve.at(near) if abs(near - skipped) <= SLACK else None


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
                None if behind is None else f"{named(behind[0])}, {behind[1].kl.value / kl.value:.1f} times the KL"])
    columns = [
        "model", "weights skipped", "closest", "KL of the first [95% interval] (nats per token)",
        "decoding, times as fast as dense", "next"]
    return table(columns, rows, CAPTION, "tab-choose")


def advice() -> str:
    """A list, one entry a model: as few methods as lead over all shares that were measured, each with its stretch."""
    lines = []
    for model in curves():
        if found := led(stretches(model)):
            parts = [f"**{name}** from {low:.0%} to {high:.0%}" for name, low, high in found]
            lines.append(f"- {short(model)}: {', then '.join(parts)} of all weights skipped.")
    return "\n".join(lines) + "\n" if lines else "Nothing has been measured yet: `make results`.\n"


Span = tuple[str, float, float]


def led(spans: list[Span]) -> list[Span]:
    """The fewest of the spans that cover what all of them do, each from where the one before ends."""
    found: list[Span] = []
    while rest := [span for span in spans if not found or span[2] > found[-1][2]]:
        start = max(min(low for _, low, _ in rest), found[-1][2] if found else 0.0)
        name, _, high = max((span for span in rest if span[1] <= start + STEP), key=lambda span: span[2])
        found.append((name, start, high))
    return found


def stretches(model: str) -> list[Span]:
    """Name, first and last share of weights skipped: each stretch over which no other method is ahead of one."""
    spans: list[Span] = []
    for skipped in (s / 100 for s in range(1, 100)):
        found = ranked(model, skipped)
        for curve, _ in level(found) if len(found) > 1 else ():
            name, start = named(curve), skipped
            for before in [span for span in spans if span[0] == name and skipped - span[2] < STEP]:
                spans.remove(before)
                start = before[1]
            spans.append((name, start, skipped))
    return [span for span in sorted(spans, key=lambda span: span[1:]) if span[2] - span[1] >= STRETCH]


def trained() -> str:
    """A paragraph on thresholds that are learned, which cost training: what claim A1 has come to."""
    found = next(judged for judged in page.judged()["CWIC, active parameters"] if judged.claim.id == "A1")
    start = "With training, thresholds can be learned (CWIC). That this brings them ahead of TEAL is [claim A1](#claim-a1): "
    return f"{start}{page.badge(found.outcome)}.\n"


def by_tasks() -> str:
    """A paragraph: what the search's recipe, which leads in KL, loses on nine tasks, beside the best method at the same share."""
    if TASKS not in results.names():
        return f"Whether the lead in KL shows in tasks was not measured: `make results R={TASKS}`.\n"
    parts = []
    for model, rows in results.load(TASKS).data.items():
        dense = nine(rows[0])
        share = max(row["share"] for row in rows if row["method"] == "spread")
        lost = {row["method"]: points(nine(row), dense, "book9") for row in rows
                if row["share"] == share and "results" in row and "part" not in row}
        own = lost.pop("spread")
        method, best = max(lost.items(), key=lambda pair: pair[1].value)
        parts.append(f"{short(model)} at {share:.0%}: {own} points, {style.look(method).label} {best}")
    return ("That is a ranking by KL, which weighs a word by its probability. On nine tasks, which compare the probabilities of "
            "given answers, it need not hold. The search's recipe and the best other method, less the dense model: "
            f"{'; '.join(parts)}.{_on_many()}\n")


def _on_many() -> str:
    """A sentence: the same for the best of each kind, on more documents."""
    if MANY not in results.names():
        return ""
    found, parts = results.load(MANY), []
    for model, rows in found.data.items():
        scored = {row["method"]: BenchmarkResult.from_dict(row["results"]["scap7"]) for row in rows
                  if "results" in row and "part" not in row}
        lost = {method: points(each, scored["dense"], "scap7") for method, each in scored.items() if method != "dense"}
        own = lost.pop("spread")
        method, best = max(lost.items(), key=lambda pair: pair[1].value)
        parts.append(f"{short(model)}: {own} points, {style.look(method).label} {best}")
    return (f" On {found.manifest['params']['tasks']['scap7']} documents of each of seven tasks, at the same shares: "
            f"{'; '.join(parts)}.")
