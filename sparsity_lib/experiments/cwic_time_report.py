"""Rows and verdicts of the CWIC chapter on time: training steps, products and tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sparsity_lib.evaluate.bootstrap import median_interval
from sparsity_lib.experiments.claws_report import cell
from sparsity_lib.report import Number
from sparsity_lib.verdicts import Verdict, effect, not_testable

Data = Mapping[str, Any]
FASTER = "2.5 times as fast at a third of the parameters, on CPU and GPU (1B)"


def decoding_rows(bench: Mapping[str, Any]) -> list[list[Any]]:
    """Thresholds, times fewer weights that their masks read, times as fast as dense; percent of a pure read's speed, both."""
    def order(name: str) -> tuple[bool, float]:
        return "imposed" not in name, bench[name]["ratio"]

    def of_memory(found: Mapping[str, Any], way: str) -> Number:
        speed = found["bytes"][way] / (found["times"][way]["median_us"] * 1e-6)
        return Number(100 * speed / found["bandwidth"], ".0f", rtol=0.5)

    return [[name, Number(bench[name]["ratio"], ".2f"), cell(median_interval(bench[name]["times_as_fast"]), ".2f", rtol=0.3),
             *(of_memory(bench[name], way) for way in ("dense", "granular"))] for name in sorted(bench, key=order)]


def step_rows(training: Mapping[str, Any], shapes: Mapping[str, Sequence[int]]) -> list[list[Any]]:
    """Matrix, stripe, how many times as fast a training step is as in plain PyTorch and as a dense one, MiB that each keeps."""
    return [[f"{name}, {shape[0]} × {shape[1]}", shape[2], Number(training[name]["over_plain"], ".1f"),
             Number(training[name]["over_dense"], ".2f"),
             *(Number(training[name]["saved"][kind] / 2**20, ".1f") for kind in ("plain", "ours"))]
            for name, shape in shapes.items()]


def product_rows(product: Mapping[str, Any]) -> list[list[Any]]:
    """Share kept, times as fast as the best dense product by columns and by stripes, and stripes' time over columns'."""
    found = []
    for share in sorted({p["kept"] for p in product["points"]}, reverse=True):
        points = (p for p in product["points"] if p["kept"] == share)
        fast = {p["way"]: cell(median_interval(p["times_as_fast"]), ".2f", rtol=0.3) for p in points}
        slower = median_interval(product["stripes_over_columns"][f"{share:.3f}"])
        found.append([f"{share:.2f}", fast["columns"], fast["stripes"], cell(slower, ".2f", rtol=0.3)])
    return found


def verdict_product(product: Data, share: float = 1 / 3, published: float = 2.5) -> Verdict:
    """A2 for one product, which is what the paper's figure times."""
    point = next(p for p in product["points"] if p["way"] == "stripes" and abs(p["kept"] - share) < 1e-6)
    own = median_interval(point["times_as_fast"])
    return effect(
        "A2, one product in stripes", FASTER, f"time of torch's best 4096 × 4096 product over one in stripes, {share:.0%} kept",
        number=own.value, low=own.low, high=own.high, published=published, null=1.0)


def verdict_clock(bench: Data, name: str, published: float = 2.5) -> Verdict:
    """A2: wall clock."""
    own = median_interval(bench[name]["times_as_fast"])
    return effect(
        f"A2, {name}", FASTER,
        f"time of a token of dense SmolLM2 over a granular one's at {bench[name]['ratio']:.2f}x, in the same rounds",
        number=own.value, low=own.low, high=own.high, published=published, null=1.0)


def verdict_kernel(product: Data, share: str = "0.333") -> Verdict:
    """A17: stripes cost nothing beside columns, which is said of a kernel for GPUs."""
    over = median_interval(product["stripes_over_columns"][share])
    return not_testable(
        "A17", "stripes of a multiple of the kernel's block keep TEAL's efficiency",
        f"is said of a Triton kernel on a GPU; on this CPU a product in stripes of 512 takes {over.value:.2f} [{over.low:.2f}, "
        f"{over.high:.2f}] times as long as one in columns, {float(share):.0%} kept", "make results R=bench/cwic_gpu")


def bench_verdicts(bench: Data) -> list[Verdict]:
    """What the measured products and tokens decide."""
    return [*(verdict_clock(bench["decoding"], name) for name in sorted(bench["decoding"]) if "3x" in name),
            verdict_product(bench["product"]), verdict_kernel(bench["product"])]
