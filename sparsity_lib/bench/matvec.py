"""Input-sparse matrix-vector products against torch's and llama.cpp's dense ones: speed-up, and share of read bandwidth."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from sparsity_lib import ops
from sparsity_lib.bench import ggml, llama
from sparsity_lib.bench.timing import Case, ReadBandwidth, interleaved

SHAPES = ((14336, 4096), (4096, 14336))
SPARSITIES = (0.0, 0.25, 0.4, 0.5, 0.66, 0.8, 0.85, 0.9, 0.95)
FORMATS = ("bfloat16", "float32", "int8", "int4")
ROUNDS = 21
#: Copies of each weight, taken in turn, so that no cache holds what is read.
COPIES = {"bfloat16": 2, "float32": 2, "int8": 3, "int4": 5}


def run(checkpoint) -> tuple[Any, dict, list[int]]:
    """One item a format and shape."""
    data: dict[str, Any] = {}
    for format in FORMATS:
        for outputs, inputs in SHAPES:
            params = {"format": format, "outputs": outputs, "inputs": inputs, "sparsities": SPARSITIES, "rounds": ROUNDS}
            found = checkpoint.item({**params, "llama.cpp": llama.version()}, lambda p=params: measure(**p))
            data[f"{format} {outputs} x {inputs}"] = found
            print(table(f"{format} {outputs} x {inputs}", found), flush=True)
    params = {"shapes": SHAPES, "sparsities": SPARSITIES, "rounds": ROUNDS, "threads": torch.get_num_threads()}
    return data, {**params, "llama.cpp": llama.version()}, [0]


def measure(format: str, outputs: int, inputs: int, sparsities, rounds: int) -> dict[str, Any]:
    """Times of dense and sparse products of one format and shape, from one interleaved run."""
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(outputs, inputs, generator=generator).mul_(inputs**-0.5) for _ in range(COPIES[format])]
    dtype = torch.float32 if format == "float32" else torch.bfloat16
    x = torch.randn(1, inputs, generator=generator).to(dtype)
    packed = [ops.pack(w, "inputs", format) for w in weights]
    rows = [ops.pack(w, "outputs", format) for w in weights]
    bandwidth = ReadBandwidth()
    dense = dense_cases(format, weights, x)
    cases: dict[str, Case] = dict(dense)
    cases["ours dense"] = lambda turn: ops.linear(x, rows[turn % len(rows)])
    score = x.float().abs().flatten()
    for s in sparsities:
        threshold = float(score.quantile(s)) if s else -1.0
        cases[f"sparse {s}"] = lambda turn, t=threshold: ops.input_sparse(x, packed[turn % len(packed)], threshold=t)
    cases["read"] = bandwidth
    times = interleaved(cases, rounds, desc=f"{format} {outputs} x {inputs}", rehearse=True)
    del weights
    best = min((t.median, n) for n, t in times.items() if n in dense)
    speed = bandwidth.bytes / times["read"].median
    points = []
    for s in sparsities:
        kept = int((score > float(score.quantile(s))).sum()) if s else inputs
        seconds, read = times[f"sparse {s}"].median, kept * packed[0].row_bytes
        points.append({"sparsity": s, "kept": kept, "speedup": best[0] / seconds, "share_of_bandwidth": read / seconds / speed})
    dense_share = rows[0].bytes / times["ours dense"].median / speed
    return {"times": {n: t.to_json() for n, t in times.items()}, "best_dense": best[1], "bandwidth": speed, "points": points,
            "ours_dense": {"speedup": best[0] / times["ours dense"].median, "share_of_bandwidth": dense_share}}


def dense_cases(format: str, weights: list[Tensor], x: Tensor) -> dict[str, Case]:
    """The dense products that torch has for a format, and llama.cpp where it is installed, each as a case."""
    cases = {f"torch {name}": case for name, case in torch_cases(format, weights, x).items()}
    if ggml.available():
        products = [ggml.Product(w, format, x) for w in weights]
        cases[f"llama.cpp {ggml.TYPES[format].name}, {products[0].layout}"] = lambda turn: products[turn % len(products)]()
    return cases


def torch_cases(format: str, weights: list[Tensor], x: Tensor) -> dict[str, Case]:
    """The dense products that torch has for a format, each as a case."""
    n = len(weights)
    if format in ("bfloat16", "float32"):
        dtype = getattr(torch, format)
        plain = [w.to(dtype) for w in weights]
        across = [w.T.contiguous() for w in plain]
        cases: dict[str, Case] = {
            "linear": lambda turn: functional.linear(x, plain[turn % n]),
            "mv": lambda turn: torch.mv(plain[turn % n], x[0]),
            "matmul with W^T": lambda turn: x @ across[turn % n],
        }
        if onednn_can(dtype):
            reordered = [onednn_pack(w, 1) for w in plain]
            cases["oneDNN, packed weights"] = lambda turn: onednn(x, reordered[turn % n])
        return cases
    if format == "int8":
        scales = [w.abs().amax(1) / 127 for w in weights]
        levels = [(w / s[:, None]).round().to(torch.int8) for w, s in zip(weights, scales, strict=True)]
        narrow = [s.to(torch.bfloat16) for s in scales]
        return {"_weight_int8pack_mm": lambda turn: torch._weight_int8pack_mm(x, levels[turn % n], narrow[turn % n])}
    packs = [_int4(w) for w in weights]
    return {"_weight_int4pack_mm_for_cpu": lambda turn: torch.ops.aten._weight_int4pack_mm_for_cpu(x, packs[turn % n][0], 32,
                                                                                                packs[turn % n][1])}


def onednn_pack(weight: Tensor, tokens: int) -> Tensor:
    """A weight [out, in] in the order that oneDNN likes best for so many tokens."""
    return torch.ops.mkldnn._reorder_linear_weight(weight, tokens)


def onednn(x: Tensor, weight: Tensor) -> Tensor:
    """oneDNN's product with a weight of `onednn_pack`."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")


def onednn_can(dtype: torch.dtype) -> bool:
    """Whether oneDNN multiplies this dtype here: bfloat16 asks for a processor that knows it."""
    if not torch.backends.mkldnn.is_available():
        return False
    return dtype != torch.bfloat16 or torch.ops.mkldnn._is_mkldnn_bf16_supported()


def _int4(weight: Tensor, group: int = 32) -> tuple[Tensor, Tensor]:
    """torch's own packing: groups along the inputs, unsigned levels with a scale and a zero point."""
    grouped = weight.view(len(weight), -1, group)
    scale = grouped.abs().amax(-1, keepdim=True) / 7.5
    levels = (grouped / scale + 8).round().clamp(0, 15).to(torch.int32).view_as(weight)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(levels, 1)
    both = torch.stack([scale[..., 0], torch.zeros_like(scale[..., 0])], -1).transpose(0, 1).contiguous()
    return packed, both.to(torch.bfloat16)


def table(title: str, found: dict[str, Any]) -> str:
    """The figures of one format and shape as text."""
    lines = [f"{title}: best dense {found['best_dense']} {found['times'][found['best_dense']]['median_us']:.0f} us, "
             f"memory {found['bandwidth'] / 1e9:.1f} GB/s, ours dense {found['ours_dense']['speedup']:.2f}x "
             f"({100 * found['ours_dense']['share_of_bandwidth']:.0f}% of it)"]
    lines += [f"  sparsity {p['sparsity']:4.0%}  {p['speedup']:5.2f}x  {100 * p['share_of_bandwidth']:5.0f}% of bandwidth"
              for p in found["points"]]
    return "\n".join(lines)
