"""A training step of CWIC's granular product on a GPU: Triton's kernels against plain PyTorch, stripe by stripe, and dense."""

from __future__ import annotations

import statistics
from functools import partial
from typing import Any

import torch

from sparsity_lib.bench.cwic_train import inputs_of, products, step
from sparsity_lib.bench.device import cuda_device
from sparsity_lib.cwic import granular
from sparsity_lib.progress import track

#: Outputs and inputs of Llama-3.2-1B's matrices, and outputs a stripe.
SHAPES = ((2048, 2048, 512), (8192, 2048, 512), (8192, 2048, 128))
TOKENS, ROUNDS = 4096, 21
DTYPES = ("bfloat16", "float32")


def run(checkpoint) -> tuple[Any, dict, list[int]]:
    """One item a shape and dtype.

    Raises
    ------
    SparsityError
        Without a CUDA device, or where the kernels would not be Triton's, compiled.
    """
    device, data = cuda_device("bench/cwic_gpu"), {}
    for dtype in DTYPES:
        for outputs, inputs, width in SHAPES:
            params = {"outputs": outputs, "inputs": inputs, "width": width, "tokens": TOKENS, "rounds": ROUNDS, "dtype": dtype}
            title = f"{dtype} {outputs} x {inputs}, stripes of {width}"
            data[title] = checkpoint.item({"device": device, **params}, partial(measure, **params))
            print(line(title, data[title]), flush=True)
    return data, {"device": device, "shapes": SHAPES, "tokens": TOKENS, "rounds": ROUNDS}, [0]


def measure(outputs: int, inputs: int, width: int, tokens: int, rounds: int, dtype: str) -> dict[str, Any]:
    """Seconds of a step and the most memory that it takes beside its arguments, of each product, all in turn."""
    made = inputs_of(outputs, inputs, width, tokens, "cuda", getattr(torch, dtype))
    grad_y = torch.randn(tokens, outputs, device="cuda").to(made["x"].dtype)
    chosen = {**products(width, plain=False), "by stripe": partial(granular.granular_matmul, width=width, triton=False)}
    times: dict[str, list[float]] = {name: [] for name in chosen}
    memory: dict[str, int] = {}
    for turn in track(range(-3, rounds), desc=f"{dtype} {outputs} x {inputs} by {width}", unit="round"):
        for name, product in chosen.items():
            for each in made.values():
                each.grad = None
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            step(product, made, grad_y)
            end.record()
            end.synchronize()
            memory[name] = torch.cuda.max_memory_allocated() - before
            if turn >= 0:
                times[name].append(start.elapsed_time(end) / 1000)
    medians = {name: statistics.median(each) for name, each in times.items()}
    return {"seconds": medians, "memory": memory, "over_stripes": medians["by stripe"] / medians["ours"],
            "over_dense": medians["dense"] / medians["ours"]}


def line(title: str, found: dict[str, Any]) -> str:
    """The figures of one item as text."""
    return (f"{title}: {1e3 * found['seconds']['ours']:.2f} ms, {found['over_stripes']:.2f} times as fast as stripe by stripe, "
            f"{found['over_dense']:.2f} times as the dense product; {found['memory']['ours'] / 2**20:.0f} MiB "
            f"against {found['memory']['by stripe'] / 2**20:.0f}")
