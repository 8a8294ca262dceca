"""Granular layers run by the compiled operators: the same numbers, and the model back as it was."""

import pytest
import torch
from core_tiny import tiny, tokens
from torch import nn

from sparsity_lib import SparsityError
from sparsity_lib.cwic import CWICConfig, convert, measure, registry_of
from sparsity_lib.cwic.granular import masks
from sparsity_lib.cwic.inference import PackedGLU, PackedLinear, packed
from sparsity_lib.cwic.layers import CWICLinear, Ledger

IDS = tokens(2, 9)


def learned(stripe, **changes):
    """A granular model with statistics of its own inputs and random thresholds, in evaluation mode."""
    model = tiny("llama", tie_word_embeddings=True)
    registry = convert(model, CWICConfig(stripe=stripe, uneven=changes.pop("uneven", stripe == 16), **changes))
    model.train()(IDS)
    draw = torch.Generator().manual_seed(3)
    for theta in registry.thresholds().values():
        theta.data.copy_(torch.rand(theta.shape, generator=draw))
    return model.eval()


@pytest.mark.parametrize("outputs", [256, 300])
@pytest.mark.parametrize("bias, stripe", [(True, 128), (False, 70)])
def test_a_packed_layer_has_a_stripes_own_thresholds(outputs, bias, stripe):
    torch.manual_seed(0)
    layer = CWICLinear(nn.Linear(40, outputs, bias=bias), "l", "q", CWICConfig(stripe=stripe, uneven=True), Ledger())
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


@pytest.mark.parametrize("stripe", [16, {"q": 5, "gate": 7, "head": 20}])
def test_stripes_of_any_width_say_the_same(stripe):
    model = learned(stripe, uneven=True)
    with torch.no_grad():
        before = model(IDS).logits
        with packed(model):
            torch.testing.assert_close(model(IDS).logits, before, rtol=1e-4, atol=1e-4)
            mlp = model.model.layers[0].mlp
            assert isinstance(mlp, PackedGLU) and mlp.gate.weight.stripe == (16 if stripe == 16 else 7)
    assert isinstance(model.model.layers[0].mlp.gate_proj, CWICLinear)


def test_what_is_read_is_what_is_counted():
    """NaN in every weight that no token's mask keeps: the operators never see one, and the rest is the account's number."""
    model = learned(16)
    found = measure(model, IDS[:1, :1])  # one token
    registry, row = registry_of(model), {}
    registry.ledger.recorder = lambda layer, x: row.__setitem__(layer.name, x)
    with torch.no_grad():
        before = model(IDS[:1, :1]).logits
    registry.ledger.recorder = None
    with packed(model):
        for name, x in row.items():
            layer = registry.layers[name]
            mean, scale, _ = layer.sparsity.rule()
            kept = torch.cat(list(masks(x, layer.sparsity.theta, mean, scale)))
            assert 0.1 < kept.float().mean() < 0.95
            if name.endswith("act_fn"):
                up, down = model.get_submodule(name.rpartition(".")[0]).matrices
                read = kept.sum() * (up.cols + down.cols)
                spoilt = [p.data for p in (up, down)]
            else:
                owner = name.rpartition(".")[0]
                module = model.get_submodule(owner).gate if name.endswith("gate_proj") else model.get_submodule(name)
                width, outputs = module.weight.stripe or module.weight.outputs, module.weight.outputs
                stripes = kept.view(-1, module.weight.inputs).sum(1).tolist()
                read = sum(count * min(width, outputs - i * width) for i, count in enumerate(stripes))
                spoilt = [module.weight.data]
            for data in spoilt:
                data[~kept.flatten()] = float("nan")
            assert read == found.read[name][0, 0]
        torch.testing.assert_close(model(IDS[:1, :1]).logits, before, rtol=1e-4, atol=1e-4)


def test_other_models_are_refused_and_left_alone():
    with pytest.raises(SparsityError, match="no granular layers"), packed(tiny("llama")):
        pass
    model = learned(16)
    model.model.layers[1].mlp.norm = nn.Identity()
    with pytest.raises(SparsityError, match=r"model.layers.1.mlp is no plain gated FFN: it holds .*norm"), packed(model):
        pass
    assert isinstance(model.model.layers[0].mlp.gate_proj, CWICLinear)
