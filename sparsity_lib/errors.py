"""The errors a user can cause, each with one wording: what came, what is allowed, how to fix it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class SparsityError(ValueError):
    """Something the user asked for cannot be done; the message says what, why and the fix."""


class AssetError(SparsityError, OSError):
    """A model, benchmark or text could not be fetched, verified or read."""


class Diverged(SparsityError):
    """Training reached a loss or gradient that is not finite."""


def refuse(what: str, value: object, allowed: str, fix: str = "") -> SparsityError:
    """Build (not raise) the error for one bad value.

    >>> str(refuse("density", 1.5, "a number in (0, 1]", "pass 0.5 for half of the neurons"))
    'density = 1.5 is not allowed: expected a number in (0, 1]. Fix: pass 0.5 for half of the neurons.'
    """
    tail = f" Fix: {fix.rstrip('.')}." if fix else ""
    return SparsityError(f"{what} = {value!r} is not allowed: expected {allowed.rstrip('.')}.{tail}")


def unknown(what: str, value: object, known: Iterable[str]) -> SparsityError:
    """Build the error for a name that is not among the known ones, with the nearest match."""
    known = sorted(known)
    near = difflib.get_close_matches(str(value), known, n=1)
    hint = f"did you mean {near[0]!r}?" if near else ""
    message = f"{what} = {value!r} is unknown: expected one of {', '.join(known)}."
    return SparsityError(f"{message} Fix: {hint}" if hint else message)
