"""Sweeps: here, by processes, and on a cluster; what workers, schedulers and clients that die leave behind."""

import contextlib
import json
import os
import shutil
import signal
import socket
import sys
import time
import weakref
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import pytest
import sweep_tasks
from processes import start

from sparsity_lib import project, results, sweep, sweep_processes
from sparsity_lib.errors import SparsityError

TESTS = Path(__file__).parent
CLIENT = """
import sys
from functools import partial
import sweep_tasks
from sparsity_lib import results

if __name__ == "__main__":
    kinds = [name for name in sys.argv[2].split(",")]
    try:
        results.Checkpoint("grid").items([({"n": n}, partial(getattr(sweep_tasks, kind), n, sys.argv[1]))
                                          for n, kind in enumerate(kinds)])
    except KeyboardInterrupt:
        sys.exit(130)
"""


@pytest.fixture(scope="module")
def stub(tmp_path_factory):
    return sweep_tasks.stub(tmp_path_factory.mktemp("stub"))


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("notebooks", "results", "sparsity_lib"):
        (folder / name).mkdir()
    for name in ("_toc.yml", "pyproject.toml"):
        (folder / name).write_text("")
    return folder


@pytest.fixture(autouse=True)
def inside(stub, checkout, monkeypatch):
    monkeypatch.setenv(project.SWITCH, str(checkout))
    monkeypatch.syspath_prepend(str(stub))  # for workers; here the library is imported already
    for switch in (sweep.WORKERS, sweep.CLUSTER, results.STRICT):
        monkeypatch.delenv(switch, raising=False)
    yield
    for file in (checkout / "results").rglob("*.json"):
        file.unlink()


@pytest.fixture
def log(tmp_path):
    folder = tmp_path / "log"
    folder.mkdir()
    return folder


def tasks(log, *kinds):
    """Of `sweep_tasks`, by name; a kind may be (name, further argument)."""
    named = [kind if isinstance(kind, tuple) else (kind,) for kind in kinds]
    return [sweep.Task(f"task {n}", partial(getattr(sweep_tasks, name), n, str(log), *more))
            for n, (name, *more) in enumerate(named)]


def kept(jobs, where=None):
    """index -> values kept for it, and the error at the end."""
    found, error = {}, None
    try:
        sweep.run(jobs, lambda index, outcome: found.setdefault(index, []).append(outcome.value), where)
    except Exception as raised:
        error = raised
    return found, error


def squares(found):
    assert all(len(values) == 1 and len(values[0]["long"]) == sweep_tasks.LONG for values in found.values())
    return {index: values[0]["square"] for index, values in found.items()}


def runs(log, n):
    return len(list(log.glob(f"{n}.*")))


def stored():
    """n -> value of all items on disk, which must be whole and alone."""
    files = list(results.Checkpoint("grid").folder.iterdir())
    assert all(file.suffix == ".json" for file in files)
    contents = [json.loads(file.read_text()) for file in files]
    found = {content["params"]["n"]: content["value"] for content in contents}
    assert len(found) == len(files) and all(len(value["long"]) == sweep_tasks.LONG for value in found.values())
    return {n: value["square"] for n, value in found.items()}


def until(true, seconds=60):
    """Wait for something to be so."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.05)


def client(stub, log, *kinds, **switches):
    """A process that computes items of these kinds, by environment variables for where."""
    script = log.parent / "client.py"
    script.write_text(CLIENT)
    paths = os.pathsep.join(map(str, (stub, TESTS)))
    return start(str(script), str(log), ",".join(kinds), env={**os.environ, "PYTHONPATH": paths, **switches})


@pytest.mark.parametrize(("workers", "cluster", "said"), [
    ("many", "", "SPARSITY_WORKERS"), ("0", "", "at least 1"), ("-1", "", "at least 1"), ("1.5", "", "at least 1"),
    ("", "localhost:8786", "tcp://HOST:PORT"), ("", "tcp://a b:1", "tcp://HOST:PORT"), ("", "tcp://host", "tcp://HOST:PORT"),
    ("2", "tcp://host:8786", "contradict"),
])
def test_a_bad_place_is_refused(monkeypatch, log, workers, cluster, said):
    monkeypatch.setenv(sweep.WORKERS, workers)
    monkeypatch.setenv(sweep.CLUSTER, cluster)
    with pytest.raises(SparsityError, match=said):
        sweep.run(tasks(log, "square"), print)
    assert not list(log.iterdir())


@pytest.mark.parametrize(("workers", "cluster", "place"), [
    ("", "", 1), (" 3 ", "", 3), ("", "tcp://[::1]:8786", "tcp://[::1]:8786"), ("", "tls://login-1.example:1", "tls://login-1.example:1"),
])
def test_the_environment_says_where(monkeypatch, workers, cluster, place):
    monkeypatch.setenv(sweep.WORKERS, workers)
    monkeypatch.setenv(sweep.CLUSTER, cluster)
    assert sweep.place() == place


def test_here_one_after_another_until_one_fails(log):
    found, error = kept(tasks(log, "square", "square", "fails", "square"))
    assert squares(found) == {0: 0, 1: 1} and str(error) == "no value for 2" and not runs(log, 3)
    assert found[0][0]["process"] == os.getpid()
    assert kept([]) == ({}, None)


def test_one_model_is_open_at_a_time_whoever_opened_it():
    opened = []

    class Model:
        def __init__(self, name):
            assert not any(reference() for reference in opened), "memory holds the last one still"
            self.name = name
            opened.append(weakref.ref(self))

    @sweep.kept_open
    def one(name, text):
        return Model(name)

    @sweep.kept_open
    def other(name, text):
        return Model(name)

    text = {"sequences": 2, "length": 8}
    assert one("a", text) is one("a", dict(text)) and len(opened) == 1
    for make, given in ((one, ("a", {**text, "length": 9})), (other, ("a", text)), (one, ("b", text)), (one, ("a", text))):
        before = len(opened)
        assert make(*given).name == given[0] and make(*given) is make(*given) and len(opened) == before + 1
    sweep.let_go()
    assert not any(reference() for reference in opened)
    with pytest.raises(SparsityError, match="what one opens"):
        one(Model, text)


def test_processes_share_the_cores_and_lose_nothing(log, monkeypatch):
    found, error = kept(tasks(log, "square", ("dies", 2), "square"), 2)
    assert error is None and squares(found) == {0: 0, 1: 1, 2: 4} and runs(log, 1) == 3
    assert os.getpid() not in {values[0]["process"] for values in found.values()}
    assert {values[0]["threads"] for values in found.values()} == {str(max(1, len(os.sched_getaffinity(0)) // 2))}


def test_what_runs_beside_a_failure_is_kept_and_nothing_new_starts(log):
    jobs = tasks(log, "held", "fails", "square")
    found = {}
    place = sweep_processes.Processes(2)
    begun = place.finished

    def finished():
        came = begun()
        if any(isinstance(outcome, Exception) for _, outcome in came):
            (log / "go").write_text("")
        return came

    place.finished = finished
    with pytest.raises(ValueError, match="no value for 1") as caught:
        sweep.drive(jobs, lambda index, outcome: found.setdefault(index, []).append(outcome.value), place)
    assert squares(found) == {0: 0} and not runs(log, 2)
    assert "sweep_tasks.py" in caught.value.__notes__[0]


def test_errors_of_processes_name_the_task_and_the_cause(log):
    found, error = kept(tasks(log, ("dies", 9), "square"), 2)
    assert isinstance(error, SparsityError) and "task 0: 4 processes" in str(error) and "-9" in str(error)
    assert squares(found) == {1: 1} and runs(log, 0) == 1 + sweep.RETRIES
    _, error = kept(tasks(log, "odd", "nan"), 2)
    assert isinstance(error, SparsityError) and ("Local: odd 0" in str(error) or "cannot be stored" in str(error))


def test_what_no_other_process_could_run_is_refused_at_once(log):
    with pytest.raises(SparsityError, match="named so cannot be sent.*function of a module"):
        sweep.run([*tasks(log, "square"), sweep.Task("named so", lambda: 1)], print, 2)
    assert not list(log.iterdir())


def test_items_of_other_code_or_assets(log, checkout, monkeypatch):
    wanted = [({"n": n}, partial(sweep_tasks.square, n, str(log))) for n in range(2)]
    first = results.Checkpoint("grid", assets={"a.whl": "1"})
    values = first.items(wanted)
    again = results.Checkpoint("grid", assets={"a.whl": "1", "b.whl": "2"})
    assert again.items([*wanted, wanted[0]]) == [*values, values[0]] and (first.reused, again.reused) == (0, 2)
    (log / "0.other").write_text("")
    results.Checkpoint("grid", assets={"a.whl": "3"}).items(wanted)
    assert len(stored()) == 2
    contents = [json.loads(file.read_text()) for file in first.folder.iterdir()]
    assert {content["assets"]["a.whl"] for content in contents} == {"3"}
    (checkout / "sparsity_lib" / "new.py").write_text("")
    try:
        assert len(results.Checkpoint("grid").items(wanted)) == 2
        monkeypatch.setenv(results.STRICT, "1")
        strict = results.Checkpoint("grid")
        with pytest.raises(SparsityError, match=f"computed by code {first._code[:16]}, and this is {strict._code[:16]}"):
            strict.items(wanted)
    finally:
        (checkout / "sparsity_lib" / "new.py").unlink()


KINDS = ("square", "square", "held", "held", "held")


def under_way(stub, log, **switches):
    """A client with two tasks done and the others begun, none of which ends before there is a file `go`."""
    made = client(stub, log, *KINDS, **switches)
    until(lambda: runs(log, 2) and len(list(results.Checkpoint("grid").folder.glob("*.json"))) == 2)
    return made


def ended(process, code):
    """What a client said, which ended with this code."""
    _, said = process.communicate(timeout=60)
    assert process.returncode == code, said
    return said


def finished_by_a_rerun(stub, log, **switches):
    """What was done is kept, and the same command does the rest and no more."""
    assert stored() == {0: 0, 1: 1}
    (log / "go").write_text("")
    ended(client(stub, log, *KINDS, **switches), 0)
    assert stored() == {n: n**2 for n in range(5)} and runs(log, 0) == runs(log, 1) == 1


def interrupted_and_resumed(stub, log, **switches):
    """Ctrl-C to a client, and the same command again."""
    first = under_way(stub, log, **switches)
    first.send_signal(signal.SIGINT)
    ended(first, 130)
    finished_by_a_rerun(stub, log, **switches)


def test_ctrl_c_keeps_what_processes_finished_and_ends_them(stub, log):
    interrupted_and_resumed(stub, log, SPARSITY_WORKERS="2")
    for process in {int(file.suffix[1:]) for file in log.glob("*.*")}:
        until(lambda process=process: not Path(f"/proc/{process}").exists(), 10)


def test_processes_end_with_a_client_that_is_killed(stub, log):
    killed = client(stub, log, "held", "held", SPARSITY_WORKERS="2")
    until(lambda: runs(log, 0) and runs(log, 1))
    killed.kill()
    killed.communicate(timeout=60)
    for file in log.glob("*.*"):
        until(lambda process=int(file.suffix[1:]): not Path(f"/proc/{process}").exists(), 10)


@pytest.fixture(scope="module")
def cluster(stub, checkout, tmp_path_factory):
    made = Cluster(stub, checkout, tmp_path_factory.mktemp("dask"))
    yield made
    made.kill()


@pytest.mark.skipif(find_spec("distributed") is None, reason="the extra 'cluster' is not installed")
class TestCluster:
    """A scheduler and its workers on the loopback interface."""

    def test_a_worker_that_dies_is_replaced(self, cluster, log):
        found, error = kept(tasks(log, "square", ("dies", 1), *["square"] * 4), cluster.address)
        assert error is None and squares(found) == {n: n**2 for n in range(6)} and runs(log, 1) == 2
        assert os.getpid() not in {values[0]["process"] for values in found.values()}

    def test_errors_name_the_task(self, cluster, log):
        found, error = kept(tasks(log, "square", ("dies", 9)), cluster.address)
        assert isinstance(error, SparsityError) and "task 1: 2 workers that ran it died" in str(error), error
        assert squares(found) == {0: 0} and runs(log, 1) == 2
        _, error = kept(tasks(log, "fails"), cluster.address)
        assert isinstance(error, ValueError) and "no value for 0" in str(error)
        _, error = kept([sweep.Task("here only", partial(runs, log, 0))], cluster.address)
        assert isinstance(error, ImportError) and __name__ in str(error)

    def test_a_worker_that_is_killed_while_others_work(self, cluster, stub, log):
        """From outside, as a machine fails: the sweep ends well all the same, with every item stored once."""
        run = under_way(stub, log, SPARSITY_CLUSTER=cluster.address)
        until(lambda: runs(log, 3) and runs(log, 4))
        (victim,) = (int(file.suffix[1:]) for file in log.glob("3.*"))
        os.kill(victim, signal.SIGKILL)
        until(lambda: runs(log, 3) == 2)
        (log / "go").write_text("")
        ended(run, 0)
        assert stored() == {n: n**2 for n in range(5)} and runs(log, 0) == runs(log, 2) == 1

    def test_a_client_that_is_killed(self, cluster, stub, log):
        killed = under_way(stub, log, SPARSITY_CLUSTER=cluster.address)
        killed.kill()
        ended(killed, -signal.SIGKILL)
        finished_by_a_rerun(stub, log, SPARSITY_CLUSTER=cluster.address)

    def test_ctrl_c_keeps_what_workers_finished(self, cluster, stub, log):
        interrupted_and_resumed(stub, log, SPARSITY_CLUSTER=cluster.address)

    def test_workers_of_other_code_are_refused(self, cluster, log, checkout):
        found, error = kept(tasks(log, "square"), cluster.address)  # a worker's code is the one it began with
        assert error is None and squares(found) == {0: 0}
        (checkout / "sparsity_lib" / "new.py").write_text("")
        try:
            _, error = kept(tasks(log, "square"), cluster.address)
            now = project.code_hash()
        finally:
            (checkout / "sparsity_lib" / "new.py").unlink()
        assert isinstance(error, SparsityError) and project.code_hash()[:16] in str(error) and now[:16] in str(error)
        assert runs(log, 0) == 1

    @pytest.mark.parametrize("workers", [True, False], ids=["with its workers", "alone"])
    def test_a_scheduler_that_is_started_anew(self, cluster, stub, log, workers):
        first = under_way(stub, log, SPARSITY_CLUSTER=cluster.address)
        cluster.restart(workers)
        said = ended(first, 1)
        assert "was lost, or started anew" in said and cluster.address in said
        finished_by_a_rerun(stub, log, SPARSITY_CLUSTER=cluster.address)

    def test_no_scheduler(self, log, monkeypatch):
        from sparsity_lib import sweep_cluster

        monkeypatch.setattr(sweep_cluster, "CONNECT", 0.5)
        address = f"tcp://127.0.0.1:{free_port()}"
        _, error = kept(tasks(log, "square"), address)
        assert isinstance(error, SparsityError) and f"no Dask scheduler answers at {address}" in str(error)

    def test_workers_of_several_threads_are_refused(self):
        from sparsity_lib import sweep_cluster

        class Client:
            def run(self, function, workers, on_error):
                return dict.fromkeys(workers, "code")

        place = object.__new__(sweep_cluster.Cluster)
        place._client, place._code, place._checked = Client(), "code", set()
        place._check({"tcp://a:1": 1})
        with pytest.raises(SparsityError, match="tcp://b:1 has 4 threads.*--nthreads 1"):
            place._check({"tcp://b:1": 4})


def test_a_cluster_without_the_extra(log, monkeypatch):
    monkeypatch.setitem(sys.modules, "distributed", None)
    _, error = kept(tasks(log, "square"), "tcp://127.0.0.1:8786")
    assert isinstance(error, SparsityError) and "[cluster]" in str(error)


def free_port():
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


class Cluster:
    """`dask scheduler` and `dask worker` as processes."""

    def __init__(self, stub, checkout, folder):
        self.port, self.folder = free_port(), folder
        self.address = f"tcp://127.0.0.1:{self.port}"
        self.environment = {
            **os.environ, project.SWITCH: str(checkout), "PYTHONPATH": os.pathsep.join(map(str, (stub, folder))),
            "DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES": "1"}
        shutil.copy(sweep_tasks.__file__, folder)
        self.processes = []
        self._start()

    def _start(self):
        for number, arguments in enumerate((
            ("scheduler", "--host", "127.0.0.1", "--port", str(self.port), "--no-dashboard"),
            ("worker", self.address, "--nworkers", "3", "--nthreads", "1", "--host", "127.0.0.1", "--no-dashboard",
             "--local-directory", str(self.folder)),
        )):
            self.processes.append(start(
                "-m", f"distributed.cli.dask_{arguments[0]}", *arguments[1:], env=self.environment, cwd=self.folder,
                start_new_session=True))
            if number == 0:
                until(self._answers)

    def _answers(self):
        with socket.socket() as trying:
            return trying.connect_ex(("127.0.0.1", self.port)) == 0

    def restart(self, workers):
        """The scheduler dies without warning, with its workers or alone, and both are started anew at the same address."""
        if workers:
            self.kill()
        else:
            os.killpg(self.processes[-2].pid, signal.SIGKILL)
            self.processes[-2].communicate(timeout=20)
        self._start()

    def kill(self):
        """End the scheduler, then the workers with the processes they started."""
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):  # it has ended by itself
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate(timeout=20)
        self.processes = []
