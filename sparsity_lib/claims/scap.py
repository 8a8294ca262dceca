"""The claims of SCAP."""

from __future__ import annotations

from sparsity_lib.claims.base import Claim, Stored, Test, recorded
from sparsity_lib.experiments import scap_center_report as centring
from sparsity_lib.experiments import scap_coverage_report as reach
from sparsity_lib.experiments import scap_report as chapter
from sparsity_lib.experiments import scap_training
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
    Claim("S1", "“with only a -1.5% deviation from the baseline on Mistral-7B across a set of zero-shot tasks, SCAP "
          "attains 48.5% FFN sparsity compared to CATS' 33.3%”",
          "scap", ("fig-fronts", "tab-front-gap", "tab-scap-tasks"), (
        Test("fronts of both methods by KL", _front, ("scap_grid",)),
        Test("seven tasks at equal targets", _tasks, ("scap_tasks",)),
    )),
    Claim("S2", "“SCAP achieves a speedup of 27.1%, compared to CATS's 17.7%”; “diminishing speedup with increasing prompt "
          "length”",
          "scap", ("tab-scap-decode", "tab-speeds"), (Test("the same pair in our decoder", _decode, ("bench/scap_decode",)),)),
    Claim("S3", "mode-centering lifts the sparsity of down's inputs at -1% “from 12.7% to 57.4%” (MPT-7B), “from 30.5% to "
          "50.3%” (Falcon-7B)",
          "scap", ("fig-centring", "tab-centring"), (
        Test("six networks at equal loss", _centring, ("scap_center",)),
    )),
    Claim("S4", "“the Down projector's activations are more prunable than those of the Up projector”",
          "scap", ("tab-grid",), (
        Test("KL with half of either dropped", _groups, ("scap_grid",)),
    )),
    Claim("S5", "“within a -1% relative task accuracy”: 38 to 59% sparsity on every model of table 4 (dense, MoE, Mamba2, "
          "ViT, 4 and 8 bits)",
          "scap", ("tab-coverage",), (Test("every kind of network of the table", _coverage, ("scap_coverage",)),)),
    Claim("S6", "“the observed sparsity, on average, aligns closely with the target sparsity” across tasks and layers",
          "scap", ("fig-targets", "tab-targets-met"), (Test("sparsity met on tasks and text", _targets, ("scap_targets",)),)),
    Claim("S7", "at equal FFN sparsity “SCAP's SwiGLU performs similarly to, or marginally faster than, CATS's”",
          "scap", ("fig-blocks-scap",), (Test("speed reached over what the bytes allow", _kernel, ("bench/scap_decode",)),)),
    Claim("S8", "“sweeping the beam width clearly revealed a decline in overlapping sparsity”",
          "scap", ("fig-beams", "tab-beams"), (
        Test("real beams on SmolLM2", _beams, ("scap_beams",)),
    )),
    Claim("S9", "TurboSparse reaches “82.2% versus SCAP's 42.3%” FFN sparsity and wins on maths by its training data; on "
          "the remaining tasks SCAP “outperformed TurboSparse”, without training",
          "scap", ("fig-training", "tab-training"), (
        Test("a small network and its twin with ReLUs, live",
             recorded("scap", "tab-scap-verdicts", "S9", "ReLUfication and training reach 82.2% FFN sparsity, SCAP 42.3%",
                      "points of FFN sparsity of a small network with ReLUs beyond SCAP's on its twin without"), record="scap"),
        Test("both on tasks", lambda stored: [scap_training.verdict_scores()]),
    )),
    Claim("S10", "“activations in GLU were observed to be centered”",
          "scap", ("fig-distributions", "tab-distributions"), (
        Test("distance of the peak from zero in SmolLM2", _centred, ("scap_center",)),
    )),
)
