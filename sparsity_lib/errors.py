"""The errors a user can cause, each with one wording: what came, what is allowed, how to fix it."""

from __future__ import annotations

import difflib
import functools
import sys
from collections.abc import Callable, Iterable


class SparsityError(ValueError):
    """Something the user asked for cannot be done; the message says what, why and the fix."""


class AssetError(SparsityError, OSError):
    """A model, benchmark or text could not be fetched, verified or read."""


class Diverged(SparsityError):
    """Training reached a loss or gradient that is not finite."""


#: A value is shown in a message up to so many letters: what a damaged or hostile file holds may be of any size.
SHOWN = 200


def shown(value: object) -> str:
    """A value as messages show it: its repr, cut where it is long, a few words where it has none."""
    try:
        text = repr(value)
    except Exception as error:  # nested too deeply, a number of too many digits, or an object of somebody else's
        return f"<{type(value).__name__} that cannot be shown: {type(error).__name__}>"
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}... ({len(text):,} letters)"


def refuse(what: str, value: object, allowed: str, fix: str = "") -> SparsityError:
    """Build (not raise) the error for one bad value.

    >>> str(refuse("density", 1.5, "a number in (0, 1]", "pass 0.5 for half of the neurons"))
    'density = 1.5 is not allowed: expected a number in (0, 1]. Fix: pass 0.5 for half of the neurons.'
    """
    tail = f" Fix: {fix.rstrip('.')}." if fix else ""
    return SparsityError(f"{what} = {shown(value)} is not allowed: expected {allowed.rstrip('.')}.{tail}")


def unknown(what: str, value: object, known: Iterable[str]) -> SparsityError:
    """Build the error for a name that is not among the known ones, with the nearest match."""
    known = sorted(known)
    near = difflib.get_close_matches(value[:SHOWN], known, n=1) if isinstance(value, str) else []
    hint = f"did you mean {near[0]!r}?" if near else ""
    message = f"{what} = {shown(value)} is unknown: expected one of {', '.join(known)}."
    return SparsityError(f"{message} Fix: {hint}" if hint else message)


def command_line(interrupted: str) -> Callable[[Callable[..., int]], Callable[..., int]]:
    """Decorate a command's `main`, which returns its exit code: a user's error ends it in one line and 1, Ctrl-C in 130 and
    what `interrupted` says of the work that was done."""
    def decorate(main: Callable[..., int]) -> Callable[..., int]:
        @functools.wraps(main)
        def run(*arguments: object, **options: object) -> int:
            try:
                return main(*arguments, **options)
            except SparsityError as error:
                print(f"error: {error}", file=sys.stderr)
                return 1
            except KeyboardInterrupt:
                print(f"interrupted: {interrupted}", file=sys.stderr)
                return 130

        return run

    return decorate
