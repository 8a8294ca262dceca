"""Every method against a slow reference written from its equation: NumPy, one token and one neuron at a time."""

import numpy as np
import pytest
import torch
from core_tiny import HIDDEN, LAYERS, WIDTH, mlp_of, numpy_of, seen_by, silu, tiny, tokens

from sparsity_lib import Recipe, Rule, fit, installed, recipes
from sparsity_lib.methods import VARIANTS
from sparsity_lib.parts.scores import ColumnNorm
from sparsity_lib.parts.select import Threshold, TopK

IDS = tokens(3, 12)
DENSITY = 0.4
K = round(DENSITY * WIDTH)


@pytest.fixture(scope="module")
def model():
    return tiny("llama")


def ffn_reference(mlp, x, keep):
    """sum over kept neurons j of g_j u_j W_down[:, j]; `keep(g, u)` names the neurons of one token."""
    gate, up, down = (numpy_of(m.weight) for m in (mlp.gate_proj, mlp.up_proj, mlp.down_proj))
    out = np.zeros_like(x)
    for t, token in enumerate(x):
        g = silu(np.array([row @ token for row in gate]))
        u = np.array([row @ token for row in up])
        for j in keep(g, u):
            out[t] += g[j] * u[j] * down[:, j]
    return out


def largest(scores, k):
    """The k largest by Python's stable sort: of equal scores the lower index comes first."""
    return sorted(range(len(scores)), key=lambda j: -scores[j])[:k]


def check_ffn(model, plan, keep, layer=0):
    """The installed model's FFN of `layer` computes what `ffn_reference` does on the very inputs it gets."""
    mlp = mlp_of(model, layer)
    with installed(model, plan):
        x, out = seen_by(model, mlp, IDS), seen_by(model, mlp, IDS, output=True)
    np.testing.assert_allclose(numpy_of(out), ffn_reference(mlp, numpy_of(x), keep), rtol=1e-4, atol=1e-5)


def gate_sizes(model, layer):
    return np.abs(numpy_of(seen_by(model, mlp_of(model, layer).act_fn, IDS, output=True)))


@pytest.mark.parametrize("layer", range(LAYERS))
def test_cats(model, layer):
    plan = fit(recipes.cats(DENSITY), model, ids=IDS)
    threshold = float(plan.tensors[f"{layer}.gate.threshold"])
    exact = np.quantile(gate_sizes(model, layer), 1 - DENSITY, method="inverted_cdf")
    assert abs(threshold / exact - 1) <= 2.0**-9
    check_ffn(model, plan, lambda g, u: [j for j in range(WIDTH) if abs(g[j]) > threshold], layer)


def test_cats_keeps_the_share_it_was_asked_for_on_its_own_text(model):
    for density in (0.1, 0.3, 0.7, 0.95):
        plan = fit(recipes.cats(density), model, ids=IDS)
        for layer in range(LAYERS):
            kept = (gate_sizes(model, layer) > float(plan.tensors[f"{layer}.gate.threshold"])).mean()
            assert abs(kept - density) < 0.003


def test_gate_topk(model):
    check_ffn(model, fit(recipes.gate_topk(DENSITY), model, ids=IDS), lambda g, u: largest(abs(g), K))


def test_oracle_ranks_what_reaches_the_down_projection(model):
    check_ffn(model, fit(recipes.oracle(DENSITY), model, ids=IDS), lambda g, u: largest(abs(g * u), K))


def test_column_norm(model):
    recipe = Recipe("wina_gate", (Rule("gate", TopK(DENSITY), ColumnNorm()),))
    norms = np.sqrt((numpy_of(mlp_of(model).down_proj.weight) ** 2).sum(0))
    check_ffn(model, fit(recipe, model, ids=IDS), lambda g, u: largest(abs(g) * norms, K))


def test_column_norm_of_a_shared_input_stacks_all_its_readers(model):
    plan = fit(Recipe("wina", (Rule("qkv_in", TopK(DENSITY), ColumnNorm()),)), model, ids=IDS)
    attention = model.model.layers[1].self_attn
    stacked = np.concatenate([numpy_of(m.weight) for m in (attention.q_proj, attention.k_proj, attention.v_proj)])
    expected = [np.linalg.norm(stacked[:, i]) for i in range(HIDDEN)]
    np.testing.assert_allclose(numpy_of(plan.tensors["1.qkv_in.norm"]), expected, rtol=1e-6)


def test_column_norm_reads_transposed_weights_the_right_way_round():
    gpt2 = tiny("gpt2")
    plan = fit(Recipe("wina", (Rule("up_in", TopK(DENSITY), ColumnNorm()),)), gpt2, ids=IDS)
    weight = numpy_of(gpt2.transformer.h[0].mlp.c_fc.weight)  # stored [in, out]
    np.testing.assert_allclose(numpy_of(plan.tensors["0.up_in.norm"]), np.linalg.norm(weight, axis=1), rtol=1e-6)


def test_random_keeps_k_neurons_that_owe_nothing_to_their_size(model):
    plan = fit(recipes.random(DENSITY), model, ids=IDS)
    score = plan.recipe.rules[0].score
    g = torch.randn(4000, WIDTH, generator=torch.Generator().manual_seed(1))
    for values in (g, g.bfloat16()):
        mask = plan.recipe.rules[0].select(score(values, {}), {})
        assert bool((mask.sum(-1) == K).all())
        # A channel's share kept, and the mean size of what is kept, within 4.5 standard errors. Equal values (many in
        # bfloat16) meet an equal verdict, so a channel has as many draws as its values' effective number.
        share = K / WIDTH
        for channel, kept in zip(values.T, mask.double().mean(0), strict=True):
            draws = 4000**2 / float(channel.unique(return_counts=True)[1].double().square().sum())
            assert abs(float(kept) - share) < 4.5 * (share * (1 - share) / draws) ** 0.5
        size = values.double().abs()
        error = float(size.std()) * (1 / float(mask.sum()) + 1 / mask.numel()) ** 0.5
        assert abs(float(size[mask].mean() - size.mean())) < 4.5 * error
    other = recipes.random(DENSITY, seed=1).rules[0].score
    overlap = (TopK(DENSITY)(score(g, {}), {}) & TopK(DENSITY)(other(g, {}), {})).double().mean()
    assert abs(float(overlap) - (K / WIDTH) ** 2) < 0.01


def test_random_agrees_with_its_mask_in_the_model(model):
    plan = fit(recipes.random(DENSITY, seed=5), model, ids=IDS)
    rule, mlp = plan.recipe.rules[0], mlp_of(model)
    mask = rule.select(rule.score(seen_by(model, mlp.act_fn, IDS, output=True), {}), {})
    rows = iter(mask)  # layer 0 sees the same gate values sparse and dense
    check_ffn(model, plan, lambda g, u: next(rows).nonzero()[:, 0].tolist())


@pytest.fixture(scope="module")
def gradients(model):
    """Gate values and dLoss/dg of every layer, [sequences, tokens, WIDTH], from the loss of the whole model at once."""
    kept = {}

    def hook(layer):
        def keep(module, args, out):
            out.retain_grad()
            kept[layer] = out

        return keep

    handles = [mlp_of(model, layer).act_fn.register_forward_hook(hook(layer)) for layer in range(LAYERS)]
    logits = model(input_ids=IDS).logits
    chosen = torch.log_softmax(logits[:, :-1], -1).gather(-1, IDS[:, 1:, None])
    (-chosen.sum()).backward()
    for handle in handles:
        handle.remove()
    model.zero_grad(set_to_none=True)
    return {layer: (numpy_of(out), numpy_of(out.grad)) for layer, out in kept.items()}


def saliency_reference(variant, z, grad):
    """c of the variant's equation, neuron by neuron, [WIDTH] with mean 1."""
    if variant == "fisher_skip_first":
        z, grad = z[:, 1:], grad[:, 1:]
    z, grad = z.reshape(-1, WIDTH), grad.reshape(-1, WIDTH)
    c = np.zeros(WIDTH)
    for j in range(WIDTH):
        squares = [float(x) ** 2 for x in grad[:, j]]
        if variant == "mean":
            c[j] = np.mean([abs(float(x)) for x in grad[:, j]])
        elif variant == "product":
            c[j] = np.sqrt(np.sum(z[:, j] ** 2 * grad[:, j] ** 2) / np.sum(z[:, j] ** 2))
        elif variant == "sqrt":
            c[j] = np.mean(squares) ** 0.25
        else:
            c[j] = np.sqrt(np.mean(squares))
    return c / c.mean()


@pytest.mark.parametrize("variant", [v for v in VARIANTS if v != "median"])
@pytest.mark.parametrize("layer", range(LAYERS))
def test_claws_saliency(model, gradients, variant, layer):
    plan = fit(recipes.claws(DENSITY, variant=variant), model, ids=IDS)
    np.testing.assert_allclose(
        numpy_of(plan.tensors[f"{layer}.gate.saliency"]), saliency_reference(variant, *gradients[layer]), rtol=1e-4
    )


def test_claws_median_lies_in_the_bin_of_the_middle_gradient(model, gradients):
    plan = fit(recipes.claws(DENSITY, variant="median"), model, ids=IDS)
    for layer in range(LAYERS):
        sizes = np.sort(np.abs(gradients[layer][1]).reshape(-1, WIDTH), axis=0)
        exact = sizes[(len(sizes) + 1) // 2 - 1]
        found = numpy_of(plan.tensors[f"{layer}.gate.saliency"])
        ratio = found / exact
        assert ratio.max() / ratio.min() <= 1.125**2  # each within an eighth of an octave; the common scale is free


@pytest.mark.parametrize("variant", VARIANTS)
def test_claws_forward(model, variant):
    plan = fit(recipes.claws(DENSITY, variant=variant), model, ids=IDS)
    c = numpy_of(plan.tensors["1.gate.saliency"])
    assert c.mean() == pytest.approx(1, abs=1e-6) and (c > 0).all()
    check_ffn(model, plan, lambda g, u: largest(abs(g) * c, K), layer=1)


def test_saliency_is_the_same_whether_weights_want_gradients_or_not(model):
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    frozen = fit(recipes.claws(DENSITY), model, ids=IDS)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    wanting = fit(recipes.claws(DENSITY), model, ids=IDS)
    assert torch.equal(frozen.tensors["0.gate.saliency"], wanting.tensors["0.gate.saliency"])
    assert all(p.grad is None for p in model.parameters())


SITES = {
    "qkv_in": (lambda block: block.self_attn.q_proj, 0.8),
    "o_in": (lambda block: block.self_attn.o_proj, 1.2),
    "up_in": (lambda block: block.mlp.up_proj, 0.8),
    "down_in": (lambda block: block.mlp.down_proj, 1.2),
}


def larosa_plan(model):
    return fit(recipes.larosa(DENSITY, inputs=0.8, outputs=1.2), model, ids=IDS)


@pytest.mark.parametrize("kind", ["qkv_in", "up_in"])
def test_larosa_rotation_holds_the_damped_second_moments_eigenvectors(model, kind):
    plan = larosa_plan(model)
    x = numpy_of(seen_by(model, SITES[kind][0](model.model.layers[1]), IDS))
    moment = sum(np.outer(row, row) for row in x) / len(x)
    moment += 0.01 * np.mean(np.diag(moment)) * np.eye(HIDDEN)
    values, vectors = np.linalg.eigh(moment)
    rotation = numpy_of(plan.tensors[f"1.{kind}.rotation"])
    np.testing.assert_allclose(rotation.T @ rotation, np.eye(HIDDEN), atol=1e-5)
    np.testing.assert_allclose(np.abs(np.diag(vectors[:, ::-1].T @ rotation)), 1, atol=1e-5)
    assert (rotation[np.abs(rotation).argmax(0), np.arange(HIDDEN)] > 0).all()


@pytest.mark.parametrize("kind", SITES)
def test_larosa_inputs(model, kind):
    plan = larosa_plan(model)
    pick, coefficient = SITES[kind]
    block = model.model.layers[0]
    got = []
    with installed(model, plan):
        # The site's own input, before any other site of the model has dropped anything, is the dense one at qkv_in only:
        # take what came in, and what the linear layer then read.
        linear = pick(block)
        first = linear.register_forward_pre_hook(lambda m, args: got.append(args[0].detach()), prepend=True)
        last = linear.register_forward_pre_hook(lambda m, args: got.append(args[0].detach()))
        with torch.no_grad():
            model(input_ids=IDS)
        first.remove()
        last.remove()
    before, after = (numpy_of(x.flatten(0, -2)) for x in got)
    width = before.shape[1]
    k = round((1 - (1 - DENSITY) * coefficient) * width)
    rotation = numpy_of(plan.tensors[f"0.{kind}.rotation"]) if coefficient == 0.8 else np.eye(width)
    for x, read in zip(before, after, strict=True):
        z = rotation.T @ x
        expected = sum(z[i] * rotation[:, i] for i in largest(abs(z), k))
        np.testing.assert_allclose(read, expected, rtol=1e-4, atol=1e-5)


def test_larosa_rotates_gradients_as_it_rotates_activations(model):
    rotate = larosa_plan(model).recipe.rules[0].transform
    rotation = {"rotation": larosa_plan(model).tensors["0.qkv_in.rotation"].double()}
    x = torch.randn(5, HIDDEN, dtype=torch.float64, requires_grad=True)
    z = rotate.forward(x, rotation).detach().requires_grad_(True)
    weight = torch.randn(HIDDEN, dtype=torch.float64)
    (rotate.inverse(z, rotation) @ weight).tanh().sum().backward()
    (x @ weight).tanh().sum().backward()
    torch.testing.assert_close(rotate.gradient(x.grad, rotation), z.grad, rtol=1e-4, atol=1e-5)


def test_thresholds_on_linear_inputs(model):
    plan = fit(Recipe("teal", (Rule("down_in", Threshold(0.3)),)), model, ids=IDS)
    h = np.abs(numpy_of(seen_by(model, mlp_of(model, 1).down_proj, IDS)))
    assert float(plan.tensors["1.down_in.threshold"]) == pytest.approx(np.quantile(h, 0.7, method="inverted_cdf"), rel=2.0**-9)
