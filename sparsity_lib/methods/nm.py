"""N:M activation pruning (Alanova et al. 2025, arXiv 2509.22166): patterns, scores, transforms and repairs to combine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sparsity_lib.errors import SparsityError, refuse, unknown
from sparsity_lib.parts.base import Part, Repair, Score, Select, Transform
from sparsity_lib.parts.nm import NofM, nearest_n
from sparsity_lib.parts.norms import Amber, Clact
from sparsity_lib.parts.repairs import LowRank, OutputScale, Variance
from sparsity_lib.parts.saliency import Saliency
from sparsity_lib.parts.scores import ColumnNorm, Magnitude
from sparsity_lib.parts.select import TopK
from sparsity_lib.parts.shift import LearnedShift, Shift, TokenShift
from sparsity_lib.parts.transforms import Identity
from sparsity_lib.recipe import Recipe, Rule
from sparsity_lib.sites import DOWN_IN, O_IN, QKV_IN, UP_IN

#: The patterns of the paper.
PATTERNS = ((2, 4), (4, 8), (8, 16), (16, 32))
#: By the paper's names, and two more scores: WINA's, and |x_i| times the usual size of dL/dx_i.
SCORES = {"act": Magnitude(), "clact": Clact(), "amber": Amber(), "wina": ColumnNorm(), "gradient": Saliency()}
TRANSFORMS = {"none": Identity(), "spts": Shift("median"), "dpts": TokenShift(), "lpts": LearnedShift()}
REPAIRS = {"var": Variance(), "ls": OutputScale(), "low_rank": LowRank()}
#: The seven projections by the site they read.
PROJECTIONS = {QKV_IN: ("q", "k", "v"), O_IN: ("o",), UP_IN: ("gate", "up"), DOWN_IN: ("down",)}


def nm(
    n: int = 8, m: int = 16, *, score: str | Score = "act", transform: str | Transform = "none",
    repair: str | Repair | Sequence[str | Repair] = (), sites: Sequence[str] = tuple(PROJECTIONS), dense: Sequence[str] = (),
    pad: bool = False, token_share: float = 1.0,
) -> Recipe:
    """Keep exactly `n` of every `m` consecutive inputs of each projection, by score, after a transform, with repairs.

    Parameters
    ----------
    score, transform
        A name of `SCORES`, `TRANSFORMS`, or a part.
    repair
        Names of `REPAIRS` or parts (`LowRank(0.1)`), one or several, in the order in which they are done. "ls" and the
        transform "lpts" change nothing until `train.repairs.train_repairs` has trained them.
    sites, dense
        Where it is done, and where it is not: kinds of sites ("qkv_in"), or projections (q, k, v, o, gate, up, down), of
        which those left out read their input whole though others drop parts of it.
    pad
        Allow widths that `m` does not divide (`parts.nm.NofM`).

    Raises
    ------
    SparsityError
        If a name is unknown, the pattern out of range, or no projection is left.
    """
    return _recipe("nm", NofM(n, m, pad), score, transform, repair, sites, dense, token_share)


def nm_density(density: float = 0.5, *, m: int = 16, **options) -> Recipe:
    """`nm` with the N for which N / `m` is nearest to `density`, at least 1."""
    return nm(nearest_n(density, m), m, **options)


def unstructured(
    density: float = 0.5, *, score: str | Score = "act", transform: str | Transform = "none",
    repair: str | Repair | Sequence[str | Repair] = (), sites: Sequence[str] = tuple(PROJECTIONS), dense: Sequence[str] = (),
    token_share: float = 1.0,
) -> Recipe:
    """What `nm` is measured against: the same with the K = density * width largest scores of the whole token.

    With nothing else chosen it is `inputs_topk` under the study's name.
    """
    return _recipe("unstructured", TopK(density), score, transform, repair, sites, dense, token_share)


def _recipe(
    method: str, select: Select, score, transform, repair, sites: Sequence[str], dense: Sequence[str], token_share: float
) -> Recipe:
    chosen = _pick("score", score, SCORES, Score)
    moved = _pick("transform", transform, TRANSFORMS, Transform)
    pieces = [repair] if isinstance(repair, (str, Part)) else list(repair)
    repairs = tuple(_pick("repair", piece, REPAIRS, Repair) for piece in pieces)
    left = _projections("sites", sites) - _projections("dense", dense)
    rules = []
    for site, roles in PROJECTIONS.items():
        readers = tuple(role for role in roles if role in left)
        if readers:
            rules.append(Rule(site, select, chosen, moved, repairs, () if readers == roles else readers))
    if not rules:
        raise SparsityError(f"sites = {sites!r} without dense = {dense!r} leave no projection. Fix: leave one to be pruned.")
    words = [score, transform, *pieces]
    named = [word if isinstance(word, str) else word.kind for word in words]
    return Recipe("_".join([method, *(word for word in named if word not in ("act", "none"))]), tuple(rules), token_share)


def _pick(name: str, value: object, table: Mapping[str, Part], role: type[Part]) -> Part:
    if isinstance(value, role):
        return value
    if not isinstance(value, str) or value not in table:
        raise unknown(name, value, table)
    return table[value]


def _projections(name: str, wanted: Sequence[str]) -> set[str]:
    """Roles named by kinds of sites and by projections."""
    if isinstance(wanted, str) or not isinstance(wanted, Sequence):
        raise refuse(name, wanted, "a list of sites and projections", f'{name}=("q", "down_in")')
    found: set[str] = set()
    roles = {role for group in PROJECTIONS.values() for role in group}
    for word in wanted:
        if word not in PROJECTIONS and word not in roles:
            raise unknown(name, word, [*PROJECTIONS, *roles])
        found |= set(PROJECTIONS.get(word, (word,)))
    return found
