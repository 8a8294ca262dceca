"""A training step of CWIC's granular product on a CPU: stripe by stripe with its own backward, against the plain PyTorch form."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from sparsity_lib.bench.timing import Case, Times, interleaved
from sparsity_lib.cwic import granular, reference

#: Outputs and inputs of SmolLM2-135M's matrices, and outputs a stripe.
SHAPES = {"q": (576, 576, 64), "gate": (1536, 576, 64), "gate, wide stripes": (1536, 576, 512), "one stripe": (1536, 576, 1536)}
TOKENS, ROUNDS, THREADS = 256, 15, 1
LEARNING = ("x", "weight", "theta")


def run(checkpoint) -> tuple[Any, dict, list[int]]:
    """One item a shape, on one thread."""
    data: dict[str, Any] = {}
    threads = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    try:
        for name, (outputs, inputs, width) in SHAPES.items():
            params = {"outputs": outputs, "inputs": inputs, "width": width, "tokens": TOKENS, "rounds": ROUNDS}
            data[name] = checkpoint.item({**params, "threads": THREADS}, partial(measure, **params))
            print(line(name, data[name]), flush=True)
    finally:
        torch.set_num_threads(threads)
    return data, {"shapes": SHAPES, "tokens": TOKENS, "rounds": ROUNDS, "threads": THREADS}, [0]


def inputs_of(outputs: int, inputs: int, width: int, tokens: int, device: str = "cpu", dtype: torch.dtype = torch.float32,
              ) -> dict[str, Tensor]:
    """Arguments of a granular product: normal x, a third of it above its thresholds; what learns requires gradients."""
    draw = torch.Generator(device).manual_seed(0)
    made = {
        "x": torch.randn(tokens, inputs, generator=draw, device=device).to(dtype),
        "weight": torch.randn(outputs, inputs, generator=draw, device=device).mul_(inputs**-0.5).to(dtype),
        "theta": 0.97 + 0.1 * torch.randn(-(-outputs // width), inputs, generator=draw, device=device),
        "mean": torch.zeros(inputs, device=device), "scale": torch.ones(inputs, device=device),
        "eps": torch.full((inputs,), 0.1, device=device)}
    return {name: each.requires_grad_(name in LEARNING) for name, each in made.items()}


def step(product, made: dict[str, Tensor], grad_y: Tensor) -> None:
    """Forward and backward; product(*arguments) gives y, or y and its cost."""
    for name in LEARNING:
        made[name].grad = None
    found = product(*made.values())
    y, *cost = found if isinstance(found, tuple) else (found,)
    torch.autograd.backward([y, *cost], [grad_y, *(torch.ones_like(each) for each in cost)])


def saved(product, made: dict[str, Tensor]) -> int:
    """Bytes that the forward keeps for the backward, each tensor once, beside its own arguments."""
    seen = {}
    own = {each.untyped_storage().data_ptr() for each in made.values()}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = (storage.nbytes(), tensor)  # held, so that no other tensor takes its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        product(*made.values())
    return sum(size for size, _ in seen.values())


def products(width: int, plain: bool = True) -> dict[str, Any]:
    """The products that are compared, by name: dense, plain PyTorch (`cwic.reference`), and ours."""
    found = {"dense": lambda x, weight, *_: functional.linear(x, weight)}
    if plain:
        found["plain"] = partial(reference.granular_matmul, width=width)
    return {**found, "ours": partial(granular.granular_matmul, width=width)}


def measure(outputs: int, inputs: int, width: int, tokens: int, rounds: int) -> dict[str, Any]:
    """Seconds of a step, and bytes that its forward keeps, of each product, all in turn."""
    made = inputs_of(outputs, inputs, width, tokens)
    grad_y = torch.randn(tokens, outputs, generator=torch.Generator().manual_seed(1))

    def case(product) -> Case:
        def call(turn: int) -> None:
            with torch.inference_mode(False), torch.enable_grad():
                step(product, made, grad_y)

        return call

    chosen = products(width)
    cases = {name: case(product) for name, product in chosen.items()}
    times = interleaved(cases, rounds, desc=f"{outputs} x {inputs} by {width}")
    ours = times["ours"]
    with torch.no_grad():
        density = float(chosen["ours"](*made.values())[1].mean() / (outputs * inputs))
    return {
        "times": {name: each.to_json() for name, each in times.items()}, "density": density,
        "saved": {name: saved(product, made) for name, product in chosen.items()},
        "over_plain": _ratio(times["plain"], ours), "over_dense": _ratio(times["dense"], ours)}


def _ratio(other: Times, ours: Times) -> float:
    return other.median / ours.median


def line(name: str, found: dict[str, Any]) -> str:
    """The figures of one shape as text."""
    milliseconds = {kind: each["median_us"] / 1000 for kind, each in found["times"].items()}
    kept = {kind: each / 2**20 for kind, each in found["saved"].items()}
    return (f"{name}: a step takes {milliseconds['ours']:.1f} ms, {found['over_plain']:.1f} times as fast as plain PyTorch "
            f"({milliseconds['plain']:.1f} ms) and {found['over_dense']:.2f} times as the dense product; kept for the backward: "
            f"{kept['ours']:.1f} MiB against {kept['plain']:.1f}")
