"""Sparse models as Hugging Face models: installing, token shares, generation."""

import pytest
import torch
from core_tiny import LAYERS, outputs, tiny, tokens

from sparsity_lib import Recipe, Rule, SparsityError, fit, fit_many, install, installed, lm, recipes, uninstall
from sparsity_lib.install import installed_on
from sparsity_lib.parts.select import TopK

IDS = tokens(3, 12)
MAKERS = [recipes.cats(0.3), recipes.claws(0.3), recipes.larosa(0.3)]


@pytest.fixture
def model():
    return tiny("llama")


@pytest.fixture(scope="module")
def plans():
    return fit_many(MAKERS, tiny("llama"), ids=IDS)


def test_installing_twice_is_refused_and_changes_nothing(model, plans):
    install(model, plans[0])
    sparse = outputs(model)
    with pytest.raises(SparsityError, match=r"already carries the recipe 'cats'.*uninstall\(model\)"):
        install(model, plans[1])
    assert torch.equal(outputs(model), sparse) and installed_on(model).recipe == plans[0].recipe
    uninstall(model)
    assert not torch.equal(outputs(install(model, plans[1])), sparse)


def test_uninstalling_a_dense_model_does_nothing(model):
    before = outputs(model)
    assert uninstall(uninstall(model)) is model and torch.equal(outputs(model), before)


def test_the_context_manager_cleans_up_after_an_error(model, plans):
    before = outputs(model)
    with pytest.raises(RuntimeError), installed(model, plans[0]) as same:
        assert same is model and not torch.equal(outputs(model), before)
        raise RuntimeError
    assert torch.equal(outputs(model), before)
    with installed(model, None):
        assert torch.equal(outputs(model), before)


def test_installing_sets_no_parameters_and_no_gradients(model, plans):
    names = [n for n, _ in model.named_parameters()]
    install(model, plans[1])
    assert [n for n, _ in model.named_parameters()] == names
    buffers = {n for n, _ in model.named_buffers() if "sparsity" in n}
    assert buffers == {f"model.layers.{i}.sparsity.gate.saliency" for i in range(LAYERS)}


def test_gradients_flow_through_kept_entries_only(model, plans):
    install(model, plans[1])
    mlp = model.model.layers[-1].mlp
    kept = []
    mlp.act_fn.register_forward_hook(lambda m, a, out: kept.append((out != 0).flatten(0, -2)))
    model(input_ids=IDS[:1, :1], labels=None).logits.sum().backward()
    rows_with_gradient = mlp.up_proj.weight.grad.abs().sum(1) > 0
    assert torch.equal(rows_with_gradient, kept[0][0]) and int(kept[0].sum()) == round(0.3 * 48)


@pytest.mark.parametrize("make", [recipes.cats, recipes.claws, recipes.larosa], ids=lambda m: m.__name__)
@pytest.mark.parametrize("share", [0.01, 0.25, 0.5, 0.75])
def test_exactly_the_last_share_of_tokens_is_sparsified(model, make, share):
    """Feed the first tokens to the dense model, the others to the sparse one, through the cache: the same logits."""
    tail = round(share * IDS.shape[1])
    full, part = (fit(make(0.3, token_share=s), model, ids=IDS) for s in (1.0, share))
    with torch.no_grad():
        dense = model(input_ids=IDS[:, : IDS.shape[1] - tail], use_cache=True)
        pieces = [dense.logits]
        if tail:
            with installed(model, full):
                pieces.append(model(input_ids=IDS[:, -tail:], **lm.with_cache(model, lm.cache_of(dense))).logits)
        with installed(model, part):
            found = model(input_ids=IDS).logits
    torch.testing.assert_close(found, torch.cat(pieces, 1), rtol=1e-4, atol=1e-4)


def test_single_decoded_tokens_are_always_sparsified(model):
    share, whole = (fit(recipes.claws(0.3, token_share=s), model, ids=IDS) for s in (0.5, 1.0))
    with torch.no_grad():
        dense = model(input_ids=IDS[:, :1]).logits
        with installed(model, share):
            one = model(input_ids=IDS[:, :1]).logits
        with installed(model, whole):
            assert torch.equal(one, model(input_ids=IDS[:, :1]).logits)
    assert not torch.allclose(one, dense)


def test_the_token_share_tells_the_benchmark_runner_to_keep_sequences_whole(model):
    with installed(model, fit(recipes.cats(0.3, token_share=0.5), model, ids=IDS)):
        assert model.sparsity_needs_sequences
    assert not model.sparsity_needs_sequences


def test_a_token_share_among_experts_is_refused():
    mixture = tiny("mixtral")
    plan = fit(recipes.cats(0.3, token_share=0.5), mixture, ids=IDS)
    with pytest.raises(SparsityError, match=r"token_share = 0.5.*mixture of experts"):
        install(mixture, plan)


@pytest.mark.parametrize("number", range(len(MAKERS)), ids=[m.method for m in MAKERS])
@pytest.mark.parametrize("family", ["llama", "gemma3", "mixtral"])
def test_generation_with_a_cache_is_generation_without(family, number):
    model = tiny(family)
    install(model, fit(MAKERS[number], model, ids=IDS))
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    cached = model.generate(IDS[:2, :5], use_cache=True, **options)
    assert cached.shape == (2, 13)
    assert torch.equal(cached, model.generate(IDS[:2, :5], use_cache=False, **options))


def test_batching_does_not_change_a_sparse_model(model, plans):
    for plan in plans:
        with installed(model, plan), torch.no_grad():
            together = model(input_ids=IDS).logits
            apart = torch.cat([model(input_ids=row[None]).logits for row in IDS])
        torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-4)


def test_casting_the_model_leaves_fitted_tensors_in_float32(model, plans):
    for plan in plans:
        twin = install(tiny("llama"), plan).to(torch.bfloat16)
        assert next(twin.parameters()).dtype == torch.bfloat16
        fitted = {n: b for n, b in twin.named_buffers() if ".sparsity." in n}
        assert fitted
        for name, buffer in fitted.items():
            layer, kind, tensor = name.split(".")[2], *name.split(".")[-2:]
            assert buffer.dtype == torch.float32 and torch.equal(buffer, plan.tensors[f"{layer}.{kind}.{tensor}"])
        assert outputs(twin).dtype == torch.bfloat16


def test_moving_a_sparse_model_to_another_device_moves_its_tensors(model, plans):
    install(model, plans[2]).to("meta")
    assert all(b.device.type == "meta" and b.dtype == torch.float32 for n, b in model.named_buffers() if ".sparsity." in n)


def test_several_sites_at_once_add_up(model):
    """Gate and attention sites under one recipe; qkv_in sees what it would see alone in the first block."""
    both = Recipe("both", (Rule("qkv_in", TopK(0.4)), Rule("gate", TopK(0.4))))
    install(model, fit(both, model, ids=IDS))
    assert set(model.model.layers[0].sparsity) == {"qkv_in", "gate"}
    kept = []
    model.model.layers[0].self_attn.k_proj.register_forward_pre_hook(lambda m, args: kept.append((args[0] != 0).sum(-1)))
    outputs(model)
    assert bool((kept[0] == round(0.4 * 32)).all())
