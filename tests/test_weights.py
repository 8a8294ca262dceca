"""Weight pruning against slow references; what it leaves behind, and what it refuses."""

import numpy as np
import pytest
import torch
from core_tiny import outputs, seen_by, tiny, tokens

from sparsity_lib import SparsityError, account, find_sites, fit, installed, recipes, weights_per_token
from sparsity_lib.parts.nm import NofM
from sparsity_lib.parts.select import Threshold, TopK
from sparsity_lib.passes import Text
from sparsity_lib.weights import WeightPruning, input_rms, prune_weights, pruned_weights

IDS = tokens(4, 12)
PRUNINGS = [WeightPruning(NofM(2, 4), "magnitude"), WeightPruning(NofM(8, 16)), WeightPruning(TopK(0.5)),
            WeightPruning(TopK(0.3), "magnitude", "matrix")]


@pytest.fixture
def model():
    return tiny("llama")


def down(model, layer=0):
    return model.model.layers[layer].mlp.down_proj


def state_of(model):
    return {name: (id(p), p.detach().clone()) for name, p in model.named_parameters()}


@pytest.mark.parametrize("score", ["magnitude", "wanda"])
@pytest.mark.parametrize(("n", "m"), [(2, 4), (8, 16), (1, 8)])
def test_n_of_m_along_the_inputs_of_every_output(model, score, n, m):
    before = {linear.name: model.get_submodule(linear.name).weight.detach().clone() for linear in find_sites(model).linears}
    x = seen_by(model, down(model, 1), IDS).double().numpy()
    rms = np.sqrt((x**2).mean(0))
    with pruned_weights(model, WeightPruning(NofM(n, m), score), ids=IDS):
        for name, weight in before.items():
            kept = model.get_submodule(name).weight.detach() != 0
            assert bool((kept.unflatten(-1, (-1, m)).sum(-1) == n).all()), name
            assert torch.equal(model.get_submodule(name).weight, weight * kept)
        found = down(model, 1).weight.detach().numpy()
    weight = before[find_sites(model).sites[1, "down_in"].column_readers[0]].numpy()
    for row, pruned in zip(weight, found, strict=True):
        scores = np.abs(row) * (rms if score == "wanda" else 1)
        for start in range(0, len(row), m):
            best = sorted(range(start, start + m), key=lambda j: -scores[j])[:n]
            assert [j for j in range(start, start + m) if pruned[j] != 0] == sorted(best)


def test_one_pass_does_for_several_prunings(model):
    rms = input_rms(Text(model, list(IDS.split(1))), list(find_sites(model).sites.values()))
    for density in (0.3, 0.6):
        found = []
        for options in ({"ids": IDS}, {"rms": rms}):
            with pruned_weights(model, WeightPruning(TopK(density)), **options):
                found.append(down(model, 1).weight.detach().clone())
        assert torch.equal(*found)
    name = next(iter(rms))
    for odd in ({k: v for k, v in rms.items() if k != name}, {**rms, name: rms[name][1:]}, {**rms, "lm_head": rms[name]}):
        with pytest.raises(SparsityError, match="rms of"):
            prune_weights(model, WeightPruning(TopK(0.5)), rms=odd)
    with pytest.raises(SparsityError, match="sequential"):
        prune_weights(model, WeightPruning(TopK(0.5)), rms=rms, sequential=True)


@pytest.mark.parametrize("scope", ["row", "matrix"])
def test_unstructured_keeps_its_share_of_each_row_or_matrix(model, scope):
    weight = down(model).weight.detach().clone()
    with pruned_weights(model, WeightPruning(TopK(0.25), "magnitude", scope)):
        kept = down(model).weight.detach() != 0
    if scope == "row":
        assert bool((kept.sum(1) == 12).all())
    assert int(kept.sum()) == 12 * len(weight)
    assert float(weight.abs()[kept].min()) >= float(weight.abs()[~kept].max()) or scope == "row"


@pytest.mark.parametrize("pruning", PRUNINGS, ids=str)
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "phi3"])
def test_all_linears_of_the_blocks_are_pruned_and_come_back_bit_by_bit(pruning, family):
    model = tiny(family, dtype=torch.bfloat16)
    before, dense = state_of(model), outputs(model)
    pruned = prune_weights(model, pruning, ids=IDS)
    inside = {f"{linear.name}.weight" for linear in find_sites(model).linears}
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name][1]) != (name in inside), name
    assert not torch.equal(outputs(model), dense) and pruned.sparsity.keys() == {name.removesuffix(".weight") for name in inside}
    zeros = sum(linear.weights for linear in find_sites(model).linears) * (1 - pruning.select.density)
    assert pruned.skipped == pytest.approx(zeros / weights_per_token(model), rel=0.03)
    assert pruned.restore() is model and pruned.restore() is model
    for name, parameter in model.named_parameters():
        assert id(parameter) == before[name][0] and torch.equal(parameter, before[name][1])
    assert torch.equal(outputs(model), dense)


def test_an_error_inside_the_block_or_while_pruning_gives_the_weights_back(model):
    dense = outputs(model)
    with pytest.raises(RuntimeError), pruned_weights(model, PRUNINGS[0]):
        raise RuntimeError
    assert torch.equal(outputs(model), dense)
    with torch.no_grad():
        model.model.layers[1].input_layernorm.weight[0] = float("nan")
    for sequential in (False, True):
        before = state_of(model)
        with pytest.raises(SparsityError, match="NaN"):
            prune_weights(model, PRUNINGS[1], ids=IDS, sequential=sequential)
        assert all(torch.equal(p.nan_to_num(), before[name][1].nan_to_num()) for name, p in model.named_parameters())
    with pruned_weights(model, None) as same:
        assert same is model


def test_sequential_statistics_are_those_of_pruned_blocks(model):
    pruning = WeightPruning(NofM(1, 8))
    apart = prune_weights(model, pruning, ids=IDS)
    first, second = down(model, 0).weight.detach().clone(), down(model, 1).weight.detach().clone()
    apart.restore()
    weight = down(model, 1).weight.detach().clone()
    turn = prune_weights(model, pruning, ids=IDS, sequential=True)
    assert torch.equal(down(model, 0).weight, first) and not torch.equal(down(model, 1).weight, second)
    found = down(model, 1).weight.detach().clone()
    turn.restore()
    # by hand: block 0 pruned, block 1 whole
    partly = tiny("llama")
    with pruned_weights(partly, pruning, ids=IDS, sequential=True), torch.no_grad():
        for linear in find_sites(partly).linears:
            if linear.layer == 1:
                partly.get_submodule(linear.name).weight.data = model.get_submodule(linear.name).weight.data.clone()
        x = seen_by(partly, down(partly, 1), IDS)
    mask = pruning.mask(weight, x.double().square().mean(0).sqrt())
    assert torch.equal(found, weight * mask)


def test_a_plan_goes_onto_a_pruned_model_and_the_other_way_round_is_refused(model):
    plan = fit(recipes.nm(2, 4), model, ids=IDS)
    with pruned_weights(model, PRUNINGS[0]), installed(model, plan):
        assert account(model, ids=IDS).skipped > 0
        with pytest.raises(SparsityError, match=r"Fix: uninstall\(model\), prune"):
            prune_weights(model, PRUNINGS[0])
    pruned = prune_weights(model, PRUNINGS[0])
    with pytest.raises(SparsityError, match="pruned already"):
        prune_weights(model, PRUNINGS[0])
    pruned.restore()


@pytest.mark.parametrize(("make", "message"), [
    (lambda: WeightPruning(Threshold(0.5)), "select of weights = .*NofM"),
    (lambda: WeightPruning(NofM(2, 4), "sparsegpt"), "score of weights = 'sparsegpt'.*magnitude, wanda"),
    (lambda: WeightPruning(TopK(0.5), scope="column"), "scope = 'column'"),
    (lambda: WeightPruning(NofM(2, 4), scope="matrix"), "scope of N:M = 'matrix'"),
    (lambda: prune_weights(tiny("llama"), PRUNINGS[1]), "needs a tokenizer"),
    (lambda: prune_weights(tiny("llama"), PRUNINGS[1], ids=IDS, sequential=1), "sequential = 1"),
    (lambda: prune_weights(tiny("llama"), WeightPruning(NofM(8, 32), "magnitude")), "inputs of .*down_proj = 48 .*M = 32"),
    (lambda: prune_weights(tiny("mixtral"), PRUNINGS[0]), "experts"),
])
def test_what_cannot_be_done_is_refused(make, message):
    with pytest.raises(SparsityError, match=message):
        make()


def test_padding_and_plain_data(model):
    with pruned_weights(model, WeightPruning(NofM(8, 32, pad=True), "magnitude")):
        assert bool(((down(model).weight != 0).sum(1) == 8 + 8).all())
    assert WeightPruning(NofM(2, 4)).to_json() == {
        "select": {"kind": "n_of_m", "n": 2, "m": 4, "pad": False}, "score": "wanda", "scope": "row"}
