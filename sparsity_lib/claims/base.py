"""A claim of a paper, the tests it is put to, and what became of them: computed from stored results, never typed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from sparsity_lib import project, records, results
from sparsity_lib.errors import SparsityError
from sparsity_lib.experiments.scap_report import stored as load
from sparsity_lib.verdicts import DIRECTION, NOT_REPRODUCED, NOT_TESTABLE, REPRODUCED, Verdict

MIXED, PENDING = "mixed", "pending"
#: What can become of a claim, in the order in which the page counts them.
OUTCOMES = (REPRODUCED, DIRECTION, MIXED, NOT_REPRODUCED, NOT_TESTABLE, PENDING)
#: Stored results by name, as a test gets them.
Stored = Mapping[str, results.Result]
Run = Callable[[Stored], Iterable[Verdict]]


@dataclass(frozen=True)
class Test:
    """One way in which a claim is tested.

    what: our experiment in a few words. run: from the results named in `needs` to verdicts.
    record: the chapter whose committed record `run` reads, for what a chapter measures live.
    """

    __test__ = False  # not one of pytest's

    what: str
    run: Run
    needs: tuple[str, ...] = ()
    record: str = ""

    def missing(self) -> str:
        """The command that makes what it needs, or why there is none; empty where it can be judged."""
        from sparsity_lib.experiments import EXPERIMENTS, ON_GPU

        absent = [name for name in self.needs if name not in results.names()]
        if unknown := [name for name in absent if name not in EXPERIMENTS]:
            return f"this book has no experiment called {unknown[0]}"
        if absent:
            names = absent[0] if len(absent) == 1 else '"' + " ".join(absent) + '"'
            where = " on a machine with a GPU" if set(absent) & set(ON_GPU) else ""
            return f"`make results R={names}`{where}"
        if self.record and not record_file(self.record).exists():
            return f"`make refresh NB={self.record}`"
        return ""

    def verdicts(self) -> list[Verdict]:
        """What became of it.

        Raises
        ------
        SparsityError
            Where results are missing, damaged, or lack what the rule reads.
        """
        if why := self.missing():
            raise SparsityError(f"{self.what}: pending: {why}")
        try:
            return list(self.run({name: load(name) for name in self.needs}))
        except (KeyError, IndexError, StopIteration) as error:
            files = ", ".join(f"results/{name}.json" for name in self.needs) or f"the record of {self.record}"
            raise SparsityError(f"{self.what}: {files} lacks {error}. Fix: make it again.") from error


@dataclass(frozen=True)
class Claim:
    """A claim by its number in this book.

    words: the paper's, with its number. chapter: the notebook that tests it. labels: figures and tables that show ours, of this
    chapter or another.
    """

    id: str
    words: str
    chapter: str
    labels: tuple[str, ...]
    tests: tuple[Test, ...]


@dataclass(frozen=True)
class Judged:
    """A claim with its verdicts, and for each test without one: what it is, and the command that makes what it needs."""

    claim: Claim
    verdicts: tuple[Verdict, ...]
    missing: tuple[tuple[str, str], ...]

    @property
    def outcome(self) -> str:
        """One word for all verdicts, by `together`."""
        return together([v.outcome for v in self.verdicts])


def together(outcomes: Sequence[str]) -> str:
    """One word for many outcomes.

    The word itself where all agree; "direction only" where some are that and others reproduced; "mixed" where some are not
    reproduced and others are, at least in direction. What is not testable counts only if nothing else is there, and nothing at
    all is "pending".
    """
    tested = set(outcomes) - {NOT_TESTABLE}
    if not tested:
        return NOT_TESTABLE if outcomes else PENDING
    if len(tested) == 1:
        return tested.pop()
    return MIXED if NOT_REPRODUCED in tested else DIRECTION


def judge(claim: Claim) -> Judged:
    """Put a claim to those of its tests whose results are there."""
    verdicts: list[Verdict] = []
    missing = []
    for test in claim.tests:
        if why := test.missing():
            missing.append((test.what, why))
        else:
            verdicts += test.verdicts()
    return Judged(claim, tuple(verdicts), tuple(missing))


def record_file(chapter: str) -> Path:
    """Where a chapter's committed record is."""
    return project.root() / "notebooks" / "records" / f"{chapter}.json"


def of_claim(verdicts: Iterable[Verdict], claim: str) -> list[Verdict]:
    """Those of one claim: of this id, or of this id with something after a comma."""
    return [v for v in verdicts if v.claim.partition(",")[0] == claim]


def renamed(verdict: Verdict, claim: str) -> Verdict:
    """The same verdict under another claim's id."""
    return replace(verdict, claim=claim + verdict.claim[len(verdict.claim.partition(",")[0]) :])


def recorded(chapter: str, table: str, claim: str, words: str, experiment: str) -> Run:
    """A test's `run` for verdicts that a chapter computes from live measurements: read from its committed record.

    Takes every row of the glued table `table` whose claim is `claim`, or begins with it and a comma, and has a number.
    """

    def run(stored: Stored) -> list[Verdict]:
        entries = records.read(record_file(chapter))
        found = []
        for key, entry in entries.items():
            name = key.removeprefix(f"{table}: ").removesuffix(", verdict")
            number = f"{table}: {name}, our number [95% interval]"
            if key != f"{table}: {name}, verdict" or name.partition(",")[0] != claim or number not in entries:
                continue
            ends = [entries[number + end]["value"] for end in ("", " low", " high")]
            found.append(Verdict(name, words, experiment, *ends, entry["value"], "computed when the chapter was last executed"))
        if not found:
            raise SparsityError(f"the record of {chapter} has no verdict on {claim} in {table}. Fix: make refresh NB={chapter}")
        return found

    return run
