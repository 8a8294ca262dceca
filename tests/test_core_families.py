"""Sites of every family of models, and the taps that sit on them."""

import copy

import pytest
import torch
from core_tiny import DECODERS, GATED, HIDDEN, LAYERS, OTHERS, WIDTH, inputs, outputs, tiny
from transformers import AutoModelForCausalLM, GptOssConfig, OPTConfig

from sparsity_lib import Recipe, Rule, SparsityError, account, find_sites, fit, install, installed, recipes, uninstall
from sparsity_lib.attach import attach
from sparsity_lib.parts.scores import Magnitude
from sparsity_lib.parts.select import Threshold, TopK
from sparsity_lib.parts.transforms import Rotate

FAMILIES = (*DECODERS, *OTHERS)
FUSED_QKV = ("falcon", "falcon_new", "mpt", "gpt2", "phi3")
SPLIT = ("q", "k", "v", "o")


def width_of(family):
    return 4 * HIDDEN if family == "mpt" else WIDTH


def every_site(model, density, make=TopK):
    """One rule at every kind of site the model has; of gate and down_in only the gate."""
    kinds = [k for k in find_sites(model).kinds() if not (k == "down_in" and "gate" in find_sites(model).kinds())]
    return Recipe("everywhere", tuple(Rule(kind, make(density)) for kind in kinds))


@pytest.mark.parametrize("family", FAMILIES)
def test_sites_widths_and_roles(family):
    found = find_sites(tiny(family))
    expected = ["qkv_in", "o_in", "up_in", *(["gate"] if family in GATED else []), "down_in"]
    assert list(found.kinds()) == expected and found.layers == LAYERS
    for (_, kind), site in found.sites.items():
        assert site.width == (width_of(family) if kind in ("gate", "down_in") else HIDDEN), kind
    attention = ("qkv", "o") if family in FUSED_QKV else SPLIT
    ffn = ("gate_up", "down") if family in ("phi3", "mixtral") else ("gate", "up", "down") if family in GATED else ("up", "down")
    for layer in range(LAYERS):
        assert tuple(x.role for x in found.linears if x.layer == layer) == attention + ffn
        if family in GATED:
            gate = found.sites[layer, "gate"]
            by_name = {x.name: x.role for x in found.linears}
            assert [by_name[n] for n in gate.column_readers] == ["down"]
            assert [by_name[n] for n in gate.row_readers] == ["gate_up" if family == "mixtral" else "up"]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_linear_weight_of_the_blocks_is_found_once(family):
    model = tiny(family)
    found = find_sites(model)
    parameters = dict(model.named_parameters())
    for linear in found.linears:
        weight = parameters.get(f"{linear.name}.weight", parameters.get(linear.name))
        per_token = weight.numel() if weight.ndim == 2 else weight[0].numel() * 2
        assert linear.weights == per_token, linear.name
    in_blocks = [m for b in found.blocks for m in model.get_submodule(b).modules() if getattr(m, "weight", None) is not None]
    matrices = [m for m in in_blocks if m.weight.ndim == 2 and "Router" not in type(m).__name__]
    experts = 2 * LAYERS if family == "mixtral" else 0
    assert len(found.linears) == len(matrices) + experts


@pytest.mark.parametrize("family", FAMILIES)
def test_half_density_changes_and_uninstalling_restores_bit_for_bit(family):
    model = tiny(family)
    before, keys = outputs(model, family), set(model.state_dict())
    recipe = every_site(model, 0.5)
    plan = fit(recipe, model, batches=[inputs(family)])
    install(model, plan)
    assert not torch.allclose(outputs(model, family), before, atol=1e-4)
    uninstall(model)
    assert torch.equal(outputs(model, family), before) and set(model.state_dict()) == keys
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert "quantization_config" not in model.config.to_dict()


@pytest.mark.parametrize("select", [TopK, Threshold])
@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "mixtral"])
def test_full_density_is_bit_equal(family, select):
    model = tiny(family)
    before = outputs(model, family)
    install(model, fit(every_site(model, 1.0, select), model, batches=[inputs(family)]))
    assert torch.equal(outputs(model, family), before)


@pytest.mark.parametrize("family", FAMILIES)
def test_full_density_with_a_rotation_is_the_same_function(family):
    model = tiny(family)
    before = outputs(model, family)
    rules = tuple(Rule(kind, TopK(1.0), Magnitude(), Rotate()) for kind in ("qkv_in", "o_in", "up_in", "down_in"))
    install(model, fit(Recipe("rotated", rules), model, batches=[inputs(family)]))
    torch.testing.assert_close(outputs(model, family), before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_the_tapped_experts_compute_what_the_stock_ones_do(implementation):
    model = tiny("mixtral")
    model.set_experts_implementation(implementation)
    before = outputs(model)
    site = find_sites(model).sites[0, "gate"]
    handles = [attach(model, s, lambda x: x) for s in find_sites(model).sites.values()]
    torch.testing.assert_close(outputs(model), before, rtol=1e-5, atol=1e-5)
    for handle in handles:
        handle.remove()
    assert torch.equal(outputs(model), before)
    assert "forward" not in model.get_submodule(site.column_readers[0].rsplit(".", 1)[0]).__dict__


@pytest.mark.parametrize("family", FAMILIES)
def test_a_tap_runs_once_a_forward_and_sees_the_sites_width(family):
    model = tiny(family)
    seen = {}
    for (layer, kind), site in find_sites(model).sites.items():
        def tap(x, place=(layer, kind)):
            seen.setdefault(place, []).append(x.shape[-1])
            return x

        attach(model, site, tap)
    outputs(model, family)
    for (layer, kind), widths in seen.items():
        routed = family == "mixtral" and kind in ("gate", "down_in")
        assert set(widths) == {width_of(family) if kind in ("gate", "down_in") else HIDDEN}
        assert routed or len(widths) == 1, f"{layer}.{kind} was tapped {len(widths)} times"
    assert len(seen) == len(find_sites(model).sites)


def test_both_readers_of_a_site_get_the_tapped_value():
    model = tiny()
    mlp = model.model.layers[0].mlp
    attach(model, find_sites(model).sites[0, "up_in"], lambda x: x * 0 + 1)
    got = []
    for linear in (mlp.gate_proj, mlp.up_proj):
        linear.register_forward_hook(lambda module, args, out: got.append(args[0]))
    outputs(model)
    assert len(got) == 2 and all(bool((x == 1).all()) for x in got)


@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in GATED])
def test_a_gate_recipe_on_a_model_without_a_readable_gate_is_a_clear_error(family):
    with pytest.raises(SparsityError, match=r"no site 'gate'.*GLU.*qkv_in, o_in, up_in, down_in"):
        fit(recipes.cats(0.5), tiny(family), batches=[inputs(family)])


def test_an_activation_shared_by_all_blocks_is_told_apart():
    model = tiny()
    for layer in model.model.layers[1:]:
        layer.mlp.act_fn = model.model.layers[0].mlp.act_fn
    seen = []
    attach(model, find_sites(model).sites[1, "gate"], lambda x: seen.append(x.shape) or x)
    outputs(model)
    assert len(seen) == 1


def test_experts_of_another_layout_are_refused_not_misread():
    config = GptOssConfig(
        vocab_size=61, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, num_local_experts=4, num_experts_per_tok=2,
    )
    with pytest.raises(SparsityError, match="experts"):
        find_sites(AutoModelForCausalLM.from_config(config))


def test_things_without_blocks_are_refused():
    with pytest.raises(SparsityError, match="no stack of transformer blocks"):
        find_sites(torch.nn.Linear(4, 4))
    with pytest.raises(SparsityError, match="no attention or FFN projections"):
        find_sites(torch.nn.ModuleList([torch.nn.Sequential(torch.nn.Linear(4, 4))]))
    with pytest.raises(SparsityError, match="unknown.*did you mean 'gate'"):
        find_sites(tiny()).of_kind("gates")


def test_a_deep_copy_of_a_sparse_model_stands_on_its_own():
    model = tiny()
    before = outputs(model)
    install(model, fit(recipes.cats(0.3), model, **{"batches": [inputs()]}))
    sparse = outputs(model)
    twin = copy.deepcopy(model)
    uninstall(twin)
    assert torch.equal(outputs(twin), before)
    assert torch.equal(outputs(model), sparse)


def test_opt_lists_its_projections_in_another_order():
    made = OPTConfig(
        vocab_size=61, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=32
    )
    roles = {x.name.rsplit(".", 1)[-1]: x.role for x in find_sites(AutoModelForCausalLM.from_config(made)).linears}
    assert roles == {"q_proj": "q", "k_proj": "k", "v_proj": "v", "out_proj": "o", "fc1": "up", "fc2": "down"}


def test_a_model_in_which_only_some_blocks_have_the_site_is_counted():
    model = tiny("llama")
    model.model.layers[1].self_attn = model.model.layers[1].self_attn.q_proj  # block 1 has no attention left to sparsify
    only = Recipe("attention", (Rule("qkv_in", TopK(0.5)),))
    model.model.layers[1].forward = lambda hidden_states, **_: hidden_states
    ids = inputs("llama")["input_ids"]
    with installed(model, fit(only, model, ids=ids)):
        assert account(model, ids=ids).layer_sparsity == {"qkv_in": [0.5]}
