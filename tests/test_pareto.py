"""Fronts of sparsity and quality against a slow reading of what "beaten" means, and gaps between fronts."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsity_lib.errors import SparsityError
from sparsity_lib.pareto import best_at, front, front_gap, sparsity_gain

LEVELS = st.sampled_from([0.0, 0.25, 0.5, 1.0, math.nan])


def slow_front(points):
    """Every point that no other one beats; of equal points the first."""
    kept = []
    for i, (x, y) in enumerate(points):
        if math.isnan(x) or math.isnan(y):
            continue
        beaten = any(a >= x and b >= y and (a > x or b > y) for a, b in points)
        if not beaten and (x, y) not in points[:i]:
            kept.append(i)
    return sorted(kept, key=lambda i: points[i][0])


@given(st.lists(st.tuples(LEVELS, LEVELS), max_size=9))
def test_the_front_is_what_nothing_beats(points):
    x, y = [p[0] for p in points], [p[1] for p in points]
    assert front(x, y) == slow_front(points)


def test_ties_duplicates_and_nan():
    assert front([0.5, 0.5, 0.5], [1.0, 2.0, 2.0]) == [1]
    assert front([0.1, 0.2, 0.3], [1.0, 1.0, 1.0]) == [2]
    assert front([math.nan, 0.1], [1.0, math.nan]) == [] and front([], []) == []
    assert front([0.1, 0.2], [-math.inf, -math.inf]) == [1]
    with pytest.raises(SparsityError, match="one quality for each"):
        front([0.1], [])


def test_the_best_of_those_sparse_enough():
    x, y = [0.2, 0.4, 0.6, 0.4], [9.0, 5.0, 5.0, math.nan]
    assert best_at(x, y, 0.1) == 0 and best_at(x, y, 0.3) == 2 and best_at(x, y, 0.7) is None
    assert best_at(x, y, 0.405, slack=0.01) == 2 and best_at([0.395], [1.0], 0.4, slack=0.01) == 0


def test_a_gap_is_paired_and_takes_the_best_point():
    tokens = np.array([10.0, 30.0, 20.0, 40.0])
    cats = np.array([5.0, 9.0, 8.0, 4.0])
    losses = np.stack([cats - 0.2 * tokens, cats - 0.1 * tokens, cats + tokens])
    found = front_gap([0.2, 0.4, 0.6], losses, tokens, cats, 0.4)
    # the point at 0.2 would be better, but is not sparse enough; a constant difference leaves no uncertainty
    assert found.value == pytest.approx(-0.1) and found.low == pytest.approx(-0.1) and found.high == pytest.approx(-0.1)
    with pytest.raises(SparsityError, match="No point is as sparse"):
        front_gap([0.2, 0.4, 0.6], losses, tokens, cats, 0.7)
    with pytest.raises(SparsityError, match="points, units"):
        front_gap([0.2, 0.4], losses, tokens, cats, 0.2)


def test_choosing_anew_widens_the_interval():
    rng = np.random.default_rng(0)
    losses, cats = rng.normal(1, 0.5, (3, 40)), rng.normal(1, 0.5, 40)
    found = front_gap([0.5] * 3, losses, np.ones(40), cats, 0.5)
    alone = front_gap([0.5], losses[[int(losses.sum(1).argmin())]], np.ones(40), cats, 0.5)
    assert found.value == alone.value and found.low <= alone.low and found.low < found.high


def test_sparsity_at_equal_loss_is_read_between_points():
    tokens = np.ones(3)
    losses = np.array([[1.0] * 3, [3.0] * 3])
    assert sparsity_gain([0.2, 0.4], losses, tokens, np.full(3, 2.0), 0.1).value == pytest.approx(0.2)  # halfway: 0.3
    assert sparsity_gain([0.2, 0.4], losses, tokens, np.full(3, 9.0), 0.1).value == pytest.approx(0.3)  # all of it
    assert sparsity_gain([0.2, 0.4], losses, tokens, np.full(3, 0.5), 0.1).value == pytest.approx(0.0)  # 0.1, from the dense end
    beaten = np.array([[4.0] * 3, [1.0] * 3])  # the milder point is on no front
    assert sparsity_gain([0.2, 0.4], beaten, tokens, np.full(3, 0.5), 0.1).value == pytest.approx(0.1)
