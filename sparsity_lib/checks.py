"""Checks of single values at the door: each returns the value or raises with what is allowed."""

from __future__ import annotations

import math

from sparsity_lib.errors import refuse


def fraction(name: str, value: object, *, zero: bool = False, one: bool = True) -> float:
    """A number in (0, 1] (or with `zero`, from 0; without `one`, below 1).

    Raises
    ------
    SparsityError
        If `value` is not a finite real number inside the interval.
    """
    allowed = f"a number in {'[' if zero else '('}0, 1{']' if one else ')'}"
    number = _real(name, value, allowed)
    if not ((0 <= number if zero else 0 < number) and (number <= 1 if one else number < 1)):
        raise refuse(name, value, allowed, "0.5 keeps or drops half")
    return number


def positive(name: str, value: object) -> float:
    """A finite real number above zero."""
    number = _real(name, value, "a finite number above 0")
    if number <= 0:
        raise refuse(name, value, "a finite number above 0")
    return number


def count(name: str, value: object, minimum: int = 1) -> int:
    """A whole number of at least `minimum`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise refuse(name, value, f"a whole number of at least {minimum}")
    return value


def _real(name: str, value: object, allowed: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise refuse(name, value, allowed)
    try:
        number = float(value)
    except OverflowError:  # a whole number beyond any float
        number = math.inf
    if not math.isfinite(number):
        raise refuse(name, value, allowed)
    return number
