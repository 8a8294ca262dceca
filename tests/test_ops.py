"""The compiled operators against plain PyTorch: every format, odd sizes, empty and full masks, and what must be refused."""

import dataclasses
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ops_tiny import gap, in_stripes

from sparsity_lib import SparsityError, ops
from sparsity_lib.ops import library, packed, reference

FORMATS = tuple(name for name, (number, *_) in ops.FORMATS.items() if number is not None)  # those that C++ knows
SIZES = [(1, 1), (7, 5), (100, 333), (130, 64), (64, 129), (576, 1536), (1000, 257)]
#: bfloat16 outputs are rounded once; sums of float32 differ by their order.
CLOSE = {torch.float32: {"rtol": 1e-5, "atol": 1e-5}, torch.bfloat16: {"rtol": 1e-2, "atol": 1e-3}}

needs_library = pytest.mark.skipif(library.path() is None, reason="no compiled library")


def weight(inputs, outputs, seed=0):
    return torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(seed)) * inputs**-0.5


def vectors(tokens, inputs, dtype=torch.float32, seed=1):
    return torch.randn(tokens, inputs, generator=torch.Generator().manual_seed(seed)).to(dtype)


def rules(inputs, outputs):
    """Keyword arguments of every way to choose."""
    draw = torch.Generator().manual_seed(2)
    return [
        {"threshold": 0.5}, {"threshold": -1.0}, {"threshold": 1e9}, {"k": max(1, inputs // 2)}, {"k": 0}, {"k": inputs},
        {"threshold": 0.5, "shift": torch.randn(inputs, generator=draw), "scale": torch.rand(inputs, generator=draw)},
        {"k": max(1, inputs // 3), "scale": torch.rand(inputs, generator=draw)},
        {"threshold": torch.rand(inputs, generator=draw)},
        *({"threshold": torch.rand(-(-outputs // width), inputs, generator=draw), "stripe": width, **moved}
          for width, moved in ((min(50, outputs), {}), (min(128, outputs), {"shift": torch.randn(inputs, generator=draw)}))),
    ]


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("inputs, outputs", SIZES)
@pytest.mark.parametrize("format", FORMATS)
def test_input_sparse_is_the_reference(format, inputs, outputs, dtype):
    matrix, bias = weight(inputs, outputs), vectors(1, outputs)[0]
    whole = ops.pack(matrix, "inputs", format)
    packed = [in_stripes(rule, matrix, whole, format=format) for rule in rules(inputs, outputs)]
    for tokens in (1, 3, 4, 17):
        x = vectors(tokens, inputs, dtype)
        for w, rule in packed:
            for share in ("own", "union"):
                found = ops.input_sparse(x, w, bias=bias, share=share, **rule)
                expected = reference.input_sparse(x, w, bias=bias, union=share == "union", **rule)
                assert found.dtype == dtype
                torch.testing.assert_close(found, expected, **CLOSE[dtype])


@needs_library
@pytest.mark.parametrize("inputs, outputs", SIZES)
@pytest.mark.parametrize("format", FORMATS)
def test_linear_is_the_reference(format, inputs, outputs):
    w, bias = ops.pack(weight(inputs, outputs), "outputs", format), vectors(1, outputs)[0]
    for tokens in (1, 5, 17):
        x = vectors(tokens, inputs)
        torch.testing.assert_close(ops.linear(x, w, bias), reference.linear(x, w, bias), **CLOSE[torch.float32])


@needs_library
@pytest.mark.parametrize("activation", tuple(ops.ACTIVATIONS))
@pytest.mark.parametrize("format", FORMATS)
def test_glu_is_the_reference(format, activation):
    for width, neurons in ((64, 96), (333, 301)):
        gate, up = (ops.pack(3 * weight(width, neurons, seed), "outputs", format) for seed in (0, 1))
        down = ops.pack(weight(neurons, width, 2), "inputs", format)
        biases = {f"{n}_bias": vectors(1, m, seed=i)[0] for i, (n, m) in
                  enumerate((("gate", neurons), ("up", neurons), ("down", width)))}
        c = torch.rand(neurons, generator=torch.Generator().manual_seed(5)) + 0.5
        for tokens in (1, 4, 16):
            x = vectors(tokens, width)
            g = reference.activate(x @ gate.dense().T + biases["gate_bias"], activation).abs()
            by_saliency = {"threshold": gap(g * c, 0.3), "saliency": c}
            for rule in ({"threshold": gap(g, 0.5)}, by_saliency, {"threshold": -1.0}, {"k": neurons}):
                for share in ("own", "union"):
                    found = ops.glu(x, gate, up, down, activation=activation, share=share, **rule, **biases)
                    expected = reference.glu(x, gate, up, down, activation=activation, union=share == "union", **rule, **biases)
                    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("format", FORMATS)
def test_a_gate_that_was_computed_elsewhere(format, dtype):
    for width, neurons in ((64, 96), (333, 301)):
        up, down = ops.pack(3 * weight(width, neurons), "outputs", format), ops.pack(weight(neurons, width, 2), "inputs", format)
        biases = {"up_bias": vectors(1, neurons)[0], "down_bias": vectors(1, width, seed=2)[0]}
        each = torch.rand(neurons, generator=torch.Generator().manual_seed(5))
        for tokens in (1, 4, 17):
            x, g = vectors(tokens, width, dtype), vectors(tokens, neurons, torch.float32 if tokens == 4 else dtype, seed=3)
            for rule in ({"threshold": each}, {"threshold": 0.5, "saliency": each}, {"k": neurons // 3}, {"k": 0}):
                for share in ("own", "union"):
                    found = ops.gated(x, g, up, down, share=share, **rule, **biases)
                    expected = reference.gated(x, g, up, down, union=share == "union", **rule, **biases)
                    torch.testing.assert_close(found, expected, rtol=1e-4 if dtype == torch.float32 else 1e-2, atol=1e-3)
    gate = ops.pack(weight(333, 301, 4), "outputs", format)
    g = ops.linear(vectors(2, 333), gate)
    found = ops.gated(vectors(2, 333), g, up, down, threshold=each)
    assert torch.equal(found, ops.glu(vectors(2, 333), gate, up, down, activation="none", threshold=each))


@needs_library
def test_neurons_that_are_dropped_are_not_read():
    up, down, g = ops.pack(weight(40, 90), "outputs"), ops.pack(weight(90, 30), "inputs"), vectors(3, 90)
    each = 0.5 + torch.rand(90, generator=torch.Generator().manual_seed(0))
    kept = (g.abs() > each).any(0)
    spoilt = [dataclasses.replace(p, data=torch.where(kept[:, None], p.data, torch.nan)) for p in (up, down)]
    assert 20 < kept.sum() < 85
    found = ops.gated(vectors(3, 40), g, *spoilt, threshold=each)
    assert torch.equal(found, ops.gated(vectors(3, 40), g, up, down, threshold=each)) and found.isfinite().all()


def test_stripes_of_any_width_hold_the_same_weight():
    w = weight(37, 100)
    for format in ops.FORMATS:
        whole = ops.pack(w, "inputs", format)
        for width in (1, 7, 64, 100):
            found = ops.pack(w, "inputs", format, stripe=width)
            assert found.stripes == -(-100 // width) and (found.rows, found.outputs) == (37, 100)
            if format == "int4":  # whose groups begin anew in each stripe
                torch.testing.assert_close(found.dense(), w, rtol=0, atol=0.2 * float(w.abs().max()))
            else:
                assert torch.equal(found.dense(), whole.dense())
            assert found.padded < width + ops.FORMATS[format][1]


@needs_library
def test_a_stripe_reads_what_its_own_thresholds_keep():
    w, x, rule = ops.pack(weight(60, 70), "inputs", stripe=32), vectors(1, 60), torch.rand(3, 60)
    kept = (x.abs() > rule).flatten()
    spoilt = dataclasses.replace(w, data=torch.where(kept[:, None], w.data, torch.nan))
    assert torch.equal(ops.input_sparse(x, spoilt, threshold=rule), ops.input_sparse(x, w, threshold=rule))
    other = torch.rand(3, 60)  # the structures that are kept for one tensor are not taken for another
    torch.testing.assert_close(ops.input_sparse(x, w, threshold=other), reference.input_sparse(x, w, threshold=other))


@needs_library
@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from([0.0, 0.25, -0.25, 1.0, -2.0, 3e38, 1e-40]), min_size=1, max_size=40), st.data())
def test_exactly_k_survive_and_ties_go_to_the_lower_index(values, data):
    x = torch.tensor([values])
    k = data.draw(st.integers(0, len(values)))
    identity = ops.pack(torch.eye(len(values)), "inputs")
    found = ops.input_sparse(x, identity, k=k)
    mask = reference.keep(x, threshold=None, k=k)
    assert int(mask.sum()) == k and torch.equal(found, torch.where(mask, x, 0))


@needs_library
def test_masks_nest():
    x, identity = vectors(1, 300), ops.pack(torch.eye(300), "inputs")
    kept = [set(ops.input_sparse(x, identity, k=k).nonzero()[:, 1].tolist()) for k in range(0, 301, 20)]
    assert all(a <= b for a, b in zip(kept, kept[1:], strict=False))


@needs_library
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_is_kept_and_stays_visible(bad):
    x = vectors(2, 40)
    x[0, 7] = bad
    for rule in ({"threshold": 1e9}, {"k": 3}):
        found = ops.input_sparse(x, ops.pack(weight(40, 30), "inputs"), **rule)
        assert not found[0].isfinite().any() and found[1].isfinite().all()


@needs_library
def test_an_overflowing_neuron_of_one_token_leaves_the_others_alone():
    gate, up, down = ops.pack(torch.eye(4), "outputs"), ops.pack(1e38 * torch.eye(4), "outputs"), ops.pack(torch.eye(4), "inputs")
    x = torch.tensor([[1e3, 0.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0]])
    found = ops.glu(x, gate, up, down, activation="none", k=1)
    assert torch.isinf(found[0, 0]) and found[1].isfinite().all()


@needs_library
def test_shapes_that_are_easy_to_forget():
    w = ops.pack(weight(24, 10), "inputs")
    assert ops.input_sparse(torch.empty(0, 24), w, k=3).shape == (0, 10)
    assert ops.input_sparse(torch.zeros(24), w, k=3).shape == (10,)
    x = vectors(24, 6).T[1:4]  # neither axis contiguous
    torch.testing.assert_close(ops.input_sparse(x, w, threshold=0.3), reference.input_sparse(x, w, threshold=0.3))
    deep = vectors(6, 24).view(2, 3, 24)
    assert torch.equal(ops.input_sparse(deep, w, k=5).view(6, 10), ops.input_sparse(deep.view(6, 24), w, k=5))


@needs_library
def test_a_token_does_not_depend_on_its_batch_nor_on_the_threads():
    w, x = ops.pack(weight(300, 700), "inputs", "bfloat16"), vectors(16, 300)
    whole = ops.input_sparse(x, w, k=100)
    assert torch.equal(whole, torch.cat([ops.input_sparse(row[None], w, k=100) for row in x]))
    threads = torch.get_num_threads()
    try:
        for number in (1, 2, 3, 7):
            torch.set_num_threads(number)
            assert torch.equal(ops.input_sparse(x, w, k=100), whole)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("skip", ["inputs", "outputs"])
@pytest.mark.parametrize("inputs, outputs", SIZES)
def test_packing_keeps_what_the_format_can_hold(inputs, outputs, skip):
    w = weight(inputs, outputs)
    assert torch.equal(ops.pack(w, skip).dense(), w)
    assert torch.equal(ops.pack(w, skip, "bfloat16").dense(), w.bfloat16().float())
    int8 = ops.pack(w, skip, "int8")
    step = w.abs().amax(1, keepdim=True) / 127
    assert ((int8.dense() - w).abs() <= step * 0.501).all()
    for group in (32, 128):
        int4 = ops.pack(w, skip, "int4", group)
        assert int4.bytes == int4.rows * int4.padded * (0.5 + 2 / group)
        error = (int4.dense() - w).abs()  # half a step, or a whole one at the short end of -8..7; and the scale's rounding
        assert (error <= 1.02 * w.abs().max() / 8 + 1e-7).all() and error.mean() < 0.09 * w.abs().max()


def test_nibbles_round_trip():
    levels = torch.randint(-8, 8, (3, 256))
    assert torch.equal(packed._unpack_int4(packed._pack_int4(levels)), levels)


def striped(width):
    return ops.pack(weight(24, 10), "inputs", stripe=width)


BAD = [
    (lambda w, x: ops.input_sparse(x, w), "either threshold= or k="),
    (lambda w, x: ops.input_sparse(x, w, k=1, threshold=1.0), "either threshold= or k="),
    (lambda w, x: ops.input_sparse(x, w, k=25), r"k = 25.*\[0, 24\]"),
    (lambda w, x: ops.input_sparse(x, w, k=True), "k = True"),
    (lambda w, x: ops.input_sparse(x, w, threshold="0.5"), "threshold = '0.5'"),
    (lambda w, x: ops.input_sparse(x[:, :3], w, k=1), r"shape of x = \(2, 3\).*24"),
    (lambda w, x: ops.input_sparse(x.double(), w, k=1), "dtype of x.*float64"),
    (lambda w, x: ops.input_sparse(x.tolist(), w, k=1), "dtype of x = 'list'"),
    (lambda w, x: ops.input_sparse(x, w.data, k=1), "weight.*skip='inputs'"),
    (lambda w, x: ops.linear(x, w), "weight = 'inputs'.*skip='outputs'"),
    (lambda w, x: ops.input_sparse(x, w, k=1, shift=torch.zeros(3)), "shift.*float32 tensor"),
    (lambda w, x: ops.input_sparse(x, w, k=1, bias=torch.zeros(10).double()), "bias.*float32 tensor"),
    (lambda w, x: ops.input_sparse(x, w, threshold=torch.zeros(3, 24)), r"threshold = .*float32 tensor \[24\]"),
    (lambda w, x: ops.input_sparse(x, striped(4), threshold=0.5), r"threshold = 0.5.*\[3, 24\].*stripes"),
    (lambda w, x: ops.input_sparse(x, striped(4), k=3), "threshold = None.*stripes"),
    (lambda w, x: ops.input_sparse(x, striped(4), threshold=torch.zeros(2, 24)), r"threshold = .*float32 tensor \[3, 24\]"),
    (lambda w, x: ops.pack(torch.ones(4, 3), "inputs", stripe=0), "stripe = 0"),
    (lambda w, x: ops.pack(torch.ones(4, 3), "inputs", stripe=5), "stripe = 5.*at most the 4 outputs"),
    (lambda w, x: ops.pack(torch.ones(4, 3), "outputs", stripe=2), "stripe = 2.*skip='inputs'"),
    (lambda w, x: ops.pair(ops.pack(torch.ones(24, 3), "outputs"), striped(4)), "stripe = 4.*none"),
    (lambda w, x: dataclasses.replace(striped(4), stripe=40), "packed weight.*ops.pack"),
    (lambda w, x: ops.input_sparse(x, w, k=1, share="all"), "share = 'all'"),
    (lambda w, x: ops.input_sparse(x, w, k=1, scale=-torch.ones(24)), "scale = -1.0.*at least 0"),
    (lambda w, x: ops.input_sparse(x.requires_grad_(True), w, k=1), "no gradients.*detach"),
    (lambda w, x: ops.input_sparse(x, dataclasses.replace(w, cols=30), k=1), "packed weight.*ops.pack"),
    (lambda w, x: dataclasses.replace(w, rows="24"), "packed weight.*ops.pack"),
    (lambda w, x: dataclasses.replace(w, scales=1), "packed weight.*ops.pack"),
    (lambda w, x: dataclasses.replace(w, group="32"), "packed weight.*ops.pack"),
    (lambda w, x: dataclasses.replace(w, format=["int4"]), "packed weight.*ops.pack"),
    (lambda w, x: dataclasses.replace(w, group=torch.ones(2, 64)), "(?s)packed weight.*ops.pack"),
    (lambda w, x: ops.glu(x, *[ops.pack(weight(24, 24), "outputs")] * 2, ops.pack(weight(24, 24), "inputs"), activation=["silu"],
                          k=1), r"activation = \['silu'\]"),
    (lambda w, x: dataclasses.replace(w, rows=-24, cols=-10), "packed weight.*ops.pack"),
    (lambda w, x: ops.nm_select(x, 2, 5, pad=torch.ones(3)), "pad = .*True or False"),
    (lambda w, x: ops.nm_select(x, 2, 4, bits=torch.ones(3)), "bits = .*True or False"),
    (lambda w, x: ops.nm_select(x, 2, 4, back=1), "back = 1.*True or False"),
    (lambda w, x: ops.pack(torch.zeros(0, 3), "inputs"), "weight"),
    (lambda w, x: ops.pack(torch.tensor([[float("nan")]]), "inputs"), "NaN"),
    (lambda w, x: ops.pack(torch.zeros(2, 3), "columns"), "skip = 'columns'"),
    (lambda w, x: ops.pack(torch.zeros(2, 3), "inputs", "int3"), "format = 'int3'.*int4"),
    (lambda w, x: ops.pack(torch.zeros(2, 3), "inputs", "int4", 64), "group = 64"),
]


@pytest.mark.parametrize("call, message", BAD, ids=[f"{i} {m}" for i, (_, m) in enumerate(BAD)])
def test_bad_input_is_refused_before_any_pointer_is_touched(call, message):
    with pytest.raises(SparsityError, match=message):
        call(ops.pack(weight(24, 10), "inputs"), vectors(2, 24))


@needs_library
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("inputs, neurons", [(7, 5), (130, 64), (576, 300)])
def test_paired_rows_change_nothing(format, inputs, neurons):
    gate, up = (ops.pack(weight(inputs, neurons, seed), "outputs", format) for seed in (0, 1))
    down = ops.pack(weight(neurons, inputs), "inputs", format)
    near, far = ops.pair(up, down)
    for one, other in ((up, near), (down, far)):
        assert torch.equal(one.dense(), other.dense()) and one.bytes == other.bytes and one.row_bytes == other.row_bytes
    assert near.data.data_ptr() + near.data.shape[1] * near.data.element_size() == far.data.data_ptr()
    for tokens in (1, 5):
        x = vectors(tokens, inputs)
        found = ops.glu(x, gate, near, far, activation="silu", k=neurons // 2)
        assert torch.equal(found, ops.glu(x, gate, up, down, activation="silu", k=neurons // 2))
    arguments = (x, near.data, near.scales, [near.rows, near.cols, near.padded], format, near.group, None)
    torch.library.opcheck(torch.ops.sparsity.linear.default, arguments, test_utils=("test_schema", "test_faketensor"))


def test_rows_that_do_not_pair_are_refused():
    w = ops.pack(weight(24, 10), "inputs")
    for other, message in ((ops.pack(weight(25, 10), "inputs"), "rows of down = 25"),
                           (ops.pack(weight(24, 10), "inputs", "int8"), "format of down")):
        with pytest.raises(SparsityError, match=message):
            ops.pair(w, other)


@needs_library
def test_calls_past_torchs_dispatcher_give_what_it_gives():
    w, x, c = ops.pack(weight(300, 200), "inputs"), vectors(3, 300), torch.rand(300)
    rows = ops.pack(weight(300, 200), "outputs")
    calls = [lambda: ops.input_sparse(x, w, k=40, scale=c), lambda: ops.linear(x, rows),
             lambda: ops.glu(x, rows, rows, ops.pack(weight(200, 300), "inputs"), activation="silu", k=50)]
    direct = [call() for call in calls]

    class Passing(torch.utils._python_dispatch.TorchDispatchMode):
        seen = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            Passing.seen += str(function).startswith("sparsity.")
            return function(*args, **(kwargs or {}))

    with Passing():
        assert all(torch.equal(call(), found) for call, found in zip(calls, direct, strict=True))
    assert Passing.seen == 3


@needs_library
def test_scales_that_turn_negative_are_noticed():
    w, x, c = ops.pack(weight(24, 10), "inputs"), vectors(1, 24), torch.ones(24)
    ops.input_sparse(x, w, k=3, scale=c)
    c[5] = -1
    with pytest.raises(SparsityError, match="at least 0"):
        ops.input_sparse(x, w, k=3, scale=c)


@needs_library
def test_small_weights_share_memory_without_touching_each_other():
    kept = [(weight(n, 40, n), ops.pack(weight(n, 40, n), "inputs")) for n in range(30, 60)]
    assert all(torch.equal(w, p.dense()) and p.data.data_ptr() % 64 == 0 for w, p in kept)


def test_glus_that_do_not_fit_are_refused():
    gate, up, down = (ops.pack(weight(8, 6), "outputs"), ops.pack(weight(8, 6), "outputs"), ops.pack(weight(6, 8), "inputs"))
    x = vectors(1, 8)
    for parts, message in (
        ((gate, ops.pack(weight(8, 5), "outputs"), down), "shape of up"), ((gate, up, gate), "down.*skip='inputs'"),
        ((gate, up, ops.pack(weight(5, 8), "inputs")), "shape of down"),
        ((gate, ops.pack(weight(8, 6), "outputs", "int8"), down), "format of up"),
    ):
        with pytest.raises(SparsityError, match=message):
            ops.glu(x, *parts, activation="silu", k=1)
    with pytest.raises(SparsityError, match="activation = 'swish'.*silu"):
        ops.glu(x, gate, up, down, activation="swish", k=1)


@needs_library
def test_torch_knows_the_operators():
    w, x = ops.pack(weight(24, 10), "inputs"), vectors(2, 24)
    arguments = (x, w.data, w.scales, [w.rows, w.cols, w.padded], w.format, w.group, None, None, None, 0.5, -1, None, False)
    torch.library.opcheck(torch.ops.sparsity.input_sparse.default, arguments, test_utils=("test_schema", "test_faketensor"))

    each = ops.pack(weight(24, 10), "inputs", stripe=4)
    up, down, rule = ops.pack(weight(10, 7), "outputs"), ops.pack(weight(7, 5), "inputs"), torch.rand(3, 24)
    shapes = ([p.rows, p.cols, p.padded] for p in (up, down))
    arguments = (x[:, :10].contiguous(), torch.randn(2, 7), up.data, None, next(shapes), down.data, None, next(shapes), up.format,
                 up.group, None, None, None, torch.rand(7), 0.0, -1, False)
    torch.library.opcheck(torch.ops.sparsity.gated.default, arguments, test_utils=("test_schema", "test_faketensor"))

    def layer(x):
        y = torch.relu(ops.input_sparse(x * 2, w, threshold=0.5)) + ops.input_sparse(x, each, threshold=rule)
        return ops.gated(y, torch.sin(y[:, :7]), up, down, threshold=0.1) + 1

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x))


CHILD = """
import sys, torch
from sparsity_lib import ops
from sparsity_lib.ops import library, reference
assert sys.argv[1] == "off" or library.load().sparsity_isa() == sys.argv[1].encode()
for format in ops.FORMATS:
    w = torch.randn(333, 200)
    x = torch.randn(5, 200)
    p, q = ops.pack(w, "inputs", format), ops.pack(w, "outputs", format)
    torch.testing.assert_close(ops.input_sparse(x, p, k=70), reference.input_sparse(x, p, k=70), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(ops.linear(x, q), reference.linear(x, q), rtol=1e-5, atol=1e-4)
    down = ops.pack(torch.randn(200, 333), "inputs", format)
    for act in ops.ACTIVATIONS:
        args = (x, q, q, down)
        torch.testing.assert_close(ops.glu(*args, activation=act, threshold=-1.0),
                                   reference.glu(*args, activation=act, threshold=-1.0), rtol=1e-4, atol=1e-2)
print("same")
"""


def child(code, isa):
    environment = {**os.environ, library.SWITCH: isa}
    return subprocess.run([sys.executable, "-c", code, isa], env=environment, capture_output=True, text=True)


#: What each is compiled for, as Linux spells it.
FLAGS = {"avx2": {"avx2", "fma"}, "avx512": (wide := {f"avx512{part}" for part in ("f", "bw", "dq", "vl")}),
         "avx512vnni": wide | {"avx512_vnni"}}


def processor():
    if not os.path.exists("/proc/cpuinfo"):
        return set()
    return set(next((line for line in open("/proc/cpuinfo") if line.startswith("flags")), "").split())


def test_every_instruction_set_of_x86_says_what_it_needs():
    assert FLAGS.keys() == {isa for isa in library.ISAS if isa.startswith("avx")}


@needs_library
@pytest.mark.parametrize("isa", [*library.ISAS, "off"])
def test_every_instruction_set_computes_the_same(isa):
    if lacking := FLAGS.get(isa, set()) - processor():
        pytest.skip(f"this processor has no {', '.join(sorted(lacking))}")
    run = child(CHILD, isa)
    assert run.returncode == 0 and run.stdout == "same\n", run.stderr[-2000:]
    assert "missing" not in run.stderr


POOL = """
import os, re, torch
from sparsity_lib import ops
from sparsity_lib.ops import library
x = torch.mm(torch.randn(9, 64), torch.randn(64, 64))
ops.input_sparse(x, ops.pack(torch.randn(4096, 64), "inputs"), k=3)
assert library._thread_pool()[0]
maps = open("/proc/self/maps").read() if os.path.exists("/proc/self/maps") else ""
print(sorted(set(re.findall(r"/(lib(?:g|i|)omp[^/\\n]*)", maps))))
"""


@needs_library
def test_the_thread_pool_is_torchs():
    run = child(POOL, "")
    assert run.returncode == 0 and run.stdout.count("omp") <= 1, run.stdout + run.stderr[-2000:]


def test_an_unknown_instruction_set_is_refused():
    run = child("from sparsity_lib.ops import library; library.load()", "sse9")
    assert run.returncode != 0 and "SPARSITY_ISA = 'sse9' is unknown" in run.stderr


def test_without_a_compiled_library_there_is_one_warning(monkeypatch):
    monkeypatch.setattr(library, "path", lambda: None)
    library.load.cache_clear()
    try:
        w, x = ops.pack(weight(24, 10), "inputs"), vectors(2, 24)
        with pytest.warns(UserWarning, match="compiled CPU operators are missing.*C\\+\\+ compiler") as seen:
            found = [ops.input_sparse(x, w, k=4) for _ in range(3)]
        assert len(seen) == 1
        torch.testing.assert_close(found[0], reference.input_sparse(x, w, k=4))
    finally:
        library.load.cache_clear()
