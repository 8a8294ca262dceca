"""The small networks kept with the book: whole, as measured, and open to every method."""

import functools
import json
import math
import shutil

import pytest
import torch
from core_tiny import seen_by
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

import sparsity_lib as sl
from sparsity_lib import Recipe, Rule, SparsityError, fit, install, installed, lm, project, results, uninstall
from sparsity_lib.assets import SMALL, digits, passages, small_path, token_sequences
from sparsity_lib.assets.overlap import all_runs, overlapping
from sparsity_lib.errors import AssetError
from sparsity_lib.parts.select import Threshold, TopK
from sparsity_lib.train.tokenizer import END, bytes_of_tokens, train_tokenizer

DATA = results.load("smallnets").data
TEXT = [name for name in SMALL if name != "small-vit"]
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


def test_the_manifest_lists_them_all_and_they_are_small():
    assert set(DATA) == set(SMALL)
    files = [path for path in (project.root() / "results" / results.MODELS).rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 20e6
    assert {path.suffix for path in files} == {".json", ".safetensors"}
    for name in SMALL:
        assert DATA[name]["parameters"] == sum(p.numel() for p in loaded(name)[0].parameters())
        curve = DATA[name]["curve"]["losses"]
        assert curve[-1] < 0.75 * curve[0] and DATA[name]["seen"] > 0 and DATA[name]["per_second"] > 0


@pytest.mark.parametrize("name", SMALL)
def test_they_load_like_every_other_model(name):
    model, tokenizer = loaded(name)
    assert {p.dtype for p in model.parameters()} == {torch.float32} and not model.training
    assert (tokenizer is None) == (name == "small-vit")
    if tokenizer is not None:
        ids = tokenizer("The river rises in", return_tensors="pt").input_ids
        made = model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)
        assert made.shape == (1, ids.shape[1] + 8) and tokenizer.decode(made[0]).startswith("The river rises in")


@pytest.mark.parametrize("name", TEXT)
def test_the_loss_is_the_one_measured(name):
    """On a sixteenth of the text, within four standard errors of the manifest's mean; a broken weight is far off."""
    model, tokenizer = loaded(name)
    ids = token_sequences(tokenizer, "evaluation", tokens=4 * 512, length=512)
    with torch.no_grad():
        logits = lm.logits(model, lm.hidden_states(model, ids)[:, :-1].flatten(0, 1))
        losses = torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten(), reduction="none")
    stored = DATA[name]["evaluation"]
    assert abs(float(losses.mean()) - stored["loss"]) < 4 * float(losses.std()) / math.sqrt(len(losses)) + 0.1
    assert stored["loss"] < 5.0 < math.log(len(tokenizer)) and 1.0 < stored["bits_per_byte"] < 2.8


def test_the_vit_reads_digits_that_it_never_saw():
    held = digits("evaluation")
    with torch.no_grad():
        right = loaded("small-vit")[0](pixel_values=held["pixel_values"]).logits.argmax(-1) == held["labels"]
    accuracy = float(right.double().mean())
    assert accuracy == pytest.approx(DATA["small-vit"]["evaluation"]["accuracy"], abs=0.004) and accuracy > 0.9


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


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A checkout with one network only, free to be damaged."""
    (tmp_path / "notebooks").mkdir()
    for file in ("_toc.yml", "pyproject.toml"):
        (tmp_path / file).write_text("")
    source = project.root() / "results"
    shutil.copytree(source / results.MODELS / "small-gpt2", tmp_path / "results" / results.MODELS / "small-gpt2")
    shutil.copy(source / "smallnets.json", tmp_path / "results")
    monkeypatch.setenv(project.SWITCH, str(tmp_path))
    return tmp_path / "results" / results.MODELS / "small-gpt2"


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_flipped_byte_is_refused(checkout, file):
    assert small_path("small-gpt2") == checkout
    content = bytearray((checkout / file).read_bytes())
    content[len(content) // 2] ^= 1
    (checkout / file).write_bytes(content)
    with pytest.raises(AssetError, match=rf"{file} is damaged.*make results R=smallnets"):
        sl.load_model("small-gpt2")


def test_missing_files_added_files_and_missing_manifests_are_refused(checkout):
    (checkout / "pytorch_model.bin").write_text("")
    with pytest.raises(AssetError, match="a file pytorch_model.bin that its manifest does not list"):
        small_path("small-gpt2")
    (checkout / "pytorch_model.bin").unlink()
    (checkout / "config.json").unlink()
    with pytest.raises(AssetError, match="config.json is missing"):
        small_path("small-gpt2")
    manifest = checkout.parents[1] / "smallnets.json"
    stored = json.loads(manifest.read_text())
    del stored["data"]["small-gpt2"]
    manifest.write_text(json.dumps(stored))
    with pytest.raises(AssetError, match="does not list small-gpt2"):
        small_path("small-gpt2")
    manifest.unlink()
    with pytest.raises(SparsityError, match="make results R=smallnets"):
        small_path("small-gpt2")


def test_names_are_checked_and_listed():
    with pytest.raises(SparsityError, match="did you mean 'small-llama'"):
        sl.load_model("small-lama")
    with pytest.raises(SparsityError, match="expected one of small-falcon, small-gpt2, .*, small-vit"):
        small_path("gpt2")


def test_what_trained_them_overlaps_with_nothing_they_are_calibrated_or_measured_on():
    manifest = results.load("smallnets").manifest["params"]
    kept = all_runs(passages("evaluation") + passages("calibration"))
    for source in manifest["sources"]:
        assert not overlapping(passages("training", source)[::20], kept)


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=40))
def test_the_tokenizer_takes_any_text_and_counts_its_bytes(text):
    tokenizer = loaded("small-gpt2")[1]
    if END in text:
        return
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text
    assert int(bytes_of_tokens(tokenizer)[torch.tensor(ids, dtype=torch.long)].sum()) == len(text.encode())


def test_all_share_one_tokenizer_which_training_repeats():
    found = {DATA[name]["files"]["tokenizer.json"] for name in TEXT}
    assert len(found) == 1
    chosen = passages("evaluation", "coqa")[:60]
    a, b = (train_tokenizer(chosen, 400, 64) for _ in range(2))
    assert a.backend_tokenizer.to_str() == b.backend_tokenizer.to_str() and len(a) == 400
    assert a(END).input_ids == [a.eos_token_id] == [0] and bytes_of_tokens(a)[0] == 0
    for vocabulary in (256, 300.0):
        with pytest.raises(SparsityError, match="vocabulary"):
            train_tokenizer(chosen, vocabulary, 64)


def test_digits_are_split_once_and_for_all():
    train, held = digits("training"), digits("evaluation")
    assert train["pixel_values"].shape == (1198, 1, 8, 8) and held["pixel_values"].shape == (599, 1, 8, 8)
    both = torch.cat([train["pixel_values"], held["pixel_values"]])
    assert both.min() == -1 and both.max() == 1 and both.dtype == torch.float32
    seen = {image.numpy().tobytes() for image in train["pixel_values"]}
    assert not any(image.numpy().tobytes() in seen for image in held["pixel_values"])
    assert held["labels"].bincount().min() >= 57 and len(held["labels"].unique()) == 10
    with pytest.raises(SparsityError, match="split"):
        digits("test")
