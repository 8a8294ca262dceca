"""What N:M masks cost on this machine: for a token, as a share of the product they save, and for a prompt."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from sparsity_lib import ops
from sparsity_lib.bench.matvec import onednn, onednn_can, onednn_pack
from sparsity_lib.bench.timing import Times, interleaved
from sparsity_lib.parts.select import exact_topk

PATTERNS = ((2, 4), (4, 8), (8, 16), (16, 32))
WIDTHS = (576, 1536, 2048, 4096, 8192, 14336)
#: Outputs and inputs of the products.
SHAPES = ((4096, 14336), (14336, 4096))
#: Tokens, outputs and inputs of the prompt's product.
PROMPT = (512, 14336, 4096)
ROUNDS = 21
#: Calls that one timing of a token's mask takes the mean of, and tokens of a call whose own cost is not to count.
CALLS, TOKENS = 50, 64


def run(checkpoint) -> tuple[Any, dict, list[int]]:
    """One item a width, one a product, one for the prompt."""
    data: dict[str, Any] = {"masks": {}, "products": {}}
    for width in WIDTHS:
        params = {"width": width, "patterns": PATTERNS, "rounds": ROUNDS, "calls": CALLS, "tokens": TOKENS}
        data["masks"][str(width)] = found = checkpoint.item(params, partial(masks, width, ROUNDS))
        print(masks_table(width, found), flush=True)
    for outputs, inputs in SHAPES:
        params = {"outputs": outputs, "inputs": inputs, "patterns": PATTERNS, "rounds": ROUNDS}
        found = checkpoint.item(params, partial(product, outputs, inputs, ROUNDS))
        data["products"][f"{outputs} x {inputs}"] = found
        print(product_table(f"{outputs} x {inputs}", found, data["masks"].get(str(inputs))), flush=True)
    params = {"prompt": PROMPT, "patterns": PATTERNS, "rounds": ROUNDS}
    data["prompt"] = checkpoint.item(params, partial(prompt, *PROMPT, ROUNDS))
    print(prompt_table(data["prompt"]), flush=True)
    params = {"patterns": PATTERNS, "widths": WIDTHS, "shapes": SHAPES, "prompt": PROMPT, "rounds": ROUNDS, "calls": CALLS,
              "tokens": TOKENS, "threads": torch.get_num_threads()}
    return data, params, [0]


def by_torch(x: Tensor, n: int, m: int) -> Tensor:
    """N:M pruning as it is written without a kernel of one's own: topk of each group, scattered. Ties are topk's."""
    groups = x.view(-1, m)
    return torch.zeros_like(groups).scatter_(1, index := groups.abs().topk(n, -1).indices, groups.gather(1, index)).view(x.shape)


def masks(width: int, rounds: int) -> dict[str, Any]:
    """Microseconds a token to select and prune in bfloat16, by way.

    ours, torch: N:M with and without the kernel; topk, top-k of half of the token: the library's, in PyTorch. Each as one
    call for one token, and (`many`) as one thread's share of a call for many, which leaves out what a call itself costs.
    inside: one call of a product with hardly any outputs, which chooses by that rule: what differs is the choice.
    """
    draw = torch.Generator().manual_seed(0)
    many = torch.randn(TOKENS, width, generator=draw).bfloat16()
    x, narrow = many[:1], ops.pack(torch.randn(32, width, generator=draw), "inputs", "bfloat16")
    threshold = float(x.float().abs().median())
    ways: dict[str, Callable[[Tensor], Tensor]] = {"topk": lambda x: torch.where(exact_topk(x.float().abs(), width // 2), x, 0)}
    inside: dict[str, dict[str, Any]] = {"threshold": {"threshold": threshold}, "topk": {"k": width // 2}}
    for n, m in PATTERNS:
        ways[f"ours {n}:{m}"] = lambda x, n=n, m=m: ops.nm_select(x, n, m)
        ways[f"ours {n}:{m}, repaired"] = lambda x, n=n, m=m: ops.nm_select(x, n, m, repair="variance")
        ways[f"torch {n}:{m}"] = lambda x, n=n, m=m: by_torch(x, n, m)
        inside[f"{n}:{m}"] = {"n": n, "m": m}
    single = {name: partial(_repeat, way, x) for name, way in ways.items()}
    single |= {f"inside {name}": partial(_repeat, lambda x, r=rule: ops.input_sparse(x, narrow, **r), x)
               for name, rule in inside.items()}
    with _threads(1):
        times = interleaved(single, rounds, desc=f"masks of {width}")
        shared = interleaved({name: lambda turn, w=way: w(many) for name, way in ways.items()}, rounds, desc=f"{TOKENS} tokens",
                             rehearse=True)
    return {"one": {name: 1e6 * each.median / CALLS for name, each in times.items()},
            "many": {name: 1e6 * each.median / TOKENS for name, each in shared.items()}}


def _repeat(way: Callable[[Tensor], Tensor], x: Tensor, turn: int) -> None:
    for _ in range(CALLS):
        way(x)


@contextmanager
def _threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def product(outputs: int, inputs: int, rounds: int) -> dict[str, Any]:
    """Times of one token's product in bfloat16: dense, and with half of the inputs by each rule."""
    draw = torch.Generator().manual_seed(0)
    weights = [torch.randn(outputs, inputs, generator=draw).mul_(inputs**-0.5).bfloat16() for _ in range(2)]
    packed, x = [ops.pack(w, "inputs") for w in weights], torch.randn(1, inputs, generator=draw).bfloat16()
    dense = {"torch linear": lambda turn: functional.linear(x, weights[turn % 2])}
    if onednn_can(torch.bfloat16):
        reordered = [onednn_pack(w, 1) for w in weights]
        dense["torch oneDNN, packed weights"] = lambda turn: onednn(x, reordered[turn % 2])
    rules: dict[str, dict[str, Any]] = {"all": {"threshold": -1.0}, "threshold": {"threshold": float(x.float().abs().median())},
                                        "topk": {"k": inputs // 2}}
    rules |= {f"{n}:{m}": {"n": n, "m": m} for n, m in PATTERNS}
    sparse = {name: lambda turn, r=rule: ops.input_sparse(x, packed[turn % 2], **r) for name, rule in rules.items()}
    times = interleaved({**dense, **sparse}, rounds, desc=f"{outputs} x {inputs}", rehearse=True)
    best = min((times[name].median, name) for name in dense)
    return {"times": _json(times), "best_dense": best[1], "speedup": {name: best[0] / times[name].median for name in rules},
            "saved_us": {name: 1e6 * (times["all"].median - times[name].median) for name in rules if name != "all"}}


def prompt(tokens: int, outputs: int, inputs: int, rounds: int) -> dict[str, Any]:
    """Times of pruning a prompt in bfloat16, and as a share of the dense product behind it, all threads."""
    draw = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(size, inputs, generator=draw).bfloat16() for size in (tokens, outputs))
    cases = {"dense": lambda turn: functional.linear(x, weight)}
    for n, m in PATTERNS:
        cases[f"ours {n}:{m}"] = lambda turn, n=n, m=m: ops.nm_select(x, n, m)
        cases[f"ours {n}:{m}, repaired"] = lambda turn, n=n, m=m: ops.nm_select(x, n, m, repair="variance")
        cases[f"torch {n}:{m}"] = lambda turn, n=n, m=m: by_torch(x, n, m)
    times = interleaved(cases, rounds, desc="prompt", rehearse=True)
    return {"times": _json(times), "share": {name: each.median / times["dense"].median for name, each in times.items()}}


def _json(times: dict[str, Times]) -> dict[str, Any]:
    return {name: each.to_json() for name, each in times.items()}


def masks_table(width: int, found: dict[str, Any]) -> str:
    """Microseconds a token at one width as text."""
    lines = [f"{width} channels, us a token: top-k {found['many']['topk']:.1f} by PyTorch; inside a product "
             + ", ".join(f"{rule} {found['one'][f'inside {rule}']:.1f}" for rule in ("threshold", "topk"))]
    for n, m in PATTERNS:
        ours, torchs = f"ours {n}:{m}", f"torch {n}:{m}"
        lines.append(
            f"  {n}:{m}  ours {found['many'][ours]:.2f}, repaired {found['many'][ours + ', repaired']:.2f}, topk and scatter "
            f"{found['many'][torchs]:.1f}; one call {found['one'][ours]:.1f}, {found['one'][torchs]:.1f}; "
            f"inside a product {found['one'][f'inside {n}:{m}']:.1f}")
    return "\n".join(lines)


def product_table(name: str, found: dict[str, Any], costs: dict[str, Any] | None) -> str:
    """The products of one shape as text, with the masks' shares of what they save where their costs are known."""
    lines = [f"{name}: best dense {found['best_dense']} {found['times'][found['best_dense']]['median_us']:.0f} us"]
    for rule, speed in found["speedup"].items():
        cost = (costs or {}).get("many", {}).get(f"ours {rule}")
        saved = found["saved_us"].get(rule)
        share = f", mask {100 * cost / saved:.2f}% of what it saves" if cost is not None and saved > 0 else ""
        lines.append(f"  {rule:10} {found['times'][rule]['median_us']:7.0f} us {speed:5.2f}x{share}")
    return "\n".join(lines)


def prompt_table(found: dict[str, Any]) -> str:
    """The prompt's figures as text."""
    lines = [f"prompt: dense product {found['times']['dense']['median_us'] / 1000:.1f} ms"]
    lines += [f"  {name:22} {found['times'][name]['median_us']:8.0f} us {100 * share:6.2f}% of it"
              for name, share in found["share"].items() if name != "dense"]
    return "\n".join(lines)
