"""The LoRA recovery's report: the same documents before and after, and a gain whose interval knows seeds and documents."""

import numpy as np
import pytest

from sparsity_lib.evaluate.bench_result import BenchmarkResult, TaskResult, standard_error
from sparsity_lib.evaluate.quality import Quality
from sparsity_lib.experiments import recovery_report
from sparsity_lib.experiments.recovery_report import restricted

AVG5 = ("arc_easy", "arc_challenge", "hellaswag", "piqa", "winogrande")


def result(values, documents, names=AVG5):
    tasks = {}
    for name in names:
        each = {"acc": tuple(values), "acc_norm": tuple(values)}
        mean = {metric: sum(v) / len(v) for metric, v in each.items()}
        error = {metric: standard_error(v) for metric, v in each.items()}
        tasks[name] = TaskResult(name, "test", 0, 100, mean, error, tuple(documents), each)
    return BenchmarkResult(tasks, len(documents), 0, "hf", 1.0, "0")


def test_a_larger_run_restricted_is_the_smaller_run():
    whole, small = result([1.0, 0.0, 0.0, 1.0, 1.0], [2, 3, 5, 7, 9]), result([1.0, 0.0, 1.0], [2, 5, 9])
    found = restricted(whole, small)
    assert found == small and found.score("avg5").mean == pytest.approx(2 / 3)
    with pytest.raises(KeyError):
        restricted(small, whole)


def stored(claws, cats):
    return {
        method: {str(seed): {"avg5": result(v, range(len(v))).to_dict()} for seed, v in enumerate(runs)}
        for method, runs in {"claws": claws, "cats": cats}.items()
    }


def test_the_gain_is_paired_and_in_points():
    same = [[1.0, 0.0, 1.0, 1.0]] * 3
    found = recovery_report.gain(stored(same, same), "avg5")
    assert (found.value, found.low, found.high) == (0.0, 0.0, 0.0)
    found = recovery_report.gain(stored([[1.0] * 4] * 3, [[0.0, 1.0, 0.0, 1.0]] * 3), "avg5")
    assert found.value == 50.0 and 0 < found.low < 50 < found.high <= 100


def test_seeds_that_disagree_widen_the_interval():
    calm = recovery_report.gain(stored([[1.0, 1.0]] * 3, [[0.0, 0.0]] * 3), "avg5")
    torn = recovery_report.gain(stored([[1.0, 1.0], [0.0, 0.0], [0.0, 0.0]], [[0.0, 0.0]] * 3), "avg5")
    assert calm.high - calm.low == 0 and torn.high - torn.low > 50


def test_the_gain_in_kl_is_per_token():
    def found(kl):
        return {"quality": Quality(kl, kl, kl, (10,) * len(kl)).to_json()}

    both = {"claws": {"0": found((3.0, 4.0)), "1": found((3.0, 4.0))}, "cats": {"0": found((2.0, 2.0)), "1": found((2.0, 2.0))}}
    gain = recovery_report.kl_gain(both)
    assert gain.value == pytest.approx(0.15) and gain.low == pytest.approx(0.1) and gain.high == pytest.approx(0.2)


@pytest.mark.parametrize("right, outcome", [(0.2, "not testable here"), (0.6, "reproduced")])
def test_a_model_that_guesses_tests_no_recovery(right, outcome):
    from sparsity_lib.evaluate.groups import resolve

    names, few = resolve("mmlu"), list((np.arange(10) < 10 * right).astype(float))
    values = {"dense": few, "claws": [1.0] * 5 + [0.0] * 5, "cats": [1.0] * 4 + [0.0] * 6}
    runs = {m: result(v, range(10), names) for m, v in values.items()}
    stored = {m: {str(seed): {"mmlu": runs[m].to_dict()} for seed in range(3)} for m in ("claws", "cats")}
    verdict = recovery_report.verdict_mmlu(stored, runs["dense"])
    assert verdict.outcome == outcome
    assert (verdict.number is None) == (outcome == "not testable here")
