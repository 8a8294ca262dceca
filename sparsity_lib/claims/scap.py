"""The claims of SCAP."""

from __future__ import annotations

from sparsity_lib.claims.base import Claim, Stored, Test, recorded
from sparsity_lib.experiments import scap_center_report as centring
from sparsity_lib.experiments import scap_coverage_report as reach
from sparsity_lib.experiments import scap_report as chapter
from sparsity_lib.verdicts import Verdict


def _front(stored: Stored) -> list[Verdict]:
    data = stored["scap_grid"].data
    return [chapter.verdict_front(data, name) for name in data]


def _tasks(stored: Stored) -> list[Verdict]:
    tasks = stored["scap_tasks"]
    return [chapter.verdict_tasks(tasks.data, name, tasks.manifest["params"]["group"]) for name in tasks.data]


def _decode(stored: Stored) -> list[Verdict]:
    data = stored["bench/scap_decode"].data
    return [rule(data, name) for rule in (chapter.verdict_decode, chapter.verdict_length) for name in data]


def _kernel(stored: Stored) -> list[Verdict]:
    data = stored["bench/scap_decode"].data
    return [chapter.verdict_kernel(data, name) for name in data]


def _centring(stored: Stored) -> list[Verdict]:
    ablation = stored["scap_center"].data["ablation"]
    return [centring.verdict_gain(ablation, name) for name in ablation]


def _groups(stored: Stored) -> list[Verdict]:
    data = stored["scap_grid"].data
    return [chapter.verdict_groups(data, name) for name in data]


def _coverage(stored: Stored) -> list[Verdict]:
    data = stored["scap_coverage"].data
    own = [name for name, each in data.items() if reach.chosen(each) and not each["trained_here"]]
    return [reach.verdict_coverage(data), *(reach.verdict_tolerance(data, name) for name in own)]


def _targets(stored: Stored) -> list[Verdict]:
    data = stored["scap_targets"].data
    return [reach.verdict_targets(data, name, way) for name, ways in data.items() for way in ways]


def _beams(stored: Stored) -> list[Verdict]:
    return [reach.verdict_beams(stored["scap_beams"].data)]


def _centred(stored: Stored) -> list[Verdict]:
    return [centring.verdict_centred(stored["scap_center"].data["distributions"], ["smollm2-135m-instruct"])]


SCAP = (
    Claim("S1", "At a loss of 1.5% on seven tasks 48.5% of the FFN is skipped, by CATS 33.3% (Mistral-7B).", "scap",
          ("fig-fronts", "tab-front-gap", "tab-scap-tasks"), (
        Test("fronts of both methods by KL", _front, ("scap_grid",)),
        Test("seven tasks at equal targets", _tasks, ("scap_tasks",)),
    )),
    Claim("S2", "Decoding is 27.1% faster than dense, with CATS 17.7%; gains shrink with the prompt's length.", "scap",
          ("tab-scap-decode", "tab-speeds"), (Test("the same pair in our decoder", _decode, ("bench/scap_decode",)),)),
    Claim("S3", "Mode-centering lifts the sparsity of down's inputs at -1% from 12.7 to 57.4% (MPT) and 30.5 to 50.3% (Falcon).",
          "scap", ("fig-centring", "tab-centring"), (Test("six networks at equal loss", _centring, ("scap_center",)),)),
    Claim("S4", "Inputs of down are more prunable than inputs of up.", "scap", ("tab-grid",), (
        Test("KL with half of either dropped", _groups, ("scap_grid",)),
    )),
    Claim("S5", "Within -1%, 38 to 59% sparsity on every model of table 4: dense, MoE, Mamba2, ViT, 4 and 8 bits.", "scap",
          ("tab-coverage",), (Test("every kind of network of the table", _coverage, ("scap_coverage",)),)),
    Claim("S6", "Actual sparsity follows its target across tasks and layers.", "scap", ("fig-targets", "tab-targets-met"), (
        Test("sparsity met on tasks and text", _targets, ("scap_targets",)),
    )),
    Claim("S7", "At equal FFN sparsity its SwiGLU is as fast as that of CATS.", "scap", ("fig-blocks-scap",), (
        Test("speed reached over what the bytes allow", _kernel, ("bench/scap_decode",)),
    )),
    Claim("S8", "The overlap of sparse positions falls with the beam width.", "scap", ("fig-beams", "tab-beams"), (
        Test("real beams on SmolLM2", _beams, ("scap_beams",)),
    )),
    Claim("S9", "ReLUfication reaches 82% FFN sparsity and wins on mathematics by its training data; SCAP wins on other tasks "
          "without training.", "scap", ("fig-training", "tab-training"), (
        Test("a small network and its twin with ReLUs, live",
             recorded("scap", "tab-scap-verdicts", "S9", "ReLUfication and training reach 82.2% FFN sparsity, SCAP 42.3%",
                      "points of FFN sparsity of a small network with ReLUs beyond SCAP's on its twin without"), record="scap"),
    )),
    Claim("S10", "Activations behind GLUs are centred already.", "scap", ("fig-distributions", "tab-distributions"), (
        Test("distance of the peak from zero in SmolLM2", _centred, ("scap_center",)),
    )),
)
