"""Conversion, the budget with both schedules and ways of counting, and distillation in chunks."""

import copy
from types import SimpleNamespace

import pytest
import torch
from core_tiny import tiny, tokens
from torch import nn

from sparsity_lib import SparsityError, fit, install, lm, recipes, weights_per_token
from sparsity_lib.cwic import CWICConfig, budget, convert, registry_of, teacher_of
from sparsity_lib.cwic.budget import Budget, budget_loss, spent
from sparsity_lib.cwic.layers import CWICActivation, CWICLinear
from sparsity_lib.cwic.losses import both_divergences, distil
from sparsity_lib.cwic.train import attention_operations

IDS = tokens(3, 12)
STRIPE = {"q": 16, "k": 8, "v": 8, "o": 16, "gate": 12}


def granular(theta=0.0, config=None, **changes):
    """A tiny converted Llama whose statistics have seen a batch, with all thresholds at `theta`."""
    model = tiny("llama", **changes)
    registry = convert(model, config or CWICConfig(stripe=STRIPE))
    model.train()(IDS)
    model.eval()
    for parameter in registry.thresholds().values():
        parameter.data.fill_(theta)
    registry.take_costs()
    return model, registry


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "gemma2", "mpt"])
def test_with_thresholds_at_zero_a_converted_model_computes_what_it_did(family):
    model = tiny(family)
    before = model(IDS).logits
    registry = convert(model, CWICConfig())
    assert registry_of(model) is registry
    model.train()(IDS)
    torch.testing.assert_close(model.eval()(IDS).logits, before, rtol=1e-4, atol=1e-4)
    costs = registry.take_costs()
    read = registry.always + sum(float(cost[0].detach()) for cost in costs.values())
    assert read == registry.dense == weights_per_token(tiny(family))
    assert weights_per_token(model) == registry.dense  # thresholds are no weights


def test_every_linear_has_thresholds_or_follows_the_gate():
    model, registry = granular()
    assert [layer.role for layer in registry.layers.values()] == ["q", "k", "v", "o", "gate"] * 2 + ["ffn"] * 2 + ["head"]
    attention, mlp = model.model.layers[1].self_attn, model.model.layers[1].mlp
    assert attention.q_proj.sparsity.theta.shape == (2, 32) and attention.v_proj.sparsity.theta.shape == (2, 32)
    assert attention.q_proj.sparsity.theta is not attention.k_proj.sparsity.theta
    assert isinstance(mlp.act_fn, CWICActivation) and type(mlp.up_proj) is nn.Linear is type(mlp.down_proj)
    assert mlp.act_fn.sparsity.theta.shape == (1, 48) and mlp.act_fn.dense_cost == 2 * 32 * 48
    assert registry.head == "lm_head" and isinstance(model.lm_head, CWICLinear)


def test_up_and_down_follow_one_mask_and_cost_two_matrices():
    """Cost of the FFN: (d / k) |G| + 2 n |M|, and a neuron that is left out needs neither of its two weights."""
    model, registry = granular(theta=0.6)
    mlp, x = model.model.layers[0].mlp, torch.randn(7, 32)
    y = mlp(x)
    g = mlp.act_fn.act(mlp.gate_proj(x))
    kept = g.abs() >= 0.6 * mlp.act_fn.sparsity.std
    expected = (kept * g * (x @ mlp.up_proj.weight.T)) @ mlp.down_proj.weight.T
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-6)
    costs = registry.take_costs()
    gates = mlp.gate_proj.sparsity
    sizes = (x - gates.mean).abs()
    count = sum((sizes >= row * gates.std).sum(-1) for row in gates.theta)
    assert torch.equal(costs["model.layers.0.mlp.gate_proj"], 12.0 * count)
    assert torch.equal(costs["model.layers.0.mlp.act_fn"], 2.0 * 32 * kept.sum(-1)) and 0 < float(kept.float().mean()) < 1


def test_thresholds_learn_at_eta_times_the_root_of_their_inputs():
    _, registry = granular()
    factor = registry.scale(10.0)
    found = {name.split(".", 3)[-1]: factor(f"{name}.sparsity.theta", t) for name, t in registry.thresholds().items()}
    assert found["self_attn.q_proj"] == pytest.approx(10 * 32**0.5) and found["mlp.act_fn"] == pytest.approx(10 * 48**0.5)
    assert factor("model.layers.0.mlp.up_proj.weight", nn.Parameter(torch.zeros(3, 4))) == 1.0
    registry.thresholds()["lm_head"].data.fill_(-1.0)
    registry.clamp()
    assert min(float(t.detach().min()) for t in registry.thresholds().values()) == 0


def test_a_tied_head_stays_tied_and_copies_are_their_own():
    model, registry = granular(tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    other = copy.deepcopy(model)
    twin = registry_of(other)
    assert twin.layers["lm_head"] is other.lm_head and other.lm_head.ledger is twin.ledger is not registry.ledger
    other(IDS)
    assert twin.ledger.costs and not registry.ledger.costs


def test_the_dense_model_is_one_switch_away():
    model, registry = granular(theta=0.8)
    sparse = model(IDS).logits
    registry.take_costs()
    with registry.dense_inside():
        dense = model(IDS).logits
    torch.testing.assert_close(dense, tiny("llama")(IDS).logits, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(sparse, dense, atol=1e-2) and not registry.ledger.costs


def test_what_cannot_be_converted_is_refused_and_left_alone():
    refused = {"gpt2": "Conv1D", "falcon_new": "FalconLinear", "mixtral": "mixture", "bert": "no language-model head"}
    for family, said in refused.items():
        with pytest.raises(SparsityError, match=said):
            convert(tiny(family), CWICConfig())
    model = tiny("llama")
    with pytest.raises(SparsityError, match="stripe of q = 5"):
        convert(model, CWICConfig(stripe=5))
    assert not any(isinstance(m, (CWICLinear, CWICActivation)) for m in model.modules())
    with pytest.raises(SparsityError, match="no granular layers"):
        registry_of(model)
    convert(model, CWICConfig(head=False))
    assert type(model.lm_head) is nn.Linear
    with pytest.raises(SparsityError, match="sparse already"):
        convert(model, CWICConfig())
    sparse = tiny("llama")
    install(sparse, fit(recipes.cats(0.5), sparse, ids=IDS))
    with pytest.raises(SparsityError, match="sparse already"):
        convert(sparse, CWICConfig())


def test_the_active_parameter_schedule():
    made = budget.active(18_000)
    expected = (1.05, 6.0, 10.0, 15_000, "active", None)
    assert (made.start, made.final, made.weight, made.warmup, made.counts, made.head_limit) == expected
    assert made.target(0) == 1.05 and made.target(7_500) == pytest.approx((1.05 + 6.05) / 2)
    assert made.target(15_000) == made.target(17_999) == 6.05
    # the papers' table: 2.05x at step 3,000 and so on
    assert [round(made.target(s), 2) for s in (3_000, 6_000, 9_000)] == [2.05, 3.05, 4.05]
    assert budget.active(180, final=3.0).warmup == 150


def test_the_flop_schedule():
    made = budget.flops(7_000)
    assert (made.start, made.final, made.weight, made.warmup, made.head_limit) == (1.5, 6.0, 1.0, 6_000, 10.0)
    assert made.target(3_000) == pytest.approx(3.75) and made.target(6_000) == 6.0
    assert budget.flops(70, warmup=0).target(0) == 6.0  # the ablation without warm-up
    assert set(budget.PRESETS) == set(budget.ETA) and budget.ETA["flops"] == 10.0


def test_the_loss_is_one_sided():
    ratio = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    loss = torch.stack([budget_loss(r, 2.0) for r in ratio])
    assert loss.tolist() == [1.0, 0.0, 0.0]
    loss.sum().backward()
    assert ratio.grad.tolist() == [-2.0, 0.0, 0.0]


def batch_costs(model, registry):
    hidden = lm.hidden_states(model, IDS)
    registry.layers["lm_head"](hidden)
    return registry.take_costs()


@pytest.mark.parametrize("counts", ["active", "flops"])
def test_the_ratio_counts_the_whole_batch_both_ways(counts):
    model, registry = granular(theta=0.7)
    costs = batch_costs(model, registry)
    valid = torch.arange(36) % 12 < 9
    operations = attention_operations(model, IDS, None)
    assert operations == 4 * 2 * 4 * 8 * 6.5  # two layers, four heads of eight, 6.5 tokens seen on average
    found = spent(registry, costs, Budget(3.0, 10, counts=counts), valid=valid, attention=operations)
    weights = sum(c.detach()[valid].double().sum() for c in costs.values())
    covered = sum(layer.dense_cost for layer in registry.layers.values())
    if counts == "active":
        base, used = 27 * registry.dense, 27 * registry.always + weights
    else:
        assert covered == sum(x.weights for x in registry.sites.linears) + 61 * 32
        base, used = 27 * (2 * covered + operations), 2 * weights + 27 * operations
    ratio = float(found.ratio.detach())
    assert ratio == pytest.approx(float(base / used), rel=1e-6) and 1 < ratio < 10
    head = 27 * 61 * 32 / costs["lm_head"][valid].sum()
    assert found.head_ratio == pytest.approx(float(head))
    with pytest.raises(SparsityError, match="reported no cost"):
        spent(registry, {}, Budget(3.0, 10))


def test_the_heads_cost_stops_learning_at_its_limit_and_only_there():
    model, registry = granular(theta=0.7)
    head = registry.thresholds()["lm_head"]
    other = registry.thresholds()["model.layers.0.self_attn.q_proj"]
    for limit, learns in ((None, True), (50.0, True), (1.01, False)):
        hidden = lm.hidden_states(model, IDS)
        model.lm_head(hidden)
        found = spent(registry, registry.take_costs(), Budget(9.0, 0, head_limit=limit))
        assert found.head_ratio > 1.01
        grads = torch.autograd.grad(budget_loss(found.ratio, 9.0), [head, other], allow_unused=True)
        assert (grads[0] is not None and bool(grads[0].any())) is learns and grads[1].any()
        assert not learns or grads[0].max() <= 0  # a higher threshold costs less: the loss falls


@pytest.mark.parametrize(("bad", "said"), [
    ({"final": 0.9}, "target ratio"), ({"final": 0.0}, "final"), ({"start": 0.5}, "target ratio"), ({"start": 7.0}, "start"),
    ({"warmup": -1}, "warmup"), ({"weight": 0}, "weight"), ({"counts": "bytes"}, "counts"), ({"head_limit": 0.5}, "head_limit"),
])
def test_bad_budgets_are_refused_by_name(bad, said):
    with pytest.raises(SparsityError, match=said):
        Budget(**{"final": 3.0, "warmup": 5, **bad})


def by_hand(student, teacher, hidden, reference):
    """Both divergences from full tables of probabilities, in float64."""
    p, q = (lm.logits(m, h.flatten(0, 1)).double().softmax(-1) for m, h in ((teacher, reference), (student, hidden)))
    return (p * (p / q).log()).sum(-1), (q * (q / p).log()).sum(-1)


def test_both_divergences_are_their_definitions():
    a, b = torch.randn(5, 11), torch.randn(5, 11)
    p, q = a.double().softmax(-1), b.double().softmax(-1)
    forward, reverse = both_divergences(a, b)
    torch.testing.assert_close(forward.double(), (p * (p / q).log()).sum(-1), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(reverse.double(), (q * (q / p).log()).sum(-1), rtol=1e-5, atol=1e-6)
    assert all(bool((kl > 0).all()) for kl in (forward, reverse))


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("masked", [False, True])
def test_distillation_in_chunks_is_distillation_at_once(family, masked, monkeypatch):
    monkeypatch.setattr(lm, "HEAD_CHUNK", 7)
    teacher, student = tiny(family), tiny(family)
    registry = convert(student, CWICConfig())
    student.train()(IDS)
    for theta in registry.thresholds().values():
        theta.data.fill_(0.4)
    student.eval()
    valid = torch.arange(36) % 5 > 0 if masked else torch.ones(36, dtype=torch.bool)
    hidden, reference = lm.hidden_states(student, IDS), lm.hidden_states(teacher, IDS)
    found = distil(student, teacher, hidden, reference, registry=registry, valid=valid if masked else None, mse=True)
    forward, reverse = by_hand(student, teacher, hidden, reference)
    torch.testing.assert_close(found.loss.double(), (forward + reverse)[valid].mean() / 2, rtol=1e-4, atol=1e-6)
    expected = (hidden - reference).square().mean(-1).flatten()[valid].mean()
    torch.testing.assert_close(found.mse, expected)
    costs = registry.take_costs()["lm_head"]
    student.lm_head(hidden)
    assert torch.equal(costs, registry.take_costs()["lm_head"]) and len(costs) == 36
    chosen = [student.lm_head.sparsity.theta, student.lm_head.weight, student.model.layers[0].self_attn.q_proj.weight]
    ours = torch.autograd.grad(found.loss + costs.mean() * 1e-3, chosen, retain_graph=True)
    logits = lm.logits(student, hidden.flatten(0, 1))
    whole = sum(kl[valid].mean() for kl in both_divergences(lm.logits(teacher, reference.flatten(0, 1)).detach(), logits)) / 2
    plain = torch.autograd.grad(whole + registry.take_costs()["lm_head"].mean() * 1e-3, chosen)
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_no_table_of_logits_outlives_its_chunk(monkeypatch):
    monkeypatch.setattr(lm, "HEAD_CHUNK", 4)
    teacher, (student, registry) = tiny("llama"), granular(theta=0.3)
    hidden, reference = lm.hidden_states(student, IDS), lm.hidden_states(teacher, IDS)
    seen = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(tuple(t.shape)) or t, lambda t: t):
        distil(student, teacher, hidden, reference, registry=registry).loss.backward()
    assert not any(shape and shape[-1] == 61 and len(shape) > 1 for shape in seen)


def test_the_teacher_learns_nothing_and_the_head_sees_the_batch_once():
    teacher, (student, registry) = tiny("llama").requires_grad_(True), granular(theta=0.3)
    student.train()
    hidden, reference = lm.hidden_states(student, IDS), lm.hidden_states(teacher, IDS)
    before = int(student.lm_head.sparsity.batches)
    distil(student, teacher, hidden, reference, registry=registry).loss.backward()
    assert all(p.grad is None for p in teacher.parameters())
    assert int(student.lm_head.sparsity.batches) == before + 1


def test_a_teacher_shares_weights_only_where_it_is_told_to():
    model = tiny("llama")
    shared, own = teacher_of(model, share=True), teacher_of(model)
    assert shared.lm_head.weight is model.lm_head.weight is not own.lm_head.weight
    assert not any(p.requires_grad for p in own.parameters()) and model.lm_head.weight.requires_grad
    convert(model, CWICConfig())
    assert type(shared.lm_head) is nn.Linear
    with pytest.raises(SparsityError, match="before convert"):
        teacher_of(model)


def test_packed_rows_attend_to_their_own_document():
    model = SimpleNamespace(config=SimpleNamespace(get_text_config=lambda: SimpleNamespace(
        num_hidden_layers=1, num_attention_heads=1, head_dim=1, hidden_size=1)))
    segments = torch.tensor([[1, 1, 1, 2, 2, 0]])
    assert attention_operations(model, segments, segments) == pytest.approx(4 * (1 + 2 + 3 + 1 + 2) / 5)
