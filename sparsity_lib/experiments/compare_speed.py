"""Decode speed of every method at equal shares of weights skipped: real models, real text, the masks' cost included.

Where in memory a decoder's weights lie changes its speed by several percent (the same decoder built five times shows it), so
all are built anew several times, in another order each time: intervals hold what their places are worth. As with all timings,
items follow each other in this process, whatever SPARSITY_WORKERS says.
"""

from __future__ import annotations

import gc
import random
from collections.abc import Callable, Mapping
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor

from sparsity_lib.bench.timing import ReadBandwidth, interleaved
from sparsity_lib.cwic.inference import decoder as granular_decoder
from sparsity_lib.decode import Decoder, ModelSource
from sparsity_lib.errors import SparsityError
from sparsity_lib.experiments import common, compare_granular
from sparsity_lib.experiments.compare_common import DTYPE, WEIGHTS, Bench, Point, bench_for, maker
from sparsity_lib.experiments.compare_search import COSTS, HEAD_EVERY, candidate_points, current
from sparsity_lib.parts.scores import Relative

METHODS = ("cats", "claws", "gaussian", "griffin", "scap", "teal", "inputs_topk", "gaussian_inputs", "larosa", "wina", "rsparse",
           "nm", "wanda", "teal_head", "wina_head", "larosa_head", "spread")
SHARES = {"smollm2-135m-instruct": (0.2, 0.4, 0.5, 0.6, 0.7), "gemma3-270m": (0.15, 0.4, 0.5, 0.6, 0.7)}
#: Text: tokens of the prompt, and of its continuation, one a round; the same in every build.
PROMPT, TOKENS = 128, 12
WARMUP = 2
#: How often every decoder is built.
BUILDS = 5
#: Less text than for quality: thresholds and rotations need to be of the right size only.
CALIBRATION = {"tokens": 2048, "length": 256, "seed": 0}


def run(checkpoint) -> tuple[Any, dict, list[int]]:
    """One item a model and share: every method's decoder and the dense one, token by token in turn. After the search."""
    data: dict[str, list[dict[str, Any]]] = {}
    candidate = current()
    for name in common.MODELS:
        made: dict[str, list[Point]] = {}
        for share in SHARES[name]:
            trained = [own for own in compare_granular.shares_of(name)
                       if min(SHARES[name], key=lambda each, own=own: abs(each - own)) == share]
            params = {"model": name, "share": share, "methods": METHODS, "trained": trained, "prompt": PROMPT, "tokens": TOKENS,
                      "builds": BUILDS, "dtype": DTYPE, "calibration": CALIBRATION, "threads": torch.get_num_threads(),
                      "costs": COSTS, "head_every": HEAD_EVERY[name], "candidate": candidate}
            found = checkpoint.item(params, partial(together, made, params))
            data.setdefault(name, []).extend(found)
            for row in found:
                print(f"{name} {row['method']} {row['share']}: {row.get('ratio', row.get('reason'))}", flush=True)
    return data, {"methods": METHODS, "shares": SHARES, "prompt": PROMPT, "tokens": TOKENS, "builds": BUILDS, "dtype": DTYPE,
                  "calibration": CALIBRATION, "costs": COSTS, "candidate": candidate, "threads": torch.get_num_threads()}, [0]


def together(made: dict[str, list[Point]], params: Mapping[str, Any]) -> list[dict[str, Any]]:
    """All decoders of one share in the same rounds; `made` keeps what was fitted for the other shares."""
    bench = bench_for(params["model"], {"sequences": 2, "length": PROMPT + TOKENS + WARMUP})
    source, capacity = ModelSource(bench.model), bench.ids.shape[1]
    rows: list[dict[str, Any]] = []
    makers: dict[str, Callable[[], Decoder]] = {"dense": partial(Decoder, source, capacity=capacity)}
    for method in params["methods"]:
        if method not in made:
            made[method] = _points(bench, method, params)
        make, about = _one(bench, source, made[method][SHARES[params["model"]].index(params["share"])], capacity)
        rows.append({"method": method, "share": params["share"], **about})
        if make is not None:
            makers[method] = make
    for share in params["trained"]:
        model = compare_granular.load(share)
        makers[compare_granular.METHOD] = partial(granular_decoder, model, capacity=capacity)
        rows.append({"method": compare_granular.METHOD, "share": share, "token_share": 1.0,
                     "skipped": compare_granular.skipped(model, bench.ids[:2])})
    builds = []
    for build in range(params["builds"]):
        order = random.Random(build).sample(list(makers), len(makers))
        builds.append(_timed({name: makers[name]() for name in order}, bench.ids[:1], params["prompt"]))
        gc.collect()  # before memory is taken for the next ones
    return [{**row, **_over_builds([b[row["method"]] for b in builds if row["method"] in b])} for row in rows]


def _over_builds(builds: list[dict[str, Any]]) -> dict[str, Any]:
    """One method's times: ratios by build, and medians over builds; nothing where it was not run."""
    if not builds:
        return {}
    middle = {key: median(each[key] for each in builds) for key in ("dense", "sparse", "bandwidth")}
    return {"ratios": [each["ratios"] for each in builds], "ratio": median(median(each["ratios"]) for each in builds),
            "bytes": builds[0]["bytes"], **middle}


def _points(bench: Bench, method: str, params: Mapping[str, Any]) -> list[Point]:
    """A method at every share of the model, so that what it fits is fitted once."""
    shares = [asked(method, share) for share in SHARES[params["model"]]]
    if method == "spread":
        return candidate_points(bench, params["candidate"], shares, params["costs"], params["head_every"], params["calibration"])
    return bench.points(method, shares, calibration=params["calibration"])


def asked(method: str, share: float) -> float:
    """The share, counted over whole sequences, with which a sparse token skips `share`: those that are decoded are all sparse."""
    return share * (1.0 if method in (*WEIGHTS, "spread", compare_granular.METHOD) else maker(method)(0.5).token_share)


def _one(
    bench: Bench, source: ModelSource, point: Point, capacity: int
) -> tuple[Callable[[], Decoder] | None, dict[str, Any]]:
    """What builds a point's decoder, and what that skips; or nothing, and why."""
    if point.change is None:
        return None, dict(point.about)
    if callable(point.change):
        return None, {"reason": "The decoder reads whole rows and columns: zeros scattered over the weights save it nothing."}
    make = partial(_sparse, source, point, capacity)
    try:
        make()
    except SparsityError as error:
        return None, {"reason": str(error)}
    token_share = point.change.recipe.token_share
    return make, {"skipped": bench.shares(point)["skipped"] / token_share, "token_share": token_share}


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


def _timed(decoders: Mapping[str, Decoder], ids: Tensor, prompt: int) -> dict[str, dict[str, Any]]:
    """All read the prompt, then walk along the text after it, a token a round; times, and ratios to "dense", by name."""
    text, bytes_read = ids[0].tolist(), {name: [] for name in decoders}
    for decoder in decoders.values():
        if isinstance(decoder.source, Fewer):
            decoder.cache.normal_()  # no Hugging Face model has so few neurons; what attention reads costs the same
            decoder.position = prompt
        else:
            decoder.prefill(ids[:, :prompt])

    def step(turn: int, name: str) -> None:
        decoder = decoders[name]
        decoder.step(text[decoder.position])
        bytes_read[name].append(decoder.bytes_read)

    bandwidth = ReadBandwidth()
    rounds = len(text) - prompt - WARMUP
    cases = {name: partial(step, name=name) for name in decoders}
    times = interleaved({**cases, "read": bandwidth}, rounds, warmup=WARMUP, desc="decoding")
    found = {}
    for name in decoders:
        ratios = [a / b for a, b in zip(times["dense"].seconds, times[name].seconds, strict=True)]
        found[name] = {"dense": times["dense"].median, "sparse": times[name].median, "ratios": ratios,
                       "bytes": {"dense": median(bytes_read["dense"]), "sparse": median(bytes_read[name])},
                       "bandwidth": bandwidth.bytes / times["read"].median}
    return found
