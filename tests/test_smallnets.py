"""The small networks kept with the book: whole, and as good as measured."""

import functools
import math
import shutil

import pytest
import torch
from book_checkout import put
from hypothesis import given, settings
from hypothesis import strategies as st

import sparsity_lib as sl
from sparsity_lib import SparsityError, lm, project, results
from sparsity_lib.assets import SMALL, digits, passages, small_path, token_sequences
from sparsity_lib.assets.overlap import all_runs, overlapping
from sparsity_lib.cwic.shipped import SHIPPED
from sparsity_lib.errors import AssetError
from sparsity_lib.train.tokenizer import END, bytes_of_tokens, train_tokenizer

DATA = results.load("smallnets").data
TEXT = [name for name in SMALL if name != "small-vit"]


@functools.cache
def loaded(name):
    return sl.load_model(name)


def test_the_manifest_lists_them_all_and_they_are_small():
    assert set(DATA) == set(SMALL)
    kept = project.root() / "results" / results.MODELS
    assert {path.name for path in kept.iterdir()} <= {*SMALL, *SHIPPED}
    for names, most in ((SMALL, 20e6), (SHIPPED, 12e6)):  # what a checkout has to carry
        files = [path for name in names for path in (kept / name).rglob("*") if path.is_file()]
        assert sum(path.stat().st_size for path in files) < most
        assert {path.suffix for path in files} <= {".json", ".safetensors"}
    for name in SMALL:
        assert DATA[name]["parameters"] == sum(p.numel() for p in loaded(name)[0].parameters())
        curve = DATA[name]["curve"]["losses"]
        least = 1.0 if "origin" in DATA[name] else 0.75  # those start from trained weights
        assert curve[-1] < least * curve[0] and DATA[name]["seen"] > 0 and DATA[name]["per_second"] > 0


@pytest.mark.parametrize("name", SMALL)
def test_they_load_like_every_other_model(name):
    model, tokenizer = loaded(name)
    assert {p.dtype for p in model.parameters()} == {torch.float32} and not model.training
    assert (tokenizer is None) == (name == "small-vit")
    if tokenizer is not None:
        ids = tokenizer("The river rises in", return_tensors="pt").input_ids
        made = model.generate(ids, min_new_tokens=8, max_new_tokens=8, do_sample=False, pad_token_id=0)
        assert made.shape == (1, ids.shape[1] + 8) and tokenizer.decode(made[0]).startswith("The river rises in")


@functools.cache
def unigram():
    """Entropy, in nats a token, of the evaluation text's own token frequencies: no model without context does better."""
    ids = token_sequences(loaded("small-llama")[1], "evaluation", tokens=64 * 512, length=512)
    share = ids.flatten().bincount().double() / ids.numel()
    return float(torch.special.entr(share).sum())


@pytest.mark.parametrize("name", TEXT)
def test_the_loss_is_the_one_measured(name):
    """On a sixteenth of the text, near the manifest's mean; a broken weight is far off."""
    model, tokenizer = loaded(name)
    ids = token_sequences(tokenizer, "evaluation", tokens=4 * 512, length=512)
    with torch.no_grad():
        logits = lm.logits(model, lm.hidden_states(model, ids)[:, :-1].flatten(0, 1))
        losses = torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten(), reduction="none")
    stored = DATA[name]["evaluation"]
    assert abs(float(losses.mean()) - stored["loss"]) < 4 * float(losses.std()) / math.sqrt(len(losses)) + 0.1
    assert stored["loss"] < unigram() - 0.8 and unigram() < math.log(len(tokenizer))
    bytes_a_token = stored["loss"] / math.log(2) / stored["bits_per_byte"]
    assert bytes_a_token == pytest.approx(float(bytes_of_tokens(tokenizer)[ids].double().mean()), rel=0.05)


def test_the_vit_reads_digits_that_it_never_saw():
    held = digits("evaluation")
    with torch.no_grad():
        right = loaded("small-vit")[0](pixel_values=held["pixel_values"]).logits.argmax(-1) == held["labels"]
    accuracy = float(right.double().mean())
    assert accuracy == pytest.approx(DATA["small-vit"]["evaluation"]["accuracy"], abs=0.004) and accuracy > 0.9


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
    stored = results.load("smallnets")
    del stored.data["small-gpt2"]
    put("smallnets", stored.data, **stored.manifest["params"])
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
