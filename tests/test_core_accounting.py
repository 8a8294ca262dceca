"""Counting weights: by hand for small models, and from masks the test makes itself."""

import numpy as np
import pytest
from core_tiny import HIDDEN, LAYERS, VOCABULARY, WIDTH, mlp_of, seen_by, tiny, tokens

from sparsity_lib import Recipe, Rule, SparsityError, account, find_sites, fit, install, recipes, weights_per_token
from sparsity_lib.accounting import summarise, token_densities, weights_by_part
from sparsity_lib.parts.select import Threshold, TopK

IDS = tokens(3, 12)
KEY_VALUE = HIDDEN // 2  # two of four heads

LLAMA_BLOCK = 2 * HIDDEN * HIDDEN + 2 * HIDDEN * KEY_VALUE + 3 * HIDDEN * WIDTH
LLAMA_NORMS = (2 * LAYERS + 1) * HIDDEN
LLAMA = VOCABULARY * HIDDEN + HIDDEN + LAYERS * LLAMA_BLOCK + LLAMA_NORMS  # the head, one embedding row, blocks, norms


@pytest.fixture
def model():
    return tiny("llama")


def installed_model(recipe, family="llama"):
    model = tiny(family)
    return install(model, fit(recipe, model, ids=IDS))


@pytest.mark.parametrize("tied", [False, True])
def test_a_dense_llama_by_hand(tied):
    model = tiny("llama", tie_word_embeddings=tied)
    head, table = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    assert (head is table) == tied
    assert weights_per_token(model) == LLAMA


def test_a_dense_gpt2_by_hand():
    block = HIDDEN * 3 * HIDDEN + HIDDEN * HIDDEN + 2 * HIDDEN * WIDTH
    biases = 3 * HIDDEN + HIDDEN + WIDTH + HIDDEN
    norms = 2 * (2 * LAYERS + 1) * HIDDEN
    token_row = position_row = HIDDEN
    head = VOCABULARY * HIDDEN
    assert weights_per_token(tiny("gpt2")) == LAYERS * (block + biases) + norms + token_row + position_row + head


def test_a_dense_mixtral_by_hand():
    attention, router, expert = 2 * HIDDEN * HIDDEN + 2 * HIDDEN * KEY_VALUE, 4 * HIDDEN, 3 * HIDDEN * WIDTH
    blocks = LAYERS * (attention + router + 2 * expert)  # two of four experts
    assert weights_per_token(tiny("mixtral")) == VOCABULARY * HIDDEN + HIDDEN + blocks + LLAMA_NORMS


def test_the_parts_of_a_llama_by_hand():
    attention = 2 * HIDDEN * HIDDEN + 2 * HIDDEN * KEY_VALUE
    expected = {"attention": LAYERS * attention, "ffn": LAYERS * 3 * HIDDEN * WIDTH, "head": VOCABULARY * HIDDEN}
    assert weights_by_part(tiny("llama")) == {**expected, "rest": HIDDEN + LLAMA_NORMS}


def test_installing_a_plan_does_not_change_the_dense_count():
    assert weights_per_token(installed_model(recipes.larosa(0.5))) == LLAMA


def test_cats_by_hand():
    """Dropping neuron j of a token leaves HIDDEN weights of up and HIDDEN of down unread."""
    model = installed_model(recipes.cats(0.4))
    left = np.zeros(IDS.numel())
    sparsity = []
    for layer in range(LAYERS):
        g = seen_by(model, mlp_of(model, layer).down_proj, IDS)
        dropped = np.array([sum(float(x) == 0 for x in row) for row in g])
        left += dropped * 2 * HIDDEN
        sparsity.append(dropped.mean() / WIDTH)
    found = account(model, ids=IDS)
    assert found.tokens == IDS.numel() and found.dense_weights == LLAMA and found.method == "cats"
    assert found.skipped == pytest.approx(left.mean() / LLAMA, rel=1e-9)
    assert found.read_weights == pytest.approx(LLAMA - left.mean(), rel=1e-9)
    assert found.skipped_low == pytest.approx(np.quantile(left, 0.05) / LLAMA, rel=1e-9)
    assert found.skipped_high == pytest.approx(np.quantile(left, 0.95) / LLAMA, rel=1e-9)
    assert found.skipped_low < found.skipped < found.skipped_high
    assert found.layer_sparsity["gate"] == pytest.approx(sparsity, rel=1e-9)
    assert found.site_sparsity == {"gate": pytest.approx(np.mean(sparsity), rel=1e-9)}
    half = left.mean() / 2 / LLAMA
    assert {r: s for r, s in found.skipped_by_role.items() if s} == {
        "up": pytest.approx(half, rel=1e-9), "down": pytest.approx(half, rel=1e-9)
    }
    assert found.paper_counts["ffn"] == pytest.approx(left.mean() / (LAYERS * 3 * HIDDEN * WIDTH), rel=1e-9)
    assert found.paper_counts["linears"] == pytest.approx(left.mean() / (LAYERS * LLAMA_BLOCK), rel=1e-9)
    assert found.transform_weights == 0


def test_two_thirds_of_the_sparsity_of_a_gate_is_skipped_in_the_ffn():
    found = account(installed_model(recipes.claws(0.25)), ids=IDS)
    assert found.paper_counts["ffn"] == pytest.approx(2 / 3 * 0.75, rel=1e-9)


def test_larosa_by_hand():
    recipe = recipes.larosa(0.5, inputs=0.8, outputs=1.2)
    found = account(installed_model(recipe), ids=IDS)
    drop = {"qkv_in": HIDDEN - round(0.6 * HIDDEN), "o_in": HIDDEN - round(0.4 * HIDDEN)}
    drop.update(up_in=drop["qkv_in"], down_in=WIDTH - round(0.4 * WIDTH))
    by_role = {
        "q": drop["qkv_in"] * HIDDEN, "k": drop["qkv_in"] * KEY_VALUE, "v": drop["qkv_in"] * KEY_VALUE,
        "o": drop["o_in"] * HIDDEN, "gate": drop["up_in"] * WIDTH, "up": drop["up_in"] * WIDTH, "down": drop["down_in"] * HIDDEN,
    }
    for role, left in by_role.items():
        assert found.skipped_by_role[role] == pytest.approx(LAYERS * left / LLAMA, rel=1e-9), role
    assert found.skipped == pytest.approx(LAYERS * sum(by_role.values()) / LLAMA, rel=1e-9)
    assert found.skipped_low == found.skipped_high == pytest.approx(found.skipped, rel=1e-9)
    assert found.transform_weights == LAYERS * 2 * HIDDEN**2


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "falcon", "mixtral"])
def test_top_k_skips_what_its_recipe_says(family):
    model = tiny(family)
    kinds = [k for k in find_sites(model).kinds() if k != "down_in" or "gate" not in find_sites(model).kinds()]
    recipe = Recipe("everywhere", tuple(Rule(kind, TopK(0.4)) for kind in kinds))
    by_design = recipe.skipped(find_sites(model), weights_per_token(model))
    found = account(install(model, fit(recipe, model, ids=IDS)), ids=IDS)
    assert found.skipped == pytest.approx(by_design, rel=1e-9) and 0 < by_design < 1


def test_rows_and_columns_of_one_matrix_multiply():
    """up's columns are kept with the up_in site, its rows with the gate: 0.5 of 0.5 of it is read."""
    both = Recipe("both", (Rule("up_in", TopK(0.5)), Rule("gate", TopK(0.5))))
    found = account(installed_model(both), ids=IDS)
    assert found.skipped_by_role["up"] == pytest.approx(LAYERS * 0.75 * HIDDEN * WIDTH / LLAMA, rel=1e-9)
    assert found.skipped_by_role["gate"] == pytest.approx(LAYERS * 0.5 * HIDDEN * WIDTH / LLAMA, rel=1e-9)


def test_mixtral_counts_the_experts_a_token_is_routed_to():
    found = account(installed_model(recipes.claws(0.5), "mixtral"), ids=IDS)
    dense = weights_per_token(tiny("mixtral"))
    left = LAYERS * 2 * 2 * HIDDEN * WIDTH // 2  # layers, experts, up and down, half of the neurons
    assert found.skipped == pytest.approx(left / dense, rel=1e-9)
    assert found.tokens == IDS.numel()


def test_an_entry_that_is_zero_by_itself_needs_no_weights():
    model = tiny("llama", hidden_act="relu")
    found = account(install(model, fit(recipes.gate_topk(1.0), model, ids=IDS)), ids=IDS)
    zeros = [float((seen_by(model, mlp_of(model, i).act_fn, IDS, output=True) == 0).double().mean()) for i in range(LAYERS)]
    assert found.layer_sparsity["gate"] == pytest.approx(zeros, rel=1e-9) and min(zeros) > 0.2


def test_tokens_left_dense_by_the_token_share_count_in_full(model):
    install(model, fit(recipes.claws(0.5, token_share=0.25), model, ids=IDS))
    kept = token_densities(model, IDS)["1.gate"].view(IDS.shape)
    assert bool((kept[:, :-3] == 1).all()) and bool((kept[:, -3:] == 0.5).all())
    assert account(model, ids=IDS).skipped == pytest.approx(0.25 * LAYERS * HIDDEN * WIDTH / LLAMA, rel=1e-9)


def test_the_sum_over_tokens_is_the_sum_over_sites():
    model = installed_model(Recipe("t", (Rule("o_in", Threshold(0.5)), Rule("gate", Threshold(0.3)))))
    densities = token_densities(model, IDS)
    one_by_one = [summarise(model, {n: d[t : t + 1] for n, d in densities.items()}).skipped for t in range(IDS.numel())]
    found = summarise(model, densities)
    assert found.skipped == pytest.approx(np.mean(one_by_one), rel=1e-9)
    assert found.skipped_high == pytest.approx(np.quantile(one_by_one, 0.95), rel=1e-9)
    assert sum(found.skipped_by_role.values()) == pytest.approx(found.skipped, rel=1e-9)


def test_batches_do_not_change_the_count():
    model = installed_model(recipes.cats(0.4))
    one, three = (token_densities(model, IDS, batch_size=b) for b in (1, 3))
    for name in one:
        assert float((one[name] - three[name]).abs().max()) <= 1 / WIDTH


def test_counting_leaves_no_recorder_behind(model):
    install(model, fit(recipes.cats(), model, ids=IDS))
    with pytest.raises(IndexError):
        account(model, ids=IDS + VOCABULARY)
    assert all(s.recorder is None for b in model.model.layers for s in b.sparsity.values())


def test_a_dense_model_and_missing_text_are_refused(model):
    with pytest.raises(SparsityError, match="no masks to count"):
        account(model, ids=IDS)
    with pytest.raises(SparsityError, match="needs text"):
        account(install(model, fit(recipes.cats(), model, ids=IDS)))
