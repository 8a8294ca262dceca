"""The page on claims, as MyST text: counts, one block a claim, the papers' slips."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cache

from sparsity_lib.book.markdown import cell, labels, link, listed, number, pages, plural, reference, table
from sparsity_lib.claims import OUTCOMES, PAPERS, Judged, judge
from sparsity_lib.claims.base import MIXED, PENDING
from sparsity_lib.errors import unknown
from sparsity_lib.experiments import cwic_slips, scap_slips
from sparsity_lib.experiments.claws_report import short
from sparsity_lib.verdicts import DIRECTION, NOT_REPRODUCED, NOT_TESTABLE, REPRODUCED, Verdict

#: What verdicts call by the code's names -> what a reader calls it.
IDENTIFIERS = {
    "lambada_openai": "LAMBADA", "triviaqa": "TriviaQA", "arc_easy": "ARC-Easy", "arc_challenge": "ARC-Challenge",
    "hellaswag": "HellaSwag", "winogrande": "WinoGrande", "down_in": "down's inputs", "up_in": "gate's and up's inputs",
    "qkv_in": "the inputs of q, k and v", "o_in": "o's inputs", "+-": "±",
    "minilm-l6": "MiniLM", "smollm2 int8": "SmolLM2, int8",
}
_IDENTIFIERS = re.compile("|".join(rf"(?<![\w-]){re.escape(name)}(?![\w-])" for name in IDENTIFIERS))
#: A sign beside each word, so that an outcome is never told by its colour alone.
SIGNS = {REPRODUCED: "✓", DIRECTION: "↗", MIXED: "±", NOT_REPRODUCED: "✗", NOT_TESTABLE: "∅", PENDING: "…"}


@cache
def judged() -> dict[str, tuple[Judged, ...]]:
    """Paper -> its claims with what became of them; computed once a process."""
    return {paper: tuple(judge(claim) for claim in claims) for paper, claims in PAPERS.items()}


def badge(outcome: str) -> str:
    """An outcome with its sign."""
    return f'<span class="outcome outcome-{outcome.replace(" ", "-")}">{SIGNS[outcome]} {outcome}</span>'


def sign(outcome: str) -> str:
    """An outcome's sign alone, which still has its name."""
    name = f"outcome outcome-{outcome.replace(' ', '-')}"
    return f'<span class="{name}" role="img" aria-label="{outcome}">{SIGNS[outcome]}</span>'


def summary() -> str:
    """A sentence on how many claims there are and what became of them."""
    every = [j for found in judged().values() for j in found]
    counted = {o: sum(j.outcome == o for j in every) for o in OUTCOMES}
    words = listed(f"{count} {outcome}" for outcome, count in counted.items() if count)
    verdicts = sum(len(j.verdicts) for j in every)
    return f"So far there are {plural(verdicts, 'verdict')} on {plural(len(every), 'claim')}. Claim by claim: {words}."


def counts() -> str:
    """A table: papers by outcomes, with the sum."""
    rows = [[link_to(paper), *(sum(j.outcome == o for j in found) for o in OUTCOMES), len(found)]
            for paper, found in judged().items()]
    rows.append(["all papers", *(sum(row[i] for row in rows) for i in range(1, len(OUTCOMES) + 2))])
    caption = ("What became of the claims. One is put to several models or settings where that is possible; it is *mixed* where "
               "some reproduce it and some do not.")
    return table(["paper", *(badge(o) for o in OUTCOMES), "all"], rows, caption, "tab-claims")


def link_to(paper: str) -> str:
    """A link to a paper's part of the page."""
    return f"[{paper}](#claims-{paper.lower().replace(', ', '-').replace(' ', '-').replace(':', '')})"


def index(paper: str) -> str:
    """One line of links to a paper's claims, each with its sign."""
    return " · ".join(f"[{j.claim.id}](#claim-{j.claim.id.lower()}) {sign(j.outcome)}" for j in _of(paper)) + "\n"


def blocks(paper: str) -> str:
    """One block a claim of a paper, with everything that its verdicts rest on."""
    return "\n".join(_block(j) for j in _of(paper))


def _of(paper: str) -> tuple[Judged, ...]:
    if paper not in judged():
        raise unknown("paper", paper, judged())
    return judged()[paper]


def _block(found: Judged) -> str:
    claim = found.claim
    heading = f"{{#claim-{claim.id.lower()} .claim}}\n### {claim.id} {badge(found.outcome)}"
    parts = [heading, f"*The paper:* {_sentence(claim.words)}"]
    tested = [verdict for verdict in found.verdicts if verdict.outcome != NOT_TESTABLE]
    by_experiment: dict[str, list[Verdict]] = {}
    for verdict in tested:
        by_experiment.setdefault(verdict.experiment, []).append(verdict)
    for experiment, verdicts in by_experiment.items():
        parts += [f"*Here:* {_sentence(_readable(experiment))}", "\n".join(_item(claim.id, verdict) for verdict in verdicts)]
    parts += [_untestable(claim.id, verdict) for verdict in found.verdicts if verdict.outcome == NOT_TESTABLE]
    parts += [f"*Here:* {_sentence(what)} {badge(PENDING)}: {why}." for what, why in found.missing]
    return "\n\n".join([*parts, _shown(found), ""])


def _shown(found: Judged) -> str:
    """Where ours is shown and what it was computed from."""
    claim = found.claim
    shown = [reference(label) for label in claim.labels if label in labels()]
    chapter = f"notebooks/{claim.chapter}"
    parts = [f"Shown in {listed(shown)}." if shown else "", f"Chapter: {link(chapter)}." if chapter in pages() else ""]
    stored = sorted({name for test in claim.tests for name in test.needs if not test.missing()})
    if stored:
        parts.append("Computed from " + listed(f"[`{name}`](#{slug(name)})" for name in stored) + ".")
    return " ".join(filter(None, parts))


def slug(result: str) -> str:
    """The label under which the page on provenance describes a stored result."""
    return f"result-{result.replace('/', '-').replace('_', '-')}"


def _readable(text: str) -> str:
    """A verdict's text as prose: names of the code in words, "but" between a half that holds and one that does not."""
    text = _IDENTIFIERS.sub(lambda found: IDENTIFIERS[found[0]], text)
    first, joint, second = text.partition(" on the claimed side and ")
    contrast = joint and ("does not" in first) != ("does not" in second)
    return f"{first} on the claimed side, but {second}" if contrast else text


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:].rstrip(".") + "."


def _setting(claim: str, verdict: Verdict) -> str:
    """What a verdict's id says beside its claim, models by their short names; with a colon."""
    parts = verdict.claim.removeprefix(claim).removeprefix(",").strip().split(", ")
    where = ", ".join(_readable(short(part)) for part in parts if part)
    return f"{where}: " if where else ""


def _item(claim: str, verdict: Verdict) -> str:
    own = cell(number(verdict.number, verdict.low, verdict.high))
    return f"- {_setting(claim, verdict)}{own} {badge(verdict.outcome)}, {_readable(verdict.because)}."


def _untestable(claim: str, verdict: Verdict) -> str:
    where = _setting(claim, verdict)
    start = f"{where[:1].upper()}{where[1:]}{badge(NOT_TESTABLE)}"
    return f"{start}: {_readable(verdict.because)}. The command for that: {verdict.experiment}."


def slips_cwic() -> str:
    """CWIC's slips as a table."""
    return _slips(cwic_slips.slip_rows(), "Numbers and words in the two versions of CWIC's paper that do not fit together.",
                  "tab-slips-cwic")


def slips_scap() -> str:
    """SCAP's slips as a table."""
    changes = scap_slips.relative_rows()
    worst = max(changes, key=lambda row: -row[2].value)
    wrong = sum(row[-1] == "pruned" for row in changes)
    speed, centred = scap_slips.printed_speed(), scap_slips.centring_rows()
    rows = [
        ["tables 5 and 6", f"{len(changes)} changes \"relative\" to the dense model",
         f"{wrong} of them clearly divide by the pruned score; {worst[1]} on {worst[0]}, printed {worst[2]}%, lost {worst[3]}%"],
        ["abstract", f"\"{scap_slips.CLAIMED:g}× additional LLM decoding speedup\" over CATS",
         f"a ratio of two percentages, {speed.of_percentages:.2f}; the ratio of the speeds is {speed.of_speeds:.2f}"],
        ["section 1", f"\"up to a {centred[0][3]}% increase\" by centring",
         "; ".join(f"{row[0]}: {row[1]} to {row[2]}%, which is {row[3]} points or {row[4]}%" for row in centred)],
        ["algorithm 2, line 8", "multiplies the down matrix by x", "the gated product is meant: x does not have its width"],
    ]
    return _slips(rows, "Numbers and words in SCAP's paper that say something else than is meant.", "tab-slips-scap")


def _slips(rows: Iterable[Iterable[object]], caption: str, name: str) -> str:
    return table(["where", "printed", "what follows from the rest"], [[str(c) for c in row] for row in rows], caption, name)
