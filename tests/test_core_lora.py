"""LoRA recovery under masks: it learns, it repeats, it merges, it cleans up."""

import copy

import pytest
import torch
from core_tiny import outputs, tiny, tokens

from sparsity_lib import SparsityError, fit, install, installed, lm, recipes, uninstall
from sparsity_lib.install import installed_on
from sparsity_lib.train import lora
from sparsity_lib.train.lora import LoraRecipe, recover

IDS = tokens(5, 12, seed=9).repeat(8, 1)
RECIPE = LoraRecipe(steps=10, sequences=4, length=12, rank=4, learning_rate=1e-3)


def plan_of(make, model=None):
    return fit(make, model or tiny("llama"), ids=IDS[:4])


@pytest.fixture(scope="module")
def cats():
    return plan_of(recipes.cats(0.3))


@pytest.fixture(scope="module")
def recovered(cats):
    return recover(tiny("llama"), cats, RECIPE, IDS)


def test_the_loss_falls(recovered):
    losses = recovered[1]
    assert len(losses) == RECIPE.steps and sum(losses[-3:]) < 0.9 * sum(losses[:3])


def test_a_seed_repeats_and_another_differs(cats, recovered):
    again, losses = recover(tiny("llama"), cats, RECIPE, IDS)
    assert losses == recovered[1] and torch.equal(outputs(again), outputs(recovered[0]))
    other = LoraRecipe(**{**RECIPE.to_json(), "seed": 1})
    assert recover(tiny("llama"), cats, other, IDS)[1] != losses


def test_the_first_loss_is_the_divergence_of_the_untrained_sparse_model(cats, recovered):
    """At step 0 the adapters add nothing, so the loss is KL(dense || masked): the masks are on."""
    model = tiny("llama")
    batch = IDS[torch.randperm(len(IDS), generator=torch.Generator().manual_seed(0))[:4]]
    with torch.no_grad():
        dense = torch.log_softmax(model(input_ids=batch).logits, -1)
        with installed(model, cats):
            sparse = torch.log_softmax(model(input_ids=batch).logits, -1)
    kl = float((dense.exp() * (dense - sparse)).sum(-1).mean())
    assert recovered[1][0] == pytest.approx(kl, rel=1e-4) and kl > 0.01


def test_nothing_to_recover_at_full_density():
    one = LoraRecipe(steps=1, sequences=2, length=12, rank=2)
    assert abs(recover(tiny("llama"), plan_of(recipes.claws(1.0)), one, IDS)[1][0]) < 1e-6


@pytest.mark.parametrize("make", [recipes.cats(0.3), recipes.claws(0.3), recipes.gate_topk(0.3)], ids=lambda r: r.method)
def test_the_merged_weights_are_the_adapters_function(make, monkeypatch):
    plan, kept = plan_of(make), {}
    train = lora._train

    def keep(adapted, recipe, ids):
        losses = train(adapted, recipe, ids)
        adapted.eval()
        with torch.no_grad():
            kept["adapters"] = adapted(input_ids=IDS[:3]).logits
        return losses

    monkeypatch.setattr(lora, "_train", keep)
    merged, _ = recover(tiny("llama"), plan, RECIPE, IDS)
    with torch.no_grad(), installed(merged, plan):
        torch.testing.assert_close(merged(input_ids=IDS[:3]).logits, kept["adapters"], rtol=1e-4, atol=1e-4)


def test_what_comes_back_is_a_plain_dense_model(recovered, cats):
    merged, _ = recovered
    plain = tiny("llama")
    assert set(merged.state_dict()) == set(plain.state_dict()) and not merged.training
    assert installed_on(merged) is None and not any(p.requires_grad for p in merged.parameters())
    assert not any("lora" in type(m).__name__.lower() for m in merged.modules())
    assert torch.equal(merged.lm_head.weight, plain.lm_head.weight)
    twin = copy.deepcopy(merged)
    uninstall(install(twin, cats))
    assert torch.equal(outputs(twin), outputs(merged))
    assert recover(twin, cats, LoraRecipe(steps=1, sequences=1, length=12), IDS)[1]


@pytest.mark.parametrize("make", [recipes.larosa(0.5), recipes.oracle(0.5)], ids=lambda r: r.method)
def test_masks_on_the_inputs_of_linear_layers_are_refused(make):
    """An adapter beside a masked linear would read the unmasked input, and merging would change the function."""
    model = tiny("llama")
    before = outputs(model)
    with pytest.raises(SparsityError, match="gate-site recipes"):
        recover(model, plan_of(make), RECIPE, IDS)
    assert torch.equal(outputs(model), before)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("moment", ["in the middle", "at the start"])
def test_a_failure_leaves_the_model_as_it_was(cats, monkeypatch, error, moment):
    model = tiny("llama")
    before, keys, flags = outputs(model), set(model.state_dict()), [p.requires_grad for p in model.parameters()]
    calls, hidden = [], lm.hidden_states

    def fail(*args, **options):
        calls.append(1)
        if len(calls) == 5:
            raise error
        return hidden(*args, **options)

    if moment == "in the middle":
        monkeypatch.setattr(lm, "hidden_states", fail)
    else:
        monkeypatch.setattr(lora, "get_peft_model", lambda *args: (_ for _ in ()).throw(error))
    with pytest.raises(error):
        recover(model, cats, RECIPE, IDS)
    monkeypatch.undo()
    assert installed_on(model) is None and set(model.state_dict()) == keys
    assert [p.requires_grad for p in model.parameters()] == flags and not model.training
    assert torch.equal(outputs(model), before)


def test_too_little_text_and_sparse_models_are_refused(cats):
    with pytest.raises(SparsityError, match="39 training sequences are too few.*needs 40"):
        recover(tiny("llama"), cats, RECIPE, IDS[:39])
    with pytest.raises(SparsityError, match=r"uninstall\(model\) first"):
        recover(install(tiny("llama"), cats), cats, RECIPE, IDS)


@pytest.mark.parametrize("bad", [
    {"steps": 0}, {"steps": 1.5}, {"sequences": True}, {"length": 1}, {"rank": -1}, {"alpha": 0}, {"learning_rate": float("nan")},
    {"seed": -1}, {"learning_rate": "1e-4"},
])
def test_bad_recipes_are_refused_by_name(bad):
    with pytest.raises(SparsityError, match=next(iter(bad))):
        LoraRecipe(**bad)


def test_tokens_seen():
    assert LoraRecipe(steps=3, sequences=2, length=5).tokens == 30
