"""The SCAP experiments' own pieces on tiny models: recipes of points, int8 weights, networks, the search, masks of beams."""

import numpy as np
import pytest
import torch
from core_tiny import inputs, tiny, tokens
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, Mamba2Config

from sparsity_lib.accounting import recorded, token_densities
from sparsity_lib.distribution import Distribution
from sparsity_lib.errors import SparsityError
from sparsity_lib.experiments import scap_beams, scap_center, scap_common, scap_coverage, scap_grid, scap_targets
from sparsity_lib.experiments.scap_networks import Images, Text
from sparsity_lib.fit import fit
from sparsity_lib.install import installed
from sparsity_lib.methods import cats
from sparsity_lib.sites import DOWN_IN, IN_PROJ_IN, OUT_PROJ_IN, UP_IN, find_sites


def test_points_become_recipes():
    found = scap_common.recipe_of({"method": "scap", "up": 0.3, "down": 0.6})
    assert {rule.site: rule.select.density for rule in found.rules} == {UP_IN: 0.7, DOWN_IN: 0.4}
    assert scap_common.recipe_of({"method": "cats", "gate": 0.7}) == cats(0.3)
    (rule,) = scap_common.recipe_of({"method": "down", "down": 0.1, "center": "median"}).rules
    assert (rule.site, rule.select.density, rule.transform.by) == (DOWN_IN, 0.9, "median")
    four = scap_common.recipe_of({"method": "scap", "up": 0.3, "down": 0.6, "attention": 0.2, "center": "mode"})
    assert len(four.rules) == 4 and [r.transform.kind for r in four.rules].count("shift") == 1
    with pytest.raises(SparsityError, match="unknown"):
        scap_common.recipe_of({"method": "teal"})


def test_the_grid_leaves_out_the_dense_corner():
    lines = scap_grid.lines((0.0, 0.5), (0.0, 0.5), (0.5,))
    assert [len(line) for line in lines] == [1, 2, 1]
    assert scap_common.ffn_target(lines[1][1]) == pytest.approx(0.5)
    assert scap_common.ffn_target(lines[2][0]) == pytest.approx(1 / 3)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_rounded_weights_lie_on_their_rows_steps(bits):
    weight = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    weight[3] = 0
    found = scap_common.rounded(weight, bits)
    for row, own in zip(weight, found, strict=True):
        step = float(row.abs().max()) / (2 ** (bits - 1) - 1)
        slow = torch.tensor([round(float(w) / step) * step if step else 0.0 for w in row])
        torch.testing.assert_close(own, slow, rtol=1e-4, atol=1e-6)
    assert torch.allclose(scap_common.rounded(found, bits), found, rtol=1e-5)
    with pytest.raises(SparsityError, match="bits"):
        scap_common.rounded(weight, 1)


def test_the_head_is_not_rounded():
    model, before = tiny("llama"), tiny("llama")
    scap_common.quantise(model, 3)
    assert torch.equal(model.lm_head.weight, before.lm_head.weight)
    assert not torch.equal(model.model.layers[0].mlp.up_proj.weight, before.model.layers[0].mlp.up_proj.weight)
    assert len(model.model.layers[0].mlp.up_proj.weight[0].unique()) <= 7


def test_masks_are_counted_whoever_runs_the_model():
    model, ids = tiny("llama"), tokens(4, 10)
    plan = fit(scap_common.recipe_of({"method": "scap", "up": 0.4, "down": 0.6}), model, ids=ids)
    with installed(model, plan):
        expected = token_densities(model, ids)
        with recorded(model) as counted, torch.no_grad():
            for row in ids.split(1):
                model(input_ids=row)
        found = counted()
        assert found.keys() == expected.keys() and all(torch.equal(found[k], expected[k]) for k in found)
        assert all(s.recorder is None for s in model.model.layers[0].sparsity.values())
        layers = scap_targets.by_layer(found)
    assert len(layers[UP_IN]) == 2 and layers[UP_IN][0] == pytest.approx(1 - float(found["0.up_in"].mean()))
    with pytest.raises(SparsityError, match="dense"), recorded(model):
        pass


def test_a_text_network_is_scored_by_sequence():
    ids = tokens(3, 12)
    network = Text(tiny("gpt2"), ids, tokens(8, 12, seed=1))
    (plan,) = network.fit([scap_common.recipe_of({"method": "down", "down": 0.5, "center": "mode"})])
    dense, found = network.score(None), network.score(plan)
    assert dense.loss == [0.0] * 3 and dense.shares is None and len(found.loss) == 3 and min(found.loss) > 0
    assert found.shares["sites"][DOWN_IN] == pytest.approx(0.5, abs=0.1)
    with torch.no_grad():
        logp = network.model(input_ids=ids[:1]).logits[0].log_softmax(-1)
    assert dense.right[0] == pytest.approx(float(logp[:-1].gather(-1, ids[0, 1:, None]).sum()), rel=1e-4)


def test_images_are_scored_one_by_one():
    model = tiny("vit")
    images = inputs("vit", sequences=6)["pixel_values"]
    with torch.no_grad():
        dense = model(pixel_values=images).logits
    labels = dense.argmax(-1).clone()
    labels[0] = 1 - labels[0]
    network = Images(model, images, labels, images)
    scores = network.score(None)
    assert scores.right == [0.0] + [1.0] * 5 and scores.loss == [0.0] * 6
    (plan,) = network.fit([scap_common.recipe_of({"method": "scap", "up": 0.5, "down": 0.5, "attention": 0.5, "center": "mode"})])
    with installed(model, plan), torch.no_grad():
        own = model(pixel_values=images).logits
    expected = (dense.softmax(-1) * (dense.log_softmax(-1) - own.log_softmax(-1))).sum(-1)
    np.testing.assert_allclose(network.score(plan).loss, expected.numpy(), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("kind", ["gpt2", "vit"])
def test_distributions_are_taken_from_a_network_that_runs(kind, monkeypatch):
    model = tiny(kind)
    if kind == "vit":
        images = inputs("vit", sequences=6)["pixel_values"]
        network = Images(model, images, torch.zeros(6, dtype=torch.long), images)
    else:
        network = Text(model, tokens(3, 12), tokens(8, 12, seed=1))
    monkeypatch.setattr(scap_center, "_opened", lambda name: network)
    found = scap_center._distributions({"network": kind})
    assert {"up_in", "down_in", "before"} == found.keys()
    assert all(sum(layer) == pytest.approx(0.996, abs=0.05) for layer in found["down_in"]["shares"])


def test_a_mixers_two_projections_are_pruned_and_counted():
    config = Mamba2Config(vocab_size=61, hidden_size=32, num_hidden_layers=2, num_heads=8, head_dim=8, expand=2, state_size=8,
                          n_groups=1, chunk_size=8)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    sites = find_sites(model)
    network = Text(model, tokens(2, 8), tokens(4, 16))
    (plan,) = network.fit([scap_common.recipe_of({"method": "mixer", "in": 0.3, "out": 0.6})])
    shares = network.score(plan).shares
    linears = {x.role: x.weights for x in sites.linears}
    sites = {"in_proj": IN_PROJ_IN, "out_proj": OUT_PROJ_IN}
    met = sum(linears[role] * shares["sites"][kind] for role, kind in sites.items()) / sum(linears.values())
    assert shares["linears"] == pytest.approx(met, rel=1e-6) and shares["ffn"] == 0


def bisected(points, passes):
    """What the search finds where each point is answered at once."""
    steps = scap_coverage.search(points)
    try:
        asked = next(steps)
        while True:
            asked = steps.send(passes(asked))
    except StopIteration as end:
        return end.value


@given(st.integers(0, 9), st.integers(0, 9))
def test_the_search_finds_the_strongest_that_passes(size, limit):
    points = [{"up": i} for i in range(size)]
    found = bisected(points, lambda p: p["up"] < limit)
    assert found.chosen == (points[min(limit, size) - 1] if min(limit, size) else None)
    assert found.chosen is None or found.chosen in found.tried
    assert len(found.tried) <= max(1, size).bit_length()


def test_a_change_is_relative_to_the_dense_score_on_the_units_asked_for():
    dense = {"right": [1.0, 1.0, 0.0, 1.0], "weights": [1.0] * 4}
    found = {"right": [0.0, 1.0, 0.0, 0.0], "scale": "share"}
    assert scap_coverage.relative_change(found, dense).value == -0.5  # of the odd units' two, one is left
    assert scap_coverage.relative_change(found, dense, slice(0, None, 2)).value == -1.0
    logs = {"right": [0.0, -30.0], "weights": [10.0, 10.0]}
    assert scap_coverage.relative_change({"right": [0.0, -31.0], "scale": "log"}, logs).value == pytest.approx(np.expm1(-0.1))
    assert scap_coverage.within(found, dense) is False


def test_shares_below_undo_quantiles():
    collector, values = Distribution(), torch.randn(4000, generator=torch.Generator().manual_seed(0))
    collector.update(values)
    for value in (-9.0, -0.7, 0.0, 0.3, 9.0):
        assert scap_center.share(collector, value) == pytest.approx(float((values < value).double().mean()), abs=2e-3)
    found = scap_center.histograms([collector], cells=20)
    assert sum(found["shares"][0]) == pytest.approx(0.996, abs=0.002) and len(found["edges"]) == 21
    assert found["near_zero"][0] == pytest.approx(float((values.abs() < 0.05).double().mean()), abs=2e-3)


def test_what_enters_and_leaves_an_activation_is_watched():
    model, ids = tiny("gpt2"), tokens(2, 6)
    streams = scap_center._watched(model)
    with torch.no_grad():
        model(input_ids=ids)
        for handle in streams.pop("handles"):
            handle.remove()
        before = model.transformer.h[0].mlp.c_fc(torch.zeros(1, 32))
        model(input_ids=ids)
    assert {place: len(found) for place, found in streams.items()} == {"up_in": 2, "down_in": 2, "before": 2}
    assert streams["before"][0].count == 12 * before.shape[-1] == streams["down_in"][0].count
    assert float(streams["down_in"][0].low) >= -0.171  # GELU's lowest value, and nothing before it


def test_the_union_of_masks_is_counted_by_text():
    union = scap_beams.Union()
    union.add(0, torch.tensor([[True, False, False, False], [True, True, False, False]]))
    union.cut()
    union.add(0, torch.tensor([[True, False, False, False], [True, False, False, False]]))
    union.cut()
    assert union.needed == [0.5, 0.25] and union.each == [0.375, 0.25]
    rates = np.array([1, 0.25, 0, 0])
    assert union.by_chance() == pytest.approx((1 - (1 - rates) ** 2).mean())


def test_only_decoded_steps_of_real_beams_are_seen():
    model, ids = tiny("llama"), tokens(1, 6)
    plan = fit(scap_common.recipe_of({"method": "scap", "up": 0.5, "down": 0.5}), model, ids=tokens(4, 12))
    with installed(model, plan), scap_beams.watched(model) as found:
        model.generate(ids, attention_mask=torch.ones_like(ids), num_beams=3, max_new_tokens=4, min_new_tokens=4, do_sample=False,
                       pad_token_id=0)
        for union in found.values():
            union.cut()
    assert found[UP_IN]._size == 3 and found[UP_IN]._seen[0] == 9  # three steps after the prompt's, three beams each
    assert found[DOWN_IN].each[0] < found[DOWN_IN].needed[0] <= min(1.0, 3 * found[DOWN_IN].each[0])
    assert not model.model.layers[0].mlp.up_proj._forward_pre_hooks


def test_any_decoder_gets_a_row_by_its_kind(monkeypatch):
    asked = []
    perfect = {"scale": "share", "right": [1.0, 1.0], "weights": [1.0, 1.0]}
    monkeypatch.setattr(scap_coverage, "_scored", lambda network, point: asked.append(point) or perfect)
    for name, extra in (("small-llama", {}), ("small-gpt2", {"center": "mode"}), ("small-mamba2", None)):
        asked.clear()
        row = scap_coverage.cover(name, limit=1)
        assert asked[0] is None and row["chosen"] == asked[-1] and len(asked) == len(row["tried"]) + 1
        assert row["chosen"] == ({"method": "mixer", "in": 0.6, "out": 0.7} if extra is None else
                                 {"method": "scap", "up": 0.6, "down": 0.7, **extra})
