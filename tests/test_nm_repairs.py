"""Shifts and repairs of N:M pruning against slow references; training them; plans and checkpoints that hold them."""

import contextlib
import dataclasses

import numpy as np
import pytest
import torch
from core_tiny import HIDDEN, LAYERS, numpy_of, outputs, seen_by, tiny, tokens
from transformers import AutoModelForCausalLM

from sparsity_lib import Plan, Recipe, Rule, SparsityError, account, fit, install, installed, recipes, uninstall
from sparsity_lib.parts.nm import NofM
from sparsity_lib.parts.repairs import LowRank, OutputScale, Variance
from sparsity_lib.parts.scores import Magnitude
from sparsity_lib.parts.select import TopK
from sparsity_lib.parts.shift import LearnedShift, Shift, TokenShift, fold, lower_median
from sparsity_lib.parts.transforms import Rotate
from sparsity_lib.sites import Site, find_sites
from sparsity_lib.sparsifier import Sparsifier
from sparsity_lib.train.repairs import RepairRecipe, train_repairs

IDS = tokens(6, 12)
SHORT = RepairRecipe(sequences=6, epochs=10, learning_rate=0.01)
LEARNED = {"ls": {"repair": "ls"}, "lpts": {"transform": "lpts"}, "both": {"transform": "lpts", "repair": ("var", "ls")}}


@pytest.fixture(scope="module")
def model():
    return tiny("llama")


def kept_of(z, n, m):
    """Indices of the n largest |z| of every m, by Python's stable sort."""
    return [j for start in range(0, len(z), m) for j in sorted(range(start, start + m), key=lambda j: -abs(z[j]))[:n]]


def pruned(z, n=8, m=16):
    out = np.zeros_like(z)
    kept = kept_of(z, n, m)
    out[kept] = z[kept]
    return out


def alone(transform=None, repair=(), width=32):
    """A sparsifier of its own, without a model."""
    options = {} if transform is None else {"transform": transform}
    site = Site(0, "up_in", "block", width, ("linear",))
    return Sparsifier(Rule("up_in", NofM(8, 16), Magnitude(), repair=tuple(repair), **options), site)


X = torch.randn(40, 32, generator=torch.Generator().manual_seed(3)) + 0.3


# --- shifts ---


def test_dpts_is_prune_of_x_minus_its_median_plus_its_median():
    found = alone(TokenShift())(X)
    for x, out in zip(numpy_of(X), numpy_of(found), strict=True):
        m = sorted(x)[(len(x) - 1) // 2]
        np.testing.assert_allclose(out, pruned(x - m) + m, rtol=1e-5, atol=1e-6)
    assert torch.equal(alone(TokenShift())(X[:1]), found[:1])  # a token looks at itself only


def test_dpts_folds_into_the_row_sums():
    weight = torch.randn(5, 32)
    z = alone(TokenShift())(X) - lower_median(X)
    folded = z @ weight.T + lower_median(X) * weight.sum(1)
    torch.testing.assert_close(alone(TokenShift())(X) @ weight.T, folded, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("width", [1, 2, 7, 32])
def test_the_median_is_torchs_with_and_without_gradients(width):
    x = torch.randn(9, 3, width)
    expected = x.median(-1, keepdim=True).values
    assert torch.equal(lower_median(x), expected)
    grown = x.clone().requires_grad_(True)
    lower_median(grown).sum().backward()
    assert torch.equal(lower_median(grown).detach(), expected)
    assert bool(((grown.grad != 0).sum(-1) == 1).all())
    assert torch.equal(lower_median(x.bfloat16().float()), x.bfloat16().median(-1, keepdim=True).values.float())


def test_spts_is_the_median_of_calibration_activations(model):
    plan = fit(recipes.nm(transform="spts"), model, ids=IDS)
    x = numpy_of(seen_by(model, model.model.layers[1].mlp.down_proj, IDS))
    assert float(plan.tensors["1.down_in.shift"]) == pytest.approx(np.median(x), abs=1e-3)
    assert plan.recipe.rules[0].transform == Shift("median")


def test_lpts_prunes_around_each_channels_own_shift(model):
    shift = torch.randn(32)
    sparsifier = alone(LearnedShift())
    sparsifier.fill({"shift": shift})
    for x, out in zip(numpy_of(X), numpy_of(sparsifier(X)), strict=True):
        np.testing.assert_allclose(out, pruned(x - numpy_of(shift)) + numpy_of(shift), rtol=1e-5, atol=1e-6)
    plan = fit(recipes.nm(transform=LearnedShift("median")), model, ids=IDS)
    x = numpy_of(seen_by(model, model.model.layers[0].self_attn.o_proj, IDS))
    exact = np.quantile(x, 0.5, axis=0, method="inverted_cdf")  # found in a bin of a sixteenth of the value
    np.testing.assert_allclose(plan.tensors["0.o_in.shift"].numpy(), exact, rtol=1 / 16, atol=1e-4)
    assert not bool(fit(recipes.nm(transform="lpts"), model, ids=IDS).tensors["0.o_in.shift"].any())
    site = find_sites(model).sites[0, "o_in"]
    folded = fold(site, {"shift": shift})
    torch.testing.assert_close(folded[site.column_readers[0]], model.model.layers[0].self_attn.o_proj.weight @ shift)
    with pytest.raises(SparsityError, match="start = 'mean'"):
        LearnedShift("mean")


# --- repairs of z ---


def test_var_restores_each_tokens_variance():
    found = alone(repair=[Variance()])(X)
    for x, out in zip(numpy_of(X), numpy_of(found), strict=True):
        sparse = pruned(x)
        np.testing.assert_allclose(out, sparse * np.sqrt(x.var() / sparse.var()), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found.var(-1), X.var(-1), rtol=1e-5)


def test_var_after_a_shift_scales_what_is_left_of_it():
    found = alone(TokenShift(), [Variance()])(X)
    for x, out in zip(numpy_of(X), numpy_of(found), strict=True):
        m = sorted(x)[15]
        z = pruned(x - m)
        np.testing.assert_allclose(out, z * np.sqrt(x.var() / z.var()) + m, rtol=1e-4, atol=1e-5)


def test_var_of_tokens_without_variance_stays_finite_with_its_gradient():
    x = torch.zeros(2, 32)
    x[1] = 4.0
    x.requires_grad_(True)
    out = alone(repair=[Variance()])(x)
    out.sum().backward()
    assert bool(out.isfinite().all()) and not bool(out[0].any()) and bool(x.grad.isfinite().all())


# --- repairs of outputs ---


def linears_of(model):
    attention, mlp = model.model.layers[0].self_attn, model.model.layers[0].mlp
    return {"qkv_in": [attention.q_proj, attention.k_proj, attention.v_proj], "o_in": [attention.o_proj],
            "up_in": [mlp.gate_proj, mlp.up_proj], "down_in": [mlp.down_proj]}


def watched(model, plan, linear):
    """(input before pruning, output) of one layer in the sparse model."""
    found = []
    with installed(model, plan), torch.no_grad():
        handles = [linear.register_forward_pre_hook(lambda m, a: found.append(a[0].flatten(0, -2)), prepend=True),
                   linear.register_forward_hook(lambda m, a, out: found.append(out.flatten(0, -2)))]
        model(input_ids=IDS)
        for handle in handles:
            handle.remove()
    return [numpy_of(x) for x in found]


@pytest.mark.parametrize("family", ["llama", "qwen2"])  # qwen2 has biases at q, k and v
@pytest.mark.parametrize("kind", ["qkv_in", "down_in"])
def test_ls_scales_the_product_and_not_the_bias(family, kind):
    model = tiny(family)
    if family == "qwen2":
        for linear in linears_of(model)["qkv_in"]:
            torch.nn.init.normal_(linear.bias)
    plan = fit(recipes.nm(8, 16, repair="ls"), model, ids=IDS)
    for name, tensor in plan.tensors.items():
        tensor.copy_(torch.rand_like(tensor) + (0.5 if "scale" in name else 0))
    for number, linear in enumerate(linears_of(model)[kind]):
        scale, offset = (numpy_of(plan.tensors[f"0.{kind}.{name}_{number}"]) for name in ("scale", "offset"))
        before, after = watched(model, plan, linear)
        bias = 0 if linear.bias is None else numpy_of(linear.bias)
        for x, y in zip(before, after, strict=True):
            np.testing.assert_allclose(y, scale * (numpy_of(linear.weight) @ pruned(x)) + bias + offset, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["qkv_in", "o_in", "up_in", "down_in"])
def test_low_rank_carries_the_dropped_part_through_the_truncated_svd(model, kind):
    plan = fit(recipes.nm(8, 16, repair=LowRank(0.25)), model, ids=IDS)
    for linear in linears_of(model)[kind]:
        weight = numpy_of(linear.weight)
        u, s, v = np.linalg.svd(weight, full_matrices=False)
        rank = round(0.25 * min(weight.shape))
        stand_in = (u[:, :rank] * s[:rank]) @ v[:rank]
        for x, y in zip(*watched(model, plan, linear), strict=True):
            np.testing.assert_allclose(y, weight @ pruned(x) + stand_in @ (x - pruned(x)), rtol=1e-3, atol=1e-4)


def test_low_rank_at_full_rank_is_the_dense_model(model):
    for transform in ("none", "dpts"):
        plan = fit(recipes.nm(2, 16, transform=transform, repair=("var", LowRank(1.0))), model, ids=IDS)
        plain = fit(recipes.nm(2, 16, transform=transform, repair=LowRank(1.0)), model, ids=IDS)
        with installed(model, plain):
            torch.testing.assert_close(outputs(model), outputs(tiny("llama")), rtol=1e-3, atol=1e-3)
        with installed(model, plan):  # the variance repair comes on top of what the product gives back
            assert not torch.allclose(outputs(model), outputs(tiny("llama")), atol=1e-2)
    rotated = Recipe("rotated", (Rule("up_in", TopK(0.2), transform=Rotate(), repair=(LowRank(1.0),)),))
    with installed(model, fit(rotated, model, ids=IDS)):
        torch.testing.assert_close(outputs(model), outputs(tiny("llama")), rtol=1e-3, atol=1e-3)


def test_a_product_fitted_to_what_is_dropped_errs_less_on_it(model):
    errors = {}
    for aware in (False, True):
        plan = fit(recipes.nm(8, 16, repair=LowRank(0.25, aware)), model, ids=IDS)
        left, right = (plan.tensors[f"0.down_in.{side}_0"] for side in ("left", "right"))
        linear = model.model.layers[0].mlp.down_proj
        x = seen_by(model, linear, IDS)
        dropped = torch.stack([row - torch.from_numpy(pruned(row.numpy())) for row in x])
        errors[aware] = float((dropped @ (linear.weight.detach() - left @ right).T).square().sum())
    assert errors[True] < 0.8 * errors[False]


def test_accounting_adds_what_repairs_read(model):
    sites = find_sites(model)
    plain, ranked, scaled = (fit(recipes.nm(8, 16, repair=r), model, ids=IDS) for r in ((), LowRank(0.25), "ls"))
    counts = []
    for plan in (plain, ranked, scaled):
        with installed(model, plan):
            counts.append(account(model, ids=IDS))
    shapes = [(linear.outputs, linear.inputs) for linear in sites.linears]
    expected = sum(round(0.25 * min(shape)) * sum(shape) for shape in shapes)
    assert [c.repair_weights for c in counts] == [0, expected, sum(outputs for outputs, _ in shapes)]
    for found in counts[1:]:
        assert found.read_weights == pytest.approx(counts[0].read_weights + found.repair_weights)
        assert found.skipped == pytest.approx(counts[0].skipped - found.repair_weights / found.dense_weights)
    biased = tiny("gpt2")
    with installed(biased, fit(recipes.nm(8, 16, repair="ls"), biased, ids=IDS)):
        assert account(biased, ids=IDS).repair_weights == 0  # the offset joins a bias that is there


def test_rsparse_is_a_threshold_with_a_low_rank_product(model):
    plan = fit(recipes.rsparse(0.4, rank_share=0.2), model, ids=IDS)
    linear = model.model.layers[0].mlp.down_proj
    weight = numpy_of(linear.weight)
    norms, threshold = np.linalg.norm(weight, axis=0), float(plan.tensors["0.down_in.threshold"])
    u, s, v = np.linalg.svd(weight, full_matrices=False)
    rank = round(0.2 * HIDDEN)
    for x, y in zip(*watched(model, plan, linear), strict=True):
        kept = np.where(np.abs(x) * norms > threshold, x, 0)
        np.testing.assert_allclose(y, weight @ kept + (u[:, :rank] * s[:rank]) @ v[:rank] @ (x - kept), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("repair", ["ls", "low_rank"])
def test_repairs_of_outputs_leave_the_dense_tokens_of_a_sequence_alone(repair):
    model = tiny("llama")
    recipe = recipes.nm(4, 16, repair=repair, token_share=0.5)
    plan = fit(recipe, model, ids=IDS)
    for name, tensor in plan.tensors.items():
        if "offset" in name:
            tensor.fill_(0.3)
    dense = outputs(model)
    with installed(model, plan):
        sparse = outputs(model)
    assert torch.equal(sparse[:, :4], dense[:, :4]) and not torch.allclose(sparse[:, 4:], dense[:, 4:], atol=1e-3)


def test_nothing_is_held_after_a_forward(model):
    plan = fit(recipes.nm(8, 16, repair=("var", "low_rank")), model, ids=IDS)
    with installed(model, plan):
        outputs(model)
        assert all(s._dropped is None for block in model.model.layers for s in block.sparsity.values())


def test_repairs_are_refused_where_they_have_no_output_to_change(model):
    for repair in (OutputScale(), LowRank()):
        with pytest.raises(SparsityError, match="repair at the gate"):
            fit(Recipe("x", (Rule("gate", TopK(0.5), repair=(repair,)),)), model, ids=IDS)
        with pytest.raises(SparsityError, match="repair at an expert site"):
            fit(Recipe("x", (Rule("up_in", TopK(0.5), repair=(repair,)),)), tiny("mixtral"), ids=IDS)
    for bad in (0, 1.5, "x", None):
        with pytest.raises(SparsityError, match="rank_share"):
            LowRank(bad)
    with pytest.raises(SparsityError, match="aware = 1"):
        LowRank(0.1, 1)


# --- plans and checkpoints ---


PAIRS = [("var", "ls"), ("ls", "low_rank"), ("var", "low_rank")]


@pytest.mark.parametrize("transform", ["none", "spts", "dpts", "lpts"])
@pytest.mark.parametrize("repair", ["var", "ls", "low_rank", *PAIRS], ids=str)
def test_singly_and_in_pairs_through_plan_and_checkpoint(transform, repair, tmp_path):
    model = tiny("llama")
    plan = fit(recipes.nm(8, 16, transform=transform, repair=repair), model, ids=IDS)
    for name, tensor in plan.tensors.items():
        if any(word in name for word in ("scale", "offset", "shift")):
            tensor.add_(0.1 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(1)))
    again = Plan.load(plan.save(tmp_path / "plan.safetensors"))
    assert again.recipe == plan.recipe and again.tensors.keys() == plan.tensors.keys()
    expected = outputs(install(model, plan))
    uninstall(model)
    assert torch.equal(outputs(install(model, again)), expected)
    if transform in ("none", "lpts") and repair in ("ls", PAIRS[1]):
        model.save_pretrained(tmp_path / "model")
        assert torch.equal(outputs(AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()), expected)


def test_tensors_fitted_to_a_mask_do_not_serve_another_density(model):
    free = fit(recipes.nm(8, 16, repair=("var", "low_rank")), model, ids=IDS)
    assert free.with_density(0.25).recipe == recipes.nm(4, 16, repair=("var", "low_rank"))
    for options in ({"repair": "ls"}, {"transform": "lpts"}, {"repair": LowRank(0.1, True)}):
        with pytest.raises(SparsityError, match="fitted to its density"):
            fit(recipes.nm(8, 16, **options), model, ids=IDS).with_density(0.25)


def test_sequential_fits_see_repaired_outputs(model):
    for repair in ((), LowRank(1.0)):
        plan = fit(recipes.nm(2, 16, transform="spts", repair=repair), model, ids=IDS, sequential=True)
        apart = fit(recipes.nm(2, 16, transform="spts", repair=repair), model, ids=IDS)
        moved = float((plan.tensors["1.o_in.shift"] - apart.tensors["1.o_in.shift"]).abs())
        assert (moved < 1e-4) == bool(repair)


# --- training ---


@pytest.mark.parametrize("inputs", ["dense", "sparse"])
@pytest.mark.parametrize("name", LEARNED)
def test_the_loss_falls_in_every_block_and_the_output_moves(model, name, inputs):
    plan = fit(recipes.nm(4, 16, **LEARNED[name]), model, ids=IDS)
    trained = train_repairs(model, plan, ids=IDS, recipe=dataclasses.replace(SHORT, inputs=inputs))
    assert [len(losses) for losses in trained.losses] == [60] * LAYERS
    assert all(after < 0.97 * before for before, after in zip(trained.before, trained.after, strict=True))
    with installed(model, plan):
        before = outputs(model)
    with installed(model, trained.plan):
        assert not torch.allclose(outputs(model), before, atol=1e-3)
    assert trained.plan.calibration["repairs"]["inputs"] == inputs
    assert torch.equal(outputs(model), outputs(tiny("llama"))) and all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("name", LEARNED)
def test_each_learned_tensor_was_trained_and_changes_the_output_by_itself(model, name):
    plan = fit(recipes.nm(4, 16, **LEARNED[name]), model, ids=IDS)
    trained = train_repairs(model, plan, ids=IDS, recipe=dataclasses.replace(SHORT, epochs=2)).plan
    changed = [key for key in plan.tensors if not torch.equal(plan.tensors[key], trained.tensors[key])]
    learned = {f"{site.name}.{tensor}" for rule, site in plan.recipe.placed(find_sites(model))
               for piece in rule.parts() for tensor in piece.trained(site)}
    assert set(changed) == learned == set(plan.tensors)
    with installed(model, plan):
        before = outputs(model)
    for key in changed:
        with installed(model, dataclasses.replace(plan, tensors={**plan.tensors, key: trained.tensors[key]})):
            assert not torch.equal(outputs(model), before), key


def test_the_first_blocks_loss_and_gradient_are_those_of_a_plain_computation(model):
    """One step at a rate so small that the loss is that of the start, against a block run by hand."""
    plan = fit(recipes.nm(4, 16, repair="ls"), model, ids=IDS)
    found = train_repairs(model, plan, ids=IDS, recipe=dataclasses.replace(SHORT, epochs=1, batch=6, learning_rate=1e-9))
    dense = seen_by(model, model.model.layers[0], IDS, output=True)
    with installed(model, plan):
        sparse = seen_by(model, model.model.layers[0], IDS, output=True)
    expected = float((dense - sparse).square().mean())
    assert found.losses[0] == [pytest.approx(expected, rel=1e-5)] and found.before[0] == pytest.approx(expected, rel=1e-5)


def test_the_gradient_goes_to_kept_entries_alone():
    x = X.clone().requires_grad_(True)
    sparsifier = alone()
    (sparsifier(x) * torch.randn(32)).sum().backward()
    assert torch.equal(x.grad != 0, sparsifier.mask(X))


def test_training_is_decided_by_its_seed(model):
    plan = fit(recipes.nm(4, 16, repair="ls"), model, ids=IDS)
    short = dataclasses.replace(SHORT, epochs=1)
    one, two = (train_repairs(model, plan, ids=IDS, recipe=short) for _ in range(2))
    other = train_repairs(model, plan, ids=IDS, recipe=dataclasses.replace(short, seed=1))
    assert one.losses == two.losses != other.losses
    assert all(torch.equal(one.plan.tensors[name], tensor) for name, tensor in two.plan.tensors.items())


def test_blocks_without_learned_parts_are_passed_by(model):
    recipe = Recipe("x", (Rule("o_in", NofM(8, 16)), Rule("down_in", NofM(8, 16), repair=(OutputScale(),))))
    trained = train_repairs(model, fit(recipe, model, ids=IDS), ids=IDS, recipe=SHORT)
    assert {name.split(".")[1] for name in trained.plan.tensors} == {"down_in"}
    with pytest.raises(SparsityError, match="nothing to be trained.*repair='ls'"):
        train_repairs(model, fit(recipes.nm(repair="var"), model, ids=IDS), ids=IDS, recipe=SHORT)


def test_a_loss_that_is_not_finite_stops_with_block_and_step(model):
    plan = fit(recipes.nm(4, 16, repair="ls"), model, ids=IDS)
    plan.tensors["1.up_in.scale_0"][3] = float("nan")
    with pytest.raises(SparsityError, match="Repairs of block 1: The loss at step 0 is not finite.*learning rate"):
        train_repairs(model, plan, ids=IDS, recipe=SHORT)
    assert all(p.requires_grad for p in model.parameters()) and torch.equal(outputs(model), outputs(tiny("llama")))


@pytest.mark.parametrize(("changes", "message"), [
    ({"sequences": 0}, "sequences = 0"), ({"length": 1}, "length = 1"), ({"batch": 4}, "batch = 4.*divisor of the 6"),
    ({"learning_rate": 0}, "learning_rate = 0"), ({"inputs": "both"}, "inputs = 'both'"), ({"epochs": True}, "epochs = True"),
])
def test_bad_training_recipes_are_refused(changes, message):
    with pytest.raises(SparsityError, match=message):
        dataclasses.replace(SHORT, **changes)


def test_training_needs_a_dense_model_and_enough_text(model):
    plan = fit(recipes.nm(4, 16, repair="ls"), model, ids=IDS)
    with pytest.raises(SparsityError, match="6 training sequences are too few.*needs 256"):
        train_repairs(model, plan, ids=IDS)
    with installed(model, plan), pytest.raises(SparsityError, match="from the dense model"):
        train_repairs(model, plan, ids=IDS, recipe=SHORT)


def first_block(model, plan=None):
    """What the first block puts out for IDS, dense or under a plan."""
    seen = []
    handle = model.model.layers[0].register_forward_hook(lambda m, a, out: seen.append(out[0] if isinstance(out, tuple) else out))
    with torch.no_grad(), installed(model, plan) if plan is not None else contextlib.nullcontext():
        model(input_ids=IDS)
    handle.remove()
    return seen[0]


def test_errors_by_channel_and_token_are_in_units_of_the_dense_block(model):
    plan = fit(recipes.nm(4, 16, repair="ls"), model, ids=IDS)
    short = RepairRecipe(sequences=6, epochs=4, learning_rate=1e-9)       # too little to move anything
    found = {error: train_repairs(model, plan, ids=IDS, recipe=dataclasses.replace(short, error=error))
             for error in ("mean square", "by channel", "by token")}
    dense, sparse = (first_block(model, p).double() for p in (None, plan))
    size = dense.flatten(0, 1).square().mean(0).sqrt()
    assert found["mean square"].before[0] == pytest.approx(float((sparse - dense).square().mean()), rel=1e-3)
    assert found["by channel"].before[0] == pytest.approx(float(((sparse - dense) / size).square().mean()), rel=1e-3)
    each = dense.square().mean(-1, keepdim=True).sqrt()
    assert found["by token"].before[0] == pytest.approx(float(((sparse - dense) / each).square().mean()), rel=1e-3)
    with pytest.raises(SparsityError, match="error = 'median'"):
        RepairRecipe(error="median")


def test_by_channel_learns_the_small_channels_too():
    model = tiny("llama")
    with torch.no_grad():
        for block in model.model.layers:
            block.mlp.down_proj.weight[0] *= 100                          # one channel drowns the others
    plan = fit(recipes.nm(4, 16, repair="ls"), model, ids=IDS)
    left = {}
    for error in ("mean square", "by channel"):
        trained = train_repairs(model, plan, ids=IDS, recipe=dataclasses.replace(SHORT, error=error)).plan
        left[error] = float((first_block(model, trained) - first_block(model))[..., 1:].square().mean())
    assert left["by channel"] < 0.9 * left["mean square"]
