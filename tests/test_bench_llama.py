"""The baselines of decoding: GGUF files hold our weights, and every engine computes the model that ours computes."""

import sys

import gguf
import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig, MistralConfig

from sparsity_lib.bench import baselines, engines, ggml, llama, matvec
from sparsity_lib.bench.gguf_model import TYPES, temporary_gguf, write_gguf
from sparsity_lib.decode import Decoder, ModelSource, RandomSource
from sparsity_lib.decode.rules import Choice
from sparsity_lib.errors import SparsityError
from sparsity_lib.ops import library

SIZES = {"vocab_size": 1200, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2,
         "head_dim": 32, "max_position_embeddings": 256}
CONFIGS = {
    "llama": LlamaConfig(**SIZES, num_hidden_layers=3, rope_theta=1e5, tie_word_embeddings=False),
    "llama tied": LlamaConfig(**SIZES, num_hidden_layers=2, tie_word_embeddings=True),
    "gemma3": Gemma3TextConfig(**SIZES, num_hidden_layers=4, sliding_window=16, query_pre_attn_scalar=32,
                               layer_types=["sliding_attention", "full_attention"] * 2),
}
needs_llama = pytest.mark.skipif(not llama.available(), reason="llama-cpp-python is not installed: pip install '.[bench]'")
needs_ggml = pytest.mark.skipif(not ggml.available(), reason="no ggml library: pip install '.[bench]'")
needs_native = pytest.mark.skipif(library.path() is None, reason="no compiled library")


def model_of(name: str, dtype=torch.float32, seed: int = 0):
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(CONFIGS[name]).eval().requires_grad_(False)
    for parameter in model.parameters():  # norms off their start as well, and attention that is not uniform
        parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.to(dtype)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_gguf_file_gives_transformers_the_same_model(name, tmp_path):
    model = model_of(name)
    write_gguf(ModelSource(model), tmp_path / "m.gguf", "float32")
    again = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32).state_dict()
    for key, value in model.state_dict().items():
        torch.testing.assert_close(again[key], value, rtol=0, atol=1e-6, msg=key)  # Gemma's 1 + weight rounds
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]


@pytest.mark.parametrize("precision", TYPES)
def test_precisions_are_those_of_ggml(precision, tmp_path):
    model = model_of("llama")
    write_gguf(ModelSource(model), tmp_path / "m.gguf", precision)
    tensors = {t.name: t for t in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    down = tensors["blk.1.ffn_down.weight"]
    assert down.tensor_type == TYPES[precision] and tensors["blk.1.ffn_norm.weight"].tensor_type == TYPES["float32"]
    weight = model.model.layers[1].mlp.down_proj.weight
    found = torch.from_numpy(gguf.quants.dequantize(down.data, down.tensor_type).copy())
    steps = weight.view(-1, 32).abs().amax(1, keepdim=True)  # by groups of 32
    allowed = {"float32": 0.0, "bfloat16": 2.0**-8, "int8": 0.5 / 127 + 2.0**-11, "int4": 1 / 8 + 2.0**-11}[precision]
    # a scale is float16, and Q4_0 ends at +7
    assert ((found - weight).view(-1, 32).abs() <= allowed * steps).all()
    if precision != "float32":
        assert not torch.equal(found, weight)


def test_what_llama_cpp_would_compute_otherwise_is_refused(tmp_path):
    biased = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES, num_hidden_layers=1, attention_bias=True))
    other = AutoModelForCausalLM.from_config(MistralConfig(**SIZES, num_hidden_layers=1))
    odd = AutoModelForCausalLM.from_config(LlamaConfig(**{**SIZES, "hidden_size": 48}, num_hidden_layers=1))
    for model, precision, words in ((biased, "float32", "biases"), (other, "float32", "mistral"), (odd, "int8", "multiple of 32"),
                                    (model_of("llama"), "int3", "int4")):
        with pytest.raises(SparsityError, match=words):
            write_gguf(ModelSource(model), tmp_path / "m.gguf", precision)
    assert not list(tmp_path.iterdir())


def test_a_temporary_file_goes_away(tmp_path, monkeypatch):
    monkeypatch.setenv("SPARSITY_CACHE", str(tmp_path))
    with pytest.raises(KeyError), temporary_gguf(ModelSource(model_of("llama tied")), "tiny") as path:
        assert path.stat().st_size > 1000 and path.is_relative_to(tmp_path)
        raise KeyError
    assert not [p for p in tmp_path.rglob("*") if p.is_file() and p.suffix != ".lock"]


def test_without_llama_cpp_the_rest_is_measured(monkeypatch):
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    ggml._load.cache_clear()
    with pytest.raises(SparsityError, match=r"pip install '\.\[bench\]'"):
        llama.load()
    assert not llama.available() and llama.version() is None and not ggml.available()
    names = matvec.dense_cases("int8", [torch.randn(32, 64)], torch.randn(1, 64).bfloat16())
    assert list(names) == ["torch _weight_int8pack_mm"]


@needs_native
def test_decoders_are_measured_together(monkeypatch):
    source = ModelSource(model_of("llama", torch.bfloat16))
    found = baselines.measure(source, "tiny", (8, 16), 3, sets=(("sparse", "HF eager"), ("llama.cpp",)))
    expected = {baselines.DENSE, *baselines.SPARSE, "HF eager", "bandwidth", *(["llama.cpp"] if llama.available() else [])}
    assert [set(p) for p in found["prompts"].values()] == [expected] * 2
    assert found["prompts"]["8"][baselines.DENSE]["over_ours_dense"] == 1.0
    sizes = [found["bytes"][kind] for kind in (baselines.DENSE, *baselines.SPARSE)]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == 3
    assert "x HF eager" in baselines.table("tiny", found)


@needs_native
def test_decoders_that_share_weights_are_what_they_would_be_alone():
    source = ModelSource(model_of("llama"))

    def decoder(density: float) -> Decoder:
        def choice(layer: int, site: str, width: int) -> Choice | None:
            return Choice(k=round(density * width)) if site in baselines.SITES else None

        return Decoder(source, choices=choice)

    first, alone = decoder(0.5), decoder(0.25)
    shared = engines.sharing(first, dict.fromkeys(baselines.SITES, 0.25))
    for token in (5, 6, 7):
        assert torch.equal(shared.step(token), alone.step(token)) and shared.bytes_read == alone.bytes_read
    first.reset()
    again = decoder(0.5)
    assert torch.equal(first.step(9), again.step(9)) and first.bytes_read == again.bytes_read > shared.bytes_read


def test_random_weights_make_the_same_model_for_everyone():
    source = RandomSource(CONFIGS["llama tied"], dtype=torch.float32)
    model = engines.hugging_face(source, CONFIGS["llama tied"])
    assert not any(p.is_meta for p in [*model.parameters(), *model.buffers()])
    assert model.lm_head.weight is model.model.embed_tokens.weight and torch.isfinite(model(torch.tensor([[1, 2]])).logits).all()
    for name in "qkvo":
        assert torch.equal(getattr(model.model.layers[1].self_attn, f"{name}_proj").weight, source.matrix(1, name))


@pytest.mark.parametrize("name", ("llama", "gemma3"))
def test_a_compiled_step_is_an_eager_step(name, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda forward, **options: forward)  # what it compiles; compiling takes a minute
    model, outputs = model_of(name), []
    ways = engines.Eager(model), engines.Compiled(model, 4)
    with torch.inference_mode():
        for engine in ways:
            torch.manual_seed(1)  # of the random context
            engine.at(12)
            outputs.append(engine(2).clone())
        torch.testing.assert_close(outputs[1], outputs[0])
        torch.testing.assert_close(ways[1](2), outputs[0])  # the same place again
        for engine in ways:
            engine.at(24)  # beyond the sliding window
            assert all(torch.isfinite(engine(turn)).all() for turn in range(3))


@needs_llama
@pytest.mark.parametrize("name", CONFIGS)
def test_llama_cpp_computes_the_same_logits(name, tmp_path, monkeypatch):
    monkeypatch.setenv("SPARSITY_CACHE", str(tmp_path))
    model = model_of(name)
    ids = torch.randint(0, 1200, (1, 60), generator=torch.Generator().manual_seed(3))
    expected = model(ids).logits[0]
    found = llama.LlamaCpp.of(ModelSource(model), "tiny", "float32", capacity=64)
    scale = float(expected.std())
    close = {"rtol": 0, "atol": 40 * 2.0**-11 * scale}  # llama.cpp's cache, and its sums over it, are float16
    torch.testing.assert_close(found.read(ids[0, :40].tolist()), expected[39], **close)
    for i in range(40, 60):
        torch.testing.assert_close(found.read([int(ids[0, i])]), expected[i], **close)
    found.rewind(59)
    torch.testing.assert_close(found.read([int(ids[0, 59])]), expected[59], **close)
    with pytest.raises(SparsityError, match="room"):
        found.read([1] * 300)
    found.close()


@needs_ggml
@pytest.mark.parametrize("format", TYPES)
def test_a_product_of_ggml_is_the_product(format):
    torch.manual_seed(0)
    weight, x = torch.randn(96, 256), torch.randn(1, 256)
    stored = gguf.quants.quantize(weight.numpy(), TYPES[format])
    weight = torch.from_numpy(gguf.quants.dequantize(stored, TYPES[format]).copy())  # so x alone is rounded
    found, exact = ggml.Product(weight, format, x)(), (x @ weight.T)[0]
    step = {"float32": 2.0**-24, "bfloat16": 2.0**-9, "int8": 0.5 / 127, "int4": 0.5 / 127}[format]
    sums = 256**0.5 * 2.0**-24  # of 256 terms in float32; the weight's scale is a float16 that is rounded once more
    scale = 2.0**-11 if format.startswith("int") else 0.0
    bound = (3 * step + sums + scale) * float(x.abs().max() * weight.norm(dim=1).max())
    assert (found - exact).abs().max() < bound < 0.2 * float(exact.abs().max())


@needs_ggml
def test_shapes_that_ggml_lacks_are_refused():
    for shape, width in (((4, 33), 33), ((4, 32), 64), ((32,), 32)):
        with pytest.raises(SparsityError, match="shape"):
            ggml.Product(torch.randn(shape), "int8", torch.randn(width))
