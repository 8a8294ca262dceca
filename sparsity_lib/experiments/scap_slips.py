"""What SCAP's printed numbers say when they are computed again: relative drops, the speed-up, averages, "percent" and points."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import geometric_mean, mean
from typing import Any

from sparsity_lib.report import Number


@dataclass(frozen=True)
class Printed:
    """A row of table 5 or 6: FFN sparsity, the scores of WG, PIQA, SciQ, HS, BoolQ, Arc-E, Arc-C, printed mean and change (%)."""

    model: str
    method: str
    ffn: float
    scores: tuple[float, ...]
    average: float
    relative: float | None


TABLES = (
    Printed("Mistral-7B", "dense", 0.0, (74.2, 80.7, 95.9, 61.3, 83.7, 80.9, 50.3), 75.3, None),
    Printed("Mistral-7B", "CATS 50%", 33.3, (72.5, 80.1, 94.8, 61.0, 81.9, 78.5, 50.4), 74.2, -1.5),
    Printed("Mistral-7B", "CATS 70%", 46.7, (71.9, 80.0, 92.9, 60.6, 80.3, 74.9, 46.9), 72.5, -3.8),
    Printed("Mistral-7B", "CATS 90%", 60.0, (56.3, 60.0, 42.2, 33.6, 70.9, 37.5, 27.7), 46.9, -60.6),
    Printed("Mistral-7B", "SCAP 10/50%", 26.4, (74.5, 80.4, 96.0, 61.6, 83.4, 80.6, 50.6), 75.3, 0.0),
    Printed("Mistral-7B", "SCAP 10/60%", 29.6, (74.3, 80.5, 95.7, 61.9, 82.8, 80.1, 51.0), 75.2, -0.1),
    Printed("Mistral-7B", "SCAP 20/50%", 32.6, (74.0, 80.5, 95.7, 61.5, 83.9, 80.5, 50.3), 75.2, -0.1),
    Printed("Mistral-7B", "SCAP 20/60%", 35.8, (74.6, 80.5, 95.9, 61.9, 82.6, 80.0, 49.8), 75.0, -0.3),
    Printed("Mistral-7B", "SCAP 35/45%", 40.4, (74.0, 80.4, 95.7, 60.9, 83.8, 80.2, 49.1), 74.9, -0.6),
    Printed("Mistral-7B", "SCAP 30/70%", 45.6, (72.7, 80.3, 95.8, 62.0, 82.4, 79.5, 49.2), 74.5, -1.0),
    Printed("Mistral-7B", "SCAP 40/60%", 48.5, (71.9, 80.0, 95.1, 60.8, 82.9, 79.8, 48.7), 74.2, -1.5),
    Printed("Mistral-7B", "SCAP 40/70%", 52.5, (69.1, 79.8, 91.8, 60.1, 81.7, 79.2, 47.7), 72.8, -3.3),
    Printed("Mistral-7B", "SCAP 40/80%", 55.7, (67.6, 79.4, 86.5, 60.6, 79.8, 79.1, 48.5), 71.6, -4.8),
    Printed("Mistral-7B", "SCAP 50/70%", 59.0, (70.4, 79.4, 75.5, 56.5, 77.5, 78.5, 47.8), 69.4, -7.9),
    Printed("Mistral-7B", "SCAP 50/80%", 62.2, (69.3, 79.4, 71.5, 55.3, 75.4, 77.7, 46.5), 67.8, -9.9),
    Printed("Mistral-7B", "SCAP 60/70%", 65.3, (68.3, 78.2, 70.8, 52.7, 75.1, 77.1, 44.3), 66.7, -11.5),
    Printed("Llama-2-7B", "dense", 0.0, (69.1, 78.1, 94.0, 57.2, 77.7, 76.3, 43.4), 70.8, None),
    Printed("Llama-2-7B", "CATS 50%", 33.3, (67.5, 76.9, 92.7, 57.1, 72.6, 74.4, 41.2), 68.9, -2.8),
    Printed("Llama-2-7B", "CATS 70%", 46.7, (66.9, 75.8, 90.2, 55.0, 65.9, 70.1, 38.1), 66.0, -7.3),
    Printed("Llama-2-7B", "CATS 90%", 60.0, (57.4, 66.3, 61.1, 38.5, 62.8, 45.7, 28.1), 51.4, -37.7),
    Printed("Llama-2-7B", "SCAP 30/40%", 35.7, (69.7, 77.6, 94.0, 57.0, 77.5, 76.2, 43.1), 70.7, -0.1),
    Printed("Llama-2-7B", "SCAP 20/40%", 29.2, (68.7, 77.9, 93.5, 57.4, 77.6, 76.3, 43.6), 70.7, -0.1),
    Printed("Llama-2-7B", "SCAP 10/50%", 26.1, (69.6, 78.1, 93.4, 57.3, 77.6, 76.2, 42.8), 70.7, -0.1),
    Printed("Llama-2-7B", "SCAP 20/50%", 32.5, (69.2, 78.1, 93.7, 57.3, 77.3, 76.5, 42.6), 70.7, -0.2),
    Printed("Llama-2-7B", "SCAP 30/50%", 38.3, (70.6, 77.7, 93.4, 57.0, 77.3, 75.7, 42.6), 70.6, -0.3),
    Printed("Llama-2-7B", "SCAP 35/50%", 41.5, (69.0, 77.6, 93.3, 56.8, 77.1, 76.1, 42.4), 70.3, -0.7),
    Printed("Llama-2-7B", "SCAP 35/60%", 44.7, (68.4, 77.3, 93.5, 57.0, 76.4, 75.1, 42.5), 70.0, -1.1),
    Printed("Llama-2-7B", "SCAP 40/60%", 48.0, (68.6, 77.6, 93.8, 56.4, 76.6, 74.6, 42.6), 70.0, -1.1),
    Printed("Llama-2-7B", "SCAP 40/70%", 51.8, (68.7, 77.9, 93.0, 56.5, 75.8, 73.9, 41.4), 69.6, -1.7),
    Printed("Llama-2-7B", "SCAP 50/60%", 55.0, (67.0, 76.6, 93.3, 55.4, 75.9, 73.3, 40.4), 68.8, -2.8),
    Printed("Llama-2-7B", "SCAP 50/70%", 58.2, (67.3, 77.0, 93.6, 55.1, 74.8, 73.3, 39.8), 68.7, -3.0),
    Printed("Llama-2-7B", "SCAP 50/80%", 61.4, (64.7, 75.8, 92.7, 55.1, 73.6, 71.2, 40.8), 67.7, -4.6),
    Printed("Llama-2-7B", "SCAP 60/70%", 64.6, (65.5, 75.2, 93.5, 53.0, 74.4, 71.0, 37.8), 67.2, -5.4),
)
#: Table 2: prompt tokens -> percent faster than dense.
FASTER = {"CATS": {256: 19.9, 512: 18.3, 1024: 16.5, 2048: 16.4}, "SCAP": {256: 30.4, 512: 27.9, 1024: 25.0, 2048: 25.5}}
CLAIMED = 1.5
#: Section 4.3: down sparsity in percent without and with centring.
CENTRED = {"MPT-7B": (12.7, 57.4), "Falcon-7B": (30.5, 50.3)}
#: Printed scores have one digit after the point, so a change recomputed from seven of them is sure to about this (points).
ROUNDING = 0.1


def changes(row: Printed, dense: Printed) -> tuple[float, float]:
    """Percent change of the mean score with the dense score as the denominator, and with the pruned one."""
    own, base = mean(row.scores), mean(dense.scores)
    return 100 * (own / base - 1), -100 * (base / own - 1)


def denominator(row: Printed, dense: Printed) -> str:
    """Which denominator the printed change fits: "dense", "pruned", "either" or "neither"."""
    near = [abs(change - row.relative) <= ROUNDING for change in changes(row, dense)]
    apart = [abs(change - row.relative) for change in changes(row, dense)]
    if near[0] != near[1]:
        return "dense" if near[0] else "pruned"
    if not near[0]:
        return "neither"
    closer = min(apart)  # both fit within rounding: only a clear difference decides
    return "either" if max(apart) - closer < 0.05 else ("dense" if apart[0] == closer else "pruned")


def relative_rows() -> list[list[Any]]:
    """Model, method, printed change, change over the dense score, over the pruned score, and which of them is printed."""
    dense = {row.model: row for row in TABLES if row.relative is None}
    return [
        [row.model, row.method, Number(row.relative, ".1f"), *(Number(c, ".2f") for c in changes(row, dense[row.model])),
         denominator(row, dense[row.model])]
        for row in TABLES if row.relative is not None
    ]


@dataclass(frozen=True)
class Speed:
    """Times as fast as dense, geometric means over prompts, and the two ratios between them."""

    cats: float
    scap: float

    @property
    def of_speeds(self) -> float:
        """How many times as fast SCAP decodes as CATS."""
        return self.scap / self.cats

    @property
    def of_percentages(self) -> float:
        """The paper's "1.5x": percent gained over percent gained."""
        return (self.scap - 1) / (self.cats - 1)


def printed_speed() -> Speed:
    """Table 2."""
    return Speed(*(geometric_mean(1 + p / 100 for p in FASTER[name].values()) for name in ("CATS", "SCAP")))


def speed_rows(measured: dict[str, Speed]) -> list[list[Any]]:
    """Where, times as fast as dense for CATS and SCAP, SCAP over CATS, and the ratio of percentages; the paper first."""
    return [
        [where, *(Number(v, ".3f") for v in (s.cats, s.scap, s.of_speeds)), Number(s.of_percentages, ".2f")]
        for where, s in {"the paper, Mistral-7B": printed_speed(), **measured}.items()
    ]


def centring_rows() -> list[list[Any]]:
    """Model, sparsity without and with centring (%), the difference in points, and the same as a percentage of the first."""
    return [[m, Number(a, ".1f"), Number(b, ".1f"), Number(b - a, ".1f"), Number(100 * (b / a - 1), ".0f")]
            for m, (a, b) in CENTRED.items()]
