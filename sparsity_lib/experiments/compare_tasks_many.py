"""SCAP's seven tasks on many documents at one share of weights: does a lead in KL show in tasks?"""

from __future__ import annotations

from functools import partial
from typing import Any

from sparsity_lib.experiments import common
from sparsity_lib.experiments.compare_common import DTYPE
from sparsity_lib.experiments.compare_search import COSTS, HEAD_EVERY, ablations, current
from sparsity_lib.experiments.compare_tasks import SHARES, WITHOUT, score

#: Where fewer documents leave it open.
MODELS = common.MODELS[:1]
#: Documents a task: seven times as many as for the comparison of all methods.
TASKS = {"scap7": 420}
#: The best of each kind, with and without the head; the search's candidate, whole and with a head that is read once.
METHODS = ("dense", "teal", "wina", "teal_head", "wina_head")
PARTS = (None, WITHOUT[0])


def run(checkpoint) -> tuple[Any, dict, list[int]]:
    """One item a model and method, at the larger of the comparison's two shares. The search has to be kept before."""
    candidate = current()
    parts = {None: candidate, **ablations(candidate)}
    wanted: list[tuple[dict[str, Any], str | None]] = []
    for name in MODELS:
        share = SHARES[name][-1]
        for method, part in [*((method, None) for method in METHODS), *(("spread", part) for part in PARTS if part in parts)]:
            searched = {"costs": COSTS, "head_every": HEAD_EVERY[name], "candidate": parts[part]} if method == "spread" else {}
            wanted.append(({"model": name, "method": method, "share": 0.0 if method == "dense" else share, "tasks": TASKS,
                            "dtype": DTYPE, "calibration": common.CALIBRATION, **searched}, part))
    items = checkpoint.items([(params, partial(score, params)) for params, _ in wanted])
    data: dict[str, list[dict[str, Any]]] = {}
    for (params, part), found in zip(wanted, items, strict=True):
        about = {"method": params["method"], "share": params["share"], **({} if part is None else {"part": part})}
        data.setdefault(params["model"], []).append({**about, **found})
    return data, {"tasks": TASKS, "methods": METHODS, "parts": PARTS, "shares": {n: SHARES[n][-1] for n in MODELS},
                  "dtype": DTYPE, "costs": COSTS, "candidate": candidate, "calibration": common.CALIBRATION}, [0]
