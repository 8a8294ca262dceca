"""Sparse models on disk: saved and loaded by transformers' own calls, with this library imported or without."""

import json
import subprocess
import sys

import pytest
import torch
from core_tiny import outputs, tiny, tokens
from transformers import AutoModelForCausalLM

from sparsity_lib import SparsityError, fit, install, recipes, uninstall
from sparsity_lib.hf import SparsityConfig
from sparsity_lib.install import installed_on

IDS = tokens()
MAKERS = {"cats": recipes.cats(0.3), "claws": recipes.claws(0.3), "larosa": recipes.larosa(0.3)}
DTYPES = [torch.float32, torch.bfloat16]


def sparse(method="cats", family="llama", dtype=torch.float32):
    model = tiny(family, dtype=dtype)
    return install(model, fit(MAKERS[method], model, ids=IDS))


def load(folder, **options):
    return AutoModelForCausalLM.from_pretrained(folder, **options).eval()


def fitted(model):
    return {name: b for name, b in model.named_buffers() if ".sparsity." in name}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("method", MAKERS)
def test_a_round_trip_is_bit_equal(method, dtype, tmp_path):
    model = sparse(method, dtype=dtype)
    model.save_pretrained(tmp_path)
    again = load(tmp_path, dtype=dtype)
    assert torch.equal(outputs(again), outputs(model)) and outputs(again).dtype == dtype
    assert installed_on(again).recipe == MAKERS[method]
    assert installed_on(again).calibration == installed_on(model).calibration
    assert fitted(again).keys() == fitted(model).keys()
    for name, tensor in fitted(model).items():
        assert fitted(again)[name].dtype == torch.float32 and torch.equal(fitted(again)[name], tensor), name


@pytest.mark.parametrize("family", ["gemma3", "mixtral"])
@pytest.mark.parametrize("method", MAKERS)
def test_a_round_trip_with_a_tied_head_and_with_experts(method, family, tmp_path):
    model = sparse(method, family)
    model.save_pretrained(tmp_path)
    assert torch.equal(outputs(load(tmp_path)), outputs(model))


@pytest.mark.parametrize("method", MAKERS)
def test_loading_in_bfloat16_keeps_what_was_fitted_in_float32(method, tmp_path):
    model = sparse(method)
    model.save_pretrained(tmp_path)
    again = load(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in again.parameters()} == {torch.bfloat16} and fitted(again)
    for name, tensor in fitted(again).items():
        assert tensor.dtype == torch.float32 and torch.equal(tensor, fitted(model)[name]), name
    again.to(torch.bfloat16)
    assert {b.dtype for b in fitted(again).values()} == {torch.float32}


@pytest.mark.parametrize("method", MAKERS)
def test_saving_what_was_loaded_gives_the_same_checkpoint(method, tmp_path):
    model = sparse(method)
    model.save_pretrained(tmp_path / "first")
    load(tmp_path / "first").save_pretrained(tmp_path / "second")
    assert torch.equal(outputs(load(tmp_path / "second")), outputs(model))
    configs = [json.loads((tmp_path / n / "config.json").read_text()) for n in ("first", "second")]
    assert configs[0]["quantization_config"] == configs[1]["quantization_config"]
    assert configs[0]["quantization_config"]["recipe"] == MAKERS[method].to_json()


@pytest.mark.parametrize("loaded", [False, True])
def test_uninstalling_before_saving_gives_a_dense_checkpoint(tmp_path, loaded):
    dense = outputs(tiny("llama"))
    model = sparse("larosa")
    if loaded:
        model.save_pretrained(tmp_path / "sparse")
        model = load(tmp_path / "sparse")
    uninstall(model).save_pretrained(tmp_path / "dense")
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())
    again = load(tmp_path / "dense")
    assert installed_on(again) is None and not fitted(again) and torch.equal(outputs(again), dense)


def test_a_loaded_model_can_be_given_another_plan(tmp_path):
    model = sparse("cats")
    model.save_pretrained(tmp_path)
    again = uninstall(load(tmp_path))
    assert torch.equal(outputs(again), outputs(tiny("llama")))
    plan = fit(MAKERS["claws"], again, ids=IDS)
    assert torch.equal(outputs(install(again, plan)), outputs(sparse("claws")))


def test_a_loaded_model_generates_and_trains(tmp_path):
    sparse("claws").save_pretrained(tmp_path)
    model = load(tmp_path)
    assert model.generate(IDS[:1, :4], max_new_tokens=3, do_sample=False, eos_token_id=None, pad_token_id=0).shape == (1, 7)
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert model.model.layers[0].mlp.up_proj.weight.grad is not None


@pytest.mark.parametrize(("spoil", "message"), [
    (lambda c: c.update(recipe=None), "holds no recipe"),
    (lambda c: c["recipe"]["rules"][0]["select"].update(density=1.5), "density = 1.5"),
    (lambda c: c["recipe"]["rules"][0].update(site="gates"), "site = 'gates'"),
])
def test_a_spoilt_recipe_in_the_configuration_is_refused(tmp_path, spoil, message):
    sparse().save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    spoil(config["quantization_config"])
    file.write_text(json.dumps(config))
    with pytest.raises(SparsityError, match=message):
        load(tmp_path)


def test_a_model_with_a_quantisation_of_its_own_keeps_it(tmp_path):
    class Other:
        quant_method = "other"

    model = tiny("llama")
    model.config.quantization_config = other = Other()
    install(model, fit(recipes.cats(0.3), model, ids=IDS))
    assert model.config.quantization_config is other
    assert uninstall(model).config.quantization_config is other
    assert not isinstance(other, SparsityConfig)


ALONE = """
import sys, torch
from transformers import LlamaForCausalLM
model = LlamaForCausalLM.from_pretrained(sys.argv[1]).eval()
assert "sparsity_lib" not in sys.modules
torch.save(model(input_ids=torch.arange(3, 11)[None]).logits.detach(), sys.argv[2])
"""


def test_without_this_library_transformers_warns_and_runs_the_model_dense(tmp_path):
    """What CONTRIBUTING and the book warn of: a sparse checkpoint is sparse only where sparsity_lib was imported."""
    model = sparse("cats")
    model.save_pretrained(tmp_path / "model")
    run = subprocess.run(
        [sys.executable, "-c", ALONE, str(tmp_path / "model"), str(tmp_path / "logits.pt")],
        capture_output=True, text=True, cwd=tmp_path,
    )
    assert run.returncode == 0, run.stderr
    assert "Unknown quantization type, got sparsity_lib" in run.stdout + run.stderr
    alone = torch.load(tmp_path / "logits.pt", weights_only=True)
    ids = torch.arange(3, 11)[None]
    with torch.no_grad():
        torch.testing.assert_close(alone, tiny("llama")(input_ids=ids).logits, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(alone, model(input_ids=ids).logits, atol=1e-3)
