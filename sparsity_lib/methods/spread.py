"""What this book's search found: one budget for all sites of all layers, and a head that is read twice, its inputs rotated."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from sparsity_lib.checks import fraction
from sparsity_lib.errors import refuse, unknown
from sparsity_lib.methods.head import head_rule
from sparsity_lib.parts.base import Repair, Score, Select
from sparsity_lib.parts.repairs import LowRank
from sparsity_lib.parts.saliency import Saliency
from sparsity_lib.parts.scores import ColumnNorm, Magnitude
from sparsity_lib.parts.select import Threshold, TopK
from sparsity_lib.parts.transforms import Identity, Rotate
from sparsity_lib.recipe import Recipe, Rule
from sparsity_lib.sites import DOWN_IN, HEAD_IN, O_IN, QKV_IN, UP_IN

SCORES: dict[str, Score] = {"magnitude": Magnitude(), "column_norm": ColumnNorm(), "saliency": Saliency()}
SELECTS: dict[str, type[Select]] = {"topk": TopK, "threshold": Threshold}
REPAIRS: dict[str, tuple[Repair, ...]] = {"none": (), "low_rank": (LowRank(),)}
#: What happens at the head: nothing, its inputs are dropped like the blocks', or the likely words are then read in full.
HEADS = ("dense", "inputs", "refined")
#: Where inputs are rotated. A rotation is read for every token: at q, k, v, which are small where heads share keys and values,
#: it costs much of what it can save, at gate and up less, at the head nearly nothing.
ROTATED: dict[str, tuple[str, ...]] = {"none": (), "head": (HEAD_IN,), "ffn": (HEAD_IN, UP_IN), "all": (HEAD_IN, UP_IN, QKV_IN)}
#: Share of the vocabulary that is read in full.
REFINE = 0.02


def combined(
    density: float = 0.5, *, rotate: str = "head", score: str = "magnitude", repair: str = "none", head: str = "refined",
    refine: float = REFINE, select: str = "topk",
) -> Recipe:
    """One density, one score and one selection for all sites; `rotate` is a key of `ROTATED`. The search chose the defaults.

    Raises
    ------
    SparsityError
        If a name is unknown or a number out of range, or column norms, which are W's own, were to rank rotated inputs.
    """
    fraction("density", density)
    fraction("refine", refine)
    options = {"score": (score, SCORES), "repair": (repair, REPAIRS), "head": (head, HEADS), "rotate": (rotate, ROTATED),
               "select": (select, SELECTS)}
    for name, (value, table) in options.items():
        if not isinstance(value, str) or value not in table:
            raise unknown(name, value, table)
    if rotate != "none" and score == "column_norm":
        raise refuse("score of rotated inputs", score, "one that knows the rotation", "score='saliency', or rotate='none'")
    basis = {site: Rotate() if site in ROTATED[rotate] else Identity() for site in (QKV_IN, O_IN, UP_IN, DOWN_IN, HEAD_IN)}
    chosen = SELECTS[select](density)
    rules = [Rule(site, chosen, SCORES[score], basis[site], REPAIRS[repair])
             for site in (QKV_IN, O_IN, UP_IN, DOWN_IN)]
    if head != "dense":
        again = refine if head == "refined" else 0.0
        rules.append(head_rule(density, transform=basis[HEAD_IN], score=SCORES[score], refine=again, select=chosen))
    words = [f"rotated {rotate}", score, *(() if select == "topk" else (select,)), *(() if repair == "none" else (repair,)),
             f"head {head}"]
    return Recipe("combined " + ", ".join(words), tuple(rules))


def spread(
    model: nn.Module, tokenizer=None, *, shares: Sequence[float], costs: dict | None = None, calibration: dict | None = None,
    **options,
) -> list[Recipe]:
    """Recipes that leave each of `shares` of all weights unread, the budget shared by what every site costs.

    Of all weights, the head's included, and with what repairs and rotations read.

        recipes = spread(model, tokenizer, shares=[0.4, 0.5, 0.6])
        plans = fit_many(recipes, model, tokenizer)

    `options` are those of `combined`; `costs` those of `sensitivity.curves` (its text). The statistics that the costs need
    are fitted first: `calibration` has that text as `fit` takes it, by default `fit`'s own, or `costs`' ids, source and seed.

    Raises
    ------
    SparsityError
        If a share is out of reach.
    """
    from sparsity_lib.fit import fit
    from sparsity_lib.sensitivity import curves

    costs = dict(costs or {})
    text = {**{key: costs[key] for key in ("ids", "source", "seed") if key in costs}, **(calibration or {})}
    plan = fit(combined(0.5, **options), model, tokenizer, **text)
    found = curves(plan, model, tokenizer, **costs)
    return [found.allocate(share) for share in shares]
