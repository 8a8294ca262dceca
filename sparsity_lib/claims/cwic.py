"""The claims of CWIC, in its two versions."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from sparsity_lib.claims.base import Claim, Stored, Test, of_claim, renamed
from sparsity_lib.experiments import cwic_patterns_report as patterns
from sparsity_lib.experiments import cwic_verdicts as rules
from sparsity_lib.experiments import kernels_report
from sparsity_lib.experiments.cwic_report import beside_head
from sparsity_lib.experiments.scap_report import arranged
from sparsity_lib.verdicts import Verdict

PRODUCTS = ("bfloat16 14336 x 4096", "float32 4096 x 14336")
SHAPES = ("Llama-3.2-1B", "Llama-3.2-3B")
LIMIT = ("cwic_small", "cwic_limit")
#: Stored result -> all that it decides.
MAKE: dict[str, Callable[[Any], Iterable[Verdict]]] = {
    "cwic_small": rules.small_verdicts, "cwic_ablations": rules.ablation_verdicts, "cwic_smol": rules.smol_verdicts,
    "bench/cwic": rules.bench_verdicts,
}


def _from(name: str, claim: str, what: str) -> Test:
    """What one stored result says about one claim."""
    return Test(what, lambda stored: of_claim(MAKE[name](stored[name].data), claim), (name,))


def _watched(claim: str, what: str, of: str = "") -> Test:
    """What the watched masks say about one claim; `of`: under whose id the rule has it."""
    def run(stored: Stored) -> list[Verdict]:
        kept = stored["cwic_patterns"]
        data = arranged(kept.data, kept.manifest["params"]["models"])
        found = of_claim(patterns.verdicts(data, stored["cwic_small"].data["runs"]["active 0"]), of or claim)
        return [renamed(verdict, claim) for verdict in found]

    return Test(what, run, ("cwic_patterns", "cwic_small"))


def _unlimited(claim: str) -> Test:
    """Of both papers: what becomes of the head without its limit."""
    def run(stored: Stored) -> list[Verdict]:
        return [renamed(verdict, claim) for verdict in rules.limit_verdicts(*(stored[name].data for name in LIMIT))]

    return Test("training without the head's limit", run, LIMIT)


def _tasks(stored: Stored) -> list[Verdict]:
    kept = stored["cwic_tasks"]
    return [rules.verdict_tasks(kept.data, kept.manifest["params"]["group"])]


def _headed(stored: Stored) -> list[Verdict]:
    """A1 again, where TEAL's rule is carried on to the head, as its paper does not do."""
    rivals = stored["cwic_head"].data
    found = [verdict for name, model in (("cwic_small", "small-llama"), ("cwic_smol", "smollm2-135m-instruct"))
             for verdict in MAKE[name](beside_head(stored[name].data, rivals[model]))]
    return [verdict for verdict in of_claim(found, "A1") if verdict.claim.endswith(rules.WITH_HEAD)]


def _products(stored: Stored) -> list[Verdict]:
    return [kernels_report.verdict_product(stored["bench/matvec"].data, name) for name in PRODUCTS]


def _decoding(stored: Stored) -> list[Verdict]:
    return [kernels_report.verdict_decode(stored["bench/decode"].data, name) for name in SHAPES]


def _gpu(stored: Stored) -> list[Verdict]:
    return [kernels_report.verdict_gpu(stored["bench/gpu"].data)]


ACTIVE = (
    Claim("A1", "at 66% sparsity “a 15% increase in aggregate benchmark scores over doing the same with TEAL” (1B; 47.5 "
          "against 32.8)",
          "cwic", ("fig-cwic-frontier", "tab-cwic-small", "tab-cwic-smol", "tab-cwic-tasks"), (
        _from("cwic_small", "A1", "the small Llama, trained, beside TEAL's thresholds on its teacher"),
        _from("cwic_smol", "A1", "SmolLM2's learned thresholds beside TEAL's"),
        Test("six tasks on SmolLM2", _tasks, ("cwic_tasks",)),
        Test("TEAL's rule at the head too, which its paper leaves dense", _headed, ("cwic_head", "cwic_small", "cwic_smol")),
    )),
    Claim("A2", "at 66% sparsity “inference by 2.5x in both GPU and CPU settings for Llama3.2-1B and 2.7x for LLama3.2-3B”",
          "kernels", ("fig-latency", "tab-matvec", "fig-decode", "tab-cwic-products", "tab-cwic-decoding"), (
        Test("one product at 66%", _products, ("bench/matvec",)),
        Test("whole models with 35% of the inputs", _decoding, ("bench/decode",)),
        _from("bench/cwic", "A2", "a token of granular SmolLM2"),
        Test("one product at 66% on a GPU", _gpu, ("bench/gpu",)),
    )),
    Claim("A3", "“A CWIC Llama3.2-3B at 66% sparsity outperforms Llama3.2-1B (equal number of active parameters) … by 1.6%”",
          "cwic", ("tab-cwic-twins", "fig-cwic-frontier"), (
        _from("cwic_small", "A3", "dense networks of as many weights, trained alike"),
    )),
    Claim("A4", "“a graceful performance tradeoff at higher sparsity levels”, where others “exhibit performance collapse” "
          "(TEAL beyond 3x)",
          "cwic", ("fig-cwic-frontier",), (
        _from("cwic_small", "A4", "the trained small Llama and TEAL on its teacher, from 2x to 3.5x"),
    )),
    Claim("A5", "“a 1.7% performance hit using column sparsity” in place of stripes (3.05x)",
          "cwic", ("tab-cwic-active",), (
        _from("cwic_ablations", "A5", "training with one stripe for all outputs"),
    )),
    Claim("A6", "“a 1.6% performance drop with MSE on the last hidden states” (3.05x)",
          "cwic", ("tab-cwic-active",), (
        _from("cwic_ablations", "A6", "training with a mean squared error added to the loss"),
    )),
    Claim("A7", "“some channels in the residual stream activate for almost every input across layers … They emerge very "
          "early (100 steps), and stay almost unchanged”",
          "cwic-patterns", ("fig-cwic-channels", "fig-cwic-stripes"), (
        _watched("A7", "how often each channel passes its threshold, in trained networks and during training"),
    )),
    Claim("A8", "“activation of the V matrix is the most dense, followed by K and O … the dip in activation frequencies … "
          "from layers 8-14”",
          "cwic-patterns", ("fig-cwic-layers", "tab-density-smol", "tab-density-small"), (
        _watched("A8", "share of inputs read, by matrix and layer"),
    )),
    Claim("A9", "“Individual attention heads have consistently high/low activations across channels” (inputs of O)",
          "cwic-patterns", ("fig-cwic-heads",), (_watched("A9", "how much of the variance of O's activity lies between heads"),)),
    Claim("A10", "“stripes in the language modeling head corresponding to earlier vocabulary tokens have higher activation "
          "frequencies”; unregulated, “nearly *zero* compute towards infrequent tokens”",
          "cwic-patterns", ("fig-cwic-vocabulary",), (
        _watched("A10", "how often the head's stripes are read, along the vocabulary"),
        _unlimited("A10"),
    )),
    Claim("A11", "“Arc-E taking 5% less compute on average” than ARC-Challenge",
          "cwic-patterns", ("fig-cwic-arc", "tab-cwic-arc"), (
        _watched("A11", "weights read for each question"),
    )),
    Claim("A12", "“quoting sections of the user prompt … uses fewer active parameters. Punctuation, prepositions and "
          "filler words … lower budgets”; role tokens “very low”",
          "cwic-patterns", ("tab-kinds-smol", "tab-kinds-small"), (
        _watched("A12", "weights read for each kind of token"),
    )),
    Claim("A13", "“stable within a range of about 0.05 to 0.25” (bandwidth); momentum of 0.9 to 0.99 “very little impact”; "
          "other kernel functions “similar performance”",
          "cwic", ("tab-cwic-active",), (
        _from("cwic_ablations", "A13", "short runs over bandwidth, momentum and kernel function"),
    )),
    Claim("A14", "“KL divergence between the base and APR models remains stable between 2x-4.5x APR. It curves up beyond”",
          "cwic", ("fig-cwic-training",), (_from("cwic_small", "A14", "KL to the teacher along the schedule"),)),
    Claim("A15", "“θ benefited from a significantly higher learning rate … the base LR multiplied by η√n”",
          "cwic", ("tab-cwic-active",), (
        _from("cwic_ablations", "A15", "training with and without the factor"),
    )),
    Claim("A16", "“longer training in tokens improves quality (as seen with the continued 6x training)”: 43.8 to 44.5",
          "cwic", ("fig-cwic-training",), (
        _from("cwic_small", "A16", "loss before and after the last sixth of the steps, at 6x"),
    )),
    Claim("A17", "“Keeping the stripe size a multiple of the kernel block size … maintains the efficiency of TEAL's triton "
          "kernel”",
          "cwic", ("tab-cwic-products",), (_from("bench/cwic", "A17", "products in stripes beside whole columns, on a CPU"),)),
)
FLOPS = (
    Claim("F1", "“a steady decrease in performance across most benchmarks”: a mean of 57.1 falls to 44.0 from 1x to 6x",
          "cwic", ("fig-cwic-frontier", "tab-cwic-small"), (
        _from("cwic_small", "F1", "loss of the trained small Llama from 1x to 6x"),
    )),
    Claim("F2", "“outperform SmolLM models on MMLU, match on WinoGrande and underperform on ARC/HellaSwag” of equal active "
          "size",
          "cwic", ("tab-cwic-twins",), (Test("the papers' recipe", lambda stored: [rules.verdict_smollm()]),)),
    Claim("F3", "without warm-up or without the head's limit “immediate model collapse and performance equivalent to "
          "random choice”",
          "cwic", ("tab-cwic-flops",), (_from("cwic_ablations", "F3", "training without the warm-up"), _unlimited("F3"))),
    Claim("F4", "without normalisation ARC falls from 44.1 to 42.4 at 3x, without stripes to 25.7 (chance)",
          "cwic", ("tab-cwic-flops",), (
        _from("cwic_ablations", "F4", "training without normalisation, and with one stripe"),
    )),
    Claim("F5", "“individual attention heads will have consistently high or low activations”: O's heads are pruned as "
          "wholes",
          "cwic-patterns", ("fig-cwic-heads",), (
        _watched("F5", "how much of the variance of O's activity lies between heads", of="A9"),
    )),
)
