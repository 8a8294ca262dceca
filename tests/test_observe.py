"""Looking at activations and rankings, the chapter's overlaps and verdicts, on tiny models."""

import copy

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import sparsity_lib as sl
from sparsity_lib import analysis, observe
from sparsity_lib.errors import SparsityError
from sparsity_lib.experiments import claws_report, common
from sparsity_lib.methods.larosa import density_for_share
from sparsity_lib.parts.saliency import Saliency
from sparsity_lib.parts.select import TopK
from sparsity_lib.parts.transforms import Rotate

CONFIG = LlamaConfig(
    hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=64,
    initializer_range=0.2,
)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return LlamaForCausalLM(copy.deepcopy(CONFIG)).eval()


@pytest.fixture(scope="module")
def ids():
    return torch.randint(0, 64, (3, 12), generator=torch.Generator().manual_seed(1))


def test_activations_are_those_of_the_layers(model, ids):
    with torch.no_grad():
        states = model.model(ids, output_hidden_states=True).hidden_states
        block = model.model.layers[0]
        normed = block.input_layernorm(states[0])
        middle = states[0] + block.self_attn(
            normed, position_embeddings=model.model.rotary_emb(normed, torch.arange(12)[None]), attention_mask=None
        )[0]
        gate = torch.nn.functional.silu(block.mlp.gate_proj(block.post_attention_layernorm(middle)))
    found = observe.activations(model, "gate", ids)
    assert len(found) == 2 and found[0].shape == (36, 48)
    torch.testing.assert_close(found[0], gate.flatten(0, 1))


def test_gradient_by_position_is_autograd_s(model, ids):
    kept = []

    def keep(module, args, out):
        out.retain_grad()
        kept.append(out)

    handle = model.model.layers[1].mlp.act_fn.register_forward_hook(keep)
    wanted = torch.zeros(12)
    for row in ids:
        logits = model(row[None]).logits[0]
        torch.nn.functional.cross_entropy(logits[:-1], row[1:], reduction="sum").backward()
        wanted += kept[-1].grad[0].square().mean(-1)
    handle.remove()
    model.zero_grad(set_to_none=True)
    found = observe.gradient_by_position(model, "gate", ids)[1]
    torch.testing.assert_close(found.float(), (wanted / len(ids)).sqrt(), rtol=1e-4, atol=1e-8)
    assert not model.model.layers[1].mlp.act_fn._forward_hooks


def test_reordering_against_its_definition(model, ids):
    recipe = sl.Recipe("two", [
        sl.Rule("gate", TopK(0.5), Saliency("rms")), sl.Rule("up_in", TopK(0.5), Saliency("mean"), Rotate()),
    ])
    plan = sl.fit(recipe, model, ids=ids)
    found = observe.reordering(model, plan, ids, density=0.25, rank_every=1)
    assert [(item.layer, item.site) for item in found] == [(0, "gate"), (1, "gate"), (0, "up_in"), (1, "up_in")]
    z = observe.activations(model, "up_in", ids)[1] @ plan.tensors["1.up_in.rotation"]
    c = plan.tensors["1.up_in.saliency"]
    shares = []
    for row in z.abs():
        left, right = (set(score.topk(8).indices.tolist()) for score in (row, row * c))
        shares.append(len(left & right) / len(left | right))
    assert found[3].jaccard == pytest.approx(sum(shares) / len(shares), abs=1e-6)
    assert found[3].cv == pytest.approx(float(c.double().std() / c.double().mean()))


def test_a_constant_multiplier_reorders_nothing(model, ids):
    plan = sl.fit(sl.Recipe("one", [sl.Rule("gate", TopK(0.5), Saliency("rms"))]), model, ids=ids)
    flat = {name: torch.full_like(t, 3.0) for name, t in plan.tensors.items()}
    for item in observe.reordering(model, sl.Plan(plan.recipe, flat, plan.widths), ids):
        assert item.jaccard == 1 and item.spearman == pytest.approx(1) and item.cv == 0


def test_the_oracle_overlaps_fully_with_itself(model, ids):
    gates, products = observe.activations(model, "gate", ids), observe.activations(model, "down_in", ids)
    found = claws_report.oracle_overlap(model, ids, {"cats": None}, 0.5)["cats"]
    k = 24
    for layer, (g, h) in enumerate(zip(gates, products, strict=True)):
        a, b = g.abs().topk(k).indices, h.abs().topk(k).indices
        wanted = [len(set(x) & set(y)) / len(set(x) | set(y)) for x, y in zip(a.tolist(), b.tolist(), strict=True)]
        assert found[layer] == pytest.approx(sum(wanted) / len(wanted), abs=1e-6)


@pytest.mark.parametrize("method", ["cats", "claws_median", "larosa", "larosa_coefficients", "oracle"])
def test_methods_are_compared_at_one_share_of_weights(model, method):
    sites, total = sl.find_sites(model), sl.weights_per_token(model)
    recipe = common.recipe_at(method, 0.5, model)
    assert recipe.skipped(sites, total) == pytest.approx(common.skipped_by_gate(model, 0.5), abs=0.02)


def test_a_share_that_cannot_be_skipped_is_refused(model):
    with pytest.raises(SparsityError, match="cannot be skipped"):
        density_for_share(sl.recipes.claws, model, 0.9)


def test_a_gaussian_has_the_gini_that_the_book_says():
    values = torch.randn(4, 200_000, generator=torch.Generator().manual_seed(0)).abs()
    assert float(analysis.gini(values).mean()) == pytest.approx(2**0.5 - 1, abs=2e-3)


def test_verdicts_follow_the_numbers():
    item = observe.Reordering(0, "gate", 0.5, 0.5, 1.0, 1.0)
    still = observe.Reordering(0, "up_in", 0.95, 0.9, 0.1, 1.1)
    assert claws_report.verdict_reorder([item] * 4, [still] * 4, "x").outcome == "reproduced"
    assert claws_report.verdict_reorder([still] * 4, [item] * 4, "x").outcome == "not reproduced"
    assert claws_report.verdict_skew("gate", {"a": [0.6, 0.7], "b": [0.65]}).outcome == "reproduced"
    assert claws_report.verdict_skew("gate", {"a": [0.42, 0.48], "b": [0.45]}).outcome == "direction only"
    assert claws_report.verdict_skew("gate", {"a": [0.3, 0.7], "b": [0.35]}).outcome == "not reproduced"


def test_the_gini_of_a_product_of_gaussians():
    from sparsity_lib.figures.foundations import GAUSSIAN_PRODUCT_GINI

    a, b = torch.randn(2, 400_000, generator=torch.Generator().manual_seed(0))
    assert float(analysis.gini((a * b).abs()[None])) == pytest.approx(GAUSSIAN_PRODUCT_GINI, abs=0.003)
