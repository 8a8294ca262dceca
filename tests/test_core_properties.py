"""Properties that hold for any numbers: selections, histograms, measures of skewness and likeness."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from sparsity_lib import Rule, SparsityError
from sparsity_lib.analysis import gini, jaccard, lorenz, spearman, spread
from sparsity_lib.collectors import GradientSize, LogHistogram
from sparsity_lib.parts.base import from_json
from sparsity_lib.parts.scores import Magnitude, Random
from sparsity_lib.parts.select import Threshold, TopK, exact_topk
from sparsity_lib.sites import Site
from sparsity_lib.sparsifier import Sparsifier

FEW = settings(max_examples=60, deadline=None)
DENSITY = st.floats(0.001, 1)
FLOATS = st.floats(-1e6, 1e6, width=32)
ROWS = arrays.arrays(np.float32, st.tuples(st.integers(1, 4), st.integers(1, 24)), elements=FLOATS)
#: Few distinct values, so that most rows have ties.
TIED = arrays.arrays(np.float32, st.tuples(st.integers(1, 4), st.integers(1, 24)), elements=st.integers(0, 3).map(float))


def topk(scores, density):
    return TopK(density)(torch.as_tensor(scores).abs(), {})


def reference_topk(row, k):
    """Python's sort is stable: of equal scores the lower index wins."""
    return sorted(sorted(range(len(row)), key=lambda j: -row[j])[:k])


@FEW
@given(ROWS | TIED, st.integers(0, 24))
def test_exactly_k_are_kept_and_ties_go_to_the_lower_index(rows, k):
    k = min(k, rows.shape[1])
    for dtype in (torch.float32, torch.bfloat16):
        scores = torch.from_numpy(rows).to(dtype)
        for row, kept in zip(scores.tolist(), exact_topk(scores, k), strict=True):
            assert kept.nonzero()[:, 0].tolist() == reference_topk(row, k)


def test_bfloat16_and_constant_rows_keep_exactly_k():
    rows = torch.cat([torch.randn(50, 512).bfloat16(), torch.ones(3, 512, dtype=torch.bfloat16), torch.zeros(2, 512).bfloat16()])
    for density in (0.1, 0.5, 0.9):
        mask = topk(rows, density)
        k = round(density * 512)
        assert bool((mask.sum(-1) == k).all())
        assert bool(mask[50:, :k].all()) and not bool(mask[50:, k:].any())


def test_a_selection_works_on_any_leading_shape_and_leaves_scores_alone():
    scores = torch.randint(0, 4, (2, 3, 5, 16)).float()
    before = scores.clone()
    mask = exact_topk(scores, 4)
    assert mask.shape == scores.shape and torch.equal(scores, before)
    assert torch.equal(mask.view(-1, 16), exact_topk(scores.view(-1, 16), 4))
    for k in (-1, 17):
        with pytest.raises(SparsityError, match=r"k = .*\[0, 16\]"):
            exact_topk(scores, k)


@FEW
@given(ROWS | TIED, DENSITY, DENSITY)
def test_masks_nest_as_the_density_grows(rows, a, b):
    small, large = topk(rows, min(a, b)), topk(rows, max(a, b))
    assert bool((small <= large).all())
    few = Threshold(0.5)(torch.from_numpy(rows).abs(), {"threshold": torch.tensor([2.0])})
    many = Threshold(0.5)(torch.from_numpy(rows).abs(), {"threshold": torch.tensor([1.0])})
    assert bool((few <= many).all())


@FEW
@given(ROWS | TIED, DENSITY, st.integers(-20, 20))
def test_the_scale_of_the_scores_does_not_matter(rows, density, exponent):
    assert torch.equal(topk(rows, density), topk(rows * np.float32(2.0**exponent), density))


@FEW
@given(ROWS | TIED)
def test_zero_sparsity_changes_nothing(rows):
    x = torch.from_numpy(rows)[None]
    site = Site(0, "up_in", "block", x.shape[-1], ("linear",))
    for select, tensors in ((TopK(1.0), {}), (Threshold(1.0), Threshold(1.0).fit(None, site))):
        sparsifier = Sparsifier(Rule("up_in", select), site)
        for name, tensor in tensors.items():
            sparsifier.get_buffer(name).copy_(tensor)
        assert torch.equal(sparsifier(x), x)


@FEW
@given(ROWS, st.integers(0, 2**32 - 1))
def test_random_masks_depend_on_their_token_alone(rows, seed):
    x, score = torch.from_numpy(rows), Random(seed)
    together = score(x[None], {})[0]
    for row, scores in zip(x, together, strict=True):
        assert torch.equal(score(row, {}), scores)
        assert torch.equal(score(row[None, None], {})[0, 0], scores)
    assert bool(((together >= 0) & (together < 2**24)).all()) and torch.equal(score(x.flip(0), {}), together.flip(0))


@FEW
@given(ROWS, st.floats(0, 0.999))
def test_a_sparsifier_keeps_values_whole_or_drops_them(rows, share):
    x = torch.from_numpy(rows)
    site = Site(0, "up_in", "block", x.shape[-1], ("linear",))
    out = Sparsifier(Rule("up_in", TopK(max(0.01, share)), Magnitude()), site)(x)
    assert bool(((out == x) | (out == 0)).all())


POSITIVE = st.floats(-10, 10).map(lambda e: np.float32(10.0**e))


@FEW
@given(st.lists(POSITIVE, min_size=1, max_size=200), st.sampled_from([0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99, 1.0]))
def test_histogram_quantiles_are_within_two_per_mille_over_twenty_orders_of_magnitude(values, level):
    histogram = LogHistogram()
    for start in range(0, len(values), 7):
        histogram.update(torch.tensor(values[start : start + 7]))
    ordered = sorted(float(v) for v in values)
    exact = ordered[max(1, math.ceil(level * len(values))) - 1]
    assert abs(histogram.quantile(level) / exact - 1) <= 2.0**-9


def test_histogram_quantiles_agree_with_numpy_on_smooth_data():
    values = torch.exp(8 * torch.randn(200_000, generator=torch.Generator().manual_seed(0)))
    histogram = LogHistogram()
    histogram.update(values)
    for level in (0.001, 0.1, 0.3, 0.5, 0.7, 0.9, 0.999):
        exact = np.quantile(values.double().numpy(), level, method="inverted_cdf")
        assert histogram.quantile(level) == pytest.approx(exact, rel=2.0**-9)


def test_a_histogram_of_zeros_drops_the_zeros_only():
    histogram = LogHistogram()
    histogram.update(torch.cat([torch.zeros(70), torch.full((30,), 1e-6)]))
    assert 0 <= histogram.quantile(0.5) < 1e-30
    assert histogram.quantile(0.7) < 1e-30 and histogram.quantile(0.71) == pytest.approx(1e-6, rel=2.0**-9)
    with pytest.raises(SparsityError, match="before any calibration text"):
        LogHistogram().quantile(0.5)


@FEW
@given(st.lists(st.floats(-9, 2).map(lambda e: 10.0**e), min_size=1, max_size=80))
def test_the_median_gradient_lies_in_the_true_ones_bin(sizes):
    collector = GradientSize(1, median=True)
    collector.update(torch.zeros(len(sizes), 1), torch.tensor(sizes)[:, None])
    exact = float(sorted(torch.tensor(sizes).tolist())[(len(sizes) + 1) // 2 - 1])
    assert abs(float(collector.result()["median"]) / exact - 1) <= 0.125 + 1e-6


NONNEGATIVE = arrays.arrays(np.float64, st.tuples(st.integers(1, 4), st.integers(1, 30)), elements=st.floats(0, 1e6))
ROUNDING = 1e-9


@FEW
@given(NONNEGATIVE)
def test_gini_is_a_share_and_ignores_scale_and_order(values):
    x = torch.from_numpy(values)
    found = gini(x)
    assert found.shape == x.shape[:-1] and bool(((found > -ROUNDING) & (found < 1)).all())
    torch.testing.assert_close(gini(4 * x), found, rtol=0, atol=ROUNDING)
    torch.testing.assert_close(gini(x.flip(-1)), found, rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("constant", [0.0, 1e-12, 1.0, 7e5])
def test_gini_of_constants_is_zero(constant):
    assert float(gini(torch.full((1, 9), constant)).abs().max()) < ROUNDING


def test_gini_by_its_definition():
    x = np.abs(np.random.default_rng(0).normal(size=40))
    pairs = np.abs(x[:, None] - x[None]).sum()
    assert float(gini(torch.from_numpy(x))) == pytest.approx(pairs / (2 * len(x) ** 2 * x.mean()), abs=1e-12)
    one = torch.zeros(10)
    one[3] = 5
    assert float(gini(one)) == pytest.approx(0.9)


@FEW
@given(NONNEGATIVE.filter(lambda v: (v.sum(-1) > 1e-6).all()))
def test_lorenz_curves_rise_and_bend_upwards(values):
    share, held = lorenz(torch.from_numpy(values), points=51)
    assert held[0] == 0 and held[-1] == pytest.approx(1) and share[0] == 0 and share[-1] == 1
    steps = np.diff(held)
    assert (steps >= -ROUNDING).all() and (np.diff(steps) >= -ROUNDING).all() and (held <= share + ROUNDING).all()


def test_lorenz_and_gini_are_two_views_of_one_thing():
    values = torch.rand(1, 1000, dtype=torch.float64) ** 3
    share, held = lorenz(values, points=1001)
    area = np.trapezoid(held, share)
    assert float(gini(values)[0]) == pytest.approx(1 - 2 * area, abs=1e-9)
    for bad in (-values, values[0], values[:0]):
        with pytest.raises(SparsityError, match="values"):
            lorenz(bad)


MASKS = st.integers(1, 12).flatmap(lambda n: st.tuples(*[arrays.arrays(np.bool_, (3, n))] * 2))


@FEW
@given(MASKS)
def test_jaccard_is_symmetric_and_a_share(masks):
    a, b = (torch.from_numpy(m) for m in masks)
    found = jaccard(a, b)
    assert torch.equal(found, jaccard(b, a)) and bool(((found >= 0) & (found <= 1)).all())
    assert bool((jaccard(a, a) == 1).all())
    for left, right, value in zip(a.tolist(), b.tolist(), found.tolist(), strict=True):
        both = {i for i, x in enumerate(left) if x} & {i for i, x in enumerate(right) if x}
        either = {i for i, x in enumerate(left) if x} | {i for i, x in enumerate(right) if x}
        assert value == pytest.approx(len(both) / len(either) if either else 1)


def test_spearman_follows_ranks():
    x = torch.rand(3, 50)
    np.testing.assert_allclose(spearman(x, x.exp()), 1, atol=1e-12)
    np.testing.assert_allclose(spearman(x, -(x**3)), -1, atol=1e-12)
    assert spearman(torch.ones(1, 5), x[:1, :5])[0] == 0


def test_spread_of_a_constant_is_none():
    assert spread(torch.full((20,), 3.0)) == {"cv": 0.0, "p90_p10": 1.0}
    assert spread(torch.arange(1.0, 101))["p90_p10"] == pytest.approx(90.1 / 10.9)


def test_parts_with_equal_parameters_share_a_key():
    one, two = (from_json("select", {"kind": "topk", "density": d}) for d in (0.5, 0.25))
    assert one.key() == TopK(0.5).key() != two.key()
