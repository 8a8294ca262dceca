"""The claims of the study of N:M activation pruning."""

from __future__ import annotations

from collections.abc import Callable

from sparsity_lib.claims.base import Claim, Run, Stored, Test, renamed
from sparsity_lib.experiments import nm_report, nm_verdicts
from sparsity_lib.verdicts import Verdict

WRITTEN = ("lambada_openai", "triviaqa")
#: Finer pattern -> how many times less than 2:4 it is said to lose.
FINER = {"16:32": 2.7, "8:16": 2.0}


def _weights(stored: Stored) -> list[Verdict]:
    data = stored["nm_quality"].data
    return [nm_verdicts.verdict_weights(data, name) for name in data]


def _written(stored: Stored) -> list[Verdict]:
    data = stored["nm_tasks"].data
    return [nm_verdicts.verdict_written(data, name, task) for name in data for task in WRITTEN]


def _parity(stored: Stored) -> list[Verdict]:
    data = stored["nm_quality"].data
    return [*(nm_verdicts.verdict_parity(data, name) for name in data),
            *(nm_verdicts.verdict_ratio(data, name, "16:32", FINER["16:32"]) for name in data)]


def _ratios(stored: Stored) -> list[Verdict]:
    tasks = stored["nm_tasks"]
    group = tasks.manifest["params"]["ranked"]
    return [nm_verdicts.verdict_ratio_tasks(tasks.data, name, fine, size, group)
            for fine, size in FINER.items() for name in tasks.data]


def _eight(stored: Stored) -> list[Verdict]:
    data = stored["nm_quality"].data
    ratios = [renamed(nm_verdicts.verdict_ratio(data, name, "8:16", FINER["8:16"]), "N3") for name in data]
    return [nm_verdicts.verdict_hardware(), *ratios]


def _repairs(stored: Stored) -> list[Verdict]:
    data = stored["nm_quality"].data
    return [nm_verdicts.verdict_repair(data, name, **options) for options in nm_report.LIGHT for name in data]


def _of_tasks(*rules: Callable[..., Verdict]) -> Run:
    def run(stored: Stored) -> list[Verdict]:
        tasks = stored["nm_tasks"]
        return [rule(tasks.data, name, tasks.manifest["params"]["ranked"]) for rule in rules for name in tasks.data]

    return run


NM = (
    Claim("N1", "“pruning activations enables superior preservation of generative capabilities compared to weight pruning "
          "at equivalent sparsity levels”",
          "nm", ("fig-weights", "tab-weights", "tab-nm-tasks"), (
        Test("KL with 8:16 activations and with 8:16 weights", _weights, ("nm_quality",)),
        Test("LAMBADA and TriviaQA, which have to be written", _written, ("nm_tasks",)),
    )),
    Claim("N2", "“the 16:32 pattern achieves performance nearly on par with unstructured sparsity”; it loses 2.7 times "
          "less than 2:4, 8:16 twice less",
          "nm", ("fig-patterns", "tab-ratios"), (
        Test("KL of the patterns", _parity, ("nm_quality",)), Test("seven tasks", _ratios, ("nm_tasks",)),
    )),
    Claim("N3", "“considering the trade-off between flexibility and hardware implementation complexity, we focus on the "
          "8:16 pattern as a superior candidate”",
          "nm", ("fig-trade", "tab-trade"), (
        Test("quality against models of cost", _eight, ("nm_quality",)),
    )),
    Claim("N4", "“lightweight, plug-and-play error mitigation techniques”: a learned diagonal scale, shifts, a corrected "
          "variance",
          "nm", ("tab-repairs-8-16", "tab-repairs-2-4", "tab-nm-added"), (
        Test("each repair alone at 8:16", _repairs, ("nm_quality",)),
    )),
    Claim("N5", "“Performance degradation observed on specific tasks like ARC Challenge and HellaSwag”; VAR “helped "
          "maintain performance on … WinoGrande and BoolQ”",
          "nm", ("tab-nm-tasks", "tab-nm-added"), (
        Test("where the seven tasks lose, and what VAR adds", _of_tasks(nm_verdicts.verdict_spread, nm_verdicts.verdict_var),
             ("nm_tasks",)),
    )),
    Claim("N6", "“5.43% drop in performance with 8:16 activation sparsity” (from a summary page; it matches no row that we "
          "know of)",
          "nm", ("tab-nm-tasks",), (
        Test("relative drop of the seven tasks", _of_tasks(nm_verdicts.verdict_unverified), ("nm_tasks",)),
    )),
)
