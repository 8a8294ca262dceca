"""The one-command distillation at toy size: recipes, data, resuming, and what is refused."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from sparsity_lib import SparsityError
from sparsity_lib.cwic import command, convert, measure, registry_of

TOY = {**command.read("toy"), "length": 32, "train": {"steps": 4, "batch": 2, "learning_rate": 1e-2, "passes": 4}, "every": 2,
       "checkpointing": True}


@pytest.mark.parametrize("name", command.names())
def test_recipes_of_the_library_are_allowed(name):
    config, recipe = command.built(command.read(name))
    assert recipe.budget.target(recipe.train.steps) == pytest.approx(recipe.budget.final + recipe.budget.margin)
    assert config.normalise and recipe.mode == "all"


def test_the_papers_schedules_are_in_the_recipes():
    _, recipe = command.built(command.read("llama-3.2-1b"))
    assert (recipe.budget.warmup, recipe.budget.weight, recipe.eta) == (15_000, 10.0, 1.0)
    _, recipe = command.built(command.read("llama-3.2-1b-flops"))
    assert (recipe.budget.warmup, recipe.budget.head_limit, recipe.eta) == (6_000, 10.0, 10.0)


def test_a_run_from_a_file_writes_a_model_and_goes_on(tmp_path, capsys):
    (tmp_path / "mine.json").write_text(json.dumps(TOY))
    lines = [json.dumps({"text": "The sky is blue and the sea is deep. " * n}) for n in (1, 2, 3, 2, 1, 3)]
    (tmp_path / "data.jsonl").write_text("\n".join(lines) + "\n\n")
    asked = [str(tmp_path / "mine.json"), "--data", str(tmp_path / "data.jsonl"), "--out", str(tmp_path / "out")]
    assert command.main(asked) == 0
    first = capsys.readouterr().out
    assert "step 0: KL 0.0000, 1.00x" in first and str(tmp_path / "out" / "model") in first
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model")
    assert registry_of(model).config.stripe == 32
    assert measure(model, torch.arange(3, 35)[None]).ratio() > 1
    assert command.main(asked) == 0 and "step 0" not in capsys.readouterr().out


def test_the_books_text_is_used_without_data(tmp_path, monkeypatch):
    made = command.distilled({**TOY, "mode": "thresholds"}, None, tmp_path)
    assert len(made.history) == 4 and (tmp_path / "model" / "config.json").exists()


@pytest.mark.parametrize(("change", "said"), [
    ({"steps": 3}, "steps"), ({"preset": "flop"}, "did you mean 'flops'"), ({"teacher": "float16"}, "teacher"),
    ({"train": {"steps": 4}}, "broken"), ({"budget": {"finish": 3}}, "broken"), ({"budget": {"final": 0.5}}, "target ratio"),
    ({"config": {"stripe": 48}}, "divisor"), ({"length": 1}, "length"), ({"shard": "yes"}, "shard"),
])
def test_recipes_that_are_refused(change, said, tmp_path, capsys):
    (tmp_path / "bad.json").write_text(json.dumps({**TOY, **change}))
    assert command.main([str(tmp_path / "bad.json"), "--out", str(tmp_path / "out")]) == 1
    assert said in capsys.readouterr().err


def test_recipes_that_are_none(tmp_path):
    with pytest.raises(SparsityError, match="llama-3.2-1b"):
        command.read("llama-3.2-1")
    for text, said in (("{", "no JSON"), ("[]", "object"), ('{"model": "x"}', "lacks")):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(SparsityError, match=said):
            command.read(str(tmp_path / "bad.json"))


def test_data_that_is_refused(tmp_path):
    _, tokenizer = command.load_model("small-llama")
    path = tmp_path / "data.jsonl"
    for text, said in (("", "empty"), ("{", "line 1 is no JSON"), ('{"text": "a"}\n{"prompt": "b"}', "line 2 has neither"),
                       ('{"messages": []}', "chat format"), ('{"text": "a"}', "2 to 32 tokens")):
        path.write_text(text)
        with pytest.raises(SparsityError, match=said):
            command.rows(tokenizer, str(path), 32, 4)
    with pytest.raises(SparsityError, match="a file of JSON lines"):
        command.rows(tokenizer, str(tmp_path / "none"), 32, 4)


def test_several_devices_share_the_pieces_of_a_batch():
    found = command.read("llama-3.2-1b")
    pieces = {n: command.built(found, n)[1].train.accumulation for n in (1, 2, 5, 8, 16, 64)}
    assert pieces == {1: 16, 2: 8, 5: 16, 8: 2, 16: 1, 64: 1}  # five come out odd: the trainer says so


@pytest.mark.parametrize(("name", "shape"), [("llama-3.2-1b", (2048, 32, 8, 64)), ("llama-3.2-3b", (3072, 24, 8, 128))])
def test_the_recipes_fit_the_models_they_name(name, shape):
    hidden, heads, groups, size = shape
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(LlamaConfig(
            vocab_size=128_256, hidden_size=hidden, intermediate_size=8192, num_hidden_layers=2, num_attention_heads=heads,
            num_key_value_heads=groups, head_dim=size, tie_word_embeddings=True))
        registry = convert(model, command.built(command.read(name))[0])
    assert registry.thresholds()["lm_head"].shape == (251, hidden)
