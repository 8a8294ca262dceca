"""ReLUfication: the function, the conversion, the checkpoint."""

import pytest
import torch
from core_tiny import tiny, tokens
from transformers import AutoModelForCausalLM

from sparsity_lib import SparsityError, find_sites, fit, installed, recipes
from sparsity_lib.decode import Decoder
from sparsity_lib.drelu import LlamaDReluConfig, LlamaDReluForCausalLM, relufy

IDS = tokens(2, 10)


def test_the_ffn_is_down_of_two_relus():
    model = relufy(tiny("llama"))
    mlp, x = model.model.layers[0].mlp, torch.randn(5, 32)
    gate, up, down = (getattr(mlp, f"{name}_proj").weight.detach().double() for name in ("gate", "up", "down"))
    h = (x.double() @ gate.T).clamp(min=0) * (x.double() @ up.T).clamp(min=0)
    torch.testing.assert_close(mlp(x).detach().double(), h @ down.T, rtol=1e-5, atol=1e-6)
    assert 0.6 < float((h == 0).double().mean()) < 0.9  # both halves positive: a quarter, for random weights


def test_the_weights_stay_the_function_does_not_and_the_original_is_untouched():
    llama = tiny("llama", tie_word_embeddings=True, dtype=torch.bfloat16)
    before = llama(IDS).logits
    made = relufy(llama)
    assert set(made.state_dict()) == set(llama.state_dict()) and made.dtype == torch.bfloat16 and not made.training
    assert all(torch.equal(made.state_dict()[name], tensor) for name, tensor in llama.state_dict().items())
    assert made.lm_head.weight is made.model.embed_tokens.weight
    with torch.no_grad():
        made.model.layers[0].mlp.up_proj.weight.zero_()
    assert torch.equal(llama(IDS).logits, before) and not torch.allclose(made(IDS).logits, before, atol=1e-3)


def test_it_saves_and_loads_like_any_model(tmp_path):
    made = relufy(tiny("llama"))
    made.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again) is LlamaDReluForCausalLM and again.config.model_type == "llama_drelu"
    assert torch.equal(again(IDS).logits, made(IDS).logits)


def test_its_gate_is_a_site_and_dropping_only_zeros_changes_nothing():
    model = relufy(tiny("llama"))
    found = find_sites(model)
    assert found.kinds() == ("qkv_in", "o_in", "up_in", "gate", "down_in")
    seen = []
    model.model.layers[0].mlp.act_fn.register_forward_hook(lambda module, args, out: seen.append(out))
    before = model(IDS).logits
    assert len(seen) == 1, "the gate's activation must run on the gate alone"
    zeros = max(float((g == 0).double().mean(-1).min()) for g in seen)
    assert zeros > 0.2
    with installed(model, fit(recipes.cats(0.9), model, ids=IDS)):
        torch.testing.assert_close(model(IDS).logits, before, rtol=1e-4, atol=1e-5)


def test_what_is_no_llama_or_not_relu_is_refused():
    for family in ("mistral", "gpt2"):
        with pytest.raises(SparsityError, match="knows Llama"):
            relufy(tiny(family))
    with pytest.raises(SparsityError, match="hidden_act = 'silu'"):
        LlamaDReluForCausalLM(LlamaDReluConfig(hidden_act="silu"))
    with pytest.raises(SparsityError, match="'llama_drelu'"):
        Decoder(relufy(tiny("llama")), None)
