"""A claim of a paper, the tests it is put to, and what became of them: computed from stored results, never typed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sparsity_lib import project, records, results
from sparsity_lib.errors import SparsityError
from sparsity_lib.verdicts import DIRECTION, NOT_REPRODUCED, NOT_TESTABLE, REPRODUCED, Verdict

MIXED, NOT_RUN = "mixed", "not run yet"
#: What can become of a claim, in the order in which the page counts them.
OUTCOMES = (REPRODUCED, DIRECTION, MIXED, NOT_REPRODUCED, NOT_TESTABLE, NOT_RUN)
#: Stored results by name, as a test gets them.
Stored = Mapping[str, results.Result]


@dataclass(frozen=True)
class Test:
    """One way in which a claim is tested.

    what: our experiment in a few words. run: from the results named in `needs` to verdicts; None while nobody has written it.
    record: the chapter whose committed record `run` reads instead, for what a chapter measures live.
    """

    __test__ = False  # not one of pytest's

    what: str
    run: Callable[[Stored], Iterable[Verdict]] | None = None
    needs: tuple[str, ...] = ()
    record: str = ""

    def missing(self) -> str:
        """Why it cannot be judged yet, with the command that changes this; empty where it can."""
        from sparsity_lib.experiments import EXPERIMENTS

        absent = [name for name in self.needs if name not in results.names()]
        known = [name for name in absent if name in EXPERIMENTS]
        if known:
            return f"not run yet: `make results R={known[0]}`" if len(known) == 1 else (
                f"not run yet: `make results R=\"{' '.join(known)}\"`")
        if self.record and not record_file(self.record).exists():
            return f"not run yet: `make refresh NB={self.record}`"
        if absent or self.run is None:
            return "not run yet: its experiment is not in the book"
        return ""

    def verdicts(self) -> list[Verdict]:
        """What became of it. Raises SparsityError where results are missing or damaged."""
        if self.run is None:
            raise SparsityError(f"{self.what}: {self.missing()}")
        return list(self.run({name: _load(name) for name in self.needs}))


@dataclass(frozen=True)
class Claim:
    """A claim by its number in this book.

    words: what the paper says, in short, with its number. labels: figures and tables of `chapter` that show ours.
    """

    id: str
    words: str
    chapter: str
    labels: tuple[str, ...]
    tests: tuple[Test, ...]


@dataclass(frozen=True)
class Judged:
    """A claim with its verdicts, and the reasons of the tests that have none."""

    claim: Claim
    verdicts: tuple[Verdict, ...]
    missing: tuple[tuple[str, str], ...]

    @property
    def outcome(self) -> str:
        """One word for all verdicts: theirs where they agree (what is not testable left out), else "mixed"."""
        return together([v.outcome for v in self.verdicts])


def together(outcomes: Sequence[str]) -> str:
    """One word for many outcomes: "reproduced" if all are, "direction only" if some are only that, "not reproduced" if none is
    even that, "mixed" otherwise; what is not testable counts only where nothing else is there, and nothing at all is "not run
    yet".
    """
    tested = set(outcomes) - {NOT_TESTABLE}
    if not tested:
        return NOT_TESTABLE if outcomes else NOT_RUN
    if len(tested) == 1:
        return tested.pop()
    return MIXED if NOT_REPRODUCED in tested else DIRECTION


def judge(claim: Claim) -> Judged:
    """Put a claim to those of its tests whose results are there."""
    verdicts: list[Verdict] = []
    missing = []
    for test in claim.tests:
        why = test.missing()
        if why:
            missing.append((test.what, why))
        else:
            verdicts += test.verdicts()
    return Judged(claim, tuple(verdicts), tuple(missing))


def _load(name: str) -> results.Result:
    from sparsity_lib.experiments.scap_report import stored

    return stored(name)


def record_file(chapter: str) -> Any:
    """Where a chapter's committed record is."""
    return project.root() / "notebooks" / "records" / f"{chapter}.json"


def recorded(chapter: str, table: str, claim: str, words: str, experiment: str) -> Callable[[Stored], list[Verdict]]:
    """A test's `run` for verdicts that a chapter computes from live measurements: read from its committed record.

    Takes every row of the glued table `table` whose claim is `claim` or begins with it and a comma.
    """

    def run(stored: Stored) -> list[Verdict]:
        entries = records.read(record_file(chapter))
        found = []
        for key, entry in entries.items():
            name = key.removeprefix(f"{table}: ").removesuffix(", verdict")
            if key == f"{table}: {name}, verdict" and (name == claim or name.startswith(f"{claim},")):
                number = f"{table}: {name}, our number [95% interval]"
                value, low, high = (entries[number + end]["value"] if number + end in entries else None
                                    for end in ("", " low", " high"))
                found.append(Verdict(name, words, experiment, value, low, high, entry["value"],
                                     "as computed when the chapter was last executed"))
        if not found:
            raise SparsityError(f"the record of {chapter} has no verdict on {claim} in {table}. Fix: make refresh NB={chapter}")
        return found

    return run
