"""N:M selection, the scores of its study and what patterns are worth, against slow references and by properties."""

import itertools
import math

import numpy as np
import pytest
import torch
from core_tiny import HIDDEN, WIDTH, numpy_of, seen_by, tiny, tokens
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from sparsity_lib import Recipe, Rule, SparsityError, account, find_sites, fit, fit_many, installed, recipes, weights_per_token
from sparsity_lib.methods.nm import PATTERNS, SCORES
from sparsity_lib.nm_facts import (
    DISTRIBUTIONS,
    choices,
    comparators,
    measured_energy,
    metadata_bits,
    patterns,
    retained_energy,
    retained_energy_unstructured,
)
from sparsity_lib.parts.nm import NofM, n_of_m_mask, pattern_of
from sparsity_lib.parts.norms import Amber
from sparsity_lib.parts.saliency import Saliency
from sparsity_lib.parts.select import exact_topk
from sparsity_lib.sites import Site

IDS = tokens(4, 12)
FEW = settings(max_examples=80, deadline=None)


@pytest.fixture(scope="module")
def model():
    return tiny("llama")


def reference(row, n, m):
    """Kept indices of one row: in every group the first n by (NaN first, then the larger, then the lower index)."""
    kept = []
    for start in range(0, len(row), m):
        group = range(start, min(start + m, len(row)))
        order = sorted(group, key=lambda j: (not math.isnan(row[j]), 0 if math.isnan(row[j]) else -row[j], j))
        kept += order[:n]
    return sorted(kept)


#: Any scores, few different ones, and odd ones.
VALUES = [st.floats(0, 1e6, width=32), st.integers(0, 3).map(float), st.sampled_from([0.0, 1.0, math.inf, math.nan])]


@st.composite
def cases(draw, pad=False, values=None):
    """Scores [rows, width], n and m; width a multiple of m unless `pad`."""
    m = draw(st.integers(1, 64))
    n = draw(st.integers(1, m))
    width = draw(st.integers(1, 3 * m)) if pad else m * draw(st.integers(1, 3))
    if values is None:
        values = draw(st.sampled_from(VALUES))
    rows = draw(arrays.arrays(np.float32, (draw(st.integers(1, 3)), width), elements=values))
    return torch.from_numpy(rows), n, m


@FEW
@given(cases() | cases(pad=True))
def test_masks_are_those_of_a_stable_sort_of_each_group(case):
    scores, n, m = case
    for dtype in (torch.float32, torch.bfloat16):
        given_scores = scores.to(dtype)
        mask = n_of_m_mask(given_scores, n, m, pad=True)
        assert mask.dtype == torch.bool and mask.shape == scores.shape
        for row, kept in zip(given_scores.float().tolist(), mask, strict=True):
            assert kept.nonzero()[:, 0].tolist() == reference(row, n, m)


@FEW
@given(cases())
def test_every_group_keeps_exactly_n(case):
    scores, n, m = case
    assert bool((n_of_m_mask(scores, n, m).unflatten(-1, (-1, m)).sum(-1) == n).all())


@pytest.mark.parametrize(("n", "m"), [*PATTERNS, (1, 4), (3, 4), (2, 8), (5, 8), (32, 64)])
def test_bfloat16_ties_and_constant_rows_keep_exactly_n(n, m):
    scores = torch.cat([torch.randn(40, 1024).abs().bfloat16().float(), torch.ones(2, 1024), torch.zeros(2, 1024)])
    mask = NofM(n, m)(scores, {}).unflatten(-1, (-1, m))
    assert bool((mask.sum(-1) == n).all())
    assert bool(mask[40:, :, :n].all()) and not bool(mask[40:, :, n:].any())


@FEW
@given(cases())
def test_masks_nest_so_that_twice_the_group_allows_all_of_them(case):
    """A mask of n:m is a valid mask of 2n:2m, which therefore never keeps less of the score's sum."""
    scores, n, m = case
    scores = torch.cat([scores, scores.flip(-1)], -1).nan_to_num(0, posinf=1e6)
    fine = n_of_m_mask(scores, n, m)
    pairs = fine.unflatten(-1, (-1, 2 * m)).sum(-1)
    assert bool((pairs == 2 * n).all())
    if 2 * m <= 64:
        coarse = n_of_m_mask(scores, 2 * n, 2 * m)
        assert bool(((scores.double() * coarse).sum(-1) >= (scores.double() * fine).sum(-1)).all())


@FEW
@given(cases(), st.integers(1, 64))
def test_masks_of_one_m_nest_as_n_grows(case, more):
    scores, n, m = case
    assert bool((n_of_m_mask(scores, n, m) <= n_of_m_mask(scores, max(n, min(m, more)), m)).all())


@FEW
@given(cases(values=st.floats(0, 1e6, width=32)), st.integers(-20, 20))
def test_pruning_twice_is_pruning_once_and_scale_does_not_matter(case, exponent):
    x, n, m = case
    mask = n_of_m_mask(x, n, m)
    once = x * mask
    assert torch.equal(once * n_of_m_mask(once, n, m), once)
    large = x.double()
    assert torch.equal(n_of_m_mask((large * 2.0**exponent), n, m), mask)


@FEW
@given(st.data())
def test_permuting_channels_inside_a_group_permutes_its_mask(data):
    m = data.draw(st.integers(1, 64))
    n = data.draw(st.integers(1, m))
    values = data.draw(st.permutations(range(2 * m)))  # all different: with ties the index decides
    order = data.draw(st.permutations(range(m)))
    scores = torch.tensor(values, dtype=torch.float32).view(2, m)
    assert torch.equal(n_of_m_mask(scores[:, order], n, m), n_of_m_mask(scores, n, m)[:, order])


def test_leading_shapes_other_dtypes_and_whole_rows():
    scores = torch.randint(0, 9, (2, 3, 5, 32)).float()
    before = scores.clone()
    mask = n_of_m_mask(scores, 3, 8)
    assert torch.equal(scores, before) and torch.equal(mask.view(-1, 32), n_of_m_mask(scores.view(-1, 32), 3, 8))
    assert torch.equal(mask, n_of_m_mask(scores.double(), 3, 8)) and torch.equal(mask, n_of_m_mask(scores.half(), 3, 8))
    strided = scores.movedim(-1, 0).contiguous().movedim(0, -1)
    assert torch.equal(mask, n_of_m_mask(strided, 3, 8))
    for m in (1, 2, 16, 32):
        assert bool(n_of_m_mask(scores, m, m).all())
    assert torch.equal(n_of_m_mask(scores, 7, 32), exact_topk(scores, 7))  # one group: a top-k of the token
    assert n_of_m_mask(scores[:0], 3, 8).shape == (0, 3, 5, 32)


def test_widths_that_m_does_not_divide_are_refused_or_padded():
    scores = torch.rand(5, 50)
    with pytest.raises(SparsityError, match=r"width = 50 is not divisible by M = 16.*2, 5, 10, 25, 50.*pad=True.* 2 channels"):
        n_of_m_mask(scores, 8, 16)
    mask = n_of_m_mask(scores, 8, 16, pad=True)
    zeros = n_of_m_mask(torch.nn.functional.pad(scores, (0, 14)), 8, 16)
    assert torch.equal(mask, zeros[:, :50]) and bool(mask[:, 48:].all())
    assert NofM(8, 16, pad=True).kept(50) == float(mask.double().mean()) == (3 * 8 + 2) / 50
    site = Site(3, "down_in", "block", 50, ("linear",))
    with pytest.raises(SparsityError, match=r"width of site 3.down_in = 50 .*M = 16"):
        NofM(8, 16).check(site)
    NofM(8, 16, pad=True).check(site)
    with pytest.raises(SparsityError, match="not divisible"):
        fit(recipes.nm(8, 32), tiny("llama"), ids=IDS)  # 48 channels at the down projection
    with pytest.raises(SparsityError, match="Fix: pad=True"):
        NofM(1, 4).kept(67)


@pytest.mark.parametrize(("n", "m"), [(0, 4), (5, 4), (-1, 4), (1, 65), (1, 0), (1.0, 4), (2, 4.0), (True, 4),
                                      ("2", 4), (2, None)])
def test_patterns_out_of_range_are_refused(n, m):
    with pytest.raises(SparsityError, match=r"[nm] = .* is not allowed"):
        NofM(n, m)
    with pytest.raises(SparsityError, match=r"[nm] = "):
        recipes.nm(n, m)


def test_densities_of_a_pattern():
    select = NofM(8, 16)
    assert select.density == 0.5 and select.with_density(0.25) == NofM(4, 16) and select.with_density(1e-9) == NofM(1, 16)
    assert select.with_density(0.3) == NofM(5, 16) and select.with_density(1.0) == NofM(16, 16)
    assert recipes.nm(2, 4).with_density(0.75) == recipes.nm(3, 4)
    assert recipes.nm_density(0.7, m=32) == recipes.nm(22, 32)
    for bad in (0, 1.5, "0.5", float("nan")):
        with pytest.raises(SparsityError, match="density"):
            select.with_density(bad)
    with pytest.raises(SparsityError, match="pad = 1"):
        NofM(2, 4, pad=1)


def test_patterns_as_texts():
    assert pattern_of("8:16") == (8, 16)
    for bad in ("8", "8:", ":4", "8/16", "-2:4", "5:4", "2:65", None, 3, "²:4"):
        with pytest.raises(SparsityError):
            pattern_of(bad)


# --- methods ---


def test_what_a_layer_reads_is_the_reference_on_its_own_input(model):
    plan = fit(recipes.nm(2, 4), model, ids=IDS)
    linear, got = model.model.layers[1].mlp.down_proj, []
    with installed(model, plan), torch.no_grad():
        handles = [linear.register_forward_pre_hook(lambda m, args: got.append(args[0].flatten(0, -2)), prepend=first)
                   for first in (True, False)]
        model(input_ids=IDS)
        for handle in handles:
            handle.remove()
    before, after = got
    for x, read in zip(before, after, strict=True):
        expected = torch.zeros_like(x)
        kept = reference(x.abs().tolist(), 2, 4)
        expected[kept] = x[kept]
        assert torch.equal(read, expected)


def test_the_whole_pattern_is_the_dense_model_bit_by_bit(model):
    for options in ({}, {"score": "clact"}, {"score": "amber"}, {"repair": "var"}, {"repair": "ls"}, {"transform": "lpts"}):
        plan = fit(recipes.nm(16, 16, **options), model, ids=IDS)
        with installed(model, plan), torch.no_grad():
            sparse = model(input_ids=IDS).logits
        with torch.no_grad():
            assert torch.equal(sparse, model(input_ids=IDS).logits)


def test_share_skipped_by_design_is_the_share_counted(model):
    sites, total = find_sites(model), weights_per_token(model)
    for recipe in (recipes.nm(2, 4), recipes.nm(3, 32, pad=True), recipes.nm(8, 16, dense=("o", "down_in")),
                   recipes.nm(8, 16, sites=("v", "gate")), recipes.rsparse(0.5, select="topk", rank_share=0.1),
                   recipes.nm(8, 16, repair=("ls", "low_rank"))):
        with installed(model, fit(recipe, model, ids=IDS)):
            assert account(model, ids=IDS).skipped == pytest.approx(recipe.skipped(sites, total), abs=1e-9)


def test_one_projection_alone_is_pruned(model):
    plan = fit(recipes.nm(8, 16, sites=("v",)), model, ids=IDS)
    attention = model.model.layers[0].self_attn
    with installed(model, plan):
        seen = {name: seen_by(model, getattr(attention, f"{name}_proj"), IDS) for name in "qkv"}
        counted = account(model, ids=IDS)
    assert torch.equal(seen["q"], seen["k"]) and bool((seen["q"] != 0).all())
    assert torch.equal(seen["v"], seen["q"] * n_of_m_mask(seen["q"].abs(), 8, 16))
    roles = counted.skipped_by_role
    assert roles["v"] > 0 and {role for role, share in roles.items() if share} == {"v"}
    assert Recipe.from_json(plan.recipe.dumps()) == plan.recipe
    assert "readers" not in recipes.nm().to_json()["rules"][0]


def test_rules_for_some_readers_only_have_their_own_norms(model):
    """Recipes fitted together share statistics; the norm of v's columns is not that of all three."""
    plans = fit_many([recipes.nm(score="wina", sites=s) for s in (("v",), ("qkv_in",), ("q", "k"))], model, ids=IDS)
    attention = model.model.layers[0].self_attn
    for plan, names in zip(plans, ("v", "qkv", "qk"), strict=True):
        stacked = np.concatenate([numpy_of(getattr(attention, f"{name}_proj").weight) for name in names])
        np.testing.assert_allclose(numpy_of(plan.tensors["0.qkv_in.norm"]), np.linalg.norm(stacked, axis=0), rtol=1e-6)


@pytest.mark.parametrize(("options", "message"), [
    ({"score": "clct"}, "score = 'clct' is unknown.*did you mean 'clact'"),
    ({"transform": "d-pts"}, "transform = 'd-pts' is unknown.*dpts"),
    ({"repair": ("var", "vra")}, "repair = 'vra' is unknown"),
    ({"repair": ("var", "var")}, "repair = .*each kind once"),
    ({"sites": ("qkv",)}, "sites = 'qkv' is unknown.*did you mean 'qkv_in'"),
    ({"sites": "q"}, r"sites = 'q' is not allowed.*a list"),
    ({"dense": ("qkv_in", "o_in", "up_in", "down")}, "leave no projection"),
    ({"score": 3}, "score = 3 is unknown"),
])
def test_bad_options_are_refused(options, message):
    with pytest.raises(SparsityError, match=message):
        recipes.nm(**options)


def test_bad_readers_are_refused(model):
    with pytest.raises(SparsityError, match="reader of site 0.up_in = 'upp' is unknown.*gate, up"):
        fit(Recipe("x", (Rule("up_in", NofM(2, 4), readers=("upp",)),)), model, ids=IDS)
    with pytest.raises(SparsityError, match="readers of the gate site"):
        Rule("gate", NofM(2, 4), readers=("down",))
    with pytest.raises(SparsityError, match="readers = 3"):
        Rule.from_json({"site": "up_in", "select": {"kind": "n_of_m", "n": 2, "m": 4}, "readers": 3})


def test_unstructured_is_top_k_of_the_inputs():
    assert recipes.unstructured(0.3).rules == recipes.inputs_topk(0.3).rules
    assert recipes.unstructured(0.5, score="clact", repair="var").method == "unstructured_clact_var"
    assert recipes.nm(score="clact", transform="dpts", repair=("var", "ls")).method == "nm_clact_dpts_var_ls"
    assert SCORES["gradient"] == Saliency("rms")


# --- scores ---


def test_clact_takes_column_norms_from_calibration_text(model):
    plan = fit(recipes.nm(score="clact"), model, ids=IDS)
    x = seen_by(model, model.model.layers[1].mlp.down_proj, IDS)
    norm = plan.tensors["1.down_in.norm"]
    expected = [math.sqrt(sum(float(v) ** 2 for v in column) / len(x)) for column in x.T]
    np.testing.assert_allclose(norm.numpy(), expected, rtol=1e-5)
    score = plan.recipe.rules[0].score
    token = torch.randn(WIDTH)
    by_hand = [abs(float(token[i])) * float(norm[i]) / float(token.norm()) for i in range(WIDTH)]
    np.testing.assert_allclose(score(token, {"norm": norm}).numpy(), by_hand, rtol=1e-5)
    batch = torch.stack([token, 100 * token])  # another token in the batch changes nothing
    torch.testing.assert_close(score(batch, {"norm": norm})[0], score(token, {"norm": norm}))
    assert bool((score(torch.zeros(2, WIDTH), {"norm": norm}) == 0).all())


def standardised(weight):
    low, high = np.quantile(weight, 0.005), np.quantile(weight, 0.995)
    inside = [v for v in weight.flatten() if low <= v <= high]
    mean = sum(inside) / len(inside)
    std = math.sqrt(sum((v - mean) ** 2 for v in inside) / len(inside))
    return np.where((weight >= low) & (weight <= high), (weight - mean) / std, 0)


def test_amber_standardises_each_reader_and_divides_by_the_least_norm(model):
    plan = fit(recipes.nm(score="amber"), model, ids=IDS)
    attention = model.model.layers[0].self_attn
    square = sum((standardised(numpy_of(getattr(attention, f"{n}_proj").weight)) ** 2).sum(0) for n in "qkv")
    norms = np.sqrt(square)
    np.testing.assert_allclose(plan.tensors["0.qkv_in.norm"].numpy(), norms / norms.min(), rtol=1e-5)
    assert float(plan.tensors["0.qkv_in.norm"].min()) == 1.0
    token = torch.randn(HIDDEN)
    scores = plan.recipe.rules[0].score(token, {"norm": plan.tensors["0.qkv_in.norm"]})
    np.testing.assert_allclose(scores.numpy(), np.abs(token.numpy()) * norms / norms.min(), rtol=1e-5)


def test_amber_leaves_outliers_out():
    weight = torch.randn(40, 50)
    weight[3, 7] = 1e4
    made = Amber().standardised(weight)
    assert float(made[3, 7]) == 0 and float(made.abs().max()) < 4
    assert not bool(Amber().standardised(torch.ones(3, 4)).any())
    for bad in (0.5, -0.1, "x", None):
        with pytest.raises(SparsityError, match="outliers"):
            Amber(bad)


def test_the_gradient_score_is_the_rms_gradient_at_any_input(model):
    plan = fit(recipes.nm(score="gradient"), model, ids=IDS)
    grads = []
    linear = model.model.layers[0].mlp.down_proj
    handle = linear.register_forward_pre_hook(lambda m, args: args[0].register_hook(grads.append) and None)
    logits = model(input_ids=IDS).logits[:, :-1].flatten(0, 1)
    torch.nn.functional.cross_entropy(logits, IDS[:, 1:].flatten(), reduction="sum").backward()
    handle.remove()
    model.zero_grad()
    rms = grads[0].flatten(0, 1).square().mean(0).sqrt()
    torch.testing.assert_close(plan.tensors["0.down_in.saliency"], rms / rms.mean(), rtol=1e-3, atol=1e-5)


def test_a_gradient_through_some_readers_leaves_the_others_out(model):
    """Fitted together, and for v alone the gradient at a copy of its input that nobody else reads."""
    wanted = (("v",), ("qkv_in",), ("q", "k"), ("qkv_in",))
    scores = ("gradient", "gradient", "gradient", "act")
    plans = fit_many([recipes.nm(score=c, sites=s) for s, c in zip(wanted, scores, strict=True)], model, ids=IDS)
    alone = [fit(recipes.nm(score="gradient", sites=s), model, ids=IDS) for s in wanted[:3]]
    for together, own in zip(plans, alone, strict=False):
        assert torch.equal(together.tensors["0.qkv_in.saliency"], own.tensors["0.qkv_in.saliency"])

    grads, attention = [], model.model.layers[0].self_attn

    def copied(module, args):
        x = args[0].clone()
        x.register_hook(grads.append)
        return (x, *args[1:])

    handle = attention.v_proj.register_forward_pre_hook(copied)
    logits = model(input_ids=IDS).logits[:, :-1].flatten(0, 1)
    torch.nn.functional.cross_entropy(logits, IDS[:, 1:].flatten(), reduction="sum").backward()
    handle.remove()
    model.zero_grad()
    rms = grads[0].flatten(0, 1).square().mean(0).sqrt()
    torch.testing.assert_close(plans[0].tensors["0.qkv_in.saliency"], rms / rms.mean(), rtol=1e-3, atol=1e-5)
    assert not torch.allclose(plans[1].tensors["0.qkv_in.saliency"], plans[0].tensors["0.qkv_in.saliency"], rtol=0.05)


# --- facts ---


def test_costs_of_selecting_in_hardware():
    for m, expected in ((2, 1), (4, 6), (8, 24), (16, 80), (32, 240)):  # Batcher's counts for a whole group
        assert comparators(m) * m == expected
    for n, m in PATTERNS:
        firsts = {sorted(kept)[0] for kept in itertools.combinations(range(m), n)} if m <= 8 else set(range(m - n + 1))
        assert choices(n, m) == len(firsts)
    for bad in (1, 6, 2.0):
        with pytest.raises(SparsityError, match="m = "):
            comparators(bad)


def test_metadata_and_pattern_counts():
    assert [round(metadata_bits(n, m), 3) for n, m in PATTERNS] == [0.646, 0.766, 0.853, 0.911]
    assert patterns(2, 4) == 6 and patterns(2, 4, 16) == 1296 and patterns(4, 8, 16) == 4900 and patterns(8, 16) == 12870
    assert metadata_bits(4, 4) == 0
    for call in (lambda: patterns(2, 4, 10), lambda: patterns(5, 4), lambda: metadata_bits(0, 4), lambda: patterns(1.5, 4)):
        with pytest.raises(SparsityError):
            call()


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize(("n", "m"), [*PATTERNS, (1, 4), (3, 10)])
def test_retained_energy_against_monte_carlo(distribution, n, m):
    random = np.random.default_rng(0)
    draw = random.normal if distribution == "gaussian" else random.laplace
    square = np.sort(draw(size=(200_000 // m, m)) ** 2, axis=1)
    share = square[:, -n:].sum() / square.sum()
    assert retained_energy(n, m, distribution) == pytest.approx(share, abs=0.006)


def test_retained_energy_has_its_limits():
    for distribution in DISTRIBUTIONS:
        rising = [retained_energy(n, 2 * n, distribution) for n in (1, 2, 4, 8, 16, 500)]
        limit = retained_energy_unstructured(0.5, distribution)
        assert rising == sorted(rising) and rising[-1] < limit and limit - rising[-1] < 1e-3
        assert retained_energy(4, 4, distribution) == 1 == pytest.approx(retained_energy_unstructured(1.0, distribution))
        assert sum(retained_energy(n, 8, distribution) - (retained_energy(n - 1, 8, distribution) if n > 1 else 0)
                   for n in range(1, 9)) == pytest.approx(1)
    # the larger of two Gaussians: E[max(a^2, b^2)] = 1 + 2 / pi
    assert retained_energy(1, 2) == pytest.approx(0.5 + 1 / math.pi, abs=1e-9)
    with pytest.raises(SparsityError, match="distribution = 'normal'"):
        retained_energy(2, 4, "normal")


def test_measured_energy_is_that_of_the_mask():
    x = torch.randn(64, 4096, generator=torch.Generator().manual_seed(0))
    mask = n_of_m_mask(x.abs(), 8, 16)
    assert measured_energy(x, mask) == pytest.approx(retained_energy(8, 16), abs=2e-3)
    assert measured_energy(x.bfloat16(), torch.ones_like(mask)) == 1.0
    with pytest.raises(SparsityError, match="mask"):
        measured_energy(x, mask[:, :5])
