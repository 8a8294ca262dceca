"""Block by block: hidden states are the whole model's, sequential fits are those of a slow loop, and nothing stays behind."""

import numpy as np
import pytest
import torch
from core_tiny import DECODERS, OTHERS, inputs, outputs, tiny, tokens

from sparsity_lib import Recipe, Rule, SparsityError, account, find_sites, fit, fit_many, installed, recipes
from sparsity_lib.blocks import Blocks
from sparsity_lib.collectors import LogHistogram
from sparsity_lib.parts.select import Threshold, TopK
from sparsity_lib.parts.shift import Shift
from sparsity_lib.parts.transforms import Rotate

IDS = tokens(4, 12)


def state(model):
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    return hooks, ["forward" in m.__dict__ for m in model.modules()], [m.training for m in model.modules()]


@torch.no_grad()
def block_outputs(model, batch):
    """Output of every block in one whole forward."""
    found, handles = [], []
    for name in find_sites(model).blocks:
        keep = lambda m, a, out: found.append(out[0] if isinstance(out, tuple) else out)  # noqa: E731
        handles.append(model.get_submodule(name).register_forward_hook(keep))
    model(**batch)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("family", [*DECODERS, *OTHERS])
def test_blocks_run_alone_give_what_they_give_in_the_model(family):
    model, batches = tiny(family), [inputs(family, seed=i) for i in range(2)]
    expected, before = [block_outputs(model, batch) for batch in batches], state(model)
    with Blocks(model, batches, find_sites(model)) as blocks:
        for layer in range(len(blocks.blocks)):
            for found, whole in zip(blocks.outputs(), expected, strict=True):
                assert torch.equal(found, whole[layer])
            if layer + 1 < len(blocks.blocks):
                blocks.advance()
    assert state(model) == before


PLACES = {"qkv_in": "self_attn.q_proj self_attn.k_proj self_attn.v_proj", "o_in": "self_attn.o_proj",
          "up_in": "mlp.gate_proj mlp.up_proj", "down_in": "mlp.down_proj"}
ORDER = list(PLACES)


@torch.no_grad()
def seen_after(model, plan, layer, kind):
    """What reaches a site in one whole forward with all sites before it sparse, by hooks of the test's own."""
    handles, seen = [], []

    def sparse(m, t):
        def hook(module, args):
            z = args[0] - m
            return (torch.where(z.abs() > t, z, torch.zeros_like(z)) + m,)

        return hook

    def module_at(layer, path):
        return model.model.layers[layer].get_submodule(path)

    for name in plan.widths:
        at, other = int(name.split(".")[0]), name.split(".")[1]
        if (at, ORDER.index(other)) < (layer, ORDER.index(kind)):
            m, t = (float(plan.tensors.get(f"{name}.{n}", 0.0)) for n in ("shift", "threshold"))
            handles += [module_at(at, path).register_forward_pre_hook(sparse(m, t)) for path in PLACES[other].split()]
    watched = module_at(layer, PLACES[kind].split()[0])
    handles.append(watched.register_forward_pre_hook(lambda module, args: seen.append(args[0].clone())))
    model(input_ids=IDS)
    for handle in handles:
        handle.remove()
    return seen[0].double().numpy()


@pytest.mark.parametrize("rules", [
    {"up_in": (0.5, "none"), "down_in": (0.3, "none")},
    {"up_in": (0.6, "mean"), "down_in": (0.4, "median")},
    {"qkv_in": (0.5, "none"), "o_in": (0.5, "none"), "up_in": (0.6, "none"), "down_in": (0.4, "mean")},
], ids=["plain", "centred", "everywhere"])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_sequential_fit_is_the_slow_loops(rules, batch_size):
    model = tiny("llama", num_hidden_layers=3)
    moved = {"none": {}, "mean": {"transform": Shift("mean")}, "median": {"transform": Shift("median")}}
    made = Recipe("s", tuple(Rule(kind, Threshold(density), **moved[by]) for kind, (density, by) in rules.items()))
    before = state(model)
    plan = fit(made, model, ids=IDS, sequential=True, batch_size=batch_size)
    assert state(model) == before and plan.calibration["sequential"] is True
    dense, apart = fit(made, model, ids=IDS), 0
    for layer in range(3):
        for kind, (density, by) in rules.items():
            x, m = seen_after(model, plan, layer, kind), 0.0
            if by != "none":
                m = float(plan.tensors[f"{layer}.{kind}.shift"])
                exact = x.mean() if by == "mean" else np.quantile(x, 0.5, method="inverted_cdf")
                assert m == pytest.approx(exact, rel=2.0**-9, abs=1e-6)
            exact = np.quantile(abs(x - m), 1 - density, method="inverted_cdf")
            assert float(plan.tensors[f"{layer}.{kind}.threshold"]) == pytest.approx(exact, rel=2.0**-9 + 1e-6)
            apart += abs(float(dense.tensors[f"{layer}.{kind}.threshold"]) / exact - 1) > 0.02
    assert apart >= 2  # the dense model's thresholds are others: the test can tell


def test_the_first_site_is_fitted_as_on_the_dense_model():
    model = tiny("llama")
    one, many = (fit(recipes.scap(0.5), model, ids=IDS, sequential=s) for s in (True, False))
    assert torch.equal(one.tensors["0.up_in.threshold"], many.tensors["0.up_in.threshold"])
    assert not torch.equal(one.tensors["0.down_in.threshold"], many.tensors["0.down_in.threshold"])


def test_sequentially_each_layer_meets_its_density_on_the_sparse_model():
    model = tiny("llama", num_hidden_layers=3)
    plan = fit(recipes.scap(up=0.5, down=0.3), model, ids=IDS, sequential=True)
    with installed(model, plan):
        found = account(model, ids=IDS).layer_sparsity
    assert found["up_in"] == pytest.approx([0.5] * 3, abs=0.01) and found["down_in"] == pytest.approx([0.7] * 3, abs=0.01)


@pytest.mark.parametrize("family", ["gpt2", "mixtral", "gemma3", "falcon", "bert"])
def test_other_structures_fit_sequentially(family):
    model = tiny(family)
    text = {"batches": [inputs(family, sequences=4, length=12)]} if family == "bert" else {"ids": IDS}
    plan = fit(recipes.scap_for(model, 0.5, attention=0.7), model, sequential=True, **text)
    before = outputs(model, family)
    with installed(model, plan):
        assert outputs(model, family).isfinite().all() and not torch.allclose(outputs(model, family), before)


def test_rotations_gates_and_token_shares_fit_sequentially_too():
    model = tiny("llama")
    rotated = Recipe("r", (Rule("up_in", Threshold(0.5), transform=Rotate()), Rule("down_in", TopK(0.5))), 0.5)
    plans = fit_many([rotated, recipes.cats(0.5), recipes.oracle(0.5)], model, ids=IDS, sequential=True)
    assert [p.recipe.method for p in plans] == ["r", "cats", "oracle"]
    assert plans[1].tensors["1.gate.threshold"] != fit(recipes.cats(0.5), model, ids=IDS).tensors["1.gate.threshold"]
    assert fit_many([], model, ids=IDS, sequential=True) == []


def test_what_cannot_be_fitted_sequentially_is_refused():
    model = tiny("llama")
    before = state(model)
    with pytest.raises(SparsityError, match=r"gradient of the whole model's loss.*sequential=False"):
        fit(recipes.claws(0.5), model, ids=IDS, sequential=True)
    for bad in (1, "yes", None):
        with pytest.raises(SparsityError, match="sequential = .*true or false"):
            fit(recipes.cats(0.5), model, ids=IDS, sequential=bad)
    assert state(model) == before


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("calls", [1, 7, 13])
def test_an_interrupted_sequential_fit_leaves_the_model_as_it_was(error, calls, monkeypatch):
    model = tiny("llama").train()
    before, logits, seen = state(model), outputs(model.eval()), []
    model.train()

    def fail(self, values, grad=None):
        seen.append(1)
        if len(seen) == calls:
            raise error
        original(self, values, grad)

    original = LogHistogram.update
    monkeypatch.setattr(LogHistogram, "update", fail)
    with pytest.raises(error):
        fit(recipes.scap(0.5), model, ids=IDS, sequential=True)
    assert state(model) == before and torch.equal(outputs(model.eval()), logits)
