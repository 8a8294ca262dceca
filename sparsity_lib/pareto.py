"""Pareto fronts of sparsity and quality, and the gap between two of them with a paired interval."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sparsity_lib.errors import SparsityError
from sparsity_lib.evaluate.bootstrap import Interval, resample


def front(sparsity: Sequence[float], quality: Sequence[float]) -> list[int]:
    """Indices of the points that no other point beats, by rising sparsity (and so falling quality).

    Both are wanted large (pass -KL as the quality of a divergence). A point is beaten by one at least as large in both
    and larger in one; of equal points the first stands for all. A point with a NaN in it is on no front.

    Raises
    ------
    SparsityError
        If the two rows differ in length.
    """
    x, y = _pair(sparsity, quality)
    whole = np.flatnonzero(~(np.isnan(x) | np.isnan(y)))
    order = whole[np.lexsort((whole, -y[whole], -x[whole]))]  # sparsest first, then best, then first
    kept, best = [], -np.inf
    for index in order:
        if y[index] > best or not kept:
            kept.append(int(index))
            best = y[index]
    return kept[::-1]


def best_at(sparsity: Sequence[float], quality: Sequence[float], at: float, slack: float = 1e-9) -> int | None:
    """Index of the best point that is at least as sparse as `at` less `slack`, or None; ties go to the sparser, then the first.

    This reads a front as steps: no point between two measured ones is made up.
    """
    x, y = _pair(sparsity, quality)
    with np.errstate(invalid="ignore"):
        able = np.flatnonzero((x >= at - slack) & ~np.isnan(y))
    return None if len(able) == 0 else int(able[np.lexsort((able, -x[able], -y[able]))[0]])


def front_gap(
    sparsity: Sequence[float], losses: np.ndarray, weights: Sequence[float], other: np.ndarray, at: float, *,
    slack: float = 1e-9, seed: int = 0,
) -> Interval:
    """Mean loss of a front at a sparsity minus another method's loss there; below zero the front is better.

    Each resample of the units (sequences, documents) draws the same ones for both methods and chooses the front's best
    point anew, so the interval also holds what the choice owes to chance.

    Parameters
    ----------
    sparsity
        [points], of the front's method.
    losses
        [points, units], say each sequence's summed KL; smaller is better.
    weights
        [units], say a sequence's number of tokens.
    other
        [units], the losses of the one point compared with.
    at
        That point's sparsity.

    Raises
    ------
    SparsityError
        If shapes differ, or no point of the front's method is that sparse.
    """
    losses, weights, other = (np.asarray(a, dtype=np.float64) for a in (losses, weights, other))
    if losses.ndim != 2 or losses.shape != (len(sparsity), len(weights)) or other.shape != weights.shape:
        raise SparsityError(
            f"A front needs losses [points, units], got {losses.shape} for {len(sparsity)} points, {weights.shape} and "
            f"{other.shape} units."
        )
    able = np.flatnonzero(np.asarray(sparsity, dtype=float) >= at - slack)
    if len(able) == 0:
        raise SparsityError(f"No point is as sparse as {at:.3f}. Fix: measure sparser points, or compare at less.")
    gaps = losses[able] - other
    drawn = resample(len(weights), seed=seed)
    share = weights[drawn].sum(1)
    best = np.min([gap[drawn].sum(1) / share for gap in gaps], axis=0)
    low, high = np.quantile(best, [0.025, 0.975])
    value = float(min(gap.sum() for gap in gaps) / weights.sum())
    return Interval(value, float(min(low, value)), float(max(high, value)))


def sparsity_gain(
    sparsity: Sequence[float], losses: np.ndarray, weights: Sequence[float], other: np.ndarray, at: float, *, seed: int = 0
) -> Interval:
    """How much sparser than `at` the front goes at no more loss than the other method's point there.

    The loss between neighbouring points of the front is taken as linear in sparsity. Resampled as in `front_gap`, of which
    the arguments are; a front that is everywhere worse gives -at (nothing may be skipped), one that is everywhere better
    its largest sparsity less `at`.
    """
    losses, weights, other = (np.asarray(a, dtype=np.float64) for a in (losses, weights, other))
    sparsity = np.asarray(sparsity, dtype=float)
    drawn = resample(len(weights), seed=seed)
    share = weights[drawn].sum(1)
    means, limits = np.stack([loss[drawn].sum(1) / share for loss in losses]), other[drawn].sum(1) / share
    found = np.array([_reached(sparsity, mean, limit) for mean, limit in zip(means.T, limits, strict=True)]) - at
    value = _reached(sparsity, losses.sum(1) / weights.sum(), other.sum() / weights.sum()) - at
    low, high = np.quantile(found, [0.025, 0.975])
    return Interval(float(value), float(min(low, value)), float(max(high, value)))


def _reached(sparsity: np.ndarray, loss: np.ndarray, limit: float) -> float:
    """The largest sparsity at which the front's loss is within the limit; (0, 0), the dense model, is always on it."""
    chain = [(0.0, 0.0), *((sparsity[i], loss[i]) for i in front(sparsity, -loss))]
    reached = 0.0
    for (x, a), (y, b) in zip(chain, chain[1:], strict=False):
        if b <= limit:
            reached = max(reached, y)
        elif a <= limit and b > a:
            reached = max(reached, x + (y - x) * (limit - a) / (b - a))
    return float(reached)


def _pair(sparsity: Sequence[float], quality: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    x, y = np.asarray(sparsity, dtype=float), np.asarray(quality, dtype=float)
    if x.shape != y.shape or x.ndim != 1:
        raise SparsityError(f"Points need one quality for each sparsity, got {x.shape} and {y.shape}.")
    return x, y
