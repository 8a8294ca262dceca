"""Prefill with 2:4 activations on a GPU's sparse tensor cores, mask and compression included, against cuBLAS.

The activation is pruned row by row: each token keeps 2 of every 4 channels by size. torch's own pruning helper is no
substitute: it keeps at most 2 of 4 along both axes of 4 x 4 tiles, and ranks signed values.
"""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.sparse import SparseSemiStructuredTensor, SparseSemiStructuredTensorCUSPARSELT, SparseSemiStructuredTensorCUTLASS

from sparsity_lib import ops
from sparsity_lib.bench.device import cuda_device
from sparsity_lib.errors import SparsityError
from sparsity_lib.progress import track

#: Outputs and inputs.
SHAPES = ((14336, 4096), (4096, 14336), (4096, 4096))
TOKENS = (512, 2048, 8192)
ROUNDS = 31
BACKENDS: dict[str, type[SparseSemiStructuredTensor]] = {
    "CUTLASS": SparseSemiStructuredTensorCUTLASS, "cuSPARSELt": SparseSemiStructuredTensorCUSPARSELT}
#: Other patterns whose masks are timed; no unit multiplies them.
PATTERNS = ((2, 4), (4, 8), (8, 16), (16, 32))

Case = Callable[[], object]


def run(checkpoint) -> tuple[Any, dict, list[int]]:
    """One item a shape and number of tokens.

    Raises
    ------
    SparsityError
        Without a CUDA device whose tensor cores multiply 2:4 matrices (compute capability 8.0).
    """
    device = check_device()
    data: dict[str, Any] = {}
    for outputs, inputs in SHAPES:
        for tokens in TOKENS:
            params = {"outputs": outputs, "inputs": inputs, "tokens": tokens, "rounds": ROUNDS}
            title = f"{outputs} x {inputs}, {tokens} tokens"
            data[title] = checkpoint.item({"device": device, **params}, partial(measure, **params))
            print(table(title, data[title]), flush=True)
    return data, {"device": device, "shapes": SHAPES, "tokens": TOKENS, "rounds": ROUNDS}, [0]


def check_device() -> str:
    """The GPU's name, or a SparsityError where there is none that can do it."""
    name, capability = cuda_device("bench/nm_gpu", compiled=False), torch.cuda.get_device_capability()
    if capability < (8, 0):
        raise SparsityError(f"{name} has no 2:4 tensor cores, which came with compute capability 8.0. Fix: a newer GPU.")
    return name


def prune(x: Tensor) -> Tensor:
    """2:4 along each row of x [tokens, inputs]: what the sparse products below expect."""
    return ops.nm_select(x, 2, 4)


def compress(x: Tensor, backend: str) -> Tensor:
    """A 2:4 matrix [tokens, inputs] as torch's semi-structured tensor; its product is `compressed @ weight.T`."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*prototype.*")
        return BACKENDS[backend].from_dense(x)


def available() -> tuple[str, ...]:
    """The backends that work here: cuSPARSELt is not part of every build of torch."""
    found = []
    for name in BACKENDS:
        x = prune(torch.randn(64, 64, device="cuda").bfloat16())
        try:
            compress(x, name) @ x.T
        except (RuntimeError, NotImplementedError):
            continue
        found.append(name)
    return tuple(found)


def cases(x: Tensor, weight: Tensor, backends: tuple[str, ...]) -> dict[str, Case]:
    """What is timed, for x [tokens, inputs] and W [outputs, inputs]; `sparse`: prune, compress and multiply."""
    found: dict[str, Case] = {"dense": lambda: functional.linear(x, weight)}
    found |= {f"mask {n}:{m}": lambda n=n, m=m: ops.nm_select(x, n, m) for n, m in PATTERNS}
    found["mask 2:4, repaired"] = lambda: ops.nm_select(x, 2, 4, repair="variance")
    pruned = prune(x)
    for name in backends:
        compressed = compress(pruned, name)
        found[f"compress, {name}"] = lambda name=name: compress(pruned, name)
        found[f"product, {name}"] = lambda compressed=compressed: compressed @ weight.T
        found[f"sparse, {name}"] = lambda name=name: compress(prune(x), name) @ weight.T
    return found


def measure(outputs: int, inputs: int, tokens: int, rounds: int) -> dict[str, Any]:
    """Seconds of every case between two events, with the time to launch them; the products agree with masked dense ones."""
    draw = torch.Generator("cuda").manual_seed(0)
    x, weight = (torch.randn(size, inputs, generator=draw, device="cuda").bfloat16() for size in (tokens, outputs))
    weight *= inputs**-0.5
    backends = available()
    if not backends:
        raise SparsityError("torch multiplies no 2:4 matrix on this GPU. Fix: a build of torch with CUTLASS or cuSPARSELt.")
    with torch.inference_mode():
        chosen = cases(x, weight, backends)
        expected = functional.linear(prune(x), weight)
        for name in backends:
            torch.testing.assert_close(chosen[f"sparse, {name}"](), expected, rtol=0.02, atol=0.05)
        times: dict[str, list[float]] = {name: [] for name in chosen}
        for turn in track(range(-3, rounds), desc=f"{outputs} x {inputs}, {tokens} tokens", unit="round"):
            for name, case in chosen.items():
                seconds = _timed(case)
                if turn >= 0:
                    times[name].append(seconds)
    medians = {name: statistics.median(each) for name, each in times.items()}
    return {"seconds": medians, "speedup": {name: medians["dense"] / seconds for name, seconds in medians.items()},
            "backends": list(backends)}


def _timed(case: Case) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    case()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000


def table(title: str, found: dict[str, Any]) -> str:
    """The figures of one item as text."""
    lines = [f"{title}: dense {1e6 * found['seconds']['dense']:.0f} us"]
    lines += [f"  {name:22} {1e6 * seconds:8.0f} us {found['speedup'][name]:6.2f}x" for name, seconds in found["seconds"].items()
              if name != "dense"]
    return "\n".join(lines)
