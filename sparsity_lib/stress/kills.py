"""Interruptions at random moments: Ctrl-C, which a program may answer, and SIGKILL, which it cannot."""

from __future__ import annotations

import signal
import time
from pathlib import Path
from typing import Any

from sparsity_lib.errors import SparsityError
from sparsity_lib.stress import children
from sparsity_lib.stress.base import Attempts, trial
from sparsity_lib.stress.writers import WRITERS, Writer, undisturbed

HOLDS = ("afterwards nothing torn can be seen, and the same command, run again, ends with the same content as a run that nobody "
         "disturbed")


def _times(t: Attempts, number: int, times: int) -> None:
    """Interrupt every writer so many times a round, then let it finish."""
    expected = undisturbed(t.folder)
    litter = 0
    order = (*WRITERS[::2], *WRITERS[1::2])  # a quick trial makes a few rounds only, and ought to meet each kind
    for i in t.rounds(4, 6 * len(WRITERS)):
        writer = order[i % len(WRITERS)]
        folder = t.folder / f"{i}"
        folder.mkdir()
        began = time.monotonic()
        if children.run(lambda w=writer, f=folder: w.write(f)) != children.DONE:
            t.lose(f"{writer.name} does not even work undisturbed")
            continue
        took = time.monotonic() - began
        folder = t.folder / f"{i} interrupted"
        folder.mkdir()
        for round_ in range(times):
            t.note(f"{writer.name} {i}.{round_}")
            code = children.interrupt(children.start(lambda w=writer, f=folder: w.write(f)), number, t.random.random() * took)
            allowed = (children.DONE, children.INTERRUPTED) if number == signal.SIGINT else (children.DONE, -number)
            t.check(f"{writer.name} {i}.{round_} ended with {code}", code in allowed and _whole(writer, folder, expected))
        code = children.run(lambda w=writer, f=folder: w.write(f))
        t.check(f"{writer.name} {i}, run again, ended with {code}", code == children.DONE)
        t.check(f"{writer.name} {i}, run again, gave other content", _content(writer, folder) == expected[writer.name])
        litter += len(list(folder.rglob("*.partial")))
    t.facts["left"] = litter


def _content(writer: Writer, folder: Path) -> Any:
    try:
        return writer.read(folder)
    except SparsityError as error:
        return f"torn: {error}"


def _whole(writer: Writer, folder: Path, expected: dict[str, Any]) -> bool:
    return _content(writer, folder) in (None, expected[writer.name])


@trial("interruptions", "Ctrl-C at random moments of a fit, a training run, a run of results, an asset's fetch, a chapter's run, "
       "a sweep", HOLDS)
def ctrl_c(t: Attempts) -> None:
    _times(t, signal.SIGINT, 3)


@trial("interruptions", "SIGKILL at random moments of the same", HOLDS)
def sigkill(t: Attempts) -> None:
    _times(t, signal.SIGKILL, 3)


@trial("interruptions", "several processes that do the same into the same place at once",
       "the content of an undisturbed run; a process that does not take part says that another one is at it")
def two_at_once(t: Attempts) -> None:
    expected = undisturbed(t.folder)
    for i in t.rounds(len(WRITERS), 6 * len(WRITERS)):
        writer = WRITERS[i % len(WRITERS)]
        folder = t.folder / f"{i}"
        folder.mkdir()
        t.note(f"{writer.name} {i}")
        started = [children.start(lambda w=writer, f=folder: w.write(f)) for _ in range(3)]
        codes = [children.end(child) for child in started]
        good = children.DONE in codes and set(codes) <= {children.DONE, children.REFUSED}
        t.refused += codes.count(children.REFUSED)
        t.check(f"{writer.name} {i} ended with {codes}", good)
        t.check(f"{writer.name} {i} gave other content", _content(writer, folder) == expected[writer.name])
