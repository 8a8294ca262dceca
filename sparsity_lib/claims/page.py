"""The page on claims, as MyST text: counts, one block a claim, the papers' slips."""

from __future__ import annotations

from functools import cache
from itertools import groupby

from sparsity_lib.book.markdown import labels, number, plural, reference, table
from sparsity_lib.claims import OUTCOMES, PAPERS, Judged, cwic_slips, judge
from sparsity_lib.claims.base import MIXED, NOT_RUN
from sparsity_lib.errors import unknown
from sparsity_lib.experiments import scap_slips
from sparsity_lib.verdicts import DIRECTION, NOT_REPRODUCED, NOT_TESTABLE, REPRODUCED, Verdict

#: A sign beside each word, so that an outcome is never told by its colour alone.
SIGNS = {REPRODUCED: "✓", DIRECTION: "↗", MIXED: "±", NOT_REPRODUCED: "✗", NOT_TESTABLE: "∅", NOT_RUN: "…"}


@cache
def judged() -> dict[str, tuple[Judged, ...]]:
    """Paper -> its claims with what became of them; computed once a process."""
    return {paper: tuple(judge(claim) for claim in claims) for paper, claims in PAPERS.items()}


def badge(outcome: str) -> str:
    """An outcome with its sign."""
    return f'<span class="outcome outcome-{outcome.replace(" ", "-")}">{SIGNS[outcome]} {outcome}</span>'


def summary() -> str:
    """A sentence on how many claims there are and what became of them."""
    every = [j for found in judged().values() for j in found]
    verdicts = sum(len(j.verdicts) for j in every)
    counts = {o: sum(j.outcome == o for j in every) for o in OUTCOMES}
    words = ", ".join(f"{count} {outcome}" for outcome, count in counts.items() if count)
    return f"{plural(len(every), 'claim')}, {plural(verdicts, 'verdict')}: {words}."


def counts() -> str:
    """A table: papers by outcomes, with the sum."""
    rows = [[paper, *(sum(j.outcome == o for j in found) for o in OUTCOMES), len(found), sum(len(j.verdicts) for j in found)]
            for paper, found in judged().items()]
    total = ["**all**", *(sum(row[i] for row in rows) for i in range(1, len(OUTCOMES) + 3))]
    return table(["paper", *(badge(o) for o in OUTCOMES), "claims", "verdicts"], [*rows, total],
                 "What became of the claims. A claim may have several verdicts, one a model or setting; where some are "
                 "reproduced and some not, it is mixed.", "tab-claims")


def overview(paper: str) -> str:
    """A table of a paper's claims: number, words, outcome."""
    rows = [[f"[{j.claim.id}](#claim-{j.claim.id.lower()})", j.claim.words, badge(j.outcome)] for j in _of(paper)]
    return table(["claim", "the paper says", "here"], rows, style="claims-overview")


def blocks(paper: str) -> str:
    """One block a claim of a paper, with everything that its verdicts rest on."""
    return "\n".join(_block(j) for j in _of(paper))


def _of(paper: str) -> tuple[Judged, ...]:
    if paper not in judged():
        raise unknown("paper", paper, judged())
    return judged()[paper]


def _block(found: Judged) -> str:
    claim = found.claim
    parts = [f":::{{rubric}} {claim.id}\n:name: claim-{claim.id.lower()}\n:heading-level: 3\n:class: claim\n:::",
             f"{badge(found.outcome)} {claim.words}"]
    for experiment, verdicts in groupby(found.verdicts, key=lambda v: v.experiment):
        parts += [f"*Here:* {_sentence(experiment)}", _verdicts(claim.id, list(verdicts))]
    parts += [f"*Here:* {what}. **{why[0].upper()}{why[1:]}.**" for what, why in found.missing]
    shown = [reference(label) for label in claim.labels if label in labels()]
    where = f"Shown in {' and '.join(filter(None, (', '.join(shown[:-1]), shown[-1])))}." if shown else ""
    stored = sorted({name for test in claim.tests for name in test.needs if not test.missing()})
    made = ", ".join(f"[`{name}`](#result-{name.replace('/', '-').replace('_', '-')})" for name in stored)
    sources = f"Computed from {made}." if made else ""
    return "\n\n".join([*parts, f"{where} {sources}".strip(), ""])


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:].rstrip(".") + "."


def _verdicts(claim: str, verdicts: list[Verdict]) -> str:
    rows = []
    for verdict in verdicts:
        where = verdict.claim.removeprefix(claim).removeprefix(",").strip() or "overall"
        own = None if verdict.number is None else number(verdict.number, verdict.low, verdict.high)
        rows.append([where, own, badge(verdict.outcome), verdict.because])
    return table(["setting", "our number [95% interval]", "verdict", "because"], rows, style="claim-verdicts")


def cwic_rows() -> str:
    """CWIC's slips as a table."""
    return table(["where", "printed", "computed again"], cwic_slips.rows(),
                 "Numbers and words in both versions of CWIC's paper that do not agree with each other.", "tab-cwic-slips")


def scap_rows() -> str:
    """SCAP's slips as a table."""
    changes = scap_slips.relative_rows()
    worst = next(row for row in changes if row[:2] == ["Mistral-7B", "CATS 90%"])
    wrong = sum(row[-1] == "pruned" for row in changes)
    speed = scap_slips.printed_speed()
    rows = [
        ["tables 5 and 6", f"{len(changes)} changes \"relative\" to the dense model",
         f"{wrong} of them divide by the pruned score; CATS at 90% on Mistral, printed {worst[2]}%, lost {worst[3]}%"],
        ["abstract", f"\"{scap_slips.CLAIMED:g}x additional speed-up\" over CATS",
         f"a ratio of two percentages, {speed.of_percentages:.2f}; the ratio of the speeds is {speed.of_speeds:.2f}"],
        ["section 4.3", "centring raises sparsity by 44.7%",
         "; ".join(f"{row[0]}: {row[1]} to {row[2]}%, which is {row[3]} points or {row[4]}%" for row in scap_slips.centring_rows())],
        ["algorithm 2, last line", "multiplies the down matrix by x", "the gated product is meant; by x the shapes would not fit"],
    ]
    return table(["where", "printed", "computed again"], rows, "Numbers and words in SCAP's paper that say something else than meant.",
                 "tab-scap-slips")
