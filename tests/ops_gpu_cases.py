"""The Triton operators against the reference; test_ops_gpu.py runs this file where Triton interprets, or on a GPU."""

import dataclasses
import itertools
import os
import random

import pytest
import torch
from ops_tiny import gap, in_stripes

from sparsity_lib import ops
from sparsity_lib.ops import gpu, reference

DEVICE = os.environ.get("SPARSITY_TEST_DEVICE", "cpu")
FORMATS = tuple(ops.FORMATS)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SIZES = ((1, 1), (7, 5), (100, 333), (130, 64), (257, 129))
TOKENS = (1, 3, 16, 17, 0)
SHARES = ("own", "union")
#: float32: sums differ by their order. The others: one unit in the last place, as the interpreter cuts bfloat16 off.
CLOSE = {torch.float32: {"rtol": 1e-5, "atol": 1e-5}, torch.bfloat16: {"rtol": 2**-7, "atol": 1e-5},
         torch.float16: {"rtol": 2**-10, "atol": 1e-5}}


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def weight(inputs, outputs, seed=0):
    return draw(outputs, inputs, seed=seed) * inputs**-0.5


def rules(inputs, outputs):
    """Keyword arguments of every way to choose."""
    narrow, wide = min(40, outputs), min(128, outputs)
    positive = [draw(n, inputs, seed=5).abs() for n in (1, -(-outputs // narrow))]
    return [
        {"threshold": 0.5}, {"threshold": -1.0}, {"threshold": 1e99}, {"threshold": positive[0][0]},
        {"threshold": 0.5, "shift": draw(inputs, seed=3), "scale": positive[0][0]},
        {"threshold": positive[1], "stripe": narrow},
        {"threshold": draw(-(-outputs // wide), inputs, seed=6), "stripe": wide, "shift": draw(inputs, seed=3)},
        {"k": max(1, inputs // 2)}, {"k": 0}, {"k": inputs}, {"k": 1}, {"k": -(-inputs // 3), "scale": positive[0][0]},
    ]


def test_the_kernels_are_what_is_tested():
    assert gpu.load(DEVICE).__name__ == "sparsity_lib.ops.gpu.launch"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("format", FORMATS)
def test_input_sparse_is_the_reference(format, dtype):
    places = list(itertools.product(SIZES, TOKENS[:-1], SHARES))
    random.Random(f"{format} {dtype}").shuffle(places)
    first = (FORMATS.index(format) + DTYPES.index(dtype)) % 2  # every format meets every rule, in one dtype or another
    for i in range(first, len(rules(1, 1)), 2):
        (inputs, outputs), tokens, share = places[i]
        how = {"format": format, "group": (32, 128)[i // 2 % 2]}
        x, w = draw(tokens, inputs, seed=1).to(dtype), ops.pack(weight(inputs, outputs), "inputs", **how)
        w, rule = in_stripes(rules(inputs, outputs)[i], weight(inputs, outputs), w, **how)
        bias = draw(outputs, seed=2) if i % 3 else None
        found = ops.input_sparse(x, w, bias=bias, share=share, **rule)
        expected = reference.input_sparse(x, w, bias=bias, union=share == "union", **rule)
        assert found.dtype == dtype
        torch.testing.assert_close(found, expected, **CLOSE[dtype])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("format", FORMATS)
def test_linear_is_the_reference(format, dtype):
    places = list(itertools.product(SIZES, TOKENS[:-1]))
    random.Random(f"{format} {dtype}").shuffle(places)
    for i, ((inputs, outputs), tokens) in enumerate(places[:4]):
        w, x = ops.pack(weight(inputs, outputs), "outputs", format, (32, 128)[i % 2]), draw(tokens, inputs, seed=1).to(dtype)
        bias = draw(outputs, seed=2) if i % 2 else None
        torch.testing.assert_close(ops.linear(x, w, bias), reference.linear(x, w, bias), **CLOSE[dtype])


@pytest.mark.parametrize("format, activation", [(f, a) for i, f in enumerate(FORMATS) for j, a in enumerate(ops.ACTIVATIONS)
                                                if (i + j) % 5 in (0, 2)])
def test_glu_is_the_reference(format, activation):
    number = ops.ACTIVATIONS[activation] + FORMATS.index(format)
    width, neurons = ((64, 96), (133, 75))[number % 2]
    gate, up = (ops.pack(3 * weight(width, neurons, seed), "outputs", format) for seed in (0, 1))
    down = ops.pack(weight(neurons, width, 2), "inputs", format)
    biases = {f"{n}_bias": draw(m, seed=i) for i, (n, m) in enumerate((("gate", neurons), ("up", neurons), ("down", width)))}
    c = draw(neurons, seed=5).abs() + 0.5
    dtype, share = DTYPES[number % 3], SHARES[number % 2]
    for tokens, by_rule in ((1, "threshold"), (TOKENS[1 + number % 3], "saliency"), (TOKENS[number % 4], "k")):
        x = draw(tokens, width, seed=6).to(dtype)
        g = reference.activate(x.float() @ gate.dense().T + biases["gate_bias"], activation).abs()
        rule = {"threshold": {"threshold": gap(g, 0.5)}, "k": {"k": neurons},
                "saliency": {"threshold": gap(g * c, 0.3), "saliency": c}}[by_rule]
        found = ops.glu(x, gate, up, down, activation=activation, share=share, **rule, **biases)
        expected = reference.glu(x, gate, up, down, activation=activation, union=share == "union", **rule, **biases)
        close = {torch.float32: 1e-4, torch.bfloat16: 2**-7, torch.float16: 2**-10}[dtype]
        torch.testing.assert_close(found, expected, rtol=close, atol=1e-4)
        each = gap(g, 0.5) * torch.ones(neurons, device=DEVICE)
        each[::2] = -1.0
        found = ops.gated(x, g, up, down, threshold=each, share=share, up_bias=biases["up_bias"])
        expected = reference.gated(x, g, up, down, threshold=each, union=share == "union", up_bias=biases["up_bias"])
        torch.testing.assert_close(found, expected, rtol=close, atol=1e-4)


@pytest.mark.parametrize("share", SHARES)
def test_glu_by_rank_with_ties(share):
    """Whole numbers: every sum is exact in any order, and many gates are equal."""
    whole = [torch.randint(-2, 3, shape, generator=torch.Generator().manual_seed(i)).float().to(DEVICE)
             for i, shape in enumerate(((90, 40), (90, 40), (30, 90), (17, 40)))]
    gate, up, down = (ops.pack(w, skip) for w, skip in zip(whole, ("outputs", "outputs", "inputs"), strict=False))
    for tokens, k in ((1, 0), (1, 7), (3, 45), (17, 89)):
        arguments = (whole[3][:tokens], gate, up, down)
        found = ops.glu(*arguments, activation="relu", k=k, share=share)
        assert torch.equal(found, reference.glu(*arguments, activation="relu", k=k, union=share == "union"))


def test_exactly_k_survive_and_ties_go_to_the_lower_index():
    choose = random.Random(0)
    special = [0.0, -0.0, 0.25, -0.25, 1.0, -2.0, 3e38, 1e-40, float("inf"), float("-inf"), float("nan")]
    for width in (1, 2, 31, 128, 129, 300):
        x = torch.tensor([[choose.choice(special) for _ in range(width)] for _ in range(3)], device=DEVICE)
        x[0] = draw(width).bfloat16().float()
        for k in {0, 1, width // 2, width - 1, width}:
            border, last = gpu.load(DEVICE)._borders(x, None, None, k)
            key = torch.where(x.isnan(), 0x7FFFFFFF, x.abs().view(torch.int32))
            index = torch.arange(width, device=DEVICE)
            mask = (key > border[:, None]) | (key == border[:, None]) & (index <= last[:, None])
            assert torch.equal(mask, reference.keep(x, threshold=None, k=k)) and (mask.sum(1) == k).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_is_kept_and_stays_with_its_token(bad):
    w = ops.pack(weight(40, 30), "inputs")
    for tokens, rule in ((1, {"threshold": 1e9}), (3, {"k": 3}), (3, {"threshold": 1e9})):
        x = draw(tokens, 40)
        x[0, 7] = bad
        found = ops.input_sparse(x, w, **rule)
        assert not found[0].isfinite().any() and found[1:].isfinite().all()


def spoil(packed, rows):
    """The same weights with NaN in some rows, as `pack` would never make them."""
    data = packed.data.clone()
    data[rows] = float("nan")
    return dataclasses.replace(packed, data=data)


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("tokens", [1, 3, 17])
def test_rows_that_no_token_keeps_are_not_used(tokens, share):
    x, w = draw(tokens, 100), ops.pack(weight(100, 70), "inputs")
    x[:, ::3] = 0.01
    for rule in ({"threshold": 0.02}, {"k": 30}):
        kept = reference.keep(x, threshold=rule.get("threshold"), k=rule.get("k")).any(0)
        assert 10 < kept.sum() < 90
        assert torch.equal(ops.input_sparse(x, spoil(w, ~kept), share=share, **rule), ops.input_sparse(x, w, share=share, **rule))
    gate, up, down = ops.pack(torch.eye(100, device=DEVICE), "outputs"), ops.pack(weight(100, 100), "outputs"), w
    kept = (x.abs() > 0.02).any(0)
    plain, spoilt = (ops.glu(x, gate, *each, activation="none", threshold=0.02, share=share)
                     for each in ((up, down), (spoil(up, ~kept), spoil(down, ~kept))))
    assert torch.equal(plain, spoilt)


@pytest.fixture
def rows_read(monkeypatch):
    """A function from a packed weight to the rows of it that were read, known where Triton interprets."""
    if DEVICE != "cpu":
        return None
    from triton.runtime.interpreter import InterpreterBuilder

    seen, load = [], InterpreterBuilder.create_masked_load

    def watch(self, pointers, mask, *rest):
        seen.append(torch.from_numpy(pointers.data[mask.data].astype("int64")))
        return load(self, pointers, mask, *rest)

    def rows(packed):
        place = torch.cat([each.flatten() for each in seen]) - packed.data.data_ptr()
        return (place[(place >= 0) & (place < packed.data.nbytes)] // (packed.data.nbytes // packed.rows)).unique().tolist()

    monkeypatch.setattr(InterpreterBuilder, "create_masked_load", watch)
    return rows


@pytest.mark.parametrize("format", ["bfloat16", "int4"])
def test_only_the_rows_that_a_token_keeps_are_read(format, rows_read):
    if rows_read is None:
        assert torch.cuda.is_available()  # a GPU does not tell; the interpreter does
        return
    x, eye = draw(3, 100), ops.pack(torch.eye(100), "outputs", format)
    x[:, ::3] = 0.01
    kept = (x.abs() > 0.02).any(0).nonzero().flatten().tolist()
    w = ops.pack(weight(100, 70), "inputs", format)
    ops.input_sparse(x, w, threshold=0.02)
    assert rows_read(w) == kept and len(kept) < 70
    for rule in ({"threshold": 0.02}, {"k": 30}):
        g = reference.linear(x, eye)
        mask = reference.keep(g, threshold=rule.get("threshold"), k=rule.get("k")).any(0)
        up, down = ops.pack(weight(100, 100), "outputs", format), ops.pack(weight(100, 70), "inputs", format)
        ops.glu(x, eye, up, down, activation="none", **rule)
        assert rows_read(up) == rows_read(down) == mask.nonzero().flatten().tolist()


def test_a_shifted_value_is_not_rounded_to_the_dtype_of_x():
    shift = 1e-6 * draw(40, seed=3)
    for format in ("float16", "int8"):
        w, x = ops.pack(1e4 * weight(40, 30), "inputs", format), torch.zeros(3, 40, dtype=torch.float16, device=DEVICE)
        found = ops.input_sparse(x, w, threshold=-1.0, shift=shift)
        torch.testing.assert_close(found, reference.input_sparse(x, w, threshold=-1.0, shift=shift), rtol=2**-10, atol=1e-6)


def test_values_that_are_dropped_add_nothing():
    """An infinite shift of what a zero scale drops, and the up product of a neuron whose gate is zero."""
    x, w, shift, scale = draw(3, 40), ops.pack(weight(40, 30), "inputs"), torch.zeros(40, device=DEVICE), draw(40).abs()
    scale[5], shift[5] = 0.0, 1e38
    found = ops.input_sparse(x, w, threshold=0.1, shift=shift, scale=scale)
    torch.testing.assert_close(found, reference.input_sparse(x, w, threshold=0.1, shift=shift, scale=scale))
    eye = ops.pack(torch.eye(4, device=DEVICE), "inputs")
    gate, up = (ops.pack(s * torch.eye(4, device=DEVICE), "outputs") for s in (1, 1e38))
    x = torch.tensor([[1e3, 0.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0]], device=DEVICE)
    found = ops.glu(x, gate, up, eye, activation="none", k=1)
    assert torch.isinf(found[0, 0]) and found[1].isfinite().all()


def test_sums_in_many_splits():
    """So many inputs that the sums are cut; with a scale an output, a bias, and thresholds by stripe."""
    for format, dtype in (("int8", torch.float16), ("int4", torch.bfloat16), ("bfloat16", torch.float32)):
        whole, x, bias = ops.pack(weight(400, 140), "inputs", format), draw(2, 400).to(dtype), draw(140, seed=7)
        for rule in ({"threshold": draw(2, 400), "stripe": 128}, {"k": 200}):
            w, rule = in_stripes(rule, weight(400, 140), whole, format=format)
            for batch in (x, x[:1]):
                found = ops.input_sparse(batch, w, bias=bias, **rule)
                torch.testing.assert_close(found, reference.input_sparse(batch, w, bias=bias, **rule), **CLOSE[dtype])


def test_layers_of_one_input_are_one_launch():
    layers, x = [weight(64, n, seed=n) for n in (96, 32, 32)], draw(2, 64)
    found = ops.input_sparse(x, ops.pack(torch.cat(layers), "inputs"), threshold=0.3)
    each = [ops.input_sparse(x, ops.pack(w, "inputs"), threshold=0.3) for w in layers]
    torch.testing.assert_close(found, torch.cat(each, -1), **CLOSE[torch.float32])


def test_the_same_call_gives_the_same_bits():
    w, rows, x = ops.pack(weight(400, 140), "inputs", "bfloat16"), ops.pack(weight(400, 140), "outputs", "bfloat16"), draw(3, 400)
    down = ops.pack(weight(140, 50), "inputs", "bfloat16")
    for call in (lambda: ops.input_sparse(x, w, k=300), lambda: ops.linear(x, rows),
                 lambda: ops.glu(x, rows, rows, down, activation="silu", threshold=0.1)):
        assert torch.equal(call(), call())


def test_shapes_that_are_easy_to_forget():
    w, rows = ops.pack(weight(24, 10), "inputs"), ops.pack(weight(24, 10), "outputs")
    assert ops.input_sparse(draw(0, 24), w, k=3).shape == ops.linear(draw(0, 24), rows).shape == (0, 10)
    assert ops.glu(draw(0, 24), rows, rows, ops.pack(weight(10, 24), "inputs"), activation="silu", k=3).shape == (0, 24)
    assert ops.input_sparse(draw(24), w, k=3).shape == (10,)
    x = draw(24, 6).T[1:4]  # neither axis contiguous
    arguments = (w.data, w.scales, [w.rows, w.cols, w.padded], w.format, w.group, None, None, None, 0.3, -1, None, False)
    torch.testing.assert_close(torch.ops.sparsity.input_sparse(x, *arguments), reference.input_sparse(x, w, threshold=0.3))
    deep = draw(6, 24).view(2, 3, 24)
    assert torch.equal(ops.input_sparse(deep, w, k=5).view(6, 10), ops.input_sparse(deep.view(6, 24), w, k=5))


def test_torch_knows_the_operators():
    w, rows = ops.pack(weight(24, 10), "inputs"), ops.pack(weight(24, 10), "outputs")
    down, x = ops.pack(weight(10, 6), "inputs"), draw(2, 24)
    part = {id(p): (p.data, p.scales, [p.rows, p.cols, p.padded]) for p in (w, rows, down)}
    known = torch.ops.sparsity
    for operator, arguments in (
        (known.input_sparse, (x, *part[id(w)], w.format, w.group, None, None, None, 0.5, -1, None, False)),
        (known.linear, (x, *part[id(rows)], w.format, w.group, None)),
        (known.glu, (x, *part[id(rows)], *part[id(rows)], *part[id(down)], w.format, w.group, None, None, None, None, None,
                     0.1, -1, 1, False)),
        (known.gated, (x, draw(2, 10), *part[id(rows)], *part[id(down)], w.format, w.group, None, None, None, draw(10).abs(),
                       0.0, -1, False)),
    ):
        torch.library.opcheck(operator.default, arguments, test_utils=("test_schema", "test_faketensor"))

    def layer(x):
        kept = torch.relu(ops.input_sparse(x * 2, w, threshold=0.5)) + ops.linear(x, rows)
        return kept.sum() + ops.glu(x, rows, rows, down, activation="silu", threshold=0.1)

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x))
