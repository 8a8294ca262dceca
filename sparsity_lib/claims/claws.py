"""The claims of CLAWS (its abstract is all that is public)."""

from __future__ import annotations

from sparsity_lib.claims.base import Claim, Stored, Test, recorded
from sparsity_lib.evaluate.bench_result import BenchmarkResult
from sparsity_lib.experiments import claws_report, kernels_report, recovery_report
from sparsity_lib.experiments.common import MODELS
from sparsity_lib.verdicts import Verdict, not_testable

#: Blocks whose speed is judged: real masks, and a large shape with scattered ones.
BLOCKS = (*MODELS, "Mistral-7B, scattered masks")


def _avg5(stored: Stored) -> list[Verdict]:
    scores = claws_report.in_order(stored["claws_benchmarks"])
    return [claws_report.verdict_avg5(scores, name) for name in MODELS]


def _recovery(stored: Stored) -> list[Verdict]:
    lora = stored["claws_lora"]
    dense = stored["claws_benchmarks"].data[lora.manifest["params"]["model"]]["dense"]["mmlu"]
    return [recovery_report.verdict_mmlu(lora.data, BenchmarkResult.from_dict(dense)), recovery_report.verdict_avg5(lora.data)]


def _layout(stored: Stored) -> list[Verdict]:
    speeds = [kernels_report.point(found, 0.5)["speedup"] for name, found in stored["bench/matvec"].data.items()
              if name.startswith("int4")]
    return [not_testable(
        "K5", "the mask maps directly to row-major quantised kernels, LaRoSA's column pattern does not",
        "which pattern a kernel can follow is a matter of how it stores the weights, and ours store them as the mask needs: with "
        f"int4 weights kept by input channel, a column pattern at 50% runs {min(speeds):.2f} to {max(speeds):.2f} times as fast "
        "as the best dense product. To test the claim takes a second kernel that follows columns through row-major int4 blocks",
        "make results R=bench/matvec")]


def _blocks(stored: Stored) -> list[Verdict]:
    return [kernels_report.verdict_block(stored["bench/glu"].data, name) for name in BLOCKS]


_SKEW = "per-token activations of gated MLPs are highly skewed"
_MOVES = "the multiplier reorders the native gate score but barely moves LaRoSA's rotated-input score"

CLAWS = (
    Claim("K1", "“gated MLPs whose per-token activations are highly skewed”",
          "claws", ("fig-skewness", "tab-gini", "tab-verdicts"), (
        Test("Gini coefficients of the magnitudes, live on both models",
             recorded("claws", "tab-verdicts", "K1", _SKEW,
                      "Gini coefficient of magnitudes per token, median over the layers of both models; more than a Gaussian's "
                      "0.41 is skewed, an exponential distribution's 0.5 highly"), record="claws"),
    )),
    Claim("K2", "“On Gemma-4-E2B-IT at 50% FFN density, CLAWS recovers dense-level Avg5”",
          "claws", ("tab-avg5",), (
        Test("Avg5 of both models, training-free", _avg5, ("claws_benchmarks",)),
    )),
    Claim("K3", "“surpasses matched-recipe CATS with LoRA by 6.8pp MMLU (49.6 vs. 42.8)”",
          "claws", ("fig-lora", "tab-lora"), (
        Test("one LoRA recipe for both methods, three seeds", _recovery, ("claws_lora", "claws_benchmarks")),
    )),
    Claim("K4", "“this multiplier reorders the native gate score but barely moves LaRoSA's rotated-input score”",
          "claws", ("fig-reorder", "tab-reorder"), (
        Test("share of the mask that a multiplier exchanges, live",
             recorded("claws", "tab-verdicts", "K4", _MOVES,
                      "exchanged share of the top-50% mask, gate over rotated inputs, median over layers; barely: at most half"),
             record="claws"),
    )),
    Claim("K5", "“the top-K mask still maps directly to quantized kernels”; LaRoSA's column pattern is “poorly aligned "
          "with quantized row-major layouts”",
          "kernels", ("fig-latency", "tab-matvec"), (
        Test("int4 products in the layout that a mask needs", _layout, ("bench/matvec",)),
    )),
    Claim("K6", "“a custom ARM kernel delivers a ×1.24 wall-clock speedup on the full MLP block”",
          "kernels", ("fig-blocks", "tab-blocks"), (
        Test("whole FFN blocks, mask included", _blocks, ("bench/glu",)),
    )),
)
