"""Evaluations shared by two processes: what one finds, and no hanging where they differ or one dies."""

import json
import os
import signal
import time
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from core_tiny import tiny, tokens
from distributed_tiny import CASES, found
from hypothesis import given
from hypothesis import strategies as st
from processes import start, together

from sparsity_lib import SparsityError, distributed, fit, recipes
from sparsity_lib.distributed import Ranks
from sparsity_lib.evaluate.quality import evaluate

TESTS = Path(__file__).parent


@pytest.fixture(scope="module")
def apart(tmp_path_factory):
    """By rank, what each of two processes found."""
    folder = tmp_path_factory.mktemp("ranks")
    run = together(2, str(TESTS / "distributed_tiny.py"), str(folder))
    _, errors = run.communicate(timeout=300)
    assert run.returncode == 0, errors
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


@pytest.fixture(scope="module")
def alone():
    with distributed() as ranks:
        assert (ranks.index, ranks.count, ranks.first) == (0, 1, True)
        return json.loads(json.dumps(found()))


@pytest.mark.parametrize("case", CASES)
def test_two_processes_find_what_one_does(apart, alone, case):
    assert apart[0][case] == apart[1][case], "each has the whole result"
    assert near(apart[0][case], alone[case])


def near(one, other) -> bool:
    """Equal, numbers within what another order of sums makes of float32."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(near(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(near, one, other))
    return one == pytest.approx(other, rel=1e-5, abs=1e-6) if isinstance(one, float) else one == other


def test_each_does_a_share(apart, alone):
    tried = 2  # forwards with which each makes sure of the head; then two plans on three batches
    assert [each["forwards"] - tried for each in apart] == [4, 2] and alone["forwards"] - tried == 6
    read = [each["read"] for each in apart]
    assert min(read) > 0.3 * alone["read"] and sum(read) < 1.2 * alone["read"], "about half of the benchmarks' tokens"


def test_only_the_first_draws_bars(apart):
    assert [each["bars"] for each in apart] == [True, False]


def test_processes_that_differ_are_told(apart):
    assert all("the work of rank 1 is other than that of rank 0" in each["differs"] for each in apart)


KILLED = f"""
import os, signal, sys
sys.path.insert(0, {str(TESTS)!r})
import conftest
from contextlib import contextmanager
from core_tiny import tiny, tokens
from sparsity_lib import distributed
from sparsity_lib.evaluate.quality import evaluate

@contextmanager
def die():
    if ranks.index == int(sys.argv[1]):
        open(os.path.join(sys.argv[2], "died"), "w").close()
        os.kill(os.getpid(), signal.SIGKILL)
    yield

with distributed() as ranks:
    open(os.path.join(sys.argv[2], str(os.getpid())), "w").close()
    print(evaluate(tiny("llama"), {{"killed": die}}, tokens(4)))
"""


@pytest.mark.parametrize("rank", [0, 1])
def test_one_that_is_killed_ends_all(tmp_path, rank):
    script = tmp_path / "child.py"
    script.write_text(KILLED)
    out, errors = (run := together(2, str(script), str(rank), str(tmp_path))).communicate(timeout=300)
    assert run.returncode == 1 and f"exitcode  : {-signal.SIGKILL}" in errors and "Quality" not in out
    pids = [int(path.name) for path in tmp_path.glob("[0-9]*")]
    assert len(pids) == 2 and not any(Path(f"/proc/{pid}").exists() for pid in pids)
    assert time.time() - (tmp_path / "died").stat().st_mtime < 60, "the other one waits for what will never come"


FAILS = f"""
import json, os, sys
sys.path.insert(0, {str(TESTS)!r})
import conftest
from contextlib import contextmanager
from core_tiny import tiny, tokens
from sparsity_lib import distributed, fit, recipes
from sparsity_lib.evaluate.quality import evaluate

@contextmanager
def fail():
    if ranks.index == 1:
        raise MemoryError("no room")
    yield

model, said = tiny("llama"), ""
with distributed() as ranks:
    for density in (0.2, 0.4):
        plan = fit(recipes.cats(density), model, ids=tokens(3, 12))
        try:
            found = evaluate(model, {{"it": fail if density == 0.2 else plan}}, tokens(4, 12))["it"].to_json()
        except Exception as error:
            said = f"{{type(error).__name__}}: {{error}}"
    with open(os.path.join(sys.argv[1], f"{{ranks.index}}.json"), "w") as file:
        json.dump([said, found], file)
"""


def test_an_error_in_one_is_told_to_all_and_the_next_results_are_right(tmp_path):
    script = tmp_path / "child.py"
    script.write_text(FAILS)
    _, errors = (run := together(2, str(script), str(tmp_path))).communicate(timeout=300)
    assert run.returncode == 0, errors
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    assert [each[0] for each in found] == [
        "SparsityError: The work failed in the process of rank 1: MemoryError: no room. Fix: what it names, there.",
        "MemoryError: no room"]
    model = tiny("llama")
    whole = evaluate(model, {"it": fit(recipes.cats(0.4), model, ids=tokens(3, 12))}, tokens(4, 12))["it"].to_json()
    assert all(near(each[1], json.loads(json.dumps(whole))) for each in found)


def test_contexts_do_not_nest_and_leave_nothing():
    with distributed(), pytest.raises(SparsityError, match="one `with distributed"), distributed():
        pass
    with distributed():
        pass


@pytest.mark.parametrize("bars", [None, "0", "1"])
def test_the_switch_of_bars_is_left_as_it_was(monkeypatch, bars):
    monkeypatch.delenv("SPARSITY_PROGRESS", raising=False)
    if bars is not None:
        monkeypatch.setenv("SPARSITY_PROGRESS", bars)
    with distributed():
        pass
    assert os.environ.get("SPARSITY_PROGRESS") == bars


def test_outside_of_a_context_nothing_is_shared(monkeypatch):
    """A process that a launcher started, and that asks for nothing, works alone: the others may be doing something else."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert len(evaluate(tiny("llama"), {"same": nullcontext}, tokens(2))["same"].nll) == 2


@given(st.lists(st.integers(0, 1000), max_size=40), st.integers(1, 9))
def test_shares_are_all_of_it_once_and_about_equal(costs, count):
    ranks = [Ranks(index, count, torch.device("cpu")) for index in range(count)]
    parts = [list(range(len(costs)))[rank.share(costs)] for rank in ranks]
    assert [item for part in parts for item in part] == list(range(len(costs)))
    heaviest = max((sum(costs[item] for item in part) for part in parts), default=0)
    assert heaviest <= sum(costs) / count + max(costs, default=0)


NODE = f"""
import json, os, sys
sys.path.insert(0, {str(TESTS)!r})
import conftest
from core_tiny import tiny, tokens
from sparsity_lib import distributed
from sparsity_lib.evaluate.quality import evaluate

with distributed() as ranks:
    found = evaluate(tiny("llama"), {{}}, tokens(5))["dense"].to_json()
    print(json.dumps([ranks.index, ranks.count, os.environ["LOCAL_RANK"], found]))
"""


def test_two_launchers_as_on_two_machines(tmp_path):
    """Each starts one process, as on a machine of its own; they meet at an address."""
    script = tmp_path / "child.py"
    script.write_text(NODE)
    port = str(20_000 + int(time.time() * 1000) % 20_000)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    nodes = [start("-m", "torch.distributed.run", "--nnodes", "2", "--node-rank", str(rank), "--nproc-per-node", "1",
                   "--master-addr", "127.0.0.1", "--master-port", port, str(script), env=environment) for rank in (0, 1)]
    found = []
    for node in nodes:
        out, errors = node.communicate(timeout=300)
        assert node.returncode == 0, errors
        found.append(json.loads(out.strip().splitlines()[-1]))
    whole = json.loads(json.dumps(evaluate(tiny("llama"), {}, tokens(5))["dense"].to_json()))
    assert [each[:3] for each in found] == [[0, 2, "0"], [1, 2, "0"]]
    assert found[0][3] == found[1][3] and near(found[0][3], whole)
