"""What several processes do together when one of them fails: the tests that try it, run as trials."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Callable
from xml.etree import ElementTree

from sparsity_lib import project
from sparsity_lib.stress.base import Attempts, NotHereError, trial

_SWEEP, _CLUSTER = "test_sweep.py", "test_sweep.py::TestCluster"
#: By trial: what is tried, what has to hold, and the tests that do it.
TESTS = {
    "cluster-worker-killed": (
        "a worker of a Dask cluster that dies, or is killed, in the middle of a sweep, once and again and again",
        "its task runs on another worker; one that kills every worker is named, and the others' results are there",
        (f"{_CLUSTER}::test_a_worker_that_dies_is_replaced", f"{_CLUSTER}::test_a_worker_that_is_killed_while_others_work",
         f"{_CLUSTER}::test_errors_name_the_task")),
    "cluster-scheduler-restarted": (
        "a Dask scheduler that is killed, alone or with its workers, and started anew under a sweep",
        "a clear error, what was finished is kept, and the same command finishes the rest: every result once, none torn",
        (f"{_CLUSTER}::test_a_scheduler_that_is_started_anew",)),
    "sweep-interrupted": (
        "Ctrl-C to the client of a sweep, and a client that is killed, over processes and over a cluster",
        "what was finished is kept, no process is left, and the same command finishes the rest",
        (f"{_CLUSTER}::test_ctrl_c_keeps_what_workers_finished", f"{_CLUSTER}::test_a_client_that_is_killed",
         f"{_SWEEP}::test_ctrl_c_keeps_what_processes_finished_and_ends_them",
         f"{_SWEEP}::test_processes_end_with_a_client_that_is_killed")),
    "sweep-other-code": (
        "workers whose code is not the client's",
        "refused before anything runs",
        (f"{_CLUSTER}::test_workers_of_other_code_are_refused",)),
    "training-killed": (
        "training that is killed, or stopped at a step: one process, either of two, and two that share the weights",
        "from the last checkpoint on, the very losses of a run that nobody disturbed",
        ("test_trainer.py::test_an_interrupted_run_goes_on_as_if_nothing_had_happened",
         "test_trainer_processes.py::test_a_killed_process_loses_nothing_but_time",
         "test_trainer_processes.py::test_one_of_two_that_is_killed_ends_both_and_loses_nothing_but_time",
         "test_cwic_sharded.py::test_a_killed_run_goes_on_with_the_very_losses_it_would_have_had")),
    "training-by-two": (
        "two processes in place of one: training, with whole and with split weights",
        "the losses of one process, up to rounding",
        ("test_trainer_processes.py::test_two_processes_train_what_one_does",
         "test_cwic_processes.py::test_two_processes_train_what_one_does",
         "test_cwic_sharded.py::test_two_processes_with_split_weights_train_what_one_does")),
    "evaluation-by-two": (
        "two processes in place of one, of one launcher or two: perplexity, KL and benchmarks; given other texts; one killed",
        "the numbers of one process, up to rounding; refused; and ended at once, with the other",
        ("test_distributed.py::test_two_processes_find_what_one_does", "test_distributed.py::test_processes_that_differ_are_told",
         "test_distributed.py::test_two_launchers_as_on_two_machines",
         "test_distributed.py::test_one_that_is_killed_ends_all")),
    "download-interrupted": (
        "a download that Ctrl-C ends, and a disk that fills in each of its phases",
        "nothing torn in the cache, and an error that names the folder and the fix",
        ("test_assets_fetch.py::test_ctrl_c_in_the_middle_of_a_download",
         "test_assets_fetch.py::test_full_disk_names_folder_and_fix")),
}


def run(t: Attempts, tests: tuple[str, ...]) -> None:
    """Run tests, an attempt each case; quick: only find them.

    Raises
    ------
    NotHereError
        Where the tests or pytest are missing: an installed library without its checkout, say.
    """
    folder = project.root() / "tests"
    if not folder.is_dir() or importlib.util.find_spec("pytest") is None:
        raise NotHereError("it takes a checkout with its tests, and pytest")
    report = t.folder / "report.xml"
    how = ["--collect-only"] if t.size == "quick" else [f"--junitxml={report}"]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:randomly", *how, *tests]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if t.size == "quick":
        t.check(f"tests cannot be collected: {done.stdout[-500:]}", done.returncode == 0)
        return
    found = outcomes(report.read_text()) if report.exists() else []
    if not found:
        t.lose(f"no test has run: {(done.stdout + done.stderr)[-500:]}")
    for name, problem, why in found:
        if not why:
            t.check(f"{name}: {problem}", not problem)
    skipped = next((f"{name}: {why}" for name, _, why in found if why), None)
    if skipped is not None and not t.lost:
        raise NotHereError(skipped)


def outcomes(report: str) -> list[tuple[str, str, str]]:
    """(name, what went wrong, why it was skipped) of every test in pytest's XML."""
    found = []
    for case in ElementTree.fromstring(report).iter("testcase"):
        said = {kind: case.find(kind) for kind in ("failure", "error", "skipped")}
        bad = said["failure"] if said["failure"] is not None else said["error"]
        problem = "" if bad is None else bad.get("message") or "failed"
        found.append((case.get("name"), problem, "" if said["skipped"] is None else said["skipped"].get("message")))
    return found


def _register(name: str, tried: str, holds: str, tests: tuple[str, ...]) -> Callable[[Attempts], None]:
    def attempt(t: Attempts) -> None:
        run(t, tests)

    attempt.__name__ = name
    return trial("processes", tried, holds)(attempt)


for _name, _about in TESTS.items():
    _register(_name, *_about)
