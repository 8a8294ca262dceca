"""Trials: what is tried, what has to hold, and how attempts are counted and kept apart from whoever started them."""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import random
import shutil
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sparsity_lib.errors import SparsityError, refuse, shown, unknown

#: Kinds of trials, in the order of the book's page.
GROUPS = ("inputs", "files", "system", "interruptions", "processes", "security", "bits")
SIZES = ("quick", "full")
#: Seconds after which a trial counts as hanging.
PATIENCE = {"quick": 300, "full": 7200}
#: No error may be longer (letters): it is read by people.
LONGEST = 4000
#: Losses that are described; all are counted.
DESCRIBED = 5


class NotHereError(Exception):
    """This machine cannot make the trial (no right to mount, say)."""


@dataclass(frozen=True)
class Trial:
    """name; group; tried: a sentence; holds: what must hold; run: makes the attempts."""

    name: str
    group: str
    tried: str
    holds: str
    run: Callable[[Attempts], None]


#: Every trial by name, filled by `trial` when the modules of this package are imported.
TRIALS: dict[str, Trial] = {}


def trial(group: str, tried: str, holds: str) -> Callable[[Callable[[Attempts], None]], Callable[[Attempts], None]]:
    """Register a function as a trial under its own name."""

    def register(function: Callable[[Attempts], None]) -> Callable[[Attempts], None]:
        name = function.__name__.replace("_", "-")
        if group not in GROUPS or name in TRIALS:
            raise refuse("trial", name, f"a new name in one of the groups {', '.join(GROUPS)}")
        TRIALS[name] = Trial(name, group, tried, holds, function)
        return function

    return register


@dataclass
class Attempts:
    """What a trial is given: a folder of its own, a source of randomness, and the counts.

    right, refused: attempts that ended well. lost: how many did not, the first few of them described. facts: measured numbers
    for the book's page.
    """

    folder: Path
    size: str
    random: random.Random
    log: int | None = None
    right: int = 0
    refused: int = 0
    lost: int = 0
    described: list[str] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    def rounds(self, quick: int, full: int) -> range:
        """As many rounds as the size asks for."""
        return range(quick if self.size == "quick" else full)

    def attempt(self, what: str, call: Callable[[], Any], holds: Callable[[Any], bool] = lambda found: True, *,
                right: bool = True, refusal: type[Exception] = SparsityError) -> None:
        """Make one attempt: right if `call` returns what `holds`, refused if it raises a clear error, lost for all else.

        right: whether a result is allowed at all. refusal: the class of a clear error.
        """
        self.note(what)
        try:
            found = call()
            good = right and holds(found)
        except refusal as error:
            text = str(error)
            clear = bool(text.strip()) and len(text) <= LONGEST
            self.refused += clear
            if not clear:
                self.lose(f"{what}: an error of {len(text)} letters")
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            self.lose(f"{what}: {type(error).__name__}: {shown(str(error))} in {Path(where.filename).name}:{where.lineno}")
        else:
            self.right += good
            if not good:
                self.lose(f"{what}: {'gave another result than it should' if right else 'was accepted'}")

    def check(self, what: str, good: bool) -> None:
        """Count an attempt whose outcome is known already."""
        self.right += bool(good)
        if not good:
            self.lose(what)

    def lose(self, what: str) -> None:
        """Count a loss."""
        self.lost += 1
        if len(self.described) < DESCRIBED:
            self.described.append(what)

    def note(self, what: str) -> None:
        """Leave word of the attempt that begins, should this process not live to tell."""
        if self.log is not None:
            os.ftruncate(self.log, 0)
            os.pwrite(self.log, what.encode("utf-8", "backslashreplace")[:2000], 0)

    def counts(self) -> dict[str, Any]:
        """As plain data."""
        return {"tried": self.right + self.refused + self.lost, "right": self.right, "refused": self.refused,
                "lost": self.lost, "described": self.described, "facts": self.facts}


def find(names: list[str]) -> list[Trial]:
    """Trials by name, all for none; raises SparsityError for an unknown one."""
    for name in names:
        if name not in TRIALS:
            raise unknown("trial", name, TRIALS)
    return [TRIALS[name] for name in names] or sorted(TRIALS.values(), key=lambda each: GROUPS.index(each.group))


def run(chosen: Trial, size: str = "full", seed: int = 0) -> dict[str, Any]:
    """Make a trial in a child process, so that a crash is one more outcome; returns its counts and the seconds it took.

    The scratch folder is gone afterwards, and so is every process that the trial started.
    """
    if size not in SIZES:
        raise unknown("size", size, SIZES)
    start = time.monotonic()
    with _scratch() as folder:
        answer, log = folder / "answer.json", folder / "attempt.log"
        child = os.fork()
        if child == 0:
            _child(chosen, size, seed, folder, answer, log)
        status = _wait(child, PATIENCE[size])
        found = json.loads(answer.read_text()) if answer.exists() else None
        if found is None:
            how = "did not end" if status is None else f"ended with status {status}"
            at = log.read_text(errors="replace") if log.exists() else "its beginning"
            found = {"tried": 1, "right": 0, "refused": 0, "lost": 1, "described": [f"the process {how} at {at}"], "facts": {}}
    about = {"name": chosen.name, "group": chosen.group, "tried_what": chosen.tried, "holds": chosen.holds}
    return {**about, **found, "seconds": round(time.monotonic() - start, 1)}


@contextlib.contextmanager
def _scratch() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="sparsity-stress-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _child(chosen: Trial, size: str, seed: int, folder: Path, answer: Path, log: Path) -> None:
    """Everything that happens in the child; never returns."""
    os.setsid()  # its own group, so that all it starts can be ended with it
    signal.signal(signal.SIGINT, signal.default_int_handler)
    said = os.open(folder / "said.txt", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(said, stream)
    faulthandler.disable()  # a crash is counted, and would be shown wherever the parent shows its own
    attempts = Attempts(folder / "work", size, random.Random(f"{chosen.name} {seed}"), os.open(log, os.O_CREAT | os.O_RDWR))
    attempts.folder.mkdir()
    os.environ.update(SPARSITY_PROGRESS="0", HF_HUB_OFFLINE="1")
    try:
        chosen.run(attempts)
        found = attempts.counts()
    except NotHereError as error:
        found = {**attempts.counts(), "not_here": str(error)}
    except BaseException:
        attempts.lose(f"the trial itself failed: {traceback.format_exc()[-1500:]}")
        found = attempts.counts()
    answer.with_suffix(".partial").write_text(json.dumps(found))
    os.replace(answer.with_suffix(".partial"), answer)
    os._exit(0)


def _wait(child: int, seconds: float) -> int | None:
    """The child's exit status (negative: a signal), or None where it had to be ended; its group is gone in any case."""
    deadline, status = time.monotonic() + seconds, None
    try:
        while status is None and time.monotonic() < deadline:
            ended, raw = os.waitpid(child, os.WNOHANG)
            if ended:
                status = os.waitstatus_to_exitcode(raw)
            else:
                time.sleep(0.02)
    finally:  # Ctrl-C too: the child has a session of its own and does not hear it
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)
        if status is None:
            os.kill(child, signal.SIGKILL)  # it may not have come to have a group yet
            os.waitpid(child, 0)
    return status
