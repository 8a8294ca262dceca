"""Many independent tasks: one after another, in local processes, or on a Dask cluster.

    SPARSITY_WORKERS=4 make results R=scap_grid                     # four processes, which share this machine's cores
    SPARSITY_CLUSTER=tcp://HOST:8786 make results R=scap_grid       # the workers of a Dask scheduler

A task is a function of a module, or a partial of one over plain data, and its value is plain data. Whoever computes it sends
it back as JSON text, and the process that asked, the client, hands it to `keep`, which stores it. So there is one writer: a
value is stored once and whole whatever becomes of workers, and workers need not see the client's disk. What a task writes
besides (a trained network, its checkpoints) it writes where it runs: there workers have to share the client's file system.

What can go wrong, and what follows:

- A worker dies: its task runs again elsewhere, `RETRIES` times at most, then an error names the task.
- A task raises: nothing new starts, what is running is finished and kept, then the error is raised.
- Ctrl-C, or a scheduler that is lost: what has come back is kept, the rest is dropped. The same command resumes, for callers
  (`results.Checkpoint`, `notebook_sweep`) ask only for what they have not stored.

Processes receive tasks, and Dask sends tasks and exceptions, as pickles over their own connections, which can run code:
a scheduler must be one that only you and those you trust can reach. No pickle is read from a file.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import re
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, NamedTuple, Protocol, TypeVar

from . import project
from .errors import SparsityError, refuse

#: How many processes, or which Dask scheduler; with neither, tasks run one after another.
WORKERS, CLUSTER = "SPARSITY_WORKERS", "SPARSITY_CLUSTER"
#: Runs of a task after the first, where its worker dies: as many as Dask's own `allowed-failures`.
RETRIES = 3
Opened = TypeVar("Opened")
#: What was opened last, by the function that did and its arguments: one entry at most.
_open: dict[tuple[Callable, str], Any] = {}
_ADDRESS = re.compile(r"(tcp|tls)://([^\s/:\[\]]+|\[[0-9a-fA-F:]+\]):\d{1,5}")


class Task(NamedTuple):
    """name: for messages; compute: takes nothing, returns plain data."""

    name: str
    compute: Callable[[], Any]


class Outcome(NamedTuple):
    """value: as JSON reads it; code: `project.code_hash()` of what computed it; seconds: how long that took."""

    value: Any
    code: str
    seconds: float


class Place(Protocol):
    """Where tasks run."""

    def slots(self) -> int:
        """How many tasks may run at once, now."""

    def start(self, index: int, task: Task) -> None:
        """Run a task; there are fewer than `slots()` already."""

    def finished(self) -> list[tuple[int, Outcome | Exception]]:
        """Wait, a second at most, and return what has come back since the last call; raises where the place is lost."""

    def close(self) -> None:
        """Drop whatever is running."""


def place() -> int | str:
    """What the environment says: a number of processes (1 where it says nothing) or a scheduler's address.

    Raises SparsityError for anything else, and for both at once.
    """
    workers, cluster = (os.environ.get(switch, "").strip() for switch in (WORKERS, CLUSTER))
    if workers and cluster:
        raise SparsityError(f"{WORKERS}={workers} and {CLUSTER}={cluster} contradict each other. Fix: unset one of them.")
    if cluster:
        if not _ADDRESS.fullmatch(cluster):
            raise refuse(CLUSTER, cluster, "the address of a Dask scheduler, tcp://HOST:PORT or tls://HOST:PORT",
                         "take the line that `dask scheduler` prints")
        return cluster
    if workers and (not workers.isdecimal() or int(workers) < 1):
        raise refuse(WORKERS, workers, "a whole number of processes, at least 1")
    return int(workers or 1)


def run(
    tasks: Sequence[Task], keep: Callable[[int, Outcome], object], where: int | str | None = None, code: str | None = None,
) -> None:
    """Run tasks, and call `keep(index, outcome)` here for each as soon as its value is back.

    where: a number of processes (1: in this one), or a scheduler's address; by default `place()`. code: the version of the
    code that is asked for, by default `project.code_hash()`.

    Raises SparsityError for a bad `where`, a task that cannot be sent to another process, one whose workers keep dying, a
    scheduler that cannot be reached or is lost, cluster workers that run other code; and whatever the first task to fail
    raises. `keep` has been called for all that came back until then.
    """
    where = place() if where is None else where
    code = code or project.code_hash()
    if not tasks:
        return
    if where == 1 or (isinstance(where, int) and len(tasks) == 1):
        for index, task in enumerate(tasks):
            keep(index, outcome(answer(task.compute, code)))
        return
    for task in tasks:
        _check(task)
    if isinstance(where, int):
        from .sweep_processes import Processes

        drive(tasks, keep, Processes(min(where, len(tasks))))
    else:
        from .sweep_cluster import Cluster

        drive(tasks, keep, Cluster(where, code))


def drive(tasks: Sequence[Task], keep: Callable[[int, Outcome], object], chosen: Place) -> None:
    """Run tasks at a place, which is closed at the end.

    No more are handed out than can run: a dying worker then takes nothing along but what it was computing, and after a
    failure nothing new starts.
    """
    waiting, running = deque(range(len(tasks))), set()
    failed: Exception | None = None
    try:
        while running or (waiting and failed is None):
            slots = chosen.slots()
            while waiting and failed is None and len(running) < slots:
                chosen.start(waiting[0], tasks[waiting[0]])
                running.add(waiting.popleft())
            for index, found in chosen.finished():
                running.discard(index)
                if isinstance(found, Outcome):
                    keep(index, found)
                elif failed is None:
                    failed = found
                    if running:
                        print(f"{tasks[index].name} failed; {len(running)} more are running and will be kept (Ctrl-C drops "
                              f"them): {found}", file=sys.stderr, flush=True)
    finally:
        chosen.close()
    if failed is not None:
        raise failed


def canonical(value: Any, what: str) -> str:
    """JSON text, the same for the same data; raises SparsityError for what JSON cannot hold, NaN and infinities among it."""
    try:
        return json.dumps(value, sort_keys=True, allow_nan=False, default=_plain)
    except (TypeError, ValueError) as error:
        fix = "keep to finite numbers, texts, lists and dicts"
        raise SparsityError(f"{what} cannot be stored: {error}. Fix: {fix}.") from None


def seal(content: Any) -> str:
    """Checksum (SHA-256) of plain data, which files keep beside it."""
    return hashlib.sha256(canonical(content, "what is kept").encode()).hexdigest()


def _plain(value: Any) -> Any:
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} is not plain data")


def answer(compute: Callable[[], Any], code: str) -> str:
    """An outcome as the text that travels."""
    start = time.monotonic()
    value = compute()
    return canonical({"value": value, "code": code, "seconds": time.monotonic() - start}, "the value of a task")


def outcome(text: str) -> Outcome:
    """What `answer` said."""
    return Outcome(**json.loads(text))


def _check(task: Task) -> None:
    try:
        pickle.dumps(task.compute)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise SparsityError(
            f"{task.name} cannot be sent to another process: {error}. "
            "Fix: make it a function of a module, or a partial of one over plain data."
        ) from None


def kept_open(make: Callable[..., Opened]) -> Callable[..., Opened]:
    """Decorator of what opens a model by plain data: it stays open for the tasks that follow, in this process.

    One is open at a time, whoever opened it, and is let go of before the next: memory need not hold two.
    """
    @wraps(make)
    def opened(*given: Any) -> Opened:
        key = make, canonical(given, f"what {make.__name__} opens")
        if key not in _open:
            let_go()
            _open[key] = make(*given)
        return _open[key]

    return opened


def let_go() -> None:
    """Forget what `kept_open` keeps, as at the end of a sweep."""
    _open.clear()


def alone() -> None:
    """In a worker: what it runs starts no sweep of its own beside the others."""
    for switch in (WORKERS, CLUSTER):
        os.environ.pop(switch, None)
