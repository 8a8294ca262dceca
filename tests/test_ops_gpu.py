"""The operators in Triton: on a GPU where there is one, in Triton's interpreter and through its compiler everywhere.

Triton decides at its import whether it interprets, so each of these is a process of its own.
"""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from sparsity_lib import SparsityError, ops
from sparsity_lib.ops import gpu, library, reference

HERE = Path(__file__).parent
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="no Triton")


def python(*arguments, **environment):
    kept = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", gpu.SWITCH)}
    kept["PYTHONPATH"] = os.pathsep.join([str(HERE.parent), *filter(None, [kept.get("PYTHONPATH")])])
    return subprocess.run([sys.executable, *arguments], env={**kept, **environment}, capture_output=True, text=True)


def passes(file, at_least, **environment):
    run = python("-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "ignore::RuntimeWarning", str(HERE / file), **environment)
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    last = run.stdout.strip().splitlines()[-1]
    assert "passed" in last and "skipped" not in last and int(last.split()[0]) >= at_least, last


@needs_triton
def test_in_tritons_interpreter():
    passes("ops_gpu_cases.py", 50, TRITON_INTERPRET="1", SPARSITY_TEST_DEVICE="cpu")


@needs_triton
def test_the_granular_product_in_tritons_interpreter():
    passes("ops_gpu_granular_cases.py", 15, TRITON_INTERPRET="1", SPARSITY_TEST_DEVICE="cpu")


@needs_triton
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("file, at_least", [("ops_gpu_cases.py", 50), ("ops_gpu_granular_cases.py", 15)])
def test_on_a_gpu(file, at_least):
    passes(file, at_least, SPARSITY_TEST_DEVICE="cuda")


@needs_triton
def test_through_tritons_compiler(tmp_path):
    passes("ops_gpu_compile.py", 4, TRITON_CACHE_DIR=str(tmp_path))


CHILD = """
import os, sys, torch
from sparsity_lib import ops
def use():
    ops.input_sparse(torch.ones(1, 8), ops.pack(torch.eye(8), "inputs"), threshold=0.5)
    return "sparsity_lib.ops.gpu.launch" in sys.modules
print(use())
if len(sys.argv) > 1:
    import triton
    os.environ["TRITON_INTERPRET"] = "1"
    ops.gpu.load.cache_clear()
    use()
"""


@needs_triton
def test_the_kernels_are_imported_only_when_they_are_needed():
    assert python("-c", CHILD, TRITON_INTERPRET="1").stdout == "True\n"
    late = python("-c", CHILD, "then")
    assert late.returncode and late.stdout == "False\n"
    assert "TRITON_INTERPRET was changed after Triton's import. Fix: set it before Python starts." in late.stderr


@pytest.fixture
def fresh():
    gpu.load.cache_clear()
    yield
    gpu.load.cache_clear()


def test_without_triton_there_is_one_warning(fresh, monkeypatch):
    monkeypatch.setattr(gpu, "find_spec", lambda name: None)
    monkeypatch.delenv(gpu.SWITCH, raising=False)
    with pytest.warns(UserWarning, match="Triton is missing.*pip install triton") as seen:
        assert gpu.load("cuda") is gpu.load("cuda") is gpu.load("cpu") is None
    assert len(seen) == 1


def test_it_can_be_turned_off(fresh, monkeypatch):
    monkeypatch.setenv(gpu.SWITCH, "off")
    assert gpu.load("cuda") is gpu.load("cpu") is None
    gpu.load.cache_clear()
    monkeypatch.setenv(gpu.SWITCH, "on")
    with pytest.raises(SparsityError, match="SPARSITY_TRITON = 'on' is unknown.*off"):
        gpu.load("cuda")


def test_float16_on_a_cpu():
    """The C++ library does not know it; the numbers are right all the same, and the decoder refuses it."""
    weight, x = torch.randn(30, 40), torch.randn(3, 40)
    half = ops.pack(weight.half(), "inputs")
    assert half.format == "float16" and torch.equal(half.dense(), weight.half().float())
    expected = torch.where(x.abs() > 0.5, x, 0) @ weight.half().float().T
    torch.testing.assert_close(ops.input_sparse(x, half, threshold=0.5), expected)
    rows = ops.pack(weight, "outputs")
    found = ops.linear(x.half(), rows)
    assert found.dtype == torch.float16
    torch.testing.assert_close(found, (x.half().float() @ weight.T).half())
    with pytest.raises(SparsityError, match="format = 'float16'.*float32, bfloat16, int8, int4"):
        library.weight_of(half)
    with pytest.raises(SparsityError, match="weight = 100000.0.*float16 can hold"):
        ops.pack(torch.full((2, 2), 1e5), "inputs", "float16")


def test_other_devices_are_refused():
    w = ops.pack(torch.eye(4), "inputs")
    with pytest.raises(SparsityError, match="device of x = 'meta'.*CPU or a CUDA"):
        ops.input_sparse(torch.empty(1, 4, device="meta"), w, threshold=0.0)


def test_a_changed_saliency_is_looked_at_again():
    gate, down = ops.pack(torch.eye(4), "outputs"), ops.pack(torch.eye(4), "inputs")
    c, x = torch.ones(4), torch.randn(2, 4)
    arguments = {"activation": "none", "k": 2, "saliency": c}
    torch.testing.assert_close(ops.glu(x, gate, gate, down, **arguments), reference.glu(x, gate, gate, down, **arguments))
    c[1] = -1
    with pytest.raises(SparsityError, match="saliency = -1.0"):
        ops.glu(x, gate, gate, down, **arguments)
