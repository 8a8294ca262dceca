"""The granular product's training kernels in Triton; test_ops_gpu.py runs this file where Triton interprets, or on a GPU."""

import itertools
import os
import random

import pytest
import torch

from sparsity_lib.cwic import granular, reference
from sparsity_lib.cwic.kernel_functions import KERNELS

DEVICE = os.environ.get("SPARSITY_TEST_DEVICE", "cpu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
#: Tokens, inputs, outputs, outputs a stripe.
SHAPES = ((9, 6, 8, 2), (1, 1, 1, 1), (40, 70, 100, 33), (65, 33, 150, 150), (3, 130, 64, 64), (33, 64, 90, 17))
NAMES = ("x", "weight", "theta")
#: Of the largest entry: 16-bit products are rounded once, and the interpreter cuts bfloat16 off.
CLOSE = {torch.float32: 1e-5, torch.bfloat16: 2**-6, torch.float16: 2**-9}


def case(tokens, inputs, outputs, width, dtype, masks="some"):
    """Inputs that are whole numbers of quarters, thresholds between them: no mask hangs on a rounding."""
    g = torch.Generator().manual_seed(tokens + inputs)
    scale = torch.randint(1, 3, (inputs,), generator=g).float()
    thresholds = torch.randint(0, 4, (-(-outputs // width), inputs), generator=g) / 4 + 1 / 8
    made = {
        "x": torch.randint(-12, 13, (tokens, inputs), generator=g) / 4, "weight": torch.randn(outputs, inputs, generator=g),
        "theta": {"some": thresholds, "all": 0 * thresholds, "none": 0 * thresholds + 100}[masks],
        "mean": torch.randint(-2, 3, (inputs,), generator=g) / 4, "scale": scale, "eps": 0.9 * scale}
    made["x"], made["weight"] = made["x"].to(dtype), (made["weight"] * inputs**-0.5).to(dtype)
    return {name: each.to(DEVICE) for name, each in made.items()}


def both_ways(made, width, straight_through, learning=NAMES, kernel="rectangle"):
    """y, cost and gradients by the kernels, and by plain PyTorch with the same dtypes."""
    g = torch.Generator().manual_seed(1)
    outputs, tokens = len(made["weight"]), len(made["x"])
    grad_y, price = torch.randn(tokens, outputs, generator=g).to(DEVICE), torch.randn(tokens, generator=g).to(DEVICE)
    found = []
    for triton in (True, False):
        own = {name: each.clone().requires_grad_(name in learning) for name, each in made.items()}
        y, cost = granular.granular_matmul(
            *own.values(), width=width, straight_through=straight_through, kernel=kernel, triton=triton)
        ((y.float() * grad_y).sum() + (cost * price).sum()).backward()
        found.append([y, cost, *(own[name].grad for name in learning)])
    return found


def near(found, expected, dtype):
    for ours, plain in zip(found, expected, strict=True):
        assert ours.dtype == plain.dtype and ours.shape == plain.shape
        largest = float(plain.float().abs().max()) if plain.numel() else 0.0
        torch.testing.assert_close(ours.float(), plain.float(), rtol=CLOSE[dtype], atol=CLOSE[dtype] * largest + 1e-6)


def test_the_kernels_are_what_is_tested():
    x = torch.ones(1, device=DEVICE)
    assert granular._triton(x, torch.float32).__name__ == "sparsity_lib.ops.gpu.granular"
    assert granular._triton(x, torch.float64) is None


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_numbers_and_gradients_are_plain_pytorchs(dtype):
    cases = list(itertools.product(SHAPES, (True, False)))
    random.Random(str(dtype)).shuffle(cases)
    for i, (shape, straight_through) in enumerate(cases[:7]):
        made = case(*shape, dtype, ("some", "some", "all", "some", "none")[i % 5])
        found, expected = both_ways(made, shape[-1], straight_through)
        assert torch.equal(found[1], expected[1])
        near(found, expected, dtype)


@pytest.mark.parametrize("kernel", [kernel for kernel in KERNELS if kernel != "rectangle"])
def test_every_kernel_function_is_plain_pytorchs(kernel):
    for i, (shape, dtype) in enumerate(zip(SHAPES[2:], (*DTYPES, torch.float32), strict=True)):
        made = case(*shape, dtype)
        made["scale"][0] = made["eps"][0] = 0.0  # its values lie anywhere, one of them on the threshold
        made["x"][0, 0] = made["mean"][0]
        near(*both_ways(made, shape[-1], bool(i % 2), kernel=kernel), dtype)


@pytest.mark.parametrize("kernel", KERNELS)
def test_gradients_are_those_of_autograd(kernel):
    """The slow form of the equations, which shares no line with either."""
    made = case(12, 20, 36, 9, torch.float32)
    g = torch.Generator().manual_seed(1)
    grad_y, price = torch.randn(12, 36, generator=g).to(DEVICE), torch.randn(12, generator=g).to(DEVICE)
    found = []
    for matmul in (granular.granular_matmul, reference.granular_matmul):
        own = {name: each.clone().requires_grad_(name in NAMES) for name, each in made.items()}
        y, cost = matmul(*own.values(), width=9, kernel=kernel)
        ((y * grad_y).sum() + (cost * price).sum()).backward()
        found.append([y, cost, *(own[name].grad for name in NAMES)])
    assert found[0][4].ne(0).float().mean() > 0.5
    near(*found, torch.float32)


def test_what_is_not_wanted_is_not_computed():
    made = case(9, 12, 20, 8, torch.float32)
    for learning in (("x",), ("weight",), ("theta",), ("x", "theta")):
        near(*both_ways(made, 8, True, learning), torch.float32)


def test_autocast_and_mixed_dtypes():
    made = case(9, 12, 20, 8, torch.float32)
    with torch.autocast(DEVICE, torch.bfloat16):
        found, expected = both_ways(made, 8, True)
    assert found[0].dtype == torch.bfloat16 and found[2].dtype == torch.float32
    near(found, expected, torch.bfloat16)


def test_edges():
    made = case(9, 12, 20, 8, torch.float32)
    made["scale"][2] = made["eps"][2] = 0.0  # a channel that never varies
    made["x"][:, 2] = made["mean"][2]
    near(*both_ways(made, 8, True), torch.float32)
    nobody = {**made, "x": made["x"][:0]}
    near(*both_ways(nobody, 8, True), torch.float32)
    across = {**made, "x": made["x"].T.contiguous().T, "weight": made["weight"].T.contiguous().T}
    near(*both_ways(across, 8, True), torch.float32)


def test_memory_does_not_grow_with_stripes():
    """What one product keeps for its backward is its inputs; its gradients are no larger than what they belong to."""
    for width in (64, 1):
        made, seen = case(8, 64, 64, width, torch.float32), []
        own = {name: each.requires_grad_(name in NAMES) for name, each in made.items()}
        with torch.autograd.graph.saved_tensors_hooks(lambda t, seen=seen: seen.append(t.numel()) or t, lambda t: t):
            granular.granular_matmul(*own.values(), width=width)
        assert sum(seen) - made["theta"].numel() == 8 * 64 + 64 * 64 + 3 * 64
