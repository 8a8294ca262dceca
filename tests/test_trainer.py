"""The training loop: against plain PyTorch written out, and a run cut anywhere against one that was not."""

import copy
import hashlib
import json
import math

import pytest
import torch
from core_tiny import tiny, tokens
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sparsity_lib import SparsityError
from sparsity_lib.train import TrainRecipe, train
from sparsity_lib.train.checkpoints import steps_in
from sparsity_lib.train.data import Rows
from sparsity_lib.train.losses import labelled, next_token, with_gradient

RECIPE = TrainRecipe(steps=12, batch=4, learning_rate=1e-2, warmup=3, floor=0.1, weight_decay=0.1, seed=5)
X = torch.randn(60, 6, generator=torch.Generator().manual_seed(0))
DATA = {"x": X, "y": X @ torch.arange(6.0) + 1}


class Net(nn.Module):
    """Everything that a run must restore: a matrix, a vector, dropout, a running mean, a frozen weight."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.inner, self.outer = nn.Linear(6, 8), nn.Linear(8, 1, bias=False)
        self.frozen = nn.Parameter(torch.randn(8), requires_grad=False)
        self.register_buffer("mean", torch.zeros(8))
        self.register_buffer("scratch", torch.zeros(8), persistent=False)
        self.dropout = nn.Dropout(0.2)

    def forward(self, x):
        h = torch.tanh(self.inner(x))
        if self.training:
            self.mean.lerp_(h.detach().float().mean(0), 0.1)
        return self.outer(self.dropout(h - self.mean + self.frozen))[:, 0]


def squares(module, batch, step):
    return (module(batch["x"]) - batch["y"]).square().mean()


def run(recipe=RECIPE, net=None, **options):
    net = net or Net()
    return net, train(net, options.pop("loss", squares), options.pop("data", DATA), recipe, **options)


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def adamw_by_hand(net, recipe, order):
    """AdamW (Loshchilov and Hutter 2019, algorithm 2) with clipping, warm-up and cosine, one parameter at a time."""
    moments = {n: [torch.zeros_like(p), torch.zeros_like(p)] for n, p in net.named_parameters() if p.requires_grad}
    losses, (b1, b2) = [], recipe.betas
    for step in range(recipe.steps):
        rows = order[step * recipe.batch : (step + 1) * recipe.batch]
        net.zero_grad()
        loss = squares(net, {k: v[rows] for k, v in DATA.items()}, step)
        loss.backward()
        losses.append(float(loss.detach()))
        if step < recipe.warmup:
            rate = recipe.learning_rate * (step + 1) / recipe.warmup
        else:
            turn = math.pi * (step - recipe.warmup) / (recipe.steps - recipe.warmup)
            rate = recipe.learning_rate * (recipe.floor + (1 - recipe.floor) * (1 + math.cos(turn)) / 2)
        norm = math.sqrt(sum(float(p.grad.square().sum()) for p in net.parameters() if p.requires_grad))
        with torch.no_grad():
            for name, (m, v) in moments.items():
                p = net.get_parameter(name)
                grad = p.grad * min(1.0, recipe.clip / (norm + 1e-6))
                m.copy_(b1 * m + (1 - b1) * grad)
                v.copy_(b2 * v + (1 - b2) * grad**2)
                unbiased, spread = m / (1 - b1 ** (step + 1)), v / (1 - b2 ** (step + 1))
                decay = recipe.weight_decay if p.dim() == 2 else 0.0
                p -= rate * (unbiased / (spread.sqrt() + 1e-8) + decay * p)
    return losses


@pytest.mark.parametrize("accumulation", [1, 2, 4])
def test_it_is_adamw_with_warm_up_and_cosine(accumulation):
    recipe = TrainRecipe(**{**RECIPE.to_json(), "accumulation": accumulation})
    net, expected = Net(), Net()
    net.dropout.p = expected.dropout.p = 0.0  # whole batches and pieces of them draw different masks
    net.requires_grad_(True).mean.requires_grad_(False)
    net.inner.bias.requires_grad_(False)
    expected.load_state_dict(net.state_dict())
    for name, p in expected.named_parameters():
        p.requires_grad_(net.get_parameter(name).requires_grad)
    for each in (net, expected):
        each.mean = torch.zeros(8)
        each.forward = lambda x, n=each: n.outer(torch.tanh(n.inner(x)) + n.frozen)[:, 0]
    order = torch.randperm(60, generator=torch.Generator().manual_seed(recipe.seed))
    losses = adamw_by_hand(expected.train(), recipe, order)
    _, made = run(recipe, net)
    torch.testing.assert_close(made.losses, losses, rtol=1e-4, atol=1e-5)
    for name, p in net.named_parameters():
        torch.testing.assert_close(p, expected.get_parameter(name), rtol=1e-4, atol=1e-5)


def test_a_language_model_learns_and_is_counted_in_tokens():
    model = tiny("gpt2", tie_word_embeddings=True)
    made = train(model, next_token, tokens(4, 12).repeat(10, 1), TrainRecipe(steps=10, batch=4, learning_rate=3e-3))
    assert made.losses[-1] < 0.9 * made.losses[0] and len(made.losses) == 10
    assert (made.unit, made.seen, made.resumed) == ("token", 10 * 4 * 12, 0)
    assert made.per_second == pytest.approx(made.seen / made.seconds) and made.seconds > 0
    assert not model.training and not model.lm_head.weight.grad


def test_labelled_batches_are_counted_in_rows():
    data = {"pixel_values": torch.randn(8, 3, 8, 8), "labels": torch.tensor([0, 1] * 4)}
    made = train(tiny("vit"), labelled, data, TrainRecipe(steps=2, batch=4, learning_rate=1e-3))
    assert (made.unit, made.seen) == ("row", 8)
    with pytest.raises(SparsityError, match="labels into the data"):
        train(tiny("vit"), labelled, {"pixel_values": data["pixel_values"]}, TrainRecipe(steps=2, batch=4, learning_rate=1e-3))


def test_a_seed_repeats_another_differs_and_the_callers_randomness_stays():
    (a, first), net = run(), Net()
    torch.manual_seed(9)
    expected = torch.rand(3)
    torch.manual_seed(9)
    b, second = run(net=net)
    assert torch.equal(torch.rand(3), expected)
    assert first.losses == second.losses and same(a, b)
    assert run(TrainRecipe(**{**RECIPE.to_json(), "seed": 6}))[1].losses != first.losses


@pytest.mark.parametrize("stopped", [0, 2, 3, 7, 11])
@pytest.mark.parametrize("every", [1, 4])
def test_an_interrupted_run_goes_on_as_if_nothing_had_happened(tmp_path, stopped, every):
    whole, expected = run()

    def stop(module, step):
        if step == stopped:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(checkpoints=tmp_path, every=every, after=stop)
    torch.manual_seed(123)  # another process has other randomness
    net, made = run(checkpoints=tmp_path, every=every)
    assert made.resumed == stopped // every * every
    assert made.losses == expected.losses and same(net, whole) and made.seen == expected.seen
    again, finished = run(checkpoints=tmp_path, every=every)
    assert finished.resumed == 12 and finished.losses == expected.losses and same(again, whole)
    assert finished.seconds == made.seconds


def test_a_checkpoint_holds_what_changes_and_only_the_last_two_stay(tmp_path):
    run(checkpoints=tmp_path, every=5)
    assert steps_in(tmp_path) == [10, 12] and len(list(tmp_path.iterdir())) == 2
    from safetensors.torch import load_file

    state = load_file(tmp_path / "step-00000012" / "state.safetensors")
    assert set(state) == {"inner.weight", "inner.bias", "outer.weight", "mean"}
    assert {path.suffix for path in (tmp_path / "step-00000012").iterdir()} == {".safetensors", ".json"}


def test_a_half_written_checkpoint_is_not_seen(tmp_path):
    half = tmp_path / ".step-00000004.partial"
    half.mkdir()
    (half / "state.safetensors").write_bytes(b"\0" * 40)
    _, made = run(checkpoints=tmp_path, every=4)
    assert made.resumed == 0 and not half.exists()


@pytest.mark.parametrize(("change", "said"), [
    ({"recipe": TrainRecipe(**{**RECIPE.to_json(), "learning_rate": 1e-3})}, "its recipe.learning_rate is 0.01, not 0.001"),
    ({"data": {**DATA, "y": DATA["y"] + 1}}, "another run: its data is"),
    ({"net": "frozen"}, "another run: its frozen weights is"),
    ({"net": "wider"}, "another module: mean differs"),
])
def test_checkpoints_of_another_run_are_refused(tmp_path, change, said):
    run(checkpoints=tmp_path)
    if "net" in change:
        net = Net()
        with torch.no_grad():
            net.frozen.add_(1) if change["net"] == "frozen" else net.register_buffer("mean", torch.zeros(9))
        change = {"net": net}
    with pytest.raises(SparsityError, match=said):
        run(checkpoints=tmp_path, **change)


@pytest.mark.parametrize("file", ["state.safetensors", "moments.safetensors", "training.json"])
@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_serves(tmp_path, file, damage):
    whole, expected = run(checkpoints=tmp_path, every=5)
    path = tmp_path / "step-00000012" / file
    path.write_bytes(path.read_bytes()[:20]) if damage == "cut" else path.unlink()
    with pytest.raises(SparsityError, match="step-00000012 is damaged.*delete it"):
        run(checkpoints=tmp_path, every=5)
    for left in (tmp_path / "step-00000012").iterdir():
        left.unlink()
    (tmp_path / "step-00000012").rmdir()
    net, made = run(checkpoints=tmp_path, every=5)
    assert made.resumed == 10 and made.losses == expected.losses and same(net, whole)


def test_a_folder_that_cannot_be_written_is_a_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SparsityError, match="could not be written.*Fix"):
        run(checkpoints=tmp_path / "file")


@pytest.mark.parametrize("broken", ["loss", "gradient"])
def test_what_is_not_finite_stops_before_the_weights_are_touched(tmp_path, broken):
    kept = {}

    def loss(module, batch, step):
        found = squares(module, batch, step)
        if step == 9:
            kept.update(copy.deepcopy(dict(module.named_parameters())))
            return found * math.nan if broken == "loss" else with_gradient(module.inner.bias, torch.full((8,), math.inf), 1.0)
        return found

    net = Net()
    with pytest.raises(SparsityError, match=rf"The {broken} at step 9 is not finite.*last good checkpoint is .*step-00000008"):
        run(net=net, loss=loss, checkpoints=tmp_path, every=4)
    assert all(torch.equal(p, kept[name]) for name, p in net.named_parameters())
    with pytest.raises(SparsityError, match="There is no checkpoint"):
        run(loss=loss)
    assert run(checkpoints=tmp_path, every=4)[1].losses == run()[1].losses


def test_rates_differ_by_parameter_and_projections_hold():
    net, before = Net(), Net()

    def positive(module, step):
        module.outer.weight.clamp_(min=0)

    one = TrainRecipe(steps=1, batch=4, learning_rate=1e-2)
    run(one, net, scale=lambda name, p: 0.5 if name == "inner.weight" else 1.0, after=positive)
    # Adam's first update is lr * sign(grad), whatever the gradient's size
    moved = {name: (p - before.get_parameter(name)).abs().max().item() for name, p in net.named_parameters()}
    assert moved["inner.weight"] == pytest.approx(0.5e-2, rel=1e-3) and moved["inner.bias"] == pytest.approx(1e-2, rel=1e-3)
    assert moved["frozen"] == 0 and bool((net.outer.weight >= 0).all())


def test_bfloat16_computes_in_bfloat16_and_keeps_float32():
    seen = []
    net = Net()
    net.inner.register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    _, made = run(TrainRecipe(**{**RECIPE.to_json(), "precision": "bf16"}), net)
    assert set(seen) == {torch.bfloat16} and {p.dtype for p in net.parameters()} == {torch.float32}
    exact = run()[1].losses
    assert made.losses != exact and made.losses[0] == pytest.approx(exact[0], rel=0.02)


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(8, 30), steps=st.integers(1, 12), parts=st.tuples(*[st.integers(1, 3)] * 3), seed=st.integers(0, 99))
def test_processes_share_each_batch_and_passes_see_every_row(rows, steps, parts, seed):
    each, accumulation, processes = parts
    batch = each * accumulation * processes
    recipe = TrainRecipe(steps=steps, batch=batch, learning_rate=1, accumulation=accumulation, passes=200, seed=seed)
    data = torch.arange(rows)
    streams = [Rows(data, recipe, process, processes) for process in range(processes)]
    seen = []
    for step in range(steps):
        pieces = [list(stream.pieces(step, torch.device("cpu"))) for stream in streams]
        assert all(len(p) == accumulation and all(len(rows) == each for rows in p) for p in pieces)
        seen += [int(row) for place in range(accumulation) for p in pieces for row in p[place]]
    alone = Rows(data, TrainRecipe(**{**recipe.to_json(), "accumulation": 1}))
    assert seen == [int(row) for step in range(steps) for piece in alone.pieces(step, torch.device("cpu")) for row in piece]
    for start in range(0, len(seen) - rows + 1, rows):
        assert sorted(seen[start : start + rows]) == list(range(rows))


@pytest.mark.parametrize(("options", "said"), [
    ({"data": {k: v[:47] for k, v in DATA.items()}}, "47 training sequences are too few: the recipe needs 48"),
    ({"data": {"x": X, "y": DATA["y"][:50]}}, "equally many rows"),
    ({"data": [1, 2]}, "data = 'list'"),
    ({"data": torch.tensor(1)}, "data = 'Tensor'"),
    ({"net": Net().requires_grad_(False)}, "Nothing is to be trained"),
    ({"net": Net().bfloat16()}, r"inner.weight is torch.bfloat16.*module.float\(\)"),
    ({"loss": lambda module, batch, step: 1.0}, "The loss is float"),
    ({"loss": lambda module, batch, step: module(batch["x"])}, r"The loss is \[4\]"),
    ({"loss": lambda module, batch, step: torch.tensor(1.0)}, "without a gradient"),
    ({"scale": lambda name, p: 0}, "scale of inner.weight = 0"),
    ({"every": 0}, "every = 0"),
])
def test_what_cannot_be_trained_is_refused(options, said):
    with pytest.raises(SparsityError, match=said):
        run(**options)


@pytest.mark.parametrize("bad", [
    {"steps": 0}, {"batch": 2.0}, {"learning_rate": 0}, {"learning_rate": math.inf}, {"warmup": 12}, {"floor": 1.1}, {"seed": -1},
    {"weight_decay": -0.1}, {"clip": 0}, {"accumulation": 3}, {"precision": "fp16"}, {"passes": 0}, {"betas": (0.9,)},
    {"betas": (0.9, 1.0)}, {"betas": 0.9},
])
def test_bad_recipes_are_refused_by_name(bad):
    with pytest.raises(SparsityError, match=next(iter(bad))):
        TrainRecipe(**{**RECIPE.to_json(), **bad})


def test_a_recipe_is_plain_data():
    assert TrainRecipe(**json.loads(json.dumps(RECIPE.to_json()))) == RECIPE


@pytest.mark.parametrize("file", ["state.safetensors", "moments.safetensors", "training.json"])
def test_a_checkpoint_in_which_one_number_changed_is_refused(tmp_path, file):
    run(checkpoints=tmp_path, every=5)
    path = tmp_path / "step-00000012" / file
    whole = bytearray(path.read_bytes())
    at = whole.rindex(b"0.") + 2 if file.endswith("json") else len(whole) - 2
    whole[at] ^= 1
    path.write_bytes(bytes(whole))
    with pytest.raises(SparsityError, match="step-00000012 is damaged.*is not what was written"):
        run(checkpoints=tmp_path, every=5)


@pytest.mark.parametrize("missing", ["sha256", "sealed"])
def test_checkpoints_without_checksums_are_refused(tmp_path, missing):
    run(checkpoints=tmp_path, every=5)
    path = tmp_path / "step-00000012" / "training.json"
    about = json.loads(path.read_text())
    del about[missing]
    if missing == "sha256":
        del about["sealed"]
        about["sealed"] = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps(about))
    with pytest.raises(SparsityError, match="step-00000012 is damaged"):
        run(checkpoints=tmp_path, every=5)


def test_one_run_at_a_time_trains_into_a_folder(tmp_path):
    from sparsity_lib.train.checkpoints import alone

    with alone(tmp_path), pytest.raises(SparsityError, match="the training run in .* is being made by another process"):
        run(checkpoints=tmp_path)
    run(checkpoints=tmp_path)
