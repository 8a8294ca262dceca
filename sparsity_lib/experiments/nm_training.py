"""Whether learned repairs help depends on how they are trained: rate, text, what reaches a block, and what is minimised."""

from __future__ import annotations

from functools import partial
from typing import Any

from sparsity_lib.evaluate.quality import evaluate
from sparsity_lib.experiments import common
from sparsity_lib.experiments.nm_common import DTYPE, REPAIRS, Bench, point, recipe_of
from sparsity_lib.experiments.scap_grid import EVERY, TEXT
from sparsity_lib.fit import fit
from sparsity_lib.train.repairs import RepairRecipe, train_repairs

POINT = point("8:16", repair=["ls"])
#: Name -> changes to `REPAIRS`. The first takes as many steps as the study at its rate, on sequences half as long.
WAYS: dict[str, dict[str, Any]] = {
    "the study's rate and steps": {"sequences": 256, "learning_rate": 1e-4},
    "error by channel": {"error": "by channel"},
    "error by token": {"error": "by token"},
}


def run(checkpoint) -> tuple[Any, dict, list[int]]:
    """One item a model and way; those at `REPAIRS` itself are in nm_quality."""
    wanted = [{"model": name, "way": way, "point": POINT, "repairs": {**REPAIRS, **changes}, "text": TEXT, "every": EVERY[name],
               "dtype": DTYPE, "calibration": common.CALIBRATION} for name in common.MODELS for way, changes in WAYS.items()]
    found = checkpoint.items([(params, partial(measure, params)) for params in wanted])
    data: dict[str, Any] = {name: {} for name in common.MODELS}
    for params, value in zip(wanted, found, strict=True):
        data[params["model"]][params["way"]] = value
    return data, {"point": POINT, "ways": WAYS, "repairs": REPAIRS, "text": TEXT, "every": EVERY, "dtype": DTYPE,
                  "calibration": common.CALIBRATION}, [0]


def measure(params: dict[str, Any]) -> dict[str, Any]:
    """Quality with repairs trained one way, and each block's error before and after, in that way's units."""
    bench = Bench(params["model"], params["text"])
    plan = fit(recipe_of(params["point"]), bench.fitted, bench.tokenizer, **params["calibration"])
    made = train_repairs(bench.fitted, plan, bench.tokenizer, recipe=RepairRecipe(**params["repairs"]))
    found = evaluate(bench.model, {"repaired": made.plan}, bench.ids, every=params["every"])
    return {"quality": found["repaired"].to_json(), "before": made.before, "after": made.after,
            "ids": common.fingerprint(bench.ids)}
