"""The claims of the study of N:M activation pruning."""

from __future__ import annotations

from sparsity_lib.claims.base import Claim, Stored, Test
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
    return [nm_verdicts.verdict_hardware(), *(nm_verdicts.verdict_ratio(data, name, "8:16", FINER["8:16"]) for name in data)]


def _repairs(stored: Stored) -> list[Verdict]:
    data = stored["nm_quality"].data
    return [nm_verdicts.verdict_repair(data, name, **options) for options in nm_report.LIGHT for name in data]


def _of_tasks(rule) -> object:
    def run(stored: Stored) -> list[Verdict]:
        tasks = stored["nm_tasks"]
        return [rule(tasks.data, name, tasks.manifest["params"]["ranked"]) for name in tasks.data]

    return run


NM = (
    Claim("N1", "Pruning activations keeps generation better than pruning weights at equal sparsity.", "nm",
          ("fig-weights", "tab-weights", "tab-nm-tasks"), (
        Test("KL with 8:16 activations and with 8:16 weights", _weights, ("nm_quality",)),
        Test("LAMBADA and TriviaQA, which have to be written", _written, ("nm_tasks",)),
    )),
    Claim("N2", "16:32 is nearly as good as unstructured sparsity, and loses 2.7 times less than 2:4.", "nm",
          ("fig-patterns", "tab-ratios"), (
        Test("KL of the patterns", _parity, ("nm_quality",)), Test("seven tasks", _ratios, ("nm_tasks",)),
    )),
    Claim("N3", "8:16 is the best trade of quality against the cost of hardware.", "nm", ("fig-trade", "tab-trade"), (
        Test("quality against models of cost", _eight, ("nm_quality",)),
    )),
    Claim("N4", "Light repairs help: a learned diagonal scale, shifts, a corrected variance.", "nm",
          ("tab-repairs-8-16", "tab-repairs-2-4"), (Test("each repair alone at 8:16", _repairs, ("nm_quality",)),)),
    Claim("N5", "The drop concentrates on ARC-Challenge and HellaSwag; VAR helps WinoGrande and BoolQ.", "nm", ("tab-nm-tasks",), (
        Test("where the seven tasks lose", _of_tasks(nm_verdicts.verdict_spread), ("nm_tasks",)),
    )),
    Claim("N6", "5.43% lost at 8:16 (from a summary page; no row of the paper could be matched to it).", "nm", ("tab-nm-tasks",), (
        Test("relative drop of the seven tasks", _of_tasks(nm_verdicts.verdict_unverified), ("nm_tasks",)),
    )),
)
