"""The Triton operators against torch's dense products on a GPU: speed-up, and share of what a copy reaches."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from sparsity_lib import ops
from sparsity_lib.bench.device import cuda_device
from sparsity_lib.progress import track

SHAPES = ((14336, 4096), (4096, 14336))
SPARSITIES = (0.0, 0.25, 0.5, 0.66, 0.8, 0.9)
FORMATS = ("bfloat16", "int8", "int4")
#: Hidden size and neurons of gated FFNs.
FFNS = ((4096, 14336), (2048, 8192))
TOKENS = (1, 16)
ROUNDS = 31
#: Bytes of weights that a case goes through before it reads one again: several times what a cache holds.
COLD = 400 << 20

Case = Callable[[int], Tensor]


def run(checkpoint) -> tuple[Any, dict, list[int]]:
    """One item a format, shape and batch.

    Raises
    ------
    SparsityError
        Without a CUDA device, or where the operators would not be Triton's, compiled.
    """
    device = cuda_device("bench/gpu")
    data: dict[str, Any] = {}
    for tokens in TOKENS:
        for format in FORMATS:
            for outputs, inputs in SHAPES:
                params = {"format": format, "outputs": outputs, "inputs": inputs, "tokens": tokens, "rounds": ROUNDS}
                title = f"{format} {outputs} x {inputs}, {tokens} tokens"
                data[title] = checkpoint.item({"device": device, **params}, lambda p=params: matvec(**p))
                print(table(title, data[title]), flush=True)
        for hidden, neurons in FFNS:
            params = {"hidden": hidden, "neurons": neurons, "tokens": tokens, "rounds": ROUNDS}
            title = f"FFN {hidden} x {neurons}, {tokens} tokens"
            data[title] = checkpoint.item({"device": device, **params}, lambda p=params: ffn(**p))
            print(table(title, data[title]), flush=True)
    return data, {"device": device, "sparsities": SPARSITIES, "rounds": ROUNDS, "triton": _triton_version()}, [0]


def _triton_version() -> str:
    import triton

    return triton.__version__


def matvec(format: str, outputs: int, inputs: int, tokens: int, rounds: int) -> dict[str, Any]:
    """Times of dense and input-sparse products of one shape, the tokens of a batch sharing what any of them keeps."""
    draw = torch.Generator("cuda").manual_seed(0)
    copies = max(2, -(-COLD // ops.pack(torch.ones(outputs, inputs, device="cuda"), "inputs", format).bytes))
    weights = [torch.randn(outputs, inputs, generator=draw, device="cuda").mul_(inputs**-0.5) for _ in range(copies)]
    x = torch.randn(tokens, inputs, generator=draw, device="cuda").bfloat16()
    cases, kept = matvec_cases(weights, x, format)
    row = ops.pack(weights[0], "inputs", format).row_bytes
    del weights
    return _measure(cases, copies, {name: count * row for name, count in kept.items()}, rounds)


def matvec_cases(weights: list[Tensor], x: Tensor, format: str) -> tuple[dict[str, Case], dict[str, int]]:
    """Cases by name, each a product of x with weight number `turn`, and the inputs that each sparse one keeps."""
    plain, packed = [w.bfloat16() for w in weights], [ops.pack(w, "inputs", format) for w in weights]
    rows = [ops.pack(w, "outputs", format) for w in weights]
    cases: dict[str, Case] = {
        "torch linear": lambda turn: functional.linear(x, plain[turn]), "ours dense": lambda turn: ops.linear(x, rows[turn])}
    kept = {"ours dense": x.shape[-1]}
    score = x.float().abs().amax(0)
    for s in SPARSITIES:
        threshold = float(score.quantile(s)) if s else -1.0
        kept[f"sparse {s}"] = int((score > threshold).sum())
        cases[f"sparse {s}"] = lambda turn, t=threshold: ops.input_sparse(x, packed[turn], threshold=t, share="union")
    if len(x) == 1:
        kept["top-k 0.5"] = x.shape[-1] // 2
        cases["top-k 0.5"] = lambda turn: ops.input_sparse(x, packed[turn], k=x.shape[-1] // 2)
    return cases, kept


def ffn(hidden: int, neurons: int, tokens: int, rounds: int) -> dict[str, Any]:
    """Times of a gated FFN in bfloat16, dense and with half of the neurons, by threshold and by rank."""
    draw = torch.Generator("cuda").manual_seed(0)
    copies = max(2, -(-COLD // (6 * hidden * neurons)))
    blocks = [[torch.randn(*shape, generator=draw, device="cuda").mul_(shape[1] ** -0.5).bfloat16()
               for shape in ((neurons, hidden), (neurons, hidden), (hidden, neurons))] for _ in range(copies)]
    x = torch.randn(tokens, hidden, generator=draw, device="cuda").bfloat16()
    cases, kept = ffn_cases(blocks, x)
    row = 2 * hidden
    return _measure(cases, copies, {name: (neurons + 2 * count) * row for name, count in kept.items()}, rounds)


def ffn_cases(blocks: list[list[Tensor]], x: Tensor) -> tuple[dict[str, Case], dict[str, int]]:
    """Cases by name, each the FFN number `turn` of x, and the neurons that each sparse one keeps for some token."""
    packed = [[ops.pack(w, skip) for w, skip in zip(block, ("outputs", "outputs", "inputs"), strict=True)] for block in blocks]
    g = functional.silu(functional.linear(x.float(), blocks[0][0].float())).abs()
    score, neurons = g.amax(0), g.shape[-1]
    threshold, half = float(score.median()), neurons // 2

    def torchs(turn: int) -> Tensor:
        gate, up, down = blocks[turn]
        return functional.linear(functional.silu(functional.linear(x, gate)) * functional.linear(x, up), down)

    def ours(turn: int, **rule: float) -> Tensor:
        return ops.glu(x, *packed[turn], activation="silu", share="union", **rule)

    cases: dict[str, Case] = {"torch linear": torchs, "ours dense": lambda turn: ours(turn, threshold=-1.0),
                              "sparse 0.5": lambda turn: ours(turn, threshold=threshold)}
    kept = {"ours dense": neurons, "sparse 0.5": int((score > threshold).sum())}
    if len(x) == 1:
        kept["top-k 0.5"] = half
        cases["top-k 0.5"] = lambda turn: ours(turn, k=half)
    return cases, kept


def _measure(cases: Mapping[str, Case], copies: int, read: Mapping[str, float], rounds: int) -> dict[str, Any]:
    """Seconds of each case; read: the bytes of weights that each of ours reads. One graph a case, all copies in turn."""
    source, target = (torch.empty(256 << 20, dtype=torch.uint8, device="cuda") for _ in range(2))
    with torch.inference_mode():
        graphs = {name: _graph(lambda c=case: [c(turn) for turn in range(copies)]) for name, case in cases.items()}
        graphs["copy"] = _graph(lambda: target.copy_(source))
        times = _rounds(graphs, rounds)
    seconds = {name: statistics.median(each) / (1 if name == "copy" else copies) for name, each in times.items()}
    speed = 2 * source.nbytes / seconds["copy"]
    points = {name: {"speedup": seconds["torch linear"] / seconds[name], "share_of_bandwidth": each / seconds[name] / speed}
              for name, each in read.items()}
    return {"seconds": seconds, "bandwidth": speed, "points": points}


def _graph(work: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """Work as one graph, so that the time to launch it is not what is measured."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # compiles the kernels
            work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph


def _rounds(graphs: Mapping[str, torch.cuda.CUDAGraph], rounds: int, warmup: int = 3) -> dict[str, list[float]]:
    """Every graph once a round, in turn, between two events."""
    found: dict[str, list[float]] = {name: [] for name in graphs}
    for turn in track(range(-warmup, rounds), desc="timing", unit="round"):
        for name, graph in graphs.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            if turn >= 0:
                found[name].append(start.elapsed_time(end) / 1000)
    return found


def table(title: str, found: dict[str, Any]) -> str:
    """The figures of one item as text."""
    lines = [f"{title}: torch {1e6 * found['seconds']['torch linear']:.0f} us, a copy {found['bandwidth'] / 1e9:.0f} GB/s"]
    lines += [f"  {name:12} {1e6 * found['seconds'][name]:7.1f} us {point['speedup']:6.2f}x  "
              f"{100 * point['share_of_bandwidth']:4.0f}% of the copy's bandwidth" for name, point in found["points"].items()]
    return "\n".join(lines)
