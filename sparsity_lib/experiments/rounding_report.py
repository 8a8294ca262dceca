"""What became of a changed last bit: rows for the tables, curves for the figure, numbers for the text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from sparsity_lib.experiments.claws_report import label, short
from sparsity_lib.experiments.rounding import METHODS, SHARES, divergences
from sparsity_lib.report import Number

Data = Mapping[str, Mapping[str, Mapping[str, Any]]]
COLUMNS = ["model", "method", "hidden states", "log p, half below", "at most", "KL", "KL changes by", "answers changed"]
MASKS = {"dense": "none", "magnitude": "fixed"}


def masks(method: str) -> str:
    """What kind of masks a method has."""
    return MASKS.get(method, "by token")


def changed(found: Mapping[str, Any]) -> int:
    """Answers to the task that were right and are wrong, or the other way round."""
    return sum(before != after for before, after in zip(*found["answers"], strict=True))


def gained(found: Mapping[str, Any]) -> float:
    """Right answers with the bit changed less those without, in points."""
    before, after = (sum(each) for each in found["answers"])
    return 100 * (after - before) / len(found["answers"][0])


def shift(found: Mapping[str, Any]) -> float:
    """The largest change of the mean KL among the draws, in nats a token."""
    plain, *draws = divergences(found)
    return max(abs(draw - plain) for draw in draws)


def in_order(data: Data) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """(model, method, what was found), as they were run: a stored result has its names by the alphabet."""
    for model in (name for name in SHARES if name in data):
        for method in (name for name in METHODS if name in data[model]):
            yield model, method, data[model][method]


def rows(data: Data) -> list[list[Any]]:
    """A row a model and method, in the order of `COLUMNS`."""
    return [
        [short(model), label(method), _small(found["layers"][-1]), _small(found["median"]), _small(found["most"]),
         Number(divergences(found)[0], "z.3f"), _small(shift(found)), changed(found)]
        for model, method, found in in_order(data)]


def _small(value: float) -> Number:
    return Number(value, ".2g")


def growth(data: Data) -> dict[str, dict[str, list[float]]]:
    """By model and method, the relative difference of the hidden states after every block."""
    curves: dict[str, dict[str, list[float]]] = {}
    for model, method, found in in_order(data):
        curves.setdefault(model, {})[method] = list(found["layers"])
    return curves


def extremes(data: Data, model: str, kind: str) -> dict[str, float]:
    """Over a model's methods with masks of one kind, or of none: the least and the most of what changed."""
    chosen = [found for method, found in data[model].items() if masks(method) == kind]
    return {
        "last": max(found["layers"][-1] for found in chosen), "fewest": min(map(changed, chosen)),
        "changed": max(map(changed, chosen)), "most": max(found["most"] for found in chosen),
        "shift": max(shift(found) / divergences(found)[0] for found in chosen) if kind != "none" else 0.0,
        "gained": max(abs(gained(found)) for found in chosen),
    }
