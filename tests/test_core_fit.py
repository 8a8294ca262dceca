"""Fitting: streams, shared passes, what is left behind, what is refused, what it costs in memory."""

import signal
from pathlib import Path

import pytest
import torch
from core_tiny import WIDTH, inputs, outputs, seen_by, tiny, tokens
from processes import start

from sparsity_lib import Recipe, Rule, SparsityError, fit, fit_many, install, recipes
from sparsity_lib.collectors import GradientSize, LogHistogram, SecondMoment, bytes_needed
from sparsity_lib.methods import VARIANTS
from sparsity_lib.parts.saliency import Saliency
from sparsity_lib.parts.scores import Magnitude, Oracle
from sparsity_lib.parts.select import Threshold, TopK
from sparsity_lib.parts.transforms import Rotate

IDS = tokens(4, 10)
ALL = [recipes.cats(0.5), recipes.cats(0.3), recipes.larosa(0.5), recipes.gate_topk(), recipes.oracle(), recipes.random()]
ALL += [recipes.claws(0.5, variant=v) for v in VARIANTS]


@pytest.fixture(scope="module")
def model():
    return tiny("llama")


def state(model):
    """All that fitting may not change."""
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules()]
    flags = [p.requires_grad for p in model.parameters()]
    return hooks, flags, [p.grad is None for p in model.parameters()], [m.training for m in model.modules()]


@pytest.mark.parametrize("recipe", [recipes.cats(0.4), recipes.larosa(0.4), *(recipes.claws(0.4, variant=v) for v in VARIANTS)],
                         ids=lambda r: r.method)
@pytest.mark.parametrize("batch_size", [2, 4])
def test_streaming_gives_what_one_shot_gives(model, recipe, batch_size):
    one, many = fit(recipe, model, ids=IDS), fit(recipe, model, ids=IDS, batch_size=batch_size)
    assert one.tensors.keys() == many.tensors.keys() and one.tensors
    for name in one.tensors:
        if name.endswith("rotation"):  # eigenvectors of close eigenvalues may turn: both must diagonalise one moment
            assert_diagonalise(model, name, one.tensors[name], many.tensors[name])
        else:
            torch.testing.assert_close(one.tensors[name], many.tensors[name], rtol=1e-4, atol=0)


def assert_diagonalise(model, name, *rotations):
    layer, kind, _ = name.split(".")
    block = model.model.layers[int(layer)]
    x = seen_by(model, block.self_attn.q_proj if kind == "qkv_in" else block.mlp.up_proj, IDS).double()
    found = [rotation.double().T @ (x.T @ x) @ rotation.double() for rotation in rotations]
    for moment in found:
        torch.testing.assert_close(moment.diag().diag(), moment, rtol=0, atol=1e-5 * float(moment.trace()))
    torch.testing.assert_close(found[0].diag(), found[1].diag(), rtol=0, atol=1e-5 * float(found[0].trace()))


def test_collectors_do_not_care_how_their_stream_is_cut():
    values, grad = torch.randn(6, 8, WIDTH), torch.randn(6, 8, WIDTH)
    for make in (LogHistogram, lambda: SecondMoment(WIDTH), lambda: GradientSize(WIDTH, median=True, skip_first=True)):
        whole, cut = make(), make()
        whole.update(values.abs() if make is LogHistogram else values, grad)
        for half in (slice(0, 2), slice(2, 6)):
            cut.update((values.abs() if make is LogHistogram else values)[half], grad[half])
        for name, value in vars(whole).items():
            torch.testing.assert_close(getattr(cut, name), value, rtol=1e-5, atol=1e-5)


def test_fitting_together_is_fitting_apart_bit_for_bit(model):
    together = fit_many(ALL, model, ids=IDS)
    for recipe, plan in zip(ALL, together, strict=True):
        alone = fit(recipe, model, ids=IDS)
        assert plan.recipe == recipe == alone.recipe and plan.widths == alone.widths
        assert plan.tensors.keys() == alone.tensors.keys()
        for name, tensor in alone.tensors.items():
            assert torch.equal(tensor, plan.tensors[name]), (recipe.method, name)


def test_equal_streams_of_other_activations_are_not_shared(model):
    """An oracle watches h and a magnitude g, though both sit at the gate site."""
    rotated = [Recipe("r", (Rule("gate", TopK(0.5), score(), Rotate()),)) for score in (Magnitude, Oracle)]
    for recipe, plan in zip(rotated, fit_many(rotated, model, ids=IDS), strict=True):
        assert torch.equal(plan.tensors["0.gate.rotation"], fit(recipe, model, ids=IDS).tensors["0.gate.rotation"])
    g, h = fit_many([Recipe("t", (Rule("gate", Threshold(0.5), score()),)) for score in (Magnitude, Oracle)], model, ids=IDS)
    assert g.tensors["0.gate.threshold"] != h.tensors["0.gate.threshold"]


def test_nothing_to_fit_is_no_error(model):
    assert fit_many([], model, ids=IDS) == []


class Broken(Exception):
    pass


@pytest.mark.parametrize("error", [Broken, KeyboardInterrupt])
@pytest.mark.parametrize("recipe", [recipes.cats(), recipes.claws(), recipes.larosa()], ids=lambda r: r.method)
def test_an_interrupted_fit_leaves_the_model_as_it_was(recipe, error, monkeypatch):
    model = tiny("llama")
    for number, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(number % 2 == 0)
    before, logits, calls = state(model), outputs(model), []

    def fail(self, values, grad=None):
        calls.append(1)
        if len(calls) == 3:
            raise error

    for kind in (LogHistogram, SecondMoment, GradientSize):
        monkeypatch.setattr(kind, "update", fail)
    with pytest.raises(error):
        fit(recipe, model, ids=IDS)
    assert len(calls) == 3 and state(model) == before and torch.equal(outputs(model), logits)
    monkeypatch.undo()
    fit(recipe, model, ids=IDS)
    assert state(model) == before and torch.equal(outputs(model), logits)


@pytest.mark.parametrize("recipe", [recipes.cats(), recipes.claws()], ids=lambda r: r.method)
def test_a_model_in_training_mode_is_fitted_without_dropout(recipe):
    model = tiny("llama", attention_dropout=0.5)
    expected = fit(recipe, model, ids=IDS)
    model.train()
    found = fit(recipe, model, ids=IDS)
    assert model.training and all(m.training for m in model.modules())
    assert all(torch.equal(found.tensors[n], t) for n, t in expected.tensors.items())


def test_memory_does_not_grow_with_the_text():
    small, large = torch.rand(1, 4, WIDTH), torch.rand(8, 400, WIDTH)
    limits = {"histogram": 2**20, "moment": 8 * WIDTH**2, "gradient": 40 * WIDTH, "median": 40 * WIDTH + 1536 * WIDTH}
    made = {
        "histogram": LogHistogram, "moment": lambda: SecondMoment(WIDTH), "gradient": lambda: GradientSize(WIDTH),
        "median": lambda: GradientSize(WIDTH, median=True),
    }
    for name, make in made.items():
        sizes = []
        for text in (small, large):
            collector = make()
            collector.update(text, text)
            collector.update(text, text)
            sizes.append(bytes_needed(collector))
        assert sizes[0] == sizes[1] <= limits[name], name


def test_a_plan_says_how_much_memory_its_statistics_took(model):
    short, long = (fit(recipes.claws(variant="median"), model, ids=ids).calibration for ids in (IDS, IDS.repeat(4, 2)))
    collector = GradientSize(WIDTH, median=True)
    assert short["statistics_bytes"] == long["statistics_bytes"] == 2 * bytes_needed(collector)
    assert (short["tokens"], long["tokens"]) == (40, 320)


@pytest.mark.parametrize("recipe", [recipes.cats(), recipes.claws(), recipes.larosa()], ids=lambda r: r.method)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_broken_activations_are_refused(recipe, value):
    model = tiny("llama")
    with torch.no_grad():
        model.model.layers[0].mlp.gate_proj.weight[0, 0] = value
    with pytest.raises(SparsityError, match="NaN or infinity"):
        fit(recipe, model, ids=IDS)


def classes(sequences=4):
    return {**inputs("bert", sequences), "labels": torch.arange(sequences) % 2}


SALIENT = Recipe("salient", (Rule("down_in", TopK(0.5), Saliency()),))


def test_encoders_are_fitted_on_batches_with_labels():
    model = tiny("bert")
    plan = fit(SALIENT, model, batches=[classes()])
    linear, kept = model.bert.encoder.layer[0].output.dense, []

    def keep(module, args):
        args[0].retain_grad()
        kept.append(args[0])

    handle = linear.register_forward_pre_hook(keep)
    model(**classes()).loss.backward()
    handle.remove()
    rms = kept[0].grad.double().flatten(0, -2).square().mean(0).sqrt()
    torch.testing.assert_close(plan.tensors["0.down_in.saliency"].double(), rms / rms.mean(), rtol=1e-4, atol=1e-6)
    before = outputs(model, "bert")
    assert not torch.allclose(outputs(install(model, plan), "bert"), before, atol=1e-4)


@pytest.mark.parametrize("pick", [lambda m: m, lambda m: m.bert], ids=["without labels", "without a head"])
def test_a_gradient_recipe_without_a_loss_is_refused(pick):
    with pytest.raises(SparsityError, match="labels"):
        fit(SALIENT, pick(tiny("bert")), batches=[inputs("bert")])


def test_batches_may_come_from_a_generator():
    model = tiny("bert")
    recipe = Recipe("t", (Rule("up_in", Threshold(0.5)),))
    lazily = fit(recipe, model, batches=(inputs("bert", seed=i) for i in range(3)))
    eagerly = fit(recipe, model, batches=[inputs("bert", seed=i) for i in range(3)])
    assert lazily.calibration == eagerly.calibration and lazily.calibration["batches"] == 3
    assert torch.equal(lazily.tensors["0.up_in.threshold"], eagerly.tensors["0.up_in.threshold"])


@pytest.mark.parametrize("recipe", [recipes.cats(), recipes.larosa()], ids=lambda r: r.method)
def test_no_text_at_all_is_refused(model, recipe):
    with pytest.raises(SparsityError):
        fit(recipe, model, batches=[])


def test_text_without_a_next_token_has_no_gradient_to_learn_from(model):
    for variant in ("fisher", "fisher_skip_first"):
        with pytest.raises(SparsityError):
            fit(recipes.claws(variant=variant), model, ids=IDS[:, :1])


@pytest.mark.parametrize("ids", [torch.ones(4), torch.ones(2, 3), torch.zeros(0, 4, dtype=torch.long), [[1, 2]], "text"])
def test_ids_of_another_kind_are_refused(model, ids):
    with pytest.raises(SparsityError, match="ids = .*LongTensor"):
        fit(recipes.cats(), model, ids=ids)


def test_other_bad_arguments_are_refused(model):
    with pytest.raises(SparsityError, match="tokenizer"):
        fit(recipes.cats(), model)
    for bad in (0, -1, 1.5, True, "2"):
        with pytest.raises(SparsityError, match="batch_size"):
            fit(recipes.cats(), model, ids=IDS, batch_size=bad)
    sparse = install(tiny("llama"), fit(recipes.cats(), model, ids=IDS))
    with pytest.raises(SparsityError, match=r"uninstall\(model\) first"):
        fit(recipes.cats(), sparse, ids=IDS)


def test_skipping_the_first_token_of_experts_is_refused_as_their_tokens_have_no_place():
    with pytest.raises(SparsityError, match="skip_first"):
        fit(recipes.claws(variant="fisher_skip_first"), tiny("mixtral"), ids=IDS)


def test_ctrl_c_in_the_middle_of_a_calibration(tmp_path):
    """A process of its own, interrupted by the signal that a terminal sends."""
    script = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from core_tiny import tiny
from sparsity_lib import fit, recipes
ids = torch.randint(3, 61, (20000, 32))
model = tiny("llama")
model.model.register_forward_hook(lambda *_: print("running", flush=True))
fit(recipes.claws(), model, ids=ids).save(sys.argv[2])
"""
    target = tmp_path / "plan.safetensors"
    child = start("-c", script, str(Path(__file__).parent), str(target))
    for _ in range(5):
        assert child.stdout.readline() == "running\n"
    child.send_signal(signal.SIGINT)
    _, said = child.communicate(timeout=120)
    assert child.returncode != 0 and said.rstrip().endswith("KeyboardInterrupt") and list(tmp_path.iterdir()) == []
