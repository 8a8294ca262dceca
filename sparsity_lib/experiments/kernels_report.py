"""Rows and verdicts of the chapter on kernels, from the kept measurements."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import geometric_mean, median
from typing import Any

from sparsity_lib import style
from sparsity_lib.bench.timing import by_length
from sparsity_lib.report import Number
from sparsity_lib.verdicts import Verdict, effect

#: Timings move by some percent from run to run, more than any other number of the book.
LOOSE = {"rtol": 0.05}
MATVEC_SHOWN = (0.0, 0.5, 0.66, 0.85)
WIDE = ("bfloat16", "float32")
#: What was asked of the operators before they were measured: format -> sparsity -> speed-up, of the wide formats over the best
#: dense product that torch has, of the narrow ones over the best of all.
ASKED = {
    **dict.fromkeys(WIDE, {0.0: 1.0, 0.5: 1.9, 0.66: 2.8, 0.85: 6.0}),
    **dict.fromkeys(("int8", "int4"), {0.5: 1.7}),
}
ASKED_BANDWIDTH, ASKED_BLOCK, ASKED_DECODE, ASKED_EVALUATION = 0.85, 1.4, 0.9, 2.5


def ratio(value: float) -> Number:
    """A speed-up as a table's cell."""
    return Number(value, ".2f", **LOOSE)


def percent(share: float) -> Number:
    """A share as a table's cell, in percent."""
    return Number(100 * share, ".0f", **LOOSE)


def point(found: Mapping[str, Any], sparsity: float) -> Mapping[str, Any]:
    """The point of a matvec measurement at one sparsity."""
    return next(p for p in found["points"] if p["sparsity"] == sparsity)


def over_torch(found: Mapping[str, Any], sparsity: float) -> float:
    """Speed-up of a sparse product over the fastest dense one that torch has for its format."""
    best = min(times["median_us"] for name, times in found["times"].items() if name.startswith("torch "))
    return best / found["times"][f"sparse {sparsity}"]["median_us"]


def matvec_rows(data: Mapping[str, Any]) -> list[list[Any]]:
    """Format and shape, best dense product, speed-ups at MATVEC_SHOWN, share of bandwidth at the lowest point up to 80%."""
    rows = []
    for name, found in data.items():
        format, _, shape = name.partition(" ")
        speeds = [ratio(point(found, s)["speedup"]) for s in MATVEC_SHOWN]
        shares = [p["share_of_bandwidth"] for p in found["points"] if p["sparsity"] <= 0.8]
        best = found["best_dense"].removeprefix("torch ").removeprefix("_")
        rows.append([format, shape.replace("x", "×"), best, *speeds, percent(min(shares)), percent(median(shares))])
    return rows


def block_rows(data: Mapping[str, Any]) -> list[tuple[str, float, float]]:
    """Name, speed-up over the best dense block, what the bytes allow."""
    return [(name, found["speedup"], found["bytes_allow"]) for name, found in data.items()]


def decode_rows(data: Mapping[str, Any]) -> list[list[Any]]:
    """Model, setting, share of weights skipped; measured over predicted speed-up after each prompt."""
    rows = []
    for model, found in data.items():
        for setting, each in found.items():
            if setting in ("dense", "baselines"):
                continue
            points = list(by_length(each["prompts"]).values())
            skipped = 1 - points[0]["bytes"]["sparse"] / points[0]["bytes"]["dense"]
            cells = [ratio(p["ratio"]) for p in points]
            reached = [p["ratio"] * p["bytes"]["sparse"] / p["bytes"]["dense"] for p in points]
            predicted = points[0]["bytes"]["dense"] / points[0]["bytes"]["sparse"]
            rows.append([model, setting, percent(skipped), ratio(predicted), *cells, percent(min(reached))])
    return rows


def against_rows(data: Mapping[str, Any], engine: str) -> list[list[Any]]:
    """Model, then our decoder at 35% of the inputs over another engine, after each prompt; no row where that was not there."""
    rows = []
    for model, found in data.items():
        points = by_length(found["baselines"]["prompts"]).values()
        if all(engine in p for p in points):
            cells = [ratio(p["ours, inputs 35%"]["over_ours_dense"] / p[engine]["over_ours_dense"]) for p in points]
            rows.append([model, engine, *cells])
    return rows


def evaluation_rows(data: Mapping[str, Any]) -> list[list[Any]]:
    """Task, documents, seconds of both, their ratio, accuracies, documents whose answer differs."""
    rows = []
    for name, found in data["sets"].items():
        seconds = [Number(found[engine]["wall"], ".1f", **LOOSE) for engine in ("hflm", "prefix")]
        accuracy = [Number(100 * found["accuracy"][engine], ".0f") for engine in ("hflm", "prefix")]
        rows.append([name, found["documents"], *seconds, ratio(found["ratio"]), *accuracy, found["flipped"]])
    total = data["total"]
    rows.append(["together", sum(f["documents"] for f in data["sets"].values()),
                 *(Number(total[engine], ".1f", **LOOSE) for engine in ("hflm", "prefix")), ratio(total["ratio"]), None, None,
                 sum(f["flipped"] for f in data["sets"].values())])
    return rows


def calibration_rows(data: Mapping[str, Any]) -> list[list[Any]]:
    """Model and tokens, method, seconds, peak above the model and the model itself in MiB."""
    def size(value: int | None, fmt: str = ".0f") -> Number | None:
        return None if value is None else Number(value / 2**20, fmt, **LOOSE)

    return [
        [f"{name}, {found['tokens']:,} tokens", style.look(method).label, Number(found["seconds"], ".1f", **LOOSE),
         size(found["peak"]), size(found["statistics"], ".1f"), size(found["model"])]
        for kind in ("text", "size") for name, methods in data[kind].items()
        for method, lengths in methods.items() for found in sorted(lengths.values(), key=lambda f: f["tokens"])
    ]


def growth(calibration: Mapping[str, Any], model: str) -> tuple[float, tuple[float, float]]:
    """How many times the shortest text the longest is, and the range over methods of how many times as long it took."""
    spans = [sorted(lengths.values(), key=lambda f: f["tokens"]) for lengths in calibration["text"][model].values()]
    ratios = [last["seconds"] / first["seconds"] for first, *_, last in spans]
    return spans[0][-1]["tokens"] / spans[0][0]["tokens"], (min(ratios), max(ratios))


def bandwidths(matvec: Mapping[str, Any], glu: Mapping[str, Any], decode: Mapping[str, Any]) -> tuple[float, float]:
    """The lowest and the highest read bandwidth of all runs, in bytes a second."""
    found = [each["bandwidth"] for data in (matvec, glu) for each in data.values()]
    for model in decode.values():
        found += [point["bandwidth"] for each in model.values() for point in each["prompts"].values()]
    return min(found), max(found)


def gains(decode: Mapping[str, Any], model: str) -> tuple[float, float]:
    """Speed over our dense decoder with 35% of the inputs, after the shortest and the longest prompt."""
    ratios = [point["ratio"] for point in by_length(decode[model]["inputs 35%"]["prompts"]).values()]
    return ratios[0], ratios[-1]


@dataclass(frozen=True)
class Target:
    """One thing asked of the software before it was measured: what, how much, and what came out."""

    what: str
    asked: float
    found: float

    def row(self) -> list[Any]:
        return [self.what, f"{self.asked:g}", ratio(self.found), "reached" if self.found >= self.asked else "**missed**"]


def targets(
    matvec: Mapping[str, Any], glu: Mapping[str, Any], decode: Mapping[str, Any], evaluation: Mapping[str, Any],
) -> list[Target]:
    """Each target with the worst case measured for it."""
    found = []
    for format, wanted in ASKED.items():
        those = [each for name, each in matvec.items() if name.split()[0] == format]
        for sparsity, asked in wanted.items():
            if format in WIDE:
                worst, rival = min(over_torch(each, sparsity) for each in those), "torch's best dense"
            else:
                worst, rival = min(point(each, sparsity)["speedup"] for each in those), "the best dense"
            found.append(Target(f"{format} product, {sparsity:.0%} skipped: times {rival}", asked, worst))
        if format in WIDE:
            shares = [p["share_of_bandwidth"] for each in those for p in each["points"] if p["sparsity"] <= 0.8]
            found.append(Target(f"{format} product, up to 80% skipped: share of the bandwidth", ASKED_BANDWIDTH, min(shares)))
    real = [each["speedup"] for name, each in glu.items() if "masks" not in name]
    imposed = [each["speedup"] for name, each in glu.items() if "masks" in name]
    found.append(Target("FFN block, half of the neurons, real models: times the best dense", ASKED_BLOCK, min(real)))
    found.append(Target("FFN block, half of the neurons, larger shapes: times the best dense", ASKED_BLOCK, min(imposed)))
    for model, each in decode.items():
        reached = min(p["ratio"] * p["bytes"]["sparse"] / p["bytes"]["dense"] for p in each["inputs 35%"]["prompts"].values())
        found.append(Target(f"decoding {model}, 35% of the inputs: share of what the bytes predict", ASKED_DECODE, reached))
    for model, each in decode.items():
        points = [p for p in each["baselines"]["prompts"].values() if "llama.cpp" in p]
        if points:
            worst = min(p["ours, inputs 35%"]["over_ours_dense"] / p["llama.cpp"]["over_ours_dense"] for p in points)
            found.append(Target(f"decoding {model}, 35% of the inputs: times llama.cpp, dense", 1.0, worst))
    found.append(Target("evaluation of five benchmarks: times HFLM", ASKED_EVALUATION, evaluation["total"]["ratio"]))
    return found


def efficiencies(decode: Mapping[str, Any], model: str) -> tuple[float, float]:
    """Shares of the read bandwidth that our dense decoder and the one at 35% of the inputs reach."""
    points = decode[model]["inputs 35%"]["prompts"].values()
    return tuple(median(p["bytes"][kind] / p[kind] / p["bandwidth"] for p in points) for kind in ("dense", "sparse"))


#: Configurations of larger models: hidden, neurons, layers, heads' and key-value heads' width in all, vocabulary (untied head).
LARGER = {
    "Mistral-7B": (4096, 14336, 32, 4096, 1024, 32768), "Llama-3.1-8B": (4096, 14336, 32, 4096, 1024, 128256),
    "Qwen2.5-32B": (5120, 27648, 64, 5120, 1024, 152064), "Llama-3.3-70B": (8192, 28672, 80, 8192, 1024, 128256),
}
#: Machines by the memory bandwidth that their makers state, in GB a second.
MACHINES = {"laptop, two channels of DDR5-5600": 90, "workstation, eight channels of DDR5-4800": 307, "H100 SXM": 3350}


def weights_of(name: str) -> tuple[float, float]:
    """Weights that a token reads: in the blocks' linears, and in the head."""
    hidden, neurons, layers, wide, narrow, vocabulary = LARGER[name]
    return layers * (hidden * (2 * wide + 2 * narrow) + 3 * hidden * neurons), hidden * vocabulary


def prediction_rows(reached: tuple[float, float], density: float) -> list[list[Any]]:
    """Model and machine; tokens a second dense and at one density of the blocks' inputs, in bfloat16, from `efficiencies`."""
    rows = []
    for model in LARGER:
        blocks, head = weights_of(model)
        for machine, bandwidth in MACHINES.items():
            dense, sparse = (1e9 * bandwidth * share / (2 * (size + head))
                             for share, size in zip(reached, (blocks, blocks * density), strict=True))
            rows.append([model, machine, Number(dense, ".1f", **LOOSE), Number(sparse, ".1f", **LOOSE)])
    return rows


#: Reported decode speed-ups: paper, model, share of the FFN skipped, or of all linear layers, reported.
REPORTED = (
    ("CATS, as run by SCAP", "Mistral-7B", 0.333, None, 1.177), ("SCAP", "Mistral-7B", 0.485, None, 1.271),
    ("CWIC, 1B", "Llama-3.2-1B", None, 0.66, 2.5), ("CWIC, 3B", "Llama-3.2-3B", None, 0.66, 2.7),
)


def reported_rows(reached: tuple[float, float]) -> list[list[Any]]:
    """Paper, setting, what the bytes allow, what was reported, and what our decoder's measured efficiency would give."""
    rows = []
    for paper, model, ffn, everywhere, reported in REPORTED:
        if ffn is None:
            limit, expected = 1 / (1 - everywhere), None
        else:
            hidden, neurons, layers, *_ = LARGER[model]
            skipped = layers * 3 * hidden * neurons * ffn / sum(weights_of(model))
            limit = 1 / (1 - skipped)
            expected = ratio(limit * reached[1] / reached[0])
        share = f"{ffn:.1%} of the FFN" if ffn is not None else f"{everywhere:.0%} of all"
        rows.append([paper, model, share, ratio(limit), Number(reported, ".2f"), expected])
    return rows


def _between(found: Mapping[str, Any], dense: str, sparse: str) -> tuple[float, float]:
    """The ratio's range from the quartiles of both times."""
    a, b = found["times"][dense], found["times"][sparse]
    return a["low_us"] / b["high_us"], a["high_us"] / b["low_us"]


def verdict_block(glu: Mapping[str, Any], name: str) -> Verdict:
    """K6: CLAWS' kernel on the whole block."""
    found = glu[name]
    low, high = _between(found, found["best_dense"], "sparse")
    return effect(
        f"K6, {name}", "1.24 times as fast on the full MLP block at 50% density (ARM)",
        "whole FFN blocks at 50% of the neurons against torch's fastest dense block, bfloat16, two x86 cores",
        number=found["speedup"], low=min(low, found["speedup"]), high=max(high, found["speedup"]), published=1.24, null=1.0)


def verdict_product(matvec: Mapping[str, Any], name: str) -> Verdict:
    """A2: CWIC's kernel at 66%, one product."""
    found = matvec[name]
    number = point(found, 0.66)["speedup"]
    low, high = _between(found, found["best_dense"], "sparse 0.66")
    return effect(
        f"A2, {name}", "2.5 times as fast at 66% sparsity on CPU and GPU, 2.7 times for the 3B model",
        "one input-sparse product against the fastest dense one, mask included", number=number, low=min(low, number),
        high=max(high, number), published=2.5, null=1.0)


def verdict_gpu(gpu: Mapping[str, Any]) -> Verdict:
    """A2 on a GPU: bfloat16 products of one token, from the slowest shape to the fastest."""
    speeds = [found["points"]["sparse 0.66"]["speedup"] for name, found in gpu.items()
              if name.startswith("bfloat16") and name.endswith(", 1 tokens")]
    return effect(
        "A2, GPU", "2.5 times as fast at 66% sparsity on CPU and GPU",
        "one input-sparse bfloat16 product against torch's dense one on a GPU; the interval is from shape to shape",
        number=geometric_mean(speeds), low=min(speeds), high=max(speeds), published=2.5, null=1.0)


def verdict_decode(decode: Mapping[str, Any], model: str) -> Verdict:
    """A2 for whole models: decoding with 35% of the inputs against the same decoder, dense."""
    ratios = [p["ratio"] for p in decode[model]["inputs 35%"]["prompts"].values()]
    published = 2.7 if "3B" in model else 2.5
    return effect(
        f"A2, decoding {model}", f"{published} times as fast at 66% sparsity",
        "a whole token with 35% of the blocks' inputs and a dense head, against our dense decoder", number=geometric_mean(ratios),
        low=min(ratios), high=max(ratios), published=published, null=1.0)
