"""Granular models in the compiled decoder: PyTorch's own tokens, and the bytes that the masks leave."""

import pytest
import torch
from core_tiny import tiny, tokens

from sparsity_lib import SparsityError, fit, recipes
from sparsity_lib.cwic import CWICConfig, convert, measure, registry_of, save_thresholds
from sparsity_lib.cwic.inference import decoder
from sparsity_lib.decode import Decoder
from sparsity_lib.decode.granular import GranularSource
from sparsity_lib.decode.rules import Choice
from sparsity_lib.ops import library
from sparsity_lib.sites import HEAD_IN, O_IN, QKV_IN

pytestmark = pytest.mark.skipif(library.path() is None, reason="no compiled library")
IDS = tokens(4, 12)
#: float32 entries of a line: what a stripe's rows are padded to.
LINE = 16


def learned(family="llama", config=None, **changes):
    """A granular model with statistics of its own inputs and random thresholds, in evaluation mode."""
    model = tiny(family, **changes)
    registry = convert(model, config or CWICConfig(stripe=16, uneven=True))
    model.train()(IDS)
    draw = torch.Generator().manual_seed(3)
    for theta in registry.thresholds().values():
        theta.data.copy_(0.8 * torch.rand(theta.shape, generator=draw))
    return model.eval()


@torch.no_grad()
def forced(model, ids, made, prompt):
    """The largest difference between the decoder's logits and one whole forward's, over the tokens after the prompt."""
    whole = model(input_ids=ids).logits[0].float()
    found = [made.prefill(ids[:, :prompt])] + [made.step(int(token)).clone() for token in ids[0, prompt:]]
    return float((torch.stack(found) - whole[prompt - 1 :]).abs().max() / whole.std())


CONFIGS = [CWICConfig(), CWICConfig(stripe=16, uneven=True), CWICConfig(stripe={"q": 5, "k": 3, "gate": 7}, uneven=True),
           CWICConfig(stripe=16, uneven=True, head=False), CWICConfig(stripe=16, uneven=True, normalise=False)]


@pytest.mark.parametrize("config", CONFIGS, ids=["one", "16", "uneven", "headless", "plain"])
@pytest.mark.parametrize("tied", [True, False])
def test_logits_are_the_models_own(config, tied):
    model = learned(config=config, tie_word_embeddings=tied)
    assert forced(model, tokens(1, 20, seed=5), Decoder(model, capacity=20), prompt=4) < 1e-4


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "gemma2", "gemma3"])
def test_other_families(family):
    model = learned(family)
    assert forced(model, tokens(1, 16, seed=5), Decoder(model, capacity=16), prompt=3) < 1e-4


def test_generation_is_token_identical(tmp_path):
    model, ids = learned(), tokens(1, 6)
    expected = model.generate(ids, max_new_tokens=40, do_sample=False, eos_token_id=None, pad_token_id=0)[:, 6:]
    assert torch.equal(Decoder(model, capacity=64).generate(ids, 40), expected)
    path = save_thresholds(model, tmp_path / "cwic.safetensors")
    assert torch.equal(decoder(tiny("llama"), path, capacity=64).generate(ids, 40), expected)
    assert torch.equal(decoder(model, capacity=64).generate(ids, 40), expected)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(Decoder(model, capacity=64).generate(ids, 40), expected)
    finally:
        torch.set_num_threads(threads)


def test_bytes_are_those_of_the_masks():
    """Stripes of whole lines: every byte is a weight that the account counts, a threshold, or the cache."""
    config = CWICConfig(stripe=LINE, uneven=False)
    model = learned(config=config, vocab_size=64, head_dim=8)
    made, found, registry = Decoder(model, capacity=8), measure(model, IDS[:1, :1]), registry_of(model)
    made.step(int(IDS[0, 0]))
    weights = float(sum(each[0, 0] for each in found.read.values()))
    thresholds = sum(theta.numel() for theta in registry.thresholds().values())
    cache = 2 * 2 * 2 * 8  # layers, keys and values, heads, width: one token
    assert made.bytes_read == 4 * (weights + thresholds + cache)


def test_a_bfloat16_model_and_narrow_weights_come_close():
    model, ids = learned(dtype=torch.bfloat16), tokens(1, 14, seed=5)
    exact = learned()
    made = Decoder(model, capacity=14)
    made.prefill(ids[:, :13])
    with torch.no_grad():  # a mask that hangs on a rounding changes some logits by much
        whole = model(ids).logits[0, -1].float()
    assert float((made.step(int(ids[0, 13])) - whole).abs().mean() / whole.std()) < 0.2
    plain, narrow = Decoder(exact, capacity=14), Decoder(exact, capacity=14, format="int8")
    plain.prefill(ids[:, :13]), narrow.prefill(ids[:, :13])
    assert float((plain.step(7).softmax(-1) - narrow.step(7).softmax(-1)).abs().sum()) < 0.2


def test_what_the_decoder_cannot_do_is_said():
    model, dense = learned(), tiny("llama")
    with pytest.raises(SparsityError, match="granular model drops.*leave the plan out"):
        Decoder(model, fit(recipes.cats(0.5), dense, ids=IDS))
    with pytest.raises(SparsityError, match="no granular layers"):
        decoder(dense)


def test_a_granular_model_drops_inputs_of_a_head_that_is_not():
    """By a rule of the k largest, whose likely words are read in full; the blocks keep their stripes."""
    model, ids = learned(config=CWICConfig(stripe=16, uneven=True, head=False)), tokens(1, 16, seed=5)
    source, refined = GranularSource(model), 5

    def choices(layer, site, width):
        return Choice(k=width // 2, refine=refined / 61) if site == HEAD_IN else source.choice(layer, site, width)

    def head(module, args, whole):
        x = args[0]
        few = x.abs() >= x.abs().topk(x.shape[-1] // 2).values[..., -1:]
        y = torch.nn.functional.linear(x * few, module.weight)
        return y.scatter(-1, (likely := y.topk(refined).indices), whole.gather(-1, likely))

    made = Decoder(model, choices=choices, capacity=16)
    found = [made.prefill(ids[:, :3])] + [made.step(int(token)).clone() for token in ids[0, 3:]]
    with torch.no_grad():
        handle = model.lm_head.register_forward_hook(head)
        whole = model(input_ids=ids).logits[0].float()
        handle.remove()
    assert float((torch.stack(found[1:]) - whole[3:]).abs().max() / whole.std()) < 1e-4


@pytest.mark.parametrize("wanted", [HEAD_IN, QKV_IN, O_IN])
def test_stripes_and_a_rule_at_one_place_are_refused(wanted):
    source = GranularSource(learned())
    with pytest.raises(SparsityError, match=f"site {wanted} stripes drop inputs already"):
        Decoder(source, choices=lambda layer, site, width: Choice(k=3) if site == wanted else source.choice(layer, site, width))
