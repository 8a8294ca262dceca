"""The small networks are open to every method: their sites, and masks on all of them."""

import functools

import pytest
import torch
from core_tiny import seen_by
from transformers import AutoModelForCausalLM

import sparsity_lib as sl
from sparsity_lib import Recipe, Rule, fit, install, installed, uninstall
from sparsity_lib.assets import SMALL, digits, token_sequences
from sparsity_lib.parts.select import Threshold, TopK

ATTENTION = {"qkv_in", "o_in"}
KINDS = {
    **dict.fromkeys(("small-gpt2", "small-falcon", "small-mpt", "small-vit"), ATTENTION | {"up_in", "down_in"}),
    **dict.fromkeys(("small-llama", "small-llama-relu", "small-mixtral"), ATTENTION | {"up_in", "gate", "down_in"}),
    "small-mamba2": {"in_proj_in", "out_proj_in"},
}


@functools.cache
def loaded(name):
    return sl.load_model(name)


def inputs(name, rows=2):
    if name == "small-vit":
        return {"pixel_values": digits("evaluation")["pixel_values"][:rows]}
    return {"input_ids": token_sequences(loaded(name)[1], "evaluation", tokens=64 * rows, length=64)}


@torch.no_grad()
def outputs(name):
    return loaded(name)[0](**inputs(name)).logits


def everywhere(name, density, select=TopK):
    """Every site of the model, of gate and down_in only the gate."""
    kinds = KINDS[name] - ({"down_in"} if "gate" in KINDS[name] else set())
    return Recipe("everywhere", tuple(Rule(kind, select(density)) for kind in sorted(kinds)))


@pytest.mark.parametrize("name", SMALL)
def test_every_style_has_its_sites(name):
    found, everything = sl.find_sites(loaded(name)[0]), sl.weights_per_token(loaded(name)[0])
    assert set(found.kinds()) == KINDS[name] and found.layers >= 4
    assert everything > sum(x.weights for x in found.linears) > 0.6 * everything


@pytest.mark.parametrize("select", [TopK, Threshold])
@pytest.mark.parametrize("name", SMALL)
def test_zero_sparsity_changes_nothing_and_half_does(name, select):
    model, before = loaded(name)[0], outputs(name)
    batches = [inputs(name)]
    with installed(model, fit(everywhere(name, 1.0, select), model, batches=batches)):
        # the tapped experts sum in another order than the stock ones
        tolerance = {"rtol": 1e-5, "atol": 1e-4} if name == "small-mixtral" else {"rtol": 0, "atol": 0}
        torch.testing.assert_close(outputs(name), before, **tolerance)
    install(model, fit(everywhere(name, 0.5, select), model, batches=batches))
    assert not torch.allclose(outputs(name), before, atol=1e-2)
    uninstall(model)
    assert torch.equal(outputs(name), before)


@pytest.mark.parametrize("name", ["small-mamba2", "small-llama-relu", "small-gpt2"])
def test_a_sparse_network_survives_saving(name, tmp_path):
    model, tokenizer = sl.load_model(name)
    install(model, fit(everywhere(name, 0.5), model, batches=[inputs(name)]))
    model.save_pretrained(tmp_path)
    again, _ = AutoModelForCausalLM.from_pretrained(tmp_path), tokenizer
    with torch.no_grad():
        assert torch.equal(again(**inputs(name)).logits, model(**inputs(name)).logits)


def test_relu_makes_the_products_of_llama_zero():
    """The share of exact zeros that enters the down projection, of which SwiGLU has none."""
    shares = {}
    for name in ("small-llama", "small-llama-relu"):
        model, ids = loaded(name)[0], inputs(name)["input_ids"]
        seen = [seen_by(model, layer.mlp.down_proj, ids) for layer in model.model.layers]
        shares[name] = float(torch.cat(seen).eq(0).double().mean())
    assert shares["small-llama"] < 0.001 and shares["small-llama-relu"] > 0.6
