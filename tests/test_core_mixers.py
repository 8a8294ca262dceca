"""Sites around mixers that are no attention: Mamba2, and a hybrid of short convolutions and attention."""

import pytest
import torch
from core_tiny import seen_by, tokens
from transformers import AutoModelForCausalLM, Lfm2Config, Mamba2Config, MambaConfig

from sparsity_lib import Recipe, Rule, SparsityError, account, find_sites, fit, install, installed, uninstall, weights_per_token
from sparsity_lib.accounting import weights_by_part
from sparsity_lib.parts.select import Threshold, TopK

HIDDEN, LAYERS, STATE, HEADS, VOCABULARY = 32, 2, 4, 4, 61
INNER = 2 * HIDDEN
IN = 2 * INNER + 2 * STATE + HEADS  # z and x, B and C, dt
IDS = tokens(3, 12)


def mamba2(seed=0):
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(Mamba2Config(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, num_hidden_layers=LAYERS, num_heads=HEADS, head_dim=INNER // HEADS,
        state_size=STATE, n_groups=1, chunk_size=8, pad_token_id=None, bos_token_id=1, eos_token_id=2,
    )).eval()


def both(density, make=TopK):
    return Recipe("mixer", (Rule("in_proj_in", make(density)), Rule("out_proj_in", make(density))))


@torch.no_grad()
def logits(model, **options):
    return model(input_ids=IDS, **options).logits


def test_the_two_projections_of_mamba2_are_found():
    found = find_sites(mamba2())
    assert found.kinds() == ("in_proj_in", "out_proj_in") and found.layers == LAYERS
    of_one = [("in_proj", HIDDEN, IN), ("out_proj", INNER, HIDDEN)]
    assert [(x.role, x.inputs, x.outputs) for x in found.linears] == of_one * LAYERS
    site = found.sites[1, "out_proj_in"]
    assert (site.width, site.column_readers, site.block) == (INNER, ("backbone.layers.1.mixer.out_proj",), "backbone.layers.1")
    assert site.input_weight(site.column_readers[0]).shape == (HIDDEN, INNER)
    with pytest.raises(SparsityError, match=r"no site 'qkv_in'.*in_proj_in, out_proj_in"):
        found.of_kind("qkv_in")


@pytest.mark.parametrize("make", [TopK, Threshold])
def test_nothing_dropped_changes_nothing_and_uninstalling_restores(make):
    model = mamba2()
    before = logits(model)
    with installed(model, fit(both(1.0, make), model, ids=IDS)):
        assert torch.equal(logits(model), before)
    install(model, fit(both(0.5, make), model, ids=IDS))
    assert not torch.allclose(logits(model), before, atol=1e-4)
    uninstall(model)
    assert torch.equal(logits(model), before)


def test_a_mask_by_hand_is_what_the_projections_read():
    model = mamba2()
    first = model.backbone.layers[0].mixer.in_proj
    dense = seen_by(model, first, IDS)
    weakest = dense.abs().argsort(dim=-1)[:, : HIDDEN // 2]
    install(model, fit(both(0.5), model, ids=IDS))
    torch.testing.assert_close(seen_by(model, first, IDS), dense.scatter(-1, weakest, 0.0))
    last = seen_by(model, model.backbone.layers[-1].mixer.out_proj, IDS)
    assert ((last != 0).sum(-1) == INNER // 2).all()


def test_weights_are_counted_by_hand():
    model = mamba2()
    mixer = LAYERS * (HIDDEN * IN + INNER * HIDDEN)
    parts = weights_by_part(model)
    assert parts["mixer"] == mixer and parts["attention"] == parts["ffn"] == 0
    with installed(model, fit(both(0.5), model, ids=IDS)):
        counted = account(model, ids=IDS)
    assert counted.skipped == pytest.approx(0.5 * mixer / weights_per_token(model))
    assert counted.skipped_by_role == pytest.approx({
        "in_proj": 0.5 * LAYERS * HIDDEN * IN / weights_per_token(model),
        "out_proj": 0.5 * LAYERS * INNER * HIDDEN / weights_per_token(model),
    })


def test_decoding_token_by_token_is_sparse_as_well():
    model = install(mamba2(), fit(both(0.5), mamba2(), ids=IDS))
    whole = logits(model)
    cache, pieces = None, []
    with torch.no_grad():
        for place in range(IDS.shape[1]):
            out = model(input_ids=IDS[:, place : place + 1], cache_params=cache, use_cache=True)
            cache = out.cache_params
            pieces.append(out.logits)
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-3, atol=1e-4)


def test_a_hybrid_has_each_site_where_it_is():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(Lfm2Config(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, layer_types=["conv", "full_attention"], block_auto_adjust_ff_dim=False,
    )).eval()
    found = find_sites(model)
    of = [{kind for layer, kind in found.sites if layer == each} for each in (0, 1)]
    assert of[0] == {"in_proj_in", "out_proj_in", "up_in", "down_in"}
    assert of[1] == {"qkv_in", "o_in", "up_in", "down_in", "head_in"} and found.kinds() == ("up_in", "down_in")
    before = logits(model)
    with installed(model, fit(both(1.0), model, ids=IDS)):
        assert torch.equal(logits(model), before)
    install(model, fit(both(0.5), model, ids=IDS))
    assert not torch.equal(logits(model), before)


def test_a_mixer_with_more_projections_is_refused_by_name():
    """Mamba's first version computes B, C and dt by projections of their own."""
    model = AutoModelForCausalLM.from_config(MambaConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, num_hidden_layers=1, state_size=STATE, pad_token_id=None,
    ))
    with pytest.raises(SparsityError, match="mixer of block 0 is not one input and one output projection: .*x_proj"):
        find_sites(model)
