"""Decoders in the same rounds: ours dense and sparse, Hugging Face's, torch.compile's and llama.cpp's, all of bfloat16."""

from __future__ import annotations

import gc
from collections.abc import Iterable
from statistics import median
from typing import Any

import torch
from torch._inductor.codecache import PyCodeCache
from transformers import PretrainedConfig

from sparsity_lib.bench import llama
from sparsity_lib.bench.engines import Compiled, Eager, Engine, Llama, Ours, hugging_face, sharing
from sparsity_lib.bench.llama import LlamaCpp
from sparsity_lib.bench.timing import ReadBandwidth, by_length, interleaved
from sparsity_lib.decode import Decoder, ModelSource
from sparsity_lib.decode.rules import Choice

#: The shares of inputs that our sparse decoders keep at every site.
DENSITIES = (0.5, 0.35)
SITES = ("qkv_in", "o_in", "up_in", "down_in")
DENSE = "ours dense"
SPARSE = tuple(f"ours, inputs {density:.0%}" for density in DENSITIES)
OTHERS = ("HF eager", "torch.compile", "llama.cpp")
#: What is measured together: everything, or with a large model what 24 GB hold at once, our dense decoder always being there
#: (torch.compile's frozen weights beside Hugging Face's own are too many copies then).
TOGETHER = (("sparse", *OTHERS),)
APART = (("sparse",), ("llama.cpp",))


def measure(source: ModelSource, name: str, prompts: Iterable[int], tokens: int, *, config: PretrainedConfig | None = None,
            sets: tuple[tuple[str, ...], ...] = TOGETHER) -> dict[str, Any]:
    """Seconds a token of each engine after prompts of several lengths, and its speed over our dense decoder's.

    Parameters
    ----------
    source, config
        The weights; where they are random, `config` is the configuration of the whole model, for Hugging Face to build it.
    name
        The model's name.
    prompts, tokens
        Lengths of the context, rising; tokens timed after each of them.
    sets
        Which engines take turns; llama.cpp is left out where it is not installed.
    """
    prompts = sorted(prompts)
    found: dict[str, Any] = {"prompts": {str(p): {} for p in prompts}, "bytes": {}, "llama.cpp": llama.version()}
    for together in sets:
        wanted = [kind for kind in together if kind != "llama.cpp" or llama.available()]
        if not wanted:
            continue
        capacity = max(prompts) + tokens
        engines: dict[str, Engine] = {DENSE: Ours(Decoder(source, capacity=capacity))}
        if "sparse" in wanted:
            engines |= _sparse(source, capacity)
        model = hugging_face(source, config) if {"HF eager", "torch.compile"} & {*wanted} else None
        if "HF eager" in wanted:
            engines["HF eager"] = Eager(model)
        if "torch.compile" in wanted:
            engines["torch.compile"] = Compiled(model, tokens)
        if "llama.cpp" in wanted:
            engines["llama.cpp"] = Llama(LlamaCpp.of(source, name, capacity=capacity))
        for prompt in prompts:
            for engine in engines.values():
                engine.at(prompt)
            _rounds(engines, tokens, found["prompts"][str(prompt)], f"{name}, {prompt} tokens")
        found["bytes"] |= {kind: _weights_read(e.decoder) for kind, e in engines.items() if isinstance(e, Ours)}
        engines, engine, model = {}, None, None
        torch._dynamo.reset()
        PyCodeCache.cache_clear()  # compiled modules hold weights of their own
        gc.collect()  # the next set needs the memory
    return found


def _weights_read(decoder: Decoder) -> float:
    """Bytes of weights read for a token: the first one, whose cache is empty."""
    decoder.reset()
    decoder.step(100)
    return decoder.bytes_read


def _sparse(source: ModelSource, capacity: int) -> dict[str, Engine]:
    """One decoder for each of DENSITIES, all on one copy of the weights."""
    def choose(layer: int, site: str, width: int) -> Choice | None:
        return Choice(k=round(DENSITIES[0] * width)) if site in SITES else None

    first = Decoder(source, choices=choose, capacity=capacity)
    rest = [sharing(first, dict.fromkeys(SITES, density)) for density in DENSITIES[1:]]
    return {title: Ours(decoder) for title, decoder in zip(SPARSE, [first, *rest], strict=True)}


def _rounds(engines: dict[str, Engine], tokens: int, into: dict[str, Any], title: str) -> None:
    bandwidth = ReadBandwidth()
    times = interleaved({**engines, "read": bandwidth}, tokens, desc=title)
    dense = times[DENSE].seconds
    for kind in engines:
        ratio = median(a / b for a, b in zip(dense, times[kind].seconds, strict=True))
        into.setdefault(kind, {"seconds": times[kind].median, "over_ours_dense": ratio})
    into.setdefault("bandwidth", bandwidth.bytes / times["read"].median)


def table(name: str, found: dict[str, Any]) -> str:
    """The figures of one model as text: tokens a second of each engine, and how ours compare with the others."""
    points = by_length(found["prompts"])
    lines = [f"{name} in bfloat16: tokens per second after prompts of {', '.join(map(str, points))} tokens"]
    kinds = [kind for kind in (DENSE, *SPARSE, *OTHERS) if all(kind in point for point in points.values())]
    for kind in kinds:
        text = f"  {kind:18} " + "  ".join(f"{1 / point[kind]['seconds']:7.1f}" for point in points.values())
        if kind in found["bytes"]:
            skipped = 1 - found["bytes"][kind] / found["bytes"][DENSE]
            text += f"   {skipped:4.0%} of all weights skipped"
        if kind in SPARSE:
            for other in OTHERS:
                if other in kinds:
                    ratios = [p[kind]["over_ours_dense"] / p[other]["over_ours_dense"] for p in points.values()]
                    text += f"; {min(ratios):.2f} to {max(ratios):.2f} x {other}"
        lines.append(text)
    if not found["llama.cpp"]:
        lines.append("  llama.cpp was not there: pip install '.[bench]'")
    return "\n".join(lines)
