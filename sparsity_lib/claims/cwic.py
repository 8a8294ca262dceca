"""The claims of CWIC, in its two versions."""

from __future__ import annotations

from sparsity_lib.claims.base import Claim, Stored, Test
from sparsity_lib.experiments import kernels_report
from sparsity_lib.verdicts import Verdict

PRODUCTS = ("bfloat16 14336 x 4096", "float32 4096 x 14336")
SHAPES = ("Llama-3.2-1B", "Llama-3.2-3B")


def _products(stored: Stored) -> list[Verdict]:
    return [kernels_report.verdict_product(stored["bench/matvec"].data, name) for name in PRODUCTS]


def _decoding(stored: Stored) -> list[Verdict]:
    return [kernels_report.verdict_decode(stored["bench/decode"].data, name) for name in SHAPES]


ACTIVE = (
    Claim("A1", "At 66% sparsity 15 points above TEAL in aggregate (1B).", "cwic", (), (
        Test("a trained small network beside TEAL's thresholds on its teacher"),
    )),
    Claim("A2", "2.5 times as fast at 66% on CPU and GPU (1B), 2.7 times (3B).", "kernels",
          ("fig-latency", "tab-matvec", "fig-decode"), (
        Test("one product at 66%", _products, ("bench/matvec",)),
        Test("whole models with 35% of the inputs", _decoding, ("bench/decode",)),
    )),
    Claim("A3", "The 3B model at 3.05x beats the dense 1B model by 1.6 points.", "cwic", (), (
        Test("two sizes trained alike, the larger one sparse"),
    )),
    Claim("A4", "It declines gracefully where TEAL collapses beyond 3x.", "cwic", (), (Test("both from 2x to 6x"),)),
    Claim("A5", "Without stripes 1.7 points lower at 3.05x.", "cwic", (), (Test("ablation: one stripe"),)),
    Claim("A6", "The ablation with a mean squared error is 1.6 points lower.", "cwic", (), (
        Test("ablation: a mean squared error on the last hidden states"),
    )),
    Claim("A7", "Some residual channels fire for almost every input in all layers, are there after 100 steps, and stay.", "cwic",
          (), (Test("activation frequencies during training"),)),
    Claim("A8", "V is the densest, then K and O; frequencies dip in the middle layers.", "cwic", (), (
        Test("activation frequencies by matrix and layer"),
    )),
    Claim("A9", "Whole heads of O are consistently high or low.", "cwic", (), (Test("frequencies within and between heads"),)),
    Claim("A10", "Head stripes of early, frequent vocabulary fire more; unregulated, infrequent tokens collapse.", "cwic", (), (
        Test("frequencies of the head's stripes, with and without its limit"),
    )),
    Claim("A11", "ARC-Easy questions take 5% less compute than ARC-Challenge ones.", "cwic", (), (
        Test("active weights by question"),
    )),
    Claim("A12", "Punctuation, filler words, role tokens and quoted spans take little.", "cwic", (), (
        Test("active weights by kind of token"),
    )),
    Claim("A13", "Stable for bandwidths of 0.05 to 0.25; the momentum of 0.9 to 0.99 and the kernel's shape hardly matter.", "cwic",
          (), (Test("short runs over bandwidth, momentum and kernel"),)),
    Claim("A14", "KL to the teacher is flat from 2x to 4.5x, then rises.", "cwic", (), (Test("KL along the schedule"),)),
    Claim("A15", "Thresholds want a learning rate scaled by the square root of the width.", "cwic", (), (
        Test("runs with and without the factor"),
    )),
    Claim("A16", "More training at 6x helps: 43.8 to 44.5.", "cwic", (), (Test("training continued at 6x"),)),
    Claim("A17", "A stripe as large as the kernel's block keeps the efficiency of TEAL's kernel.", "cwic", (), (
        Test("products with stripes beside those without"),
    )),
)
FLOPS = (
    Claim("F1", "The average falls steadily from 57.1 to 44.0 from 1x to 6x.", "cwic", (), (Test("quality from 1x to 6x"),)),
    Claim("F2", "Against SmolLM of equal active size: better on MMLU, level on WinoGrande, worse on ARC and HellaSwag.", "cwic", (), (
        Test("a sparse network beside a dense one of its active size"),
    )),
    Claim("F3", "Without warmup or without the head's limit training collapses to chance.", "cwic", (), (
        Test("ablations: no warmup, no limit"),
    )),
    Claim("F4", "Without normalisation a moderate loss; without stripes near chance.", "cwic", (), (
        Test("ablations: no normalisation, one stripe"),
    )),
    Claim("F5", "Heads of O are pruned as wholes.", "cwic", (), (Test("frequencies within and between heads"),)),
)
