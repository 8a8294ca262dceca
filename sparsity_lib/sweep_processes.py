"""Processes of this machine as a place where sweeps run."""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable
from multiprocessing import connection, get_context, parent_process
from typing import Any

from . import project, sweep
from .errors import SparsityError

#: Seconds that an ended worker gets to put things away (a notebook's kernel, temporary folders).
GRACE = 5.0


class Processes:
    """Fresh processes of this machine, which share its cores; each runs one task at a time, and many in turn."""

    def __init__(self, number: int) -> None:
        self._threads = max(1, len(os.sched_getaffinity(0)) // number)
        self._idle = [_Worker(self._threads) for _ in range(number)]
        self._busy: dict[int, tuple[_Worker, sweep.Task]] = {}
        self._deaths: Counter[int] = Counter()

    def slots(self) -> int:
        return len(self._idle) + len(self._busy)

    def start(self, index: int, task: sweep.Task) -> None:
        worker = self._idle.pop()
        self._busy[index] = worker, task
        with contextlib.suppress(BrokenPipeError):  # died while idle: `finished` sees the end of its pipe
            worker.pipe.send(task.compute)

    def finished(self) -> list[tuple[int, sweep.Outcome | Exception]]:
        ready = connection.wait([worker.pipe for worker, _ in self._busy.values()], timeout=1)
        found = []
        for index, (worker, task) in list(self._busy.items()):
            if worker.pipe not in ready:
                continue
            del self._busy[index]
            try:
                message = worker.pipe.recv()
            except (EOFError, OSError):  # at the start of a message, or in the middle of one
                worker.process.join()
                self._idle.append(_Worker(self._threads))
                self._deaths[index] += 1
                if self._deaths[index] <= sweep.RETRIES:
                    self.start(index, task)
                    continue
                message = SparsityError(
                    f"{task.name}: {self._deaths[index]} processes that ran it died, the last with exit code "
                    f"{worker.process.exitcode}. Fix: if memory ran out, run fewer at once ({sweep.WORKERS}).")
            else:
                self._idle.append(worker)
            found.append((index, sweep.outcome(message) if isinstance(message, str) else message))
        return found

    def close(self) -> None:
        processes = [worker.process for worker in [*self._idle, *(worker for worker, _ in self._busy.values())]]
        until = time.monotonic() + GRACE
        try:
            for process in processes:
                process.terminate()
            for process in processes:
                process.join(max(0.0, until - time.monotonic()))
        finally:
            for process in processes:
                process.kill()


class _Worker:
    """A process, and this side of the pipe to it."""

    def __init__(self, threads: int) -> None:
        context = get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, threads))
        self.process.start()
        theirs.close()  # the process alone holds that end, so that its death ends the pipe


def _serve(pipe: connection.Connection, threads: int) -> None:
    """In a worker: answer each task that comes with its outcome as text, or with the exception."""
    signal.signal(signal.SIGINT, lambda *_: None)  # a terminal's Ctrl-C reaches all; the client alone decides what it ends
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # unwinds, so that tasks put their things away
    threading.Thread(target=_end_with_parent, daemon=True).start()
    sweep.alone()
    os.environ["OMP_NUM_THREADS"] = str(threads)  # for what a task starts: notebooks' kernels
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(threads)
    code = project.code_hash()
    while True:
        try:
            compute = pipe.recv()
        except EOFError:
            return
        except Exception as error:  # the task's module does not import here
            pipe.send(_portable(error))
        else:
            pipe.send(_reply(compute, code))


def _reply(compute: Callable[[], Any], code: str) -> str | Exception:
    try:
        return sweep.answer(compute, code)
    except Exception as error:
        return _portable(error)


def _end_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _portable(error: Exception) -> Exception:
    """An exception that another process can read, with its traceback as a note."""
    try:
        error.add_note("In a worker: " + traceback.format_exc())
        pickle.loads(pickle.dumps(error))
        return error
    except Exception:
        return SparsityError(f"{type(error).__name__}: {error}")
