"""Decode speed of every method at equal shares of weights skipped: real models, real text, the masks' cost included."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor

from sparsity_lib.bench.timing import ReadBandwidth, interleaved
from sparsity_lib.decode import Decoder, ModelSource
from sparsity_lib.errors import SparsityError
from sparsity_lib.experiments import common, compare_granular
from sparsity_lib.experiments.compare_common import DTYPE, WEIGHTS, Bench, Point, bench_for, maker
from sparsity_lib.experiments.compare_search import COSTS, HEAD_EVERY, current
from sparsity_lib.experiments.compare_tasks import point_of
from sparsity_lib.parts.scores import Relative

METHODS = ("cats", "claws", "gaussian", "griffin", "scap", "teal", "inputs_topk", "gaussian_inputs", "larosa", "wina", "rsparse",
           "nm", "wanda", "teal_head", "wina_head", "larosa_head", "spread")
SHARES = {"smollm2-135m-instruct": (0.2, 0.4, 0.5, 0.6), "gemma3-270m": (0.15, 0.4, 0.5, 0.6)}
#: Text: tokens of the prompt, and of its continuation, one a round.
PROMPT, TOKENS = 128, 40
WARMUP = 2
#: Less text than for quality: thresholds and rotations need to be of the right size only.
CALIBRATION = {"tokens": 2048, "length": 256, "seed": 0}


def run(checkpoint) -> tuple[Any, dict, list[int]]:
    """One item a model, method and share: the sparse decoder beside the dense one, in the same rounds. After the search."""
    data: dict[str, Any] = {}
    candidate = current()
    for name in common.MODELS:
        loaded: dict[str, Bench] = {}
        for method in (*METHODS, compare_granular.METHOD):
            searched = {"costs": COSTS, "head_every": HEAD_EVERY[name], "candidate": candidate} if method == "spread" else {}
            trained = method == compare_granular.METHOD
            for share in compare_granular.shares_of(name) if trained else SHARES[name]:
                params = {"model": name, "method": method, "share": share, "prompt": PROMPT, "tokens": TOKENS, "dtype": DTYPE,
                          "calibration": CALIBRATION, "threads": torch.get_num_threads(), **searched}
                found = checkpoint.item(params, partial(_trained if trained else _item, loaded, params))
                data.setdefault(name, []).append({"method": method, "share": share, **found})
                print(f"{name} {method} {share}: {found.get('ratio', found.get('reason'))}", flush=True)
    return data, {"methods": METHODS, "shares": SHARES, "prompt": PROMPT, "tokens": TOKENS, "dtype": DTYPE,
                  "calibration": CALIBRATION, "costs": COSTS, "candidate": candidate, "threads": torch.get_num_threads()}, [0]


def _item(loaded: dict[str, Bench], params: Mapping[str, Any]) -> dict[str, Any]:
    bench = bench_for(loaded, params["model"], {"sequences": 2, "length": PROMPT + TOKENS + WARMUP})
    shares = [asked(params["method"], share) for share in SHARES[params["model"]]]
    point = point_of(bench, params, asked(params["method"], params["share"]), shares)
    return measure(bench, point, params["prompt"])


def _trained(loaded: dict[str, Bench], params: Mapping[str, Any]) -> dict[str, Any]:
    bench = bench_for(loaded, params["model"], {"sequences": 2, "length": PROMPT + TOKENS + WARMUP})
    decoders, model = compare_granular.decoders(bench, params["share"], bench.ids.shape[1])
    return {**_timed(decoders, bench.ids[:1], params["prompt"]), "token_share": 1.0,
            "skipped": compare_granular.skipped(model, bench.ids[:2])}


def asked(method: str, share: float) -> float:
    """The share, counted over whole sequences, with which a sparse token skips `share`: those that are decoded are all sparse."""
    return share * (1.0 if method in (*WEIGHTS, "spread", compare_granular.METHOD) else maker(method)(0.5).token_share)


def measure(bench: Bench, point: Point, prompt: int) -> dict[str, Any]:
    """Seconds a token of both decoders and their ratio, round by round; or why the compiled decoder cannot run the method."""
    if point.change is None:
        return dict(point.about)
    if callable(point.change):
        return {"reason": "The decoder reads whole rows and columns: zeros scattered over the weights save it nothing."}
    source = ModelSource(bench.model)
    capacity = bench.ids.shape[1]
    try:
        sparse = _sparse(source, point, capacity)
    except SparsityError as error:
        return {"reason": str(error)}
    token_share = point.change.recipe.token_share
    return {**_timed({"dense": Decoder(source, capacity=capacity), "sparse": sparse}, bench.ids[:1], prompt),
            "skipped": bench.shares(point)["skipped"] / token_share, "token_share": token_share}


def _sparse(source: ModelSource, point: Point, capacity: int) -> Decoder:
    recipe = point.change.recipe
    if [type(rule.score) for rule in recipe.rules] == [Relative]:
        return Decoder(Fewer(source.model, recipe.rules[0].select.count(source.architecture.neurons)), capacity=capacity)
    return Decoder(source, point.change, capacity=capacity)


class Fewer(ModelSource):
    """A model with the first `neurons` of each FFN: as fast as with any others, as where a prompt has chosen them."""

    def __init__(self, model, neurons: int) -> None:
        import dataclasses

        super().__init__(model)
        self.architecture = dataclasses.replace(self.architecture, neurons=neurons)

    def matrix(self, layer: int, name: str) -> Tensor:
        weight, n = super().matrix(layer, name), self.architecture.neurons
        if name in ("gate", "up"):
            return weight[:n]
        return weight[:, :n].contiguous() if name == "down" else weight

    def bias(self, layer: int, name: str) -> Tensor | None:
        found = super().bias(layer, name)
        return found[: self.architecture.neurons] if found is not None and name in ("gate", "up") else found


def _timed(decoders: Mapping[str, Decoder], ids: Tensor, prompt: int) -> dict[str, Any]:
    """Both decoders read the prompt, then walk along the text after it, a token a round."""
    text, bytes_read = ids[0].tolist(), {kind: [] for kind in decoders}
    for decoder in decoders.values():
        if isinstance(decoder.source, Fewer):
            decoder.cache.normal_()  # no Hugging Face model has so few neurons; what attention reads costs the same
            decoder.position = prompt
        else:
            decoder.prefill(ids[:, :prompt])

    def step(turn: int, kind: str) -> None:
        decoder = decoders[kind]
        decoder.step(text[decoder.position])
        bytes_read[kind].append(decoder.bytes_read)

    bandwidth = ReadBandwidth()
    rounds = len(text) - prompt - WARMUP
    cases = {kind: partial(step, kind=kind) for kind in decoders}
    times = interleaved({**cases, "read": bandwidth}, rounds, warmup=WARMUP, desc="decoding")
    ratios = [a / b for a, b in zip(times["dense"].seconds, times["sparse"].seconds, strict=True)]
    return {
        **{kind: times[kind].median for kind in decoders}, "ratio": median(ratios), "ratios": ratios,
        "bytes": {kind: median(each) for kind, each in bytes_read.items()}, "bandwidth": bandwidth.bytes / times["read"].median,
    }
