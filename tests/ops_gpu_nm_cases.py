"""N:M pruning in Triton against the definition; test_ops_nm.py runs this file where Triton interprets, or on a GPU."""

import os

import pytest
import torch
from nm_tiny import PATTERNS, SPECIAL, slow

from sparsity_lib import ops
from sparsity_lib.ops import gpu, reference

DEVICE = os.environ.get("SPARSITY_TEST_DEVICE", "cpu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
KNOWN = [(n, m) for n, m in PATTERNS if not m & (m - 1) or n == m]
#: The interpreter cuts bfloat16 off.
CLOSE = {torch.float32: 2e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def inputs(width, dtype, seed=0):
    x = draw(3, width, seed=seed)
    x[1] = (4 * x[1]).round() / 4  # many ties
    special = [1e-30 if 0 < v < 1e-38 else v for v in SPECIAL]  # the interpreter makes bfloat16's smallest numbers 0
    x[2] = torch.tensor(special)[torch.randint(len(special), (width,), generator=torch.Generator().manual_seed(1))]
    return x.to(dtype)


def test_the_kernels_are_what_is_tested():
    assert gpu.load(DEVICE).__name__ == "sparsity_lib.ops.gpu.launch"


@pytest.mark.parametrize("n, m", KNOWN)
def test_exactly_the_largest_of_every_group_stay(n, m):
    dtype = DTYPES[KNOWN.index((n, m)) % 3]
    long = ((1100, {}),) if (n, m) in ((8, 16), (1, 64)) else ()  # several programs a token
    for width, options in ((1, {}), (64, {"scale": draw(64, seed=4).abs()}), (130, {"shift": draw(130, seed=3)}), *long):
        x = inputs(width, dtype)
        expected, mask = slow(x, n, m, **options)
        moved = {name: each.to(DEVICE) for name, each in options.items()}
        found, bits = ops.nm_select(x.to(DEVICE), n, m, bits=True, pad=True, **moved)
        assert torch.equal(reference.unpack_bits(bits.cpu(), width), mask)
        rounding = CLOSE[dtype] if "shift" in options else 0
        torch.testing.assert_close(found.cpu(), expected.float().to(dtype), rtol=rounding, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_shifts_come_back_and_variances_are_repaired(dtype):
    for n, m in KNOWN[DTYPES.index(dtype)::4]:
        x, shift, scale = draw(3, 72, seed=m).to(dtype), draw(72, seed=3), draw(72, seed=4).abs()
        x[2] = 0.5
        for repair in (None, "variance"):
            for options in ({}, {"shift": shift}, {"shift": shift, "back": True, "scale": scale}):
                expected, _ = slow(x, n, m, repair=repair is not None, **options)
                moved = {name: each.to(DEVICE) if name != "back" else each for name, each in options.items()}
                found = ops.nm_select(x.to(DEVICE), n, m, repair=repair, pad=True, **moved)
                torch.testing.assert_close(found.cpu().double(), expected, rtol=CLOSE[dtype], atol=1e-6)
    huge = ops.nm_select(torch.tensor([[1e30, -2e30, 3e30, 0.0]], device=DEVICE), 2, 4, repair="variance")
    assert huge.isfinite().all() and (huge != 0).sum() == 2
    zeros = torch.zeros(1, 8, device=DEVICE)
    assert torch.equal(ops.nm_select(zeros, 2, 4, repair="variance"), zeros)


@pytest.mark.parametrize("format, first", [("float32", 0), ("bfloat16", 1), ("int8", 2), ("int4", 3)])
def test_products_read_what_is_kept(format, first):
    for i, (n, m) in enumerate(KNOWN[first:7:4]):
        dtype, width = DTYPES[(i + first) % 3], (64, 70)[i % 2]
        w, bias = ops.pack(draw(40, width).to(DEVICE) / 8, "inputs", format), draw(40, seed=2).to(DEVICE)
        shift, scale = draw(width, seed=3).to(DEVICE), draw(width, seed=4).abs().to(DEVICE)
        for tokens, options in ((1, {}), (3, {"scale": scale}), (3, {"share": "union", "shift": shift}),
                                (3, {"share": "union"}), (17, {"shift": shift, "repair": "variance"})):
            x = (4 * draw(tokens, width, seed=1)).round().div(4).to(dtype).to(DEVICE)
            found = ops.input_sparse(x, w, n=n, m=m, pad=True, bias=bias, **options)
            plain = {name: each for name, each in options.items() if name not in ("share", "repair")}
            expected = reference.input_sparse(
                x, w, k=n, m=m, bias=bias, union="share" in options, repair="repair" in options, **plain)
            torch.testing.assert_close(found, expected, rtol=CLOSE[dtype] + 1e-5, atol=2e-5)


def test_other_patterns_warn_once_and_are_right_all_the_same():
    x, shift, w = inputs(60, torch.float32).nan_to_num(1.0, 3.0, -4.0)[:2], draw(60), ops.pack(draw(8, 60).to(DEVICE), "inputs")
    with pytest.warns(UserWarning, match="does not know the pattern 3:5.*m = 2, 4") as seen:
        for _ in range(3):
            found, bits = ops.nm_select(x.to(DEVICE), 3, 5, bits=True)
    assert len(seen) == 1
    expected, mask = slow(x, 3, 5)
    assert torch.equal(found.cpu().double(), expected) and torch.equal(reference.unpack_bits(bits.cpu(), 60), mask)
    for options in ({}, {"shift": shift.to(DEVICE), "repair": "variance"}, {"share": "union"}):
        plain = {"k": 3, "m": 5, "shift": options.get("shift"), "repair": "repair" in options, "union": "share" in options}
        torch.testing.assert_close(ops.input_sparse(x.to(DEVICE), w, n=3, m=5, **options),
                                   reference.input_sparse(x.to(DEVICE), w, **plain), rtol=1e-4, atol=1e-4)


def test_shapes_that_are_easy_to_forget():
    y, bits = ops.nm_select(torch.empty(0, 24, device=DEVICE), 2, 4, bits=True)
    assert y.shape == (0, 24) and bits.shape == (0, 3)
    w = ops.pack(draw(10, 24).to(DEVICE), "inputs")
    assert ops.input_sparse(torch.empty(0, 24, device=DEVICE), w, n=2, m=4).shape == (0, 10)
    x = draw(24, 6).T[1:4].to(DEVICE)
    assert torch.equal(ops.nm_select(x, 2, 4), reference.nm_select(x, 2, 4)[0])


def test_torch_knows_the_operator():
    x = draw(2, 24).to(DEVICE)
    arguments = (x, 2, 4, None, None, False, True, True)
    torch.library.opcheck(torch.ops.sparsity.nm_select.default, arguments, test_utils=("test_schema", "test_faketensor"))
    compiled = torch.compile(lambda x: ops.nm_select(x * 2, 2, 4) + 1, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), ops.nm_select(x * 2, 2, 4) + 1)
