"""Costs of dropping and a budget shared by them, against slow references."""

import itertools
import math
import sys

import numpy as np
import pytest
import torch
from core_tiny import HIDDEN, LAYERS, VOCABULARY, tiny, tokens
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsity_lib import Recipe, Rule, SparsityError, account, fit, installed, recipes
from sparsity_lib.parts.select import Threshold, TopK
from sparsity_lib.parts.transforms import Rotate
from sparsity_lib.sensitivity import Curves, curves

IDS = tokens(3, 12)


@pytest.fixture(scope="module")
def model():
    return tiny("llama")


def gradients(model, module):
    """x and dL/dx at the input of `module` by autograd alone, L the next-token loss summed over tokens; [tokens, width]."""
    seen, found = [], []
    handle = module.register_forward_pre_hook(lambda m, a: (seen.append(a[0]), a[0].retain_grad())[0])
    for row in IDS:
        model.zero_grad()
        logits = model(row[None]).logits[0, :-1]
        torch.nn.functional.cross_entropy(logits, row[1:], reduction="sum").backward()
        found.append((seen[-1].detach()[0], seen[-1].grad[0]))
    handle.remove()
    return (torch.cat(each).double().numpy() for each in zip(*found, strict=True))


@pytest.mark.parametrize("rotate", [False, True])
def test_costs_are_half_the_mean_square_of_what_is_dropped_times_the_gradient(model, rotate):
    rule = Rule("up_in", TopK(0.5), transform=Rotate()) if rotate else Rule("up_in", TopK(0.5))
    plan = fit(Recipe("r", (rule,)), model, ids=IDS)
    found = curves(plan, model, ids=IDS, levels=(0.0, 0.25, 0.75))
    x, grad = gradients(model, model.model.layers[1].mlp.gate_proj)
    _, other = gradients(model, model.model.layers[1].mlp.up_proj)
    grad = grad  # q, k, v share one tensor, and so do gate and up: autograd adds both paths up at it
    assert np.allclose(grad, other)
    basis = plan.tensors["1.up_in.rotation"].double().numpy() if rotate else np.eye(HIDDEN)
    for level, cost in zip(found.levels, found.costs["1.up_in"], strict=True):
        total, dropped = 0.0, HIDDEN - max(1, round((1 - level) * HIDDEN)) if level else 0
        for token, g in zip(x @ basis, grad @ basis, strict=True):
            smallest = sorted(range(HIDDEN), key=lambda i: abs(token[i]))[:dropped]
            total += 0.5 * sum(token[i] * g[i] for i in smallest) ** 2
        assert cost == pytest.approx(total / len(x), rel=1e-3, abs=1e-12)


def test_costs_foresee_what_a_little_dropping_does(model):
    from sparsity_lib.evaluate.quality import evaluate

    text = tokens(8, 24, seed=3)
    plan = fit(recipes.inputs_topk(0.9), model, ids=text)
    foreseen = sum(cost[1] for cost in curves(plan, model, ids=text, levels=(0.0, 0.1)).costs.values())
    measured = evaluate(model, {"x": plan}, text)["x"].divergence().value
    assert 0.2 < foreseen / measured < 5  # labels are random here, the Fisher takes them for the model's own


def test_the_heads_costs_are_its_own_divergence(model):
    plan = fit(Recipe("h", (recipes.head_rule(0.5, refine=0.1),)), model, ids=IDS)
    found = curves(plan, model, ids=IDS, levels=(0.0, 0.5, 0.75), every=5)
    with torch.no_grad():
        hidden = model.model(IDS[0:1]).last_hidden_state[0]
        rows = torch.cat([model.model(row[None]).last_hidden_state[0][::5] for row in IDS])
        dense = model.lm_head(rows).log_softmax(-1)
        with installed(model, fit(Recipe("h", (recipes.head_rule(0.25, refine=0.1),)), model, ids=IDS)):
            own = model.lm_head(rows).log_softmax(-1)
    expected = float((dense.exp() * (dense - own)).sum(-1).mean())
    assert hidden.shape[-1] == HIDDEN and found.costs[f"{LAYERS - 1}.head_in"][2] == pytest.approx(expected, rel=1e-3)
    assert found.fixed == round(0.1 * VOCABULARY) * HIDDEN


def test_selections_are_taken_as_the_largest_whatever_the_rule_says(model):
    """A threshold stays that of the density it was fitted to: it cannot stand for other levels."""
    found = {}
    for select in (TopK(0.5), Threshold(0.5)):
        plan = fit(Recipe("r", (Rule("o_in", select), Rule("head_in", select))), model, ids=IDS)
        found[select.kind] = curves(plan, model, ids=IDS, every=3).costs
    assert found["topk"] == found["threshold"]


def made(costs, weights, fixed=0, total=None):
    levels = tuple(i / (len(next(iter(costs.values()))) - 1) * 0.8 for i in range(len(next(iter(costs.values())))))
    return Curves(recipes.inputs_topk(0.5), levels, costs, weights, fixed, total or sum(weights.values()))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.floats(0.001, 1), min_size=4, max_size=4), min_size=3, max_size=3),
       st.lists(st.integers(1, 9), min_size=3, max_size=3), st.floats(0.05, 0.75))
def test_no_mix_of_levels_is_cheaper_at_the_same_budget(steps, sizes, share):
    names = ("0.qkv_in", "0.o_in", "1.up_in")
    costs = {n: tuple(itertools.accumulate([0.0, *s])) for n, s in zip(names, steps, strict=True)}
    found = made(costs, dict(zip(names, sizes, strict=True)))
    sparsity = found.at(share)
    saved = sum(found.weights[n] * sparsity[n] for n in names)
    assert saved == pytest.approx(share * found.total)

    def hull(name, s):  # the least cost of a mix of two levels with mean s
        points = list(zip(found.levels, costs[name], strict=True))
        return min((c1 + (c2 - c1) * ((s - l1) / (l2 - l1) if l2 > l1 else 0)) for l1, c1 in points for l2, c2 in points
                   if l1 <= s + 1e-9 and s <= l2 + 1e-9)

    mine = sum(hull(n, sparsity[n]) for n in names)
    for mix in itertools.product(found.levels, repeat=3):
        if sum(found.weights[n] * s for n, s in zip(names, mix, strict=True)) >= saved - 1e-9:
            assert mine <= sum(costs[n][found.levels.index(s)] for n, s in zip(names, mix, strict=True)) + 1e-9


def test_a_spread_recipe_skips_the_share_it_was_made_for(model):
    (recipe,) = recipes.spread(model, shares=[0.4], costs={"ids": IDS}, rotate="ffn", refine=0.1)
    plan = fit(recipe, model, ids=IDS)
    with installed(model, plan):
        counted = account(model, ids=IDS)
    rotations = counted.transform_weights / counted.dense_weights
    assert rotations > 0.1 and counted.skipped - rotations == pytest.approx(0.4, abs=0.02) and recipe.allocation is not None
    assert len(set(recipe.allocation.densities["down_in"])) > 1 and Recipe.from_json(recipe.dumps()) == recipe


def test_a_spread_recipes_statistics_have_a_text_of_their_own(model, monkeypatch):
    seen = []
    monkeypatch.setattr(sys.modules["sparsity_lib.fit"], "fit",
                        lambda *given, **options: seen.append(options["ids"]) or fit(*given, **options))
    for calibration, wanted in ((None, IDS), ({"ids": IDS[:1]}, IDS[:1])):
        recipes.spread(model, shares=[0.3], costs={"ids": IDS}, calibration=calibration, refine=0.1)
        assert torch.equal(seen[-1], wanted)


def test_known_blocks_are_not_measured_again(model):
    plain, headed = (fit(recipes.combined(0.5, head=head, refine=0.1), model, ids=IDS) for head in ("dense", "refined"))
    first = curves(plain, model, ids=IDS)
    both = curves(headed, model, ids=IDS, known=first)
    assert {n: both.costs[n] for n in first.costs} == dict(first.costs) and len(both.costs) == len(first.costs) + 1


def test_bad_input(model):
    plan = fit(recipes.inputs_topk(0.5), model, ids=IDS)
    for levels in ((0.1, 0.5), (0.0,), (0.0, 0.5, 0.4), (0.0, 1.0)):
        with pytest.raises(SparsityError, match="level"):
            curves(plan, model, ids=IDS, levels=levels)
    with pytest.raises(SparsityError, match="gate"):
        curves(fit(recipes.cats(0.5), model, ids=IDS), model, ids=IDS)
    with pytest.raises(SparsityError, match="repairs"):
        curves(fit(recipes.rsparse(0.5, rank_share=0.1), model, ids=IDS), model, ids=IDS)
    with installed(model, plan), pytest.raises(SparsityError, match="sparse model"):
        curves(plan, model, ids=IDS)
    known = curves(plan, model, ids=IDS)
    for odd, options in (("levels", {"levels": (0.0, 0.5)}), ("text", {"ids": tokens(2, 12)})):
        with pytest.raises(SparsityError, match=f"{odd} of the known costs"):
            curves(plan, model, **{"ids": IDS, "known": known, **options})
    with pytest.raises(SparsityError, match="rules at the blocks"):
        curves(fit(recipes.combined(0.5, rotate="ffn", head="dense"), model, ids=IDS), model, ids=IDS, known=known)
    found = made({"0.qkv_in": (0.0, 1.0)}, {"0.qkv_in": 10}, total=20)
    with pytest.raises(SparsityError, match="at most 0.400"):
        found.at(0.5)
    for bad in (math.nan, -0.1, 1.0, "0.5"):
        with pytest.raises(SparsityError, match="share"):
            found.at(bad)
    for options in ({"score": "size"}, {"repair": "glue"}, {"head": "half"}, {"refine": 0}, {"density": 0},
                    {"score": "column_norm"}, {"rotate": True}, {"rotate": "some"}):
        with pytest.raises(SparsityError):
            recipes.combined(**options)
