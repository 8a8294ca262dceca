"""The embedded models as they come out of the conversion, and what `load_model` refuses."""

import json

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, ViTConfig, ViTForImageClassification

from sparsity_lib.assets import MODELS, load_model, load_tokenizer, model_path
from sparsity_lib.errors import SparsityError

TEXT = (
    "The river rises in the hills above the town and runs for forty miles before it meets the sea. In spring, when the "
    "snow melts, it often floods the meadows on both banks, and the farmers move their sheep to higher ground."
)


@pytest.mark.parametrize(
    ("name", "tokens", "loss", "likeliest"),
    [("smollm2-135m-instruct", 47, 3.3252158, 198), ("gemma3-270m", 48, 2.6951587, 669)],
)
def test_language_model_gives_its_golden_loss(name, tokens, loss, likeliest):
    """Mean cross-entropy (nats per token) of a plain text; rounding moves the sixth digit, a wrong layout the first."""
    model, tokenizer = load_model(name)
    assert not model.training and not any(parameter.requires_grad for parameter in model.parameters())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    ids = tokenizer(TEXT, return_tensors="pt").input_ids
    assert ids.shape == (1, tokens)
    with torch.inference_mode():
        output = model(ids, labels=ids)
    assert output.loss.item() == pytest.approx(loss, rel=1e-4)
    assert likeliest in output.logits[0, -1].topk(2).indices


def test_encoder_comes_without_a_language_model_head():
    model, tokenizer = load_model("minilm-l6")
    assert type(model).__name__ == "BertModel"
    texts = ["A cat sits on the mat.", "A kitten rests on a rug.", "Stock prices fell sharply."]
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.inference_mode():
        hidden = model(**batch).last_hidden_state
    kept = batch.attention_mask[..., None]
    mean = torch.nn.functional.normalize((hidden * kept).sum(1) / kept.sum(1), dim=-1)
    similarity = mean @ mean.T
    assert similarity[0, 1].item() == pytest.approx(0.6654, abs=1e-3)
    assert similarity[0, 2].item() == pytest.approx(0.0654, abs=1e-3)


def test_gemma_starts_with_bos_also_after_a_round_trip(tmp_path):
    tokenizer = load_tokenizer("gemma3-270m")
    tokenizer.save_pretrained(tmp_path)
    for each in (tokenizer, load_tokenizer(str(tmp_path))):
        ids = each("Hello  world").input_ids
        assert ids[0] == each.bos_token_id == 2 and ids.count(2) == 1
        assert each.decode(ids, skip_special_tokens=True) == "Hello  world"


def test_smollm2_keeps_template_special_tokens_and_digits(tmp_path):
    tokenizer = load_tokenizer("smollm2-135m-instruct")
    tokenizer.save_pretrained(tmp_path)
    for each in (tokenizer, load_tokenizer(str(tmp_path))):
        chat = each.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True)
        assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
        assert each.tokenize("a<|im_end|>b") == ["a", "<|im_end|>", "b"]
        assert each.eos_token == each.pad_token == "<|im_end|>"
        assert each.tokenize("x  1995") == ["x", "ĠĠ", "1", "9", "9", "5"]  # GPT-2's own pattern gives "Ġ", "Ġ"


@pytest.mark.parametrize("name", MODELS)
def test_record_names_the_source_and_every_file(name):
    folder = model_path(name)
    record = json.loads((folder / "provenance.json").read_text())
    assert {path.name for path in folder.iterdir()} == {*record["files"], "provenance.json"}
    assert all(len(wheel["sha256"]) == 64 and wheel["licence"] for wheel in record["wheels"])


def test_local_folders_load_through_the_same_call(tmp_path):
    llama = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2,
    )
    LlamaForCausalLM(llama).save_pretrained(tmp_path / "llama")
    load_tokenizer("smollm2-135m-instruct").save_pretrained(tmp_path / "llama")
    model, tokenizer = load_model(str(tmp_path / "llama"), dtype="bfloat16", attn_implementation="eager")
    assert type(model).__name__ == "LlamaForCausalLM" and model.dtype is torch.bfloat16 and tokenizer is not None
    assert model.config._attn_implementation == "eager"

    vit = ViTConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4
    )
    ViTForImageClassification(vit).save_pretrained(tmp_path / "vit")
    model, tokenizer = load_model(str(tmp_path / "vit"))
    assert type(model).__name__ == "ViTForImageClassification" and tokenizer is None


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("smollm2-135m", "did you mean 'smollm2-135m-instruct'"), ("./nowhere", "no such folder"), ("", "not allowed"),
        (None, "not allowed"), ("someone/no-such-model", "one of gemma3-270m, minilm-l6, small-falcon, .*, smollm2-135m"),
    ],
)
def test_unknown_model_lists_the_embedded_ones(monkeypatch, name, said):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(SparsityError, match=said):
        load_model(name)


def test_pickled_weights_are_refused(tmp_path):
    LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
                architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path)
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(SparsityError, match="safetensors"):
        load_model(str(tmp_path))


@pytest.mark.parametrize(
    ("option", "value"), [("dtype", "int8"), ("dtype", torch.int64), ("dtype", "nn"), ("device", "moon")]
)
def test_bad_dtype_and_device_are_refused(option, value):
    with pytest.raises(SparsityError, match=f"{option} = "):
        load_model("minilm-l6", **{option: value})


def test_embedded_model_name_is_checked():
    with pytest.raises(SparsityError, match="embedded model = 'olmo-eval' is unknown"):
        model_path("olmo-eval")


@pytest.mark.parametrize("harm", ["weights", "config", "json"])
def test_damaged_folders_are_refused_with_their_name(tmp_path, harm):
    llama = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
                        num_key_value_heads=2)
    LlamaForCausalLM(llama).save_pretrained(tmp_path)
    file = tmp_path / ("model.safetensors" if harm == "weights" else "config.json")
    if harm == "config":
        file.write_text(file.read_text().replace('"hidden_size": 16', '"hidden_size": "wide"'))
    else:
        file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(SparsityError, match=str(tmp_path)):
        load_model(str(tmp_path))
