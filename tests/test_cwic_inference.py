"""Granular layers run by the compiled operators: the same numbers, and the model back as it was."""

import pytest
import torch
from core_tiny import tiny, tokens
from torch import nn

from sparsity_lib import SparsityError
from sparsity_lib.cwic import CWICConfig, convert
from sparsity_lib.cwic.inference import PackedLinear, packed
from sparsity_lib.cwic.layers import CWICLinear, Ledger

IDS = tokens(2, 9)


@pytest.mark.parametrize("outputs", [256, 300])
@pytest.mark.parametrize("bias", [True, False])
def test_a_packed_layer_has_a_stripes_own_thresholds(outputs, bias):
    torch.manual_seed(0)
    layer = CWICLinear(nn.Linear(40, outputs, bias=bias), "l", "q", CWICConfig(stripe=128, uneven=True), Ledger())
    layer.train()(torch.randn(50, 40) * 2 + 1)
    layer.eval().sparsity.theta.data.uniform_(0, 2)
    x = torch.randn(3, 4, 40) * 2 + 1
    with torch.no_grad():
        torch.testing.assert_close(PackedLinear(layer)(x), layer(x), rtol=1e-4, atol=1e-5)


def test_an_entry_at_its_threshold_is_kept_as_in_training():
    layer = CWICLinear(nn.Linear(4, 2, bias=False), "l", "q", CWICConfig(), Ledger()).eval()
    layer.sparsity.theta.data.fill_(0.7)
    x = torch.tensor([[0.7, -0.7, 0.6999999, 0.0]])
    with torch.no_grad():
        found = PackedLinear(layer)(x)
        torch.testing.assert_close(found, x * torch.tensor([1.0, 1, 0, 0]) @ layer.weight.T)
        torch.testing.assert_close(found, layer(x))


@pytest.mark.parametrize("config", [CWICConfig(), CWICConfig(normalise=False)])
def test_a_packed_model_says_what_it_said(config):
    model = tiny("llama", tie_word_embeddings=True)
    registry = convert(model, config)
    model.train()(IDS)
    for theta in registry.thresholds().values():
        theta.data.uniform_(0, 1)
    model.eval()
    kinds = {name: type(module) for name, module in model.named_modules()}
    with torch.no_grad():
        before = model(IDS).logits
        model.train()
        with packed(model):
            torch.testing.assert_close(model(IDS).logits, before, rtol=1e-4, atol=1e-4)
            assert isinstance(model.lm_head, PackedLinear)
    assert model.training and {name: type(module) for name, module in model.named_modules()} == kinds
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model.eval()(IDS).logits, before)


def test_narrow_stripes_are_refused_with_the_model_left_alone():
    model = tiny("llama")
    convert(model, CWICConfig(stripe={"q": 16}))
    with pytest.raises(SparsityError, match=r"stripe of model.layers.0.self_attn.q_proj = 16.*multiple of 128"), packed(model):
        pass
    assert isinstance(model.model.layers[0].self_attn.q_proj, CWICLinear)
    with pytest.raises(SparsityError, match="no granular layers"), packed(tiny("llama")):
        pass
