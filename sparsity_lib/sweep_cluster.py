"""The workers of a Dask cluster as a place where sweeps run; needs the extra `cluster`."""

from __future__ import annotations

import contextlib
import pickle
import sys
import time
from concurrent.futures import CancelledError
from functools import lru_cache
from typing import Any
from uuid import uuid4

from . import project, sweep
from .errors import SparsityError

#: Seconds to wait for a scheduler, and for leaving it.
CONNECT, CLOSE = 10.0, 5.0
#: Seconds between two looks at what has come back, and at which workers there are.
LOOK, COUNT = 0.05, 1.0
#: What Dask raises where the scheduler is gone: broken connections and timeouts are OSErrors, a closed client a RuntimeError.
_GONE = (OSError, RuntimeError, CancelledError)


class Cluster:
    """One task at a time on each worker of a scheduler; workers may come and go.

    Every worker is asked for `project.code_hash()` before anything runs, and each outcome says it again.

    Raises SparsityError where `distributed` is not installed, no scheduler answers at the address, a worker runs other code
    than `code` or has more than one thread: tasks change what a process has once (torch's threads, the environment).
    """

    def __init__(self, address: str, code: str) -> None:
        try:
            import distributed
        except ImportError:
            raise SparsityError(
                f"{sweep.CLUSTER}={address} needs the package distributed. Fix: pip install '.[cluster]' in the checkout, or "
                f"{sweep.WORKERS}=N for processes of this machine."
            ) from None
        self._address, self._code = address, code
        self._running: dict[int, tuple[sweep.Task, Any]] = {}
        self._checked: set[str] = set()
        self._slots, self._counted, self._waits = 0, 0.0, False
        self._killed = distributed.KilledWorker
        try:
            self._client = distributed.Client(address, timeout=CONNECT, set_as_default=False)
        except (OSError, ValueError) as error:
            raise SparsityError(
                f"no Dask scheduler answers at {address} ({error}). Fix: start one with `dask scheduler`, and look at the "
                "address it prints, and at firewalls between here and there."
            ) from None

    def slots(self) -> int:
        if time.monotonic() >= self._counted + COUNT:
            try:
                threads = self._client.nthreads()
                self._check({worker: threads[worker] for worker in threads.keys() - self._checked})
            except _GONE as error:
                raise self._lost() from error
            self._slots, self._counted = len(threads.keys() & self._checked), time.monotonic()
            if not threads and not self._waits:
                print(f"{self._address} has no workers: the sweep waits for the first.", file=sys.stderr, flush=True)
            self._waits = not threads
        return self._slots

    def _check(self, fresh: dict[str, int]) -> None:
        if not fresh:
            return
        found = self._client.run(_code, workers=list(fresh), on_error="return")
        for worker, code in found.items():
            if isinstance(code, OSError):
                continue  # it has just left, or is asked again
            if isinstance(code, BaseException):
                raise SparsityError(f"worker {worker} cannot tell which code it runs: {type(code).__name__}: {code}")
            if code != self._code:
                raise self._other(worker, code)
            if fresh[worker] != 1:
                raise SparsityError(
                    f"worker {worker} has {fresh[worker]} threads, and tasks need a process each. "
                    "Fix: dask worker --nworkers N --nthreads 1")
            self._checked.add(worker)

    def _other(self, worker: str, code: str) -> SparsityError:
        return SparsityError(
            f"worker {worker} runs code {code[:16]}, and the client {self._code[:16]}: their results would not be one sweep's. "
            "Fix: bring both to the same commit without changes, and restart the workers.")

    def _lost(self) -> SparsityError:
        return SparsityError(
            f"the scheduler at {self._address} was lost, or started anew. What had come back is kept. "
            "Fix: see that it runs and has workers, then the same command resumes.")

    def start(self, index: int, task: sweep.Task) -> None:
        try:
            future = self._client.submit(_answer, pickle.dumps(task.compute), key=f"{task.name}-{uuid4().hex}", pure=False)
        except _GONE as error:
            raise self._lost() from error
        self._running[index] = task, future

    def finished(self) -> list[tuple[int, sweep.Outcome | Exception]]:
        time.sleep(LOOK)
        found = []
        for index, (task, future) in list(self._running.items()):
            if future.status in ("pending", "lost"):
                continue
            try:
                found.append((index, self._outcome(task, future)))
            except _GONE as error:
                raise self._lost() from error
            del self._running[index]
        return found

    def _outcome(self, task: sweep.Task, future: Any) -> sweep.Outcome | Exception:
        if future.status == "cancelled":  # by a lost connection: nobody else does
            raise self._lost()
        if future.status == "error":
            error = future.exception()
            if isinstance(error, self._killed):
                return SparsityError(
                    f"{task.name}: {error.allowed_failures + 1} workers that ran it died. Fix: look at the last one's log; if "
                    "memory ran out, give workers more of it.")
            return error
        outcome = sweep.outcome(future.result())
        return outcome if outcome.code == self._code else self._other("", outcome.code)

    def close(self) -> None:
        """A task that is running cannot be stopped from here: its worker ends it, and drops its value."""
        with contextlib.suppress(*_GONE):
            self._client.cancel([future for _, future in self._running.values()], force=True)
        with contextlib.suppress(*_GONE):
            self._client.close(timeout=CLOSE)


@lru_cache(maxsize=1)
def _code() -> str:
    """In a worker: the version of the code it began with."""
    sweep.alone()
    return project.code_hash()


def _answer(task: bytes) -> str:
    """In a worker: read here what to compute, where a module that is missing fails the task and not the connection."""
    return sweep.answer(pickle.loads(task), _code())
