"""The language model's head as a site of any method: an extension that none of the papers has."""

from __future__ import annotations

import dataclasses

from sparsity_lib.checks import fraction
from sparsity_lib.errors import SparsityError
from sparsity_lib.parts.base import Score, Select, Transform
from sparsity_lib.parts.refine import Refine
from sparsity_lib.parts.scores import Magnitude
from sparsity_lib.parts.select import TopK
from sparsity_lib.parts.transforms import Identity
from sparsity_lib.recipe import Recipe, Rule
from sparsity_lib.sites import HEAD_IN


def head_rule(
    density: float, *, transform: Transform | None = None, score: Score | None = None, refine: float = 0.0,
    select: Select | None = None,
) -> Rule:
    """Top-k on the head's input, or another selection.

    With `refine`, that share of the vocabulary is then read in full (`parts.refine`).
    """
    fraction("refine", refine, zero=True)
    repair = (Refine(refine),) if refine else ()
    return Rule(HEAD_IN, select or TopK(density), score or Magnitude(), transform or Identity(), repair)


def with_head(recipe: Recipe, density: float | None = None, **options) -> Recipe:
    """`recipe` with a rule at the head's input as well (options: those of `head_rule`).

    Without a density the head gets a rule like that of the recipe's first site: the same method, carried on to the head.

    Raises
    ------
    SparsityError
        If the recipe has a rule there already.
    """
    if any(rule.site == HEAD_IN for rule in recipe.rules):
        raise SparsityError(f"{recipe.method!r} has a rule at the head already. Fix: leave it as it is.")
    added = dataclasses.replace(recipe.rules[0], site=HEAD_IN) if density is None else head_rule(density, **options)
    return dataclasses.replace(recipe, method=f"{recipe.method}_head", rules=(*recipe.rules, added))
