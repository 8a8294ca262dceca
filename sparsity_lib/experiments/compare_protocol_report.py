"""What a changed protocol does to the same method: rows, points, ratios."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from sparsity_lib.evaluate.bootstrap import Interval, ratio_interval
from sparsity_lib.evaluate.quality import Quality
from sparsity_lib.experiments.claws_report import cell, label, short
from sparsity_lib.report import Number

Data = Mapping[str, Any]


def protocol_points(data: Data, effect: str) -> dict[str, dict[str, list[tuple[str, Interval, float]]]]:
    """model -> method -> [(what was changed, KL, share skipped)]."""
    def point(row: Data) -> tuple[str, Interval, float]:
        return change_name(row["change"]), Quality.from_json(row["quality"]).divergence(), row["shares"]["skipped"]

    return {model: {method: [point(row) for row in found[effect]] for method, found in methods.items() if effect in found}
            for model, methods in data.items()}


def change_name(change: Data) -> str:
    """One changed thing in words."""
    if "token_share" in change:
        return f"{100 * change['token_share']:.0f}% of tokens"
    found = change["calibration"]
    if "source" in found:
        return found["source"]
    if "seed" in found:
        return f"seed {found['seed']}"
    return ", ".join(f"{value} {'tokens' if key == 'tokens' else 'a sequence'}" for key, value in found.items()) or "all sources"


def protocol_rows(data: Data, effect: str) -> list[list[Any]]:
    """Model, method and what was changed; weights skipped (%), KL, and KL over the first setting's (paired over sequences).

    Where fewer tokens are made sparse, also the KL of one that is, before the last: tokens before them have none.
    """
    rows = []
    for model in data:
        for method, effects in data[model].items():
            if effect not in effects:
                continue
            base = Quality.from_json(effects[effect][0]["quality"])
            for row in effects[effect]:
                own = Quality.from_json(row["quality"])
                skipped = Number(100 * row["shares"]["skipped"], ".1f")
                name, part = f"{label(method)}, {change_name(row['change'])}", row["change"].get("token_share")
                of_sparse = [] if part is None else [Number(own.divergence().value / part, ".3f", rtol=0.05)]
                rows.append([short(model), name, skipped, cell(own.divergence(), ".3f"), *of_sparse,
                             cell(ratio_interval(own.kl, base.kl), ".2f")])
    return rows


def protocol_ratio(data: Data, model: str, method: str, effect: str, change: str) -> Interval:
    """KL with one thing changed, by the name that `change_name` gives it, over the first setting's; paired over sequences."""
    rows = data[model][method][effect]
    row = next(row for row in rows if change_name(row["change"]) == change)
    own, base = (Quality.from_json(each["quality"]) for each in (row, rows[0]))
    return ratio_interval(own.kl, base.kl)


def largest_change(data: Data, effect: str) -> tuple[str, str, str, Interval]:
    """Model, method, change and ratio where an effect moves KL furthest, up or down."""
    found = [(model, method, name, protocol_ratio(data, model, method, effect, name))
             for model, methods in data.items() for method, effects in methods.items() if effect in effects
             for name in map(change_name, (row["change"] for row in effects[effect][1:]))]
    return max(found, key=lambda each: abs(np.log(each[-1].value)))
