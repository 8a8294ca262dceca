"""Granular products and granular SmolLM2 in time: stripes against whole columns, and a token decoded at 2x, 3x and 6x."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from statistics import fmean, median
from typing import Any

import torch
from torch import Tensor, nn

from sparsity_lib import lm, ops
from sparsity_lib.assets.models import load_model
from sparsity_lib.assets.texts import token_sequences
from sparsity_lib.bench.matvec import torch_cases
from sparsity_lib.bench.timing import ReadBandwidth, Times, interleaved
from sparsity_lib.cwic import CWICConfig, Registry, convert, measure
from sparsity_lib.cwic.inference import decoder
from sparsity_lib.cwic.layers import CWICActivation
from sparsity_lib.cwic.shipped import SMOLLM2_STRIPES, load_shipped
from sparsity_lib.decode import Decoder
from sparsity_lib.errors import SparsityError

MODEL = "smollm2-135m-instruct"
#: Width and stripe of the papers' figure 3, and shares kept: all, and 1/2, 1/3, 1/6.
WIDTH, STRIPE, KEPT, COPIES = 4096, 512, (1.0, 1 / 2, 1 / 3, 1 / 6), 3
#: Ratios imposed on SmolLM2, and the artifacts with learned thresholds.
RATIOS, LEARNED = (1.0, 2.0, 3.0, 6.0), ("smollm2-cwic-2x", "smollm2-cwic-3x")
PROMPT, ROUNDS = 256, 21
CALIBRATION = {"tokens": 1024, "length": 256}


def run(checkpoint) -> tuple[Any, dict, list[int]]:
    """One item for the product, and one for the model at all ratios and with all artifacts."""
    params = {"width": WIDTH, "stripe": STRIPE, "kept": KEPT, "rounds": ROUNDS}
    product = checkpoint.item({"case": "product", **params}, partial(measure_product, params))
    shared = {"model": MODEL, "prompt": PROMPT, "rounds": ROUNDS, "stripes": SMOLLM2_STRIPES, "calibration": CALIBRATION}
    cases = {f"{ratio:g}x imposed": ratio for ratio in RATIOS} | dict.fromkeys(LEARNED)
    decoding = checkpoint.item({"case": "decoding", "cases": cases, **shared}, partial(measure_decoding, cases, shared))
    for label, found in decoding.items():
        print(f"{label}: {median(found['times_as_fast']):.2f} times as fast as dense", flush=True)
    threads = torch.get_num_threads()
    return {"product": product, "decoding": decoding}, {**shared, **params, "threads": threads}, [0]


def measure_product(params: dict) -> dict[str, Any]:
    """Times of torch's product, of one mask for whole columns and of one a stripe, at shares kept; bfloat16."""
    width, stripe = params["width"], params["stripe"]
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(width, width, generator=generator).mul_(width**-0.5) for _ in range(COPIES)]
    x = torch.randn(1, width, generator=generator).to(torch.bfloat16)
    held, striped = ([ops.pack(w, "inputs", "bfloat16", stripe=s) for w in weights] for s in (None, stripe))
    cases = {f"torch {name}": case for name, case in torch_cases("bfloat16", weights, x).items()}
    dense = list(cases)
    for share in params["kept"]:
        each = thresholds(x.float().flatten(), width // stripe, share, generator)
        column = float(x.float().abs().quantile(1 - share)) if share < 1 else -1.0
        cases[f"columns {share:.3f}"] = lambda turn, t=column: ops.input_sparse(x, held[turn % COPIES], threshold=t)
        cases[f"stripes {share:.3f}"] = lambda turn, t=each: ops.input_sparse(x, striped[turn % COPIES], threshold=t)
    bandwidth = ReadBandwidth()
    times = interleaved({**cases, "read": bandwidth}, params["rounds"], desc="granular products", rehearse=True)
    best = min(dense, key=lambda name: times[name].median)
    points = [{"kept": share, "way": way, "times_as_fast": between(times[best], times[f"{way} {share:.3f}"])}
              for share in params["kept"] for way in ("columns", "stripes")]
    return {"times": {name: t.to_json() for name, t in times.items()}, "best_dense": best, "points": points,
            "stripes_over_columns": {f"{s:.3f}": between(times[f"stripes {s:.3f}"], times[f"columns {s:.3f}"])
                                     for s in params["kept"]}}


def thresholds(x: Tensor, number: int, share: float, generator: torch.Generator) -> Tensor:
    """Thresholds [stripes, in] that keep `share` of the entries, other ones in each stripe: infinity or nothing."""
    keep = torch.rand(number, len(x), generator=generator) < share
    return torch.where(keep, -1.0, torch.inf).contiguous()


def between(slow: Times, fast: Times) -> list[float]:
    """How many times longer the first took than the second, round by round."""
    return [round(a / b, 4) for a, b in zip(slow.seconds, fast.seconds, strict=True)]


def measure_decoding(cases: Mapping[str, float | None], params: dict) -> dict[str, dict[str, Any]]:
    """Seconds a token of dense SmolLM2 and of granular ones, all in the same rounds, by our decoder on one text, in bfloat16.

    cases: label -> the ratio to impose thresholds for, or None for the artifact of that name.
    """
    dense, tokenizer = load_model(params["model"], dtype=torch.bfloat16)
    ids = token_sequences(tokenizer, "evaluation", **params["calibration"])
    engines, ratios = {"dense": Reading(Decoder(dense), ids.flatten())}, {}
    for label, ratio in cases.items():
        if ratio is None:
            model, _ = load_shipped(label, torch.bfloat16)
        else:
            model, _ = load_model(params["model"], dtype=torch.bfloat16)
            meet(model, convert(model, CWICConfig(stripe=params["stripes"], uneven=True)), ids, ratio)
        ratios[label], engines[label] = measure(model, ids).ratio(), Reading(decoder(model), ids.flatten())
    for engine in engines.values():
        engine.at(params["prompt"])
    bandwidth = ReadBandwidth()
    times = interleaved({**engines, "read": bandwidth}, params["rounds"], desc="decoding")
    read = {which: fmean(engine.read) for which, engine in engines.items()}
    speed = bandwidth.bytes / times["read"].median
    return {label: {
        "ratio": ratio, "times_as_fast": between(times["dense"], times[label]), "bandwidth": speed,
        "bytes": {"dense": read["dense"], "granular": read[label]},
        "times": {"dense": times["dense"].to_json(), "granular": times[label].to_json()}} for label, ratio in ratios.items()}


class Reading:
    """A decoder that reads a text [tokens] one token a call: it skips what this text makes it skip. read: bytes of each call."""

    def __init__(self, decoder: Decoder, ids: Tensor) -> None:
        self.decoder, self.ids, self.prompt, self.calls = decoder, ids.tolist(), 0, 0
        self.read: list[float] = []

    def at(self, prompt: int) -> None:
        """Read the first `prompt` tokens; calls go on from there, and at the text's or the cache's end from there again."""
        self.prompt, self.calls, self.decoder.position, self.read = prompt, 0, 0, []
        for token in self.ids[:prompt]:
            self.decoder.step(token)

    def __call__(self, turn: int) -> Tensor:
        place = self.prompt + self.calls % (min(len(self.ids), self.decoder.capacity) - self.prompt)
        self.decoder.position = place
        self.calls += 1
        logits = self.decoder.step(self.ids[place])
        self.read.append(self.decoder.bytes_read)
        return logits


def meet(model: nn.Module, registry: Registry, ids: Tensor, ratio: float) -> None:
    """Impose thresholds under which the model as a whole, its layers fed by sparse layers, has `ratio` within 3%."""
    impose(model, registry, ids, ratio)
    if ratio == 1:
        return
    asked, below, above = ratio, 1.0, None
    for _ in range(12):
        found = measure(model, ids).ratio()
        if abs(found / ratio - 1) < 0.03:
            return
        below, above = (asked, above) if found < ratio else (below, asked)
        asked = 1.5 * asked if above is None else (below * above) ** 0.5
        impose(model, registry, ids, asked)
    raise SparsityError(f"Imposed thresholds reach {found:.2f} where {ratio:g} was asked for. Fix: more calibration text.")


@torch.no_grad()
def impose(model: nn.Module, registry: Registry, ids: Tensor, ratio: float) -> None:
    """Thresholds that were not learned: one a layer, at which every layer keeps the share that gives the model `ratio`.

    Statistics are those of `ids` in the dense model, so that what comes out depends on `ratio` alone; 1 leaves all thresholds
    at zero.
    """
    share = (registry.dense / ratio - registry.always) / (registry.dense - registry.always)
    seen: dict[str, list[Tensor]] = {}
    for layer in registry.layers.values():
        layer.sparsity.batches.zero_()
        layer.sparsity.theta.zero_()
    registry.ledger.recorder = lambda layer, x: seen.setdefault(layer.name, []).append(x.float())
    try:
        hidden = lm.hidden_states(model, ids)
        if registry.head is not None:
            seen[registry.head] = [hidden.flatten(0, -2).float()]
    finally:
        registry.ledger.recorder = None
        registry.take_costs()
    for name, layer in registry.layers.items():
        x = torch.cat(seen[name])
        layer.sparsity.observe(x)
        if ratio > 1:
            mean, scale, _ = layer.sparsity.rule()
            size = (x if isinstance(layer, CWICActivation) else x - mean).abs() / scale
            # torch.quantile takes no more than 16 million elements
            kept = size.flatten().kthvalue(max(1, round((1 - share) * size.numel()))).values
            layer.sparsity.theta.fill_(float(kept))
