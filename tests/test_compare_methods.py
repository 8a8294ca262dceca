"""GRIFFIN, Gaussian top-k and the head as a site, against slow references written from their equations."""

import math
from statistics import NormalDist

import numpy as np
import pytest
import torch
from core_tiny import HIDDEN, LAYERS, VOCABULARY, WIDTH, mlp_of, numpy_of, seen_by, silu, tiny, tokens
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsity_lib import Plan, Recipe, Rule, SparsityError, account, fit, installed, lm, recipes
from sparsity_lib.evaluate.quality import evaluate
from sparsity_lib.install import head_of, install, uninstall
from sparsity_lib.parts.refine import Refine
from sparsity_lib.parts.scores import Magnitude, Relative, Value
from sparsity_lib.parts.select import Gaussian, Threshold, TopK
from sparsity_lib.parts.transforms import Rotate
from sparsity_lib.sites import HEAD_IN, find_sites

IDS = tokens(3, 12)
DENSITY = 0.4
K = round(DENSITY * WIDTH)


@pytest.fixture(scope="module")
def model():
    return tiny("llama")


@pytest.mark.parametrize("share", [0.5, 0.75])
def test_griffin_keeps_the_neurons_of_the_first_part_for_the_rest(model, share):
    mlp, start = mlp_of(model, 0), 12 - round(12 * share)
    with installed(model, fit(recipes.griffin(DENSITY, token_share=share), model, ids=IDS)):
        x = numpy_of(seen_by(model, mlp, IDS)).reshape(3, 12, HIDDEN)
        found = numpy_of(seen_by(model, mlp, IDS, output=True)).reshape(3, 12, HIDDEN)
    gate, up, down = (numpy_of(m.weight) for m in (mlp.gate_proj, mlp.up_proj, mlp.down_proj))
    for sequence in range(3):
        h = [silu(gate @ token) * (up @ token) for token in x[sequence]]
        statistic = [math.sqrt(sum((h[t][j] / np.linalg.norm(h[t])) ** 2 for t in range(start))) for j in range(WIDTH)]
        kept = sorted(range(WIDTH), key=lambda j: -statistic[j])[:K]
        for t in range(12):
            neurons = range(WIDTH) if t < start else kept
            expected = sum(h[t][j] * down[:, j] for j in neurons)
            np.testing.assert_allclose(found[sequence, t], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("act", ["silu", "relu"])
def test_griffin_leaves_whole_neurons_out_and_counts_its_prompt_as_dense(act):
    model, recipe = tiny("llama", hidden_act=act), recipes.griffin(DENSITY, token_share=0.5)
    ffn = 3 * HIDDEN * WIDTH * LAYERS
    total = account_of(model, recipes.cats(1.0)).dense_weights
    with installed(model, fit(recipe, model, ids=IDS)):
        counted = account(model, ids=IDS)
    assert counted.skipped == pytest.approx(0.5 * (1 - K / WIDTH) * ffn / total)
    assert counted.skipped_by_role["gate"] == counted.skipped_by_role["up"] == counted.skipped_by_role["down"] > 0
    assert recipe.skipped(find_sites(model), total) == pytest.approx((1 - K / WIDTH) * ffn / total)


def account_of(model, recipe):
    with installed(model, fit(recipe, model, ids=IDS)):
        return account(model, ids=IDS)


def test_griffin_generates_with_the_neurons_of_the_prompt(model):
    plan, text = fit(recipes.griffin(DENSITY, token_share=0.5), model, ids=IDS), IDS[:1]
    with installed(model, plan):
        cache = lm.cache_of(model(text, use_cache=True))
        kept = model.model.layers[0].sparsity["gate"]._prompt["relative"][0, 0].topk(K).indices.sort().values
        seen = []
        handle = mlp_of(model, 0).down_proj.register_forward_pre_hook(lambda m, a: seen.append(a[0]))
        model(torch.tensor([[5]]), **lm.with_cache(model, cache))
        handle.remove()
    assert torch.equal(seen[0][0, 0].nonzero()[:, 0], kept)


def test_griffin_refuses_what_has_no_prompt(model):
    with pytest.raises(SparsityError, match="token_share"):
        recipes.griffin(0.5, token_share=1.0)
    with pytest.raises(SparsityError, match="topk"):
        Rule("gate", Threshold(0.5), Relative())
    with pytest.raises(SparsityError, match="site"):
        Rule("down_in", TopK(0.5), Relative())
    plan = fit(recipes.griffin(0.5), model, ids=IDS)
    with installed(model, plan), pytest.raises(SparsityError, match="prompt"):
        model(IDS[:1, :1])
    with installed(model, plan):
        model(IDS)
        with pytest.raises(SparsityError, match="prompt"):
            model(IDS[:2, :1])
    mixture = tiny("mixtral")
    with pytest.raises(SparsityError, match="expert"):
        fit(recipes.griffin(0.5), mixture, ids=IDS)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.02, 0.98), st.sampled_from(["normal", "half_normal"]), st.floats(0.1, 100))
def test_gaussian_threshold_token_by_token(seed, density, law, size):
    z = size * torch.randn(4, 37, generator=torch.Generator().manual_seed(seed))
    scores = z if law == "normal" else z.abs()
    mask = Gaussian(density, law)(scores, {})
    for row, kept in zip(scores.double().tolist(), mask.tolist(), strict=True):
        mean = sum(row) / len(row)
        if law == "normal":
            bound = mean + math.sqrt(sum((v - mean) ** 2 for v in row) / len(row)) * NormalDist().inv_cdf(1 - density)
        else:
            bound = math.sqrt(sum(v * v for v in row) / len(row)) * NormalDist().inv_cdf(1 - density / 2)
        for value, one in zip(row, kept, strict=True):
            assert one == (value > bound) or abs(value - bound) < 1e-5 * size


@pytest.mark.parametrize("law", ["normal", "half_normal"])
def test_gaussian_keeps_its_share_of_gaussian_numbers_at_any_scale(law):
    z = 7 * torch.randn(64, 4096, generator=torch.Generator().manual_seed(0))
    for density in (0.1, 0.3, 0.5, 0.9):
        kept = Gaussian(density, law)(z if law == "normal" else z.abs(), {}).double().mean()
        assert abs(float(kept) - density) < 0.01
    assert Gaussian(1.0, law)(z, {}).all()


def test_gaussian_recipes_and_bad_input(model):
    assert recipes.gaussian(0.3).rules[0].score == Value()
    plan = fit(recipes.gaussian(0.3), model, ids=IDS)
    assert not plan.tensors and account_of(model, recipes.gaussian(0.3)).skipped > 0
    assert account_of(model, recipes.gaussian_inputs(0.3)).skipped > account_of(model, recipes.gaussian_inputs(0.8)).skipped
    for bad in ({"density": 0}, {"density": 0.5, "law": "laplace"}, {"density": 0.5, "law": 3}):
        with pytest.raises(SparsityError):
            Gaussian(**bad)


def head_reference(model, hidden, kept, refined=0):
    """Logits of one token from the inputs `kept` alone, the `refined` largest from all of them."""
    weight = numpy_of(model.get_output_embeddings().weight)
    preview = np.array([sum(row[i] * hidden[i] for i in kept) for row in weight])
    top = sorted(range(len(preview)), key=lambda v: -preview[v])[:refined]
    return np.array([weight[v] @ hidden if v in top else preview[v] for v in range(len(preview))])


@pytest.mark.parametrize("refine", [0, 0.1])
def test_head_inputs_are_dropped_and_the_largest_outputs_read_in_full(model, refine):
    recipe = Recipe("head", (recipes.head_rule(0.5, refine=refine),))
    plan, count = fit(recipe, model, ids=IDS), round(0.5 * HIDDEN)
    with torch.no_grad():
        hidden = numpy_of(model.model(IDS).last_hidden_state)
        with installed(model, plan):
            found = numpy_of(model(IDS).logits)
            counted = account(model, ids=IDS)
        for _ in range(2):  # the head alone, on rows of hidden states
            with head_of(model, plan)():
                rows = numpy_of(model.get_output_embeddings()(torch.from_numpy(hidden).float().flatten(0, 1)))
            np.testing.assert_allclose(rows.reshape(found.shape), found, rtol=1e-5, atol=1e-5)
    for sequence, token in ((0, 0), (1, 7), (2, 11)):
        h = hidden[sequence, token]
        kept = sorted(range(HIDDEN), key=lambda i: -abs(h[i]))[:count]
        expected = head_reference(model, h, kept, round(refine * VOCABULARY))
        np.testing.assert_allclose(found[sequence, token], expected, rtol=1e-4, atol=1e-5)
    read = round(refine * VOCABULARY) * HIDDEN
    assert counted.skipped * counted.dense_weights == pytest.approx(HIDDEN * VOCABULARY * (1 - count / HIDDEN) - read)
    assert counted.repair_weights == read and counted.skipped_by_role["head"] > 0
    assert recipe.skipped(find_sites(model), counted.dense_weights) == pytest.approx(counted.skipped)


def test_evaluation_sees_the_sparse_head_as_the_model_itself_does(model):
    recipe = recipes.with_head(recipes.inputs_topk(0.6), 0.4, transform=Rotate(), refine=0.1)
    plan = fit(recipe, model, ids=IDS)
    found = evaluate(model, {"sparse": plan, "again": plan}, IDS)
    with torch.no_grad():
        dense = model(IDS).logits[:, :-1].log_softmax(-1)
        with installed(model, plan):
            own = model(IDS).logits[:, :-1].log_softmax(-1)
    kl = (dense.exp() * (dense - own)).sum(-1).sum(-1)
    np.testing.assert_allclose(found["sparse"].kl, kl, rtol=1e-3, atol=1e-5)
    assert found["sparse"] == found["again"] and max(found["dense"].kl) == 0
    assert not model.get_output_embeddings()._forward_pre_hooks


def test_a_dense_head_rule_changes_nothing_and_full_refinement_neither(model):
    for recipe in (Recipe("h", (Rule(HEAD_IN, TopK(1.0)),)), Recipe("h", (recipes.head_rule(0.3, refine=1.0),))):
        with torch.no_grad():
            dense = model(IDS).logits
            with installed(model, fit(recipe, model, ids=IDS)):
                torch.testing.assert_close(model(IDS).logits, dense, rtol=1e-5, atol=1e-5)


def test_thresholds_and_rotations_of_the_head_are_fitted_to_its_input(model):
    recipe = Recipe("h", (Rule(HEAD_IN, Threshold(0.4), Magnitude(), Rotate()),))
    plan = fit(recipe, model, ids=IDS)
    with torch.no_grad():
        hidden = model.model(IDS).last_hidden_state.flatten(0, 1).double()
    rotation = plan.tensors[f"{LAYERS - 1}.{HEAD_IN}.rotation"].double()
    moment = rotation.T @ (hidden.T @ hidden) @ rotation
    assert float((moment - moment.diagonal().diag()).abs().max()) < 1e-3 * float(moment.max())
    threshold = float(plan.tensors[f"{LAYERS - 1}.{HEAD_IN}.threshold"])
    assert float(((hidden @ rotation).abs() > threshold).double().mean()) == pytest.approx(0.4, abs=0.01)


def test_a_sparse_head_is_saved_and_loaded(model, tmp_path):
    from transformers import AutoModelForCausalLM

    plan = fit(recipes.with_head(recipes.teal(0.5), 0.4, refine=0.05), model, ids=IDS)
    assert Recipe.from_json(plan.recipe.dumps()) == plan.recipe
    assert Plan.load(plan.save(tmp_path / "plan.safetensors")).recipe == plan.recipe
    other = tiny("llama")
    install(other, plan)
    with torch.no_grad():
        expected = other(IDS).logits
        other.save_pretrained(tmp_path / "model")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
        torch.testing.assert_close(again(IDS).logits, expected)
    uninstall(other)


def test_head_rules_refuse_what_they_cannot_do(model):
    with pytest.raises(SparsityError, match="token_share"):
        recipes.with_head(recipes.teal(0.5, token_share=0.5))
    with pytest.raises(SparsityError, match="already"):
        recipes.with_head(recipes.with_head(recipes.teal(0.5)))
    with pytest.raises(SparsityError, match="site"):
        Rule("down_in", TopK(0.5), repair=(Refine(0.1),))
    with pytest.raises(SparsityError, match="refine"):
        recipes.head_rule(0.5, refine=2)
    with pytest.raises(SparsityError, match="sequential"):
        fit(recipes.with_head(recipes.teal(0.5)), model, ids=IDS, sequential=True)
    with pytest.raises(SparsityError, match="head_in"):
        fit(recipes.with_head(recipes.teal(0.5)), tiny("bert"), ids=IDS)
    from sparsity_lib.greedy import greedy

    with pytest.raises(SparsityError, match="head site"):
        greedy(recipes.with_head(recipes.teal(0.5)), model, ids=IDS, target=0.3)


def test_weights_of_the_head_are_not_pruned_and_carry_the_method_on(model):
    from sparsity_lib.weights import WeightPruning, pruned_weights

    before = model.get_output_embeddings().weight.clone()
    with pruned_weights(model, WeightPruning(TopK(0.5), "wanda"), ids=IDS):
        assert torch.equal(before, model.get_output_embeddings().weight)
    carried = recipes.with_head(recipes.wina(0.5))
    assert carried.rules[-1].site == HEAD_IN and carried.rules[-1].score == carried.rules[0].score
