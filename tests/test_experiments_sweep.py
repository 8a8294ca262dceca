"""Experiments whose items may run anywhere: what is handed over can travel, and comes back from other processes the same."""

import inspect
import json
import os
import pickle
import sys
from functools import partial

import pytest
from distributed_tiny import scored

from sparsity_lib import project, results, sweep
from sparsity_lib.assets import load_tokenizer, model_path
from sparsity_lib.experiments import EXPERIMENTS, common, compare_common, compare_quality, compare_search
from sparsity_lib.sweep import canonical

#: Here and one by one: what is timed, trials that start processes, and networks that are trained where their checkpoints are.
TIMED = [name for name in EXPERIMENTS if name.startswith("bench/")]
ALONE = [*TIMED, "stress", "smallnets"]
BEST = {"rotate": "ffn", "score": "magnitude", "head": "refined", "allocation": "spread"}


class Known(Exception):
    """The items are known; none is computed."""


class Collecting:
    """A checkpoint that takes down what it is asked for."""

    def __init__(self):
        self.wanted = []

    def items(self, wanted):
        self.wanted += wanted
        raise Known

    def item(self, params, compute):
        raise AssertionError("items that need nothing of each other go through checkpoint.items")


@pytest.mark.parametrize("name", [*(name for name in EXPERIMENTS if name not in ALONE), "compare_search, second step"])
def test_items_are_functions_of_modules_over_plain_data(name, monkeypatch):
    monkeypatch.setenv(sweep.WORKERS, "2")
    checkpoint = Collecting()
    with pytest.raises(Known):
        if name in EXPERIMENTS:
            EXPERIMENTS[name](checkpoint)
        else:
            compare_search.tried(checkpoint, BEST)
    assert len(checkpoint.wanted) > 1
    assert len({canonical(params, "parameters") for params, _ in checkpoint.wanted}) == len(checkpoint.wanted)
    for params, compute in checkpoint.wanted:
        json.dumps(params, allow_nan=False)
        assert isinstance(compute, partial)
        assert getattr(sys.modules[compute.func.__module__], compute.func.__name__) is compute.func
        given = json.dumps([compute.args, compute.keywords], allow_nan=False)  # a model, or a tensor, is not plain
        there = pickle.loads(pickle.dumps(compute))
        assert there.func is compute.func and json.dumps([there.args, there.keywords]) == given


@pytest.mark.parametrize("name", TIMED)
def test_what_is_timed_stays_here(name):
    assert "checkpoint.items" not in inspect.getsource(sys.modules[EXPERIMENTS[name].__module__])


@pytest.fixture
def small(tmp_path, monkeypatch):
    """The name under which every process can open a small model, the only one that there is."""
    folder = tmp_path / "small"
    tokenizer = load_tokenizer(str(model_path("smollm2-135m-instruct")))
    scored(tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for part in (*project.MARKS, "results", "sparsity_lib"):
        (tmp_path / part).mkdir()
    monkeypatch.setenv(project.SWITCH, str(tmp_path))
    monkeypatch.setattr(common, "MODELS", (str(folder),))
    monkeypatch.setattr(common, "CALIBRATION", {"tokens": 64, "length": 32, "seed": 0})
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})  # a thread each, as here: sums come in one order
    return str(folder)


def here_and_there(monkeypatch, run):
    """What a run gives in this process, and by two others."""
    for switch in (sweep.WORKERS, sweep.CLUSTER):
        monkeypatch.delenv(switch, raising=False)
    here = run(results.Checkpoint("here"))
    sweep.let_go()
    monkeypatch.setenv(sweep.WORKERS, "2")
    monkeypatch.setattr(compare_common, "Bench", None)  # not this process
    return here, run(results.Checkpoint("there"))


def test_an_evaluation_by_two_processes_finds_the_same(small, monkeypatch):
    for name, value in {"EVERY_METHOD": ("cats", "teal_head"), "SHARES": (0.002, 0.3), "EVERY": {small: 2},
                        "TEXT": {"sequences": 3, "length": 32}}.items():
        monkeypatch.setattr(compare_quality, name, value)
    here, there = here_and_there(monkeypatch, compare_quality.run)
    assert canonical(here, "here") == canonical(there, "there")
    rows = here[0][small]["methods"]
    assert list(rows) == ["cats", "teal_head"] and "quality" in rows["cats"][0] and "reason" in rows["cats"][1]


def test_a_search_by_two_processes_finds_the_same(small, monkeypatch):
    text = {"tokens": 64, "length": 32, "seed": 1}
    for name, value in {"FITTED": text, "COSTS": text, "JUDGED": text, "SHARES": (0.3,),
                        "BLOCKS": tuple(compare_search.BLOCKS[i] for i in (0, 3)), "HEADS": ("dense", "inputs"),
                        **dict.fromkeys(("HEAD_EVERY", "JUDGED_EVERY"), {small: 2})}.items():
        monkeypatch.setattr(compare_search, name, value)
    here, there = here_and_there(monkeypatch, compare_search.searched)
    assert canonical(here, "here") == canonical(there, "there")
    assert len(here[small]) == 4 + 2 and compare_search.chosen(here) == compare_search.chosen(there)
