"""N:M pruning: the compiled operator and plain PyTorch against the definition, and what must be refused."""

import ctypes
import os
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nm_tiny import PATTERNS, SPECIAL, digest, slow
from test_ops import child
from test_ops_gpu import needs_triton, passes

from sparsity_lib import SparsityError, ops
from sparsity_lib.ops import library, reference

needs_library = pytest.mark.skipif(library.path() is None, reason="no compiled library")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WIDTHS = (1, 3, 16, 63, 64, 65, 130, 576)
#: One rounding to the dtype of what both sides compute in float32.
CLOSE = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def same(found, expected):
    """Equal bits, but for which NaN it is and the sign of a 0."""
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n, m", PATTERNS)
def test_exactly_the_largest_of_every_group_stay(n, m, dtype):
    for width in WIDTHS:
        x = draw(3, width, seed=width)
        x[1] = (4 * x[1]).round() / 4  # many ties
        x[2] = torch.tensor(SPECIAL)[torch.randint(len(SPECIAL), (width,), generator=torch.Generator().manual_seed(1))]
        x = x.to(dtype)
        for shift, scale in ((None, None), (draw(width, seed=3), None), (None, draw(width, seed=4).abs())):
            expected, mask = slow(x, n, m, shift, scale)
            for call in (ops.nm_select, plain):
                found, bits = call(x, n, m, shift=shift, scale=scale, bits=True, pad=True)
                assert found.dtype == dtype and bits.shape == (3, -(-width // 8)) and bits.dtype == torch.uint8
                assert torch.equal(reference.unpack_bits(bits, width), mask)
                same(found, expected.float().to(dtype))


def plain(x, n, m, *, pad, repair=None, **options):
    return reference.nm_select(x, n, m, repair=repair is not None, **{"bits": False, **options})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_shifts_come_back_and_variances_are_repaired(dtype):
    for (n, m), width in zip(PATTERNS, (64, 576, 96, 32, 7, 9, 35, 49, 128, 64, 48, 33, 64, 96), strict=True):
        x, shift, scale = draw(3, width, seed=m).to(dtype), draw(width, seed=3), draw(width, seed=4).abs()
        x[2] = 0.5
        for options in ({}, {"shift": shift}, {"shift": shift, "back": True}, {"shift": shift, "back": True, "scale": scale}):
            for repair in (None, "variance"):
                expected, mask = slow(x, n, m, repair=repair is not None, **options)
                for call in (ops.nm_select, plain):
                    found = call(x, n, m, repair=repair, pad=True, **options)
                    found = found[0] if isinstance(found, tuple) else found
                    torch.testing.assert_close(found.double(), expected, rtol=CLOSE[dtype], atol=1e-6)
                    if options.get("back") and repair is None:
                        assert torch.equal(found[mask], x[mask])  # to the bit: x - m + m is x


def test_a_repaired_token_has_the_variance_it_had():
    x = draw(4, 512)
    for n, m in PATTERNS[:4]:
        found = ops.nm_select(x, n, m, repair="variance")
        torch.testing.assert_close(found.var(-1), x.var(-1), rtol=1e-5, atol=0)
        assert torch.equal(found != 0, ops.nm_select(x, n, m) != 0)
    assert torch.equal(ops.nm_select(torch.zeros(1, 8), 2, 4, repair="variance"), torch.zeros(1, 8))
    flat = ops.nm_select(torch.ones(1, 8), 4, 4, repair="variance")  # nothing to repair, and nothing to divide by
    assert torch.equal(flat, torch.ones(1, 8))
    huge = ops.nm_select(torch.tensor([[1e30, -2e30, 3e30, 0.0]]), 2, 4, repair="variance")
    assert huge.isfinite().all() and (huge != 0).sum() == 2
    bad = ops.nm_select(torch.tensor([[float("nan"), 1.0, 2.0, 3.0]]), 2, 4, repair="variance")
    assert bad[0, [0, 3]].isnan().all() and torch.equal(bad[0, 1:3], torch.zeros(2))


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 64), st.data())
def test_properties(m, data):
    n, groups = data.draw(st.integers(1, m)), data.draw(st.integers(1, 5))
    values = st.sampled_from([v for v in SPECIAL if v == v] + [0.1, -0.3, 7.0])
    x = torch.tensor([data.draw(st.lists(values, min_size=m * groups, max_size=m * groups))])

    def mask(x, n=n, m=m):
        return reference.unpack_bits(ops.nm_select(x, n, m, bits=True)[1], x.shape[1])

    found = mask(x)
    assert (found.view(-1, m).sum(1) == n).all()
    assert torch.equal(mask(ops.nm_select(x, n, m)), found) or (ops.nm_select(x, n, m) == 0).view(-1, m).sum(1).gt(m - n).any()
    assert torch.equal(mask(2 * x.clamp(-1e30, 1e30)), mask(x.clamp(-1e30, 1e30)))
    assert n == m or (mask(x, n + 1) | ~found).all()  # fewer kept are among more kept
    order = torch.randperm(m, generator=torch.Generator().manual_seed(0))
    distinct = torch.randperm(m * groups, generator=torch.Generator().manual_seed(1)).float().view(-1, m) + 1
    assert torch.equal(mask(distinct[:, order].view(1, -1)).view(-1, m), mask(distinct.view(1, -1)).view(-1, m)[:, order])


@needs_library
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("format", ["float32", "bfloat16", "int8", "int4"])
def test_products_read_what_is_kept(format, dtype):
    for i, (n, m) in enumerate(PATTERNS):
        inputs, outputs = ((96, 40), (130, 300), (64, 129))[i % 3]
        w, bias = ops.pack(draw(outputs, inputs) / inputs**0.5, "inputs", format), draw(outputs, seed=2)
        shift, scale = draw(inputs, seed=3), draw(inputs, seed=4).abs()
        for tokens, options in ((1, {}), (1, {"repair": "variance"}), (5, {"share": "union", "shift": shift}),
                                (16, {"shift": shift, "scale": scale, "repair": "variance"}), (17, {"scale": scale})):
            x = (4 * draw(tokens, inputs, seed=1)).round().div(4).to(dtype)
            found = ops.input_sparse(x, w, n=n, m=m, pad=True, bias=bias, **options)
            plain = {name: each for name, each in options.items() if name not in ("share", "repair")}
            expected = reference.input_sparse(
                x, w, k=n, m=m, bias=bias, union="share" in options, repair="repair" in options, **plain)
            close = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-2, "atol": 2e-3}
            torch.testing.assert_close(found, expected, **close)


@needs_library
def test_a_product_with_the_identity_is_the_pruned_token():
    x, shift, eye = draw(7, 192), draw(192, seed=1), ops.pack(torch.eye(192), "inputs")
    for n, m in PATTERNS:
        for options in ({}, {"repair": "variance"}, {"shift": shift, "repair": "variance"}):
            same(ops.input_sparse(x, eye, n=n, m=m, pad=True, **options), ops.nm_select(x, n, m, pad=True, **options))


@needs_library
def test_a_token_does_not_depend_on_its_batch_nor_on_the_threads():
    w, x = ops.pack(draw(700, 320), "inputs", "bfloat16"), draw(16, 320)
    calls = [lambda x: ops.input_sparse(x, w, n=8, m=16, repair="variance"), lambda x: ops.nm_select(x, 4, 8, repair="variance")]
    threads = torch.get_num_threads()
    for call in calls:
        whole = call(x)
        assert torch.equal(whole, torch.cat([call(row[None]) for row in x]))
        try:
            for number in (1, 2, 3, 7):
                torch.set_num_threads(number)
                assert torch.equal(call(x), whole)
        finally:
            torch.set_num_threads(threads)


def test_shapes_that_are_easy_to_forget():
    w = ops.pack(draw(10, 24), "inputs")
    assert ops.nm_select(torch.empty(0, 24), 2, 4).shape == (0, 24) and ops.nm_select(torch.ones(24), 2, 4).shape == (24,)
    y, bits = ops.nm_select(torch.empty(2, 0, 20), 2, 4, bits=True)
    assert y.shape == (2, 0, 20) and bits.shape == (2, 0, 3)
    assert ops.input_sparse(torch.empty(0, 24), w, n=2, m=4).shape == (0, 10)
    x = draw(24, 6).T[1:4]  # neither axis contiguous
    assert torch.equal(ops.nm_select(x, 2, 4), reference.nm_select(x, 2, 4)[0])
    assert torch.equal(ops.nm_select(draw(6, 24)[:, :20], 2, 4), reference.nm_select(draw(6, 24)[:, :20], 2, 4)[0])
    deep = draw(6, 24).view(2, 3, 24)
    y, bits = ops.nm_select(deep, 3, 8, bits=True)
    flat = ops.nm_select(deep.view(6, 24), 3, 8, bits=True)
    assert y.shape == deep.shape and bits.shape == (2, 3, 3)
    assert torch.equal(y.view(6, 24), flat[0]) and torch.equal(bits.view(6, 3), flat[1])
    kept = deep.clone()
    ops.nm_select(deep, 1, 4)
    assert torch.equal(kept, deep)


BAD = [
    (lambda w, x: ops.nm_select(x, 3, 5), r"m = 5.*divisor of the 24 channels.*pad=True"),
    (lambda w, x: ops.nm_select(x, 0, 4), r"n = 0.*\[1, 4\]"), (lambda w, x: ops.nm_select(x, 5, 4), r"n = 5.*\[1, 4\]"),
    (lambda w, x: ops.nm_select(x, 2, 65), r"m = 65.*\[1, 64\]"), (lambda w, x: ops.nm_select(x, True, 4), "n = True"),
    (lambda w, x: ops.nm_select(x, 2, 4.0), "m = 4.0"),
    (lambda w, x: ops.nm_select(x, 2, 4, repair="var"), "repair = 'var'.*variance"),
    (lambda w, x: ops.nm_select(x, 2, 4, shift=torch.zeros(3)), "shift.*float32 tensor"),
    (lambda w, x: ops.nm_select(x, 2, 4, scale=-torch.ones(24)), "scale = -1.0.*at least 0"),
    (lambda w, x: ops.nm_select(x.double(), 2, 4), "dtype of x.*float64"),
    (lambda w, x: ops.nm_select(x[:, :0], 1, 1), "shape of x"),
    (lambda w, x: ops.nm_select(torch.tensor(1.0), 1, 1), "shape of x"),
    (lambda w, x: ops.nm_select(x.requires_grad_(True), 2, 4), "no gradients.*detach"),
    (lambda w, x: ops.input_sparse(x, w, n=2, m=4, k=3), "n= with m="), (lambda w, x: ops.input_sparse(x, w, n=2), "m = None"),
    (lambda w, x: ops.input_sparse(x, w, m=4), "n = None"), (lambda w, x: ops.input_sparse(x, w, n=2, m=7), "m = 7.*divisor"),
    (lambda w, x: ops.input_sparse(x, w, k=2, repair="variance"), "repair = 'variance'.*n= and m="),
    (lambda w, x: ops.input_sparse(x, w, n=2, m=4, share="union", repair="variance"), "repair = 'variance'.*share='own'"),
]


@pytest.mark.parametrize("call, message", BAD, ids=[m for _, m in BAD])
def test_bad_input_is_refused(call, message):
    with pytest.raises(SparsityError, match=message):
        call(ops.pack(draw(10, 24), "inputs"), draw(2, 24))


def test_torch_knows_the_operator():
    w, x, known = ops.pack(draw(10, 24), "inputs"), draw(2, 24), torch.ops.sparsity
    for arguments in ((x, 2, 4, None, None, False, False, False), (x, 3, 8, draw(24), draw(24).abs(), True, True, True)):
        torch.library.opcheck(known.nm_select.default, arguments, test_utils=("test_schema", "test_faketensor"))
    parts = (w.data, w.scales, [w.rows, w.cols, w.padded], w.format, w.group)
    product = (x, *parts, None, None, None, 0.0, 2, None, False, 4, True)
    torch.library.opcheck(known.input_sparse.default, product, test_utils=("test_schema", "test_faketensor"))

    def layer(x):
        y, bits = ops.nm_select(x * 2, 2, 4, repair="variance", bits=True)
        return torch.relu(y).sum() + bits.float().sum() + ops.input_sparse(x, w, n=4, m=8)

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x))


CHILD = """
import sys
sys.path.insert(0, {0!r})
from nm_tiny import digest
from sparsity_lib.ops import library
assert library.load().sparsity_isa() == sys.argv[1].encode()
print(digest())
"""


@needs_library
def test_every_instruction_set_gives_the_same_bits():
    for isa in ("avx512", "avx2", "baseline"):
        run = child(CHILD.format(str(Path(__file__).parent)), isa)
        if "this processor lacks it" not in run.stderr:
            assert run.stdout.strip() == digest(), run.stderr[-2000:]


@needs_triton
def test_in_tritons_interpreter():
    passes("ops_gpu_nm_cases.py", 12, TRITON_INTERPRET="1", SPARSITY_TEST_DEVICE="cpu")


@needs_triton
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_on_a_gpu():
    passes("ops_gpu_nm_cases.py", 12, SPARSITY_TEST_DEVICE="cuda")


def test_a_size_that_the_library_would_follow_is_refused_there_too():
    if library.path() is None or os.environ.get(library.SWITCH) == "off":
        pytest.skip("no compiled library")
    x, y = draw(2, 24), torch.empty(2, 24)
    native, one = library.load(), ctypes.byref
    for group, k, rank, repair in ((0, 2, 1, 0), (65, 2, 1, 0), (4, 5, 1, 0), (4, 0, 1, 0), (4, 2, 0, 0), (4, 2, 1, 2)):
        rule = library.Select(None, None, None, 0.0, rank, k, group, repair)
        assert native.sparsity_nm_select(one(rule), 24, one(library.vectors_of(x)), one(library.vectors_of(y)), 0, None, 1) == 1
