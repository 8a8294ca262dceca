"""Bootstrap intervals: what they must contain, and what is refused."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from sparsity_lib import SparsityError
from sparsity_lib.evaluate.bootstrap import Interval, mean_interval, median_interval, median_of_groups, ratio_interval, resample
from sparsity_lib.evaluate.quality import Quality, difference


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(20, 200), st.floats(-5, 5), st.floats(0.1, 3))
def test_an_interval_contains_its_estimate(seed, units, centre, width):
    found = mean_interval(np.random.default_rng(seed).normal(centre, width, units))
    assert found.low <= found.value <= found.high


def test_an_interval_agrees_with_scipys():
    values = np.random.default_rng(1).gamma(2, size=300)
    theirs = stats.bootstrap((values,), np.mean, n_resamples=2000, method="percentile", rng=np.random.default_rng(0))
    ours = mean_interval(values)
    width = theirs.confidence_interval.high - theirs.confidence_interval.low
    # Two sets of 2000 resamples: each end has a standard error of about 3% of the width.
    assert ours.low == pytest.approx(theirs.confidence_interval.low, abs=0.12 * width)
    assert ours.high == pytest.approx(theirs.confidence_interval.high, abs=0.12 * width)
    assert ours.value == values.mean()


def test_an_interval_is_the_middle_of_its_resamples():
    values = np.random.default_rng(2).gamma(2, size=30)
    drawn = np.sort([values[row].mean() for row in resample(30, 200, seed=4)])
    found = mean_interval(values, resamples=200, seed=4, level=0.8)
    assert drawn[19] <= found.low <= drawn[20] and drawn[179] <= found.high <= drawn[180]


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    hits = 0
    for seed in range(200):
        found = mean_interval(np.random.default_rng(seed).normal(size=60), resamples=400, seed=seed)
        hits += found.low <= 0 <= found.high
    assert 0.88 <= hits / 200 <= 0.985  # 95%, less a little at 60 units, within 4 standard errors


def test_a_ratio_weighs_its_units():
    assert ratio_interval([1, 9], [1, 3]).value == 2.5
    assert ratio_interval([2, 6], [1, 3], transform=np.exp) == Interval(*[pytest.approx(np.exp(2))] * 3)


def test_one_unit_and_equal_units_have_no_width():
    for values in ([3.0], [3.0] * 5):
        assert mean_interval(values).to_json() == [3.0, 3.0, 3.0]


def test_equal_arguments_give_equal_resamples():
    assert np.array_equal(resample(7, 50, seed=3), resample(7, 50, seed=3))
    assert not np.array_equal(resample(7, 50, seed=3), resample(7, 50, seed=4))
    assert set(np.unique(resample(7))) == set(range(7))


def test_a_wider_level_gives_a_wider_interval():
    values = np.random.default_rng(0).normal(size=50)
    narrow, wide = (mean_interval(values, level=level) for level in (0.5, 0.99))
    assert wide.low < narrow.low < narrow.high < wide.high


def test_intervals_apart():
    assert Interval(1, 0, 2).below(Interval(4, 3, 5))
    assert not Interval(1, 0, 2).below(Interval(2, 1, 3)) and not Interval(4, 3, 5).below(Interval(1, 0, 2))


@pytest.mark.parametrize(("sums", "weights", "options"), [
    ([], [], {}), ([1, 2], [1], {}), ([[1]], [[1]], {}), ([1], [1], {"level": 1}), ([1], [1], {"level": 0}),
    ([1], [1], {"resamples": 0}), ([1], [1], {"resamples": 2.5}), ([1.0], [0.0], {}), ([float("nan")], [1], {}),
])
def test_bad_arguments_are_refused(sums, weights, options):
    with pytest.raises(SparsityError):
        ratio_interval(sums, weights, **options)


def quality(kl):
    return Quality(tuple(2 * k for k in kl), tuple(kl), (1.0,) * len(kl), (4,) * len(kl))


def test_the_paired_difference_of_one_thing_with_itself_is_nothing():
    some = quality(np.random.default_rng(0).gamma(1, size=20))
    assert difference(some, some) == Interval(0, 0, 0) == difference(some, some, "nll")


def test_pairs_see_a_small_difference_that_overlapping_intervals_hide():
    base = np.random.default_rng(0).gamma(1, size=40)
    a, b = quality(base), quality(base + 0.01)
    assert not a.divergence().below(b.divergence())
    assert difference(a, b).high < 0 and difference(b, a).low > 0
    assert difference(a, b).value == pytest.approx(-0.01 / 4)


def test_only_pairs_can_be_paired():
    with pytest.raises(SparsityError, match="same sequences"):
        difference(quality([1.0]), quality([1.0, 2.0]))
    with pytest.raises(SparsityError, match="expected kl or nll"):
        difference(quality([1.0]), quality([1.0]), "ppl")


def test_a_median_lies_in_its_interval_and_knows_its_units():
    values = np.random.default_rng(0).normal(3, 1, 200)
    found = median_interval(values)
    assert found.low < found.value == np.median(values) < found.high and found == median_interval(list(values))
    assert median_interval([2.0]).to_json() == [2.0, 2.0, 2.0]
    narrow = median_interval(np.tile(values, 16))
    assert narrow.high - narrow.low < 0.5 * (found.high - found.low)


def test_a_median_over_groups_knows_what_a_group_is_worth():
    rng = np.random.default_rng(3)
    alike = 1 + 0.01 * rng.standard_normal((5, 12))
    apart = alike + np.array([[-0.2], [-0.1], [0.0], [0.1], [0.2]])
    near, far = median_of_groups(alike)[0], median_of_groups(apart)[0]
    assert near.high - near.low < 0.02 < 0.1 < far.high - far.low and far.low < far.value < far.high
    assert near.value == np.median(np.median(alike, axis=1)) and median_of_groups([[2.0]])[0].to_json() == [2.0, 2.0, 2.0]
    # equal seeds draw the same groups: what two share cancels
    other = median_of_groups(apart + 0.05)[1] - median_of_groups(apart)[1]
    assert np.allclose(other, 0.05)
