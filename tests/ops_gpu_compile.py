"""What no interpreter shows: the kernels compile for GPUs, to vector loads and without atomics. Needs no GPU.

test_ops_gpu.py runs this file in a process of its own: a launch is caught here, and compiled instead of run.
"""

import re

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from sparsity_lib import ops
from sparsity_lib.ops.gpu import granular, launch

POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int8: "*i8",
            torch.uint8: "*u8", torch.int32: "*i32"}
WIDTH, NEURONS = 64, 2048


def compile_for(kernel, arguments, capability):
    """The PTX of a kernel for these arguments, specialised as a launch would (tensors aligned, sizes a multiple of 16)."""
    signature, constants, attributes = {}, {}, {}
    warps = arguments.pop("num_warps")
    for i, parameter in enumerate(kernel.params):
        value = arguments[parameter.name]
        if parameter.is_constexpr or value is None:
            signature[parameter.name], constants[(i,)] = "constexpr", value
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        else:
            tensor = isinstance(value, torch.Tensor)
            signature[parameter.name] = POINTERS[value.dtype] if tensor else "i32"
            if tensor or value % 16 == 0:
                attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps}).asm["ptx"]


@pytest.fixture
def compiled(monkeypatch, capability):
    """Kernel name -> PTX of all that the test launches."""
    found = {}

    def run(self, *values, grid, warmup=False, **rest):
        assert all(size > 0 for size in grid)
        arguments = {**dict(zip(self.arg_names, values, strict=False)), **rest}
        found.setdefault(self.__name__, []).append(compile_for(self, arguments, capability))

    monkeypatch.setattr(JITFunction, "run", run)
    return found


@pytest.mark.parametrize("format, dtype, tokens, capability", [
    ("bfloat16", torch.bfloat16, 1, 90), ("bfloat16", torch.float32, 4, 90), ("float16", torch.float16, 16, 80),
    ("int8", torch.bfloat16, 16, 90), ("int4", torch.bfloat16, 1, 90),
])
def test_every_kernel_compiles(compiled, format, dtype, tokens):
    wide = ops.pack(torch.ones(NEURONS, WIDTH), "outputs", format)
    down = ops.pack(torch.ones(WIDTH, NEURONS), "inputs", format)
    x, deep, each = torch.ones(tokens, WIDTH, dtype=dtype), torch.ones(tokens, NEURONS, dtype=dtype), torch.ones(NEURONS)
    biases = {"gate_bias": each, "up_bias": None, "down_bias": None}
    launch.glu(x, wide, wide, down, activation="gelu", threshold=0.5, k=None, saliency=each, union=False, **biases)
    launch.glu(x, wide, wide, down, activation="silu", threshold=None, k=9, saliency=None, union=True, **biases)
    plain = {"threshold": 0.5, "k": None, "shift": None, "scale": None, "bias": None, "union": False}
    launch.input_sparse(deep, down, **{**plain, "bias": each})
    striped = ops.pack(torch.ones(WIDTH, NEURONS), "inputs", format, stripe=48)
    launch.input_sparse(deep, striped, **{**plain, "threshold": each.expand(2, -1).contiguous(), "shift": each, "scale": each})
    launch.gated(x, deep, wide, down, threshold=each, k=None, saliency=None, up_bias=None, down_bias=None, union=False)
    assert set(compiled) == {"linear_kernel", "up_kernel", "columns_kernel", "reduce_kernel", "border_kernel"}
    for name, each_ptx in compiled.items():
        for ptx in each_ptx:
            assert not re.search(r"\b(atom|red)\.", ptx), f"{name} adds in an order that differs from run to run"
            weights = name in ("columns_kernel", "linear_kernel", "up_kernel")
            if weights and (format != "int4" or name == "columns_kernel" and tokens == 1):
                # a predicate, or a size that is 0 where the mask is: 16 bytes at a time, or none
                masked = re.findall(r"@%p\d+ ld\.global\S*\.v4|cp\.async\.\S+ .*, 0x10, %r\d+;", ptx)
                assert masked, f"{name} reads weights in small pieces, or those that are masked out"


@pytest.mark.parametrize("dtype, width, capability, kernel", [
    (torch.bfloat16, 512, 90, "rectangle"), (torch.float16, 40, 80, "rectangle"), (torch.float32, 128, 80, "rectangle"),
    (torch.bfloat16, 512, 90, "triangle"), (torch.float32, 128, 80, "gaussian"), (torch.float16, 40, 80, "biweight")])
def test_training_the_granular_product_compiles(compiled, dtype, width, kernel):
    x, w, each = torch.ones(64, WIDTH, dtype=dtype), torch.ones(NEURONS, WIDTH, dtype=dtype), torch.ones(WIDTH)
    limits, price = torch.ones(-(-NEURONS // width), WIDTH), torch.ones(64)
    granular.forward(x, w, limits, each, width)
    for straight_through in (True, False):
        granular.backward(x, w, limits, each, each, torch.ones(64, NEURONS, dtype=dtype), price, width, straight_through,
                          kernel, (True, straight_through, straight_through))
    kernels = {"product_kernel": 1, "cost_kernel": 1, "grad_x_kernel": 2, "grad_w_kernel": 1, "grad_theta_kernel": 1}
    assert {name: len(each) for name, each in compiled.items()} == kernels
    for name, each_ptx in compiled.items():
        for ptx in each_ptx:
            assert not re.search(r"\b(atom|red)\.", ptx), f"{name} adds in an order that differs from run to run"
            if name != "cost_kernel":
                cores = re.search(r"\b(mma|wgmma)\.", ptx) is not None  # float32 is multiplied exactly, without them
                assert cores == (dtype != torch.float32), name


@pytest.mark.parametrize("dtype, m, capability", [(torch.bfloat16, 16, 90), (torch.float16, 4, 80), (torch.float32, 64, 90)])
def test_pruning_compiles(compiled, dtype, m):
    x, each = torch.ones(3, NEURONS, dtype=dtype), torch.ones(NEURONS)
    launch.nm_select(x, m // 2, m, bits=True)
    launch.nm_select(x, m // 2, m, shift=each, scale=each, back=True, repair=True)
    launch._pruned(x, m // 2, m, each, None, False, False)
    assert set(compiled) == {"nm_kernel"} and len(compiled["nm_kernel"]) == 3
