"""Percentile bootstrap over sequences or documents, paired where two methods saw the same ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from sparsity_lib.checks import count, fraction
from sparsity_lib.errors import SparsityError

#: Resamples and level of every interval in the book.
RESAMPLES, LEVEL = 2000, 0.95


@dataclass(frozen=True)
class Interval:
    """An estimate with the bootstrap interval around it."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3g} [{self.low:.3g}, {self.high:.3g}]"

    def below(self, other: Interval) -> bool:
        """Whether this interval lies wholly below the other: "intervals apart"."""
        return self.high < other.low

    def to_json(self) -> list[float]:
        return [self.value, self.low, self.high]


def resample(units: int, resamples: int = RESAMPLES, seed: int = 0) -> np.ndarray:
    """Indices [resamples, units], drawn with replacement; equal for equal arguments, so pairs stay pairs."""
    count("resamples", resamples)
    return np.random.default_rng(seed).integers(0, units, size=(resamples, units))


def ratio_interval(
    sums: np.ndarray,
    weights: np.ndarray,
    *,
    transform: Callable[[np.ndarray], np.ndarray] = lambda x: x,
    resamples: int = RESAMPLES,
    level: float = LEVEL,
    seed: int = 0,
) -> Interval:
    """Interval of transform(sum(sums) / sum(weights)) over resampled units.

    Parameters
    ----------
    sums, weights
        [units], say a sequence's total loss and its number of tokens.
    transform
        Monotone, applied at the end (exp for a perplexity).

    Raises
    ------
    SparsityError
        If there is no unit, the arrays differ in length, or hold NaN, infinity or weights of zero.
    """
    sums, weights = np.asarray(sums, dtype=np.float64), np.asarray(weights, dtype=np.float64)
    if sums.shape != weights.shape or sums.ndim != 1 or len(sums) == 0:
        shapes = f"{sums.shape} and {weights.shape}"
        raise SparsityError(f"An interval needs two equally long, non-empty rows of numbers, got {shapes}.")
    if not (np.isfinite(sums).all() and np.isfinite(weights).all() and (weights > 0).all()):
        raise SparsityError("An interval needs finite sums and weights above zero. Fix: leave out units that hold nothing.")
    fraction("level", level, one=False)
    index = resample(len(sums), resamples, seed)
    drawn = transform(sums[index].sum(1) / weights[index].sum(1))
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(transform(sums.sum() / weights.sum())), float(low), float(high))


def mean_interval(values: np.ndarray, **options) -> Interval:
    """Interval of a mean over units."""
    values = np.asarray(values, dtype=np.float64)
    return ratio_interval(values, np.ones_like(values), **options)


def median_interval(values: Sequence[float]) -> Interval:
    """Interval of a median over units: layers, or rounds of a measurement."""
    values = np.asarray(values, dtype=np.float64)
    low, high = np.quantile(np.median(values[resample(len(values))], axis=1), [0.025, 0.975])
    return Interval(float(np.median(values)), float(low), float(high))


def median_of_groups(values: Sequence[Sequence[float]], seed: int = 0) -> tuple[Interval, np.ndarray]:
    """Median over groups [groups, units] of their medians, and its draws [resamples]: groups drawn anew, then units of each.

    Such are rounds of a measurement that was set up several times. Equal seeds draw the same groups, so that pairs stay pairs.
    """
    medians = np.asarray(values, dtype=np.float64)
    groups, units = medians.shape
    chosen = resample(groups, seed=seed)
    # [resamples, groups, units]
    within = np.stack([medians[g][resample(units, seed=seed + 1 + g)] for g in range(groups)], axis=1)
    drawn = np.median(np.take_along_axis(np.median(within, axis=2), chosen, axis=1), axis=1)
    low, high = np.quantile(drawn, [0.025, 0.975])
    return Interval(float(np.median(np.median(medians, axis=1))), float(low), float(high)), drawn
