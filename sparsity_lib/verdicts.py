"""What became of a claim: a verdict computed from numbers by one of two rules, never typed.

Two rules, because papers make two kinds of claim. "A beats B by so much" is an effect, and `effect` asks
whether ours is on the claimed side at all and as large as theirs. "A keeps what B had" is an equivalence, and
`kept` asks whether the loss stays under a margin that was fixed beforehand.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from .errors import refuse

REPRODUCED = "reproduced"
DIRECTION = "direction only"
NOT_REPRODUCED = "not reproduced"
NOT_TESTABLE = "not testable here"


@dataclass(frozen=True)
class Verdict:
    """One claim met by one experiment.

    claim: its id in this book (K1). words: the paper's, with its number. experiment: ours, in a sentence.
    number, low, high: our estimate and its 95% interval, in the claim's units (None where not testable).
    outcome: one of the four words above. because: the rule with the numbers put in.
    """

    claim: str
    words: str
    experiment: str
    number: float | None
    low: float | None
    high: float | None
    outcome: str
    because: str


def _check(number: float, low: float, high: float) -> None:
    if not all(math.isfinite(value) for value in (number, low, high)) or not low <= number <= high:
        raise refuse("(low, number, high)", (low, number, high), "finite numbers in that order")


def effect(
    claim: str, words: str, experiment: str, *, number: float, low: float, high: float, published: float,
    null: float = 0.0,
) -> Verdict:
    """A claimed difference: `published` is the paper's size of it, `null` what no effect would be.

    Reproduced: our interval lies wholly on the claimed side of `null` and reaches the published size.
    Direction only: wholly on the claimed side, but all of it smaller than published. Else not reproduced.
    """
    _check(number, low, high)
    if published == null:
        raise refuse("published", published, "an effect: a number other than null", "use `kept` for 'no change'")
    larger = published > null
    established = low > null if larger else high < null
    reaches = high >= published if larger else low <= published
    outcome = NOT_REPRODUCED if not established else REPRODUCED if reaches else DIRECTION
    because = f"the interval does not lie beyond {null:g} on the claimed side"
    if established:
        because = (f"the interval lies beyond {null:g} on the claimed side and "
                   f"{'reaches' if reaches else 'does not reach'} the size asked for, {published:.4g}")
    return Verdict(claim, words, experiment, number, low, high, outcome, because)


def kept(
    claim: str, words: str, experiment: str, *, number: float, low: float, high: float, margin: float,
) -> Verdict:
    """A claim that nothing (much) is lost: `number` is ours minus the reference, higher being better.

    Reproduced: the whole interval lies above -margin. Direction only: the estimate does, the interval does
    not (the data cannot tell). Else not reproduced. Raises SparsityError for a margin that is not positive.
    """
    _check(number, low, high)
    if not (math.isfinite(margin) and margin > 0):
        raise refuse("margin", margin, "a positive number, fixed before the run")
    outcome = REPRODUCED if low > -margin else DIRECTION if number > -margin else NOT_REPRODUCED
    where = {
        REPRODUCED: "the whole interval lies above", DIRECTION: "the estimate lies above, the interval crosses,",
        NOT_REPRODUCED: "the estimate lies below",
    }[outcome]
    return Verdict(claim, words, experiment, number, low, high, outcome, f"{where} the allowed loss of {margin:g}")


def not_testable(claim: str, words: str, why: str, command: str) -> Verdict:
    """A claim that this machine or these models cannot test: why, and the command that would elsewhere."""
    return Verdict(claim, words, f"`{command}`", None, None, None, NOT_TESTABLE, why)
