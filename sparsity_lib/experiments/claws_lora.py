"""LoRA recovery at 50% FFN density by one recipe: CATS against CLAWS, three seeds."""

from __future__ import annotations

from functools import partial
from typing import Any

from sparsity_lib.assets.models import load_model
from sparsity_lib.assets.texts import token_sequences
from sparsity_lib.evaluate.benchmarks import BenchmarkResult
from sparsity_lib.evaluate.quality import evaluate_pair
from sparsity_lib.experiments import claws_benchmarks, common
from sparsity_lib.install import install
from sparsity_lib.train import LoraRecipe, recover

MODEL = "smollm2-135m-instruct"
METHODS = ("cats", "claws")
SEEDS = (0, 1, 2)
DENSITY = 0.5
RECIPE = {"steps": 40, "sequences": 4, "length": 256, "rank": 16, "alpha": 32.0, "learning_rate": 5e-4}
TEXT = {"sequences": 32, "length": 256}
DTYPE = "bfloat16"
#: Avg5 with fewer documents than in the training-free table: six models are scored, and pairs share documents and seeds.
LIMITS = {"avg5": 150, "mmlu": 10}


def run(checkpoint) -> tuple[Any, dict, list[int]]:
    """One item a method and seed: losses, quality and benchmark scores after recovery."""
    wanted = [{"model": MODEL, "method": method, "seed": seed, "density": DENSITY, "recipe": RECIPE, "text": TEXT, "dtype": DTYPE,
               "limits": LIMITS, "calibration": common.CALIBRATION} for seed in SEEDS for method in METHODS]
    data: dict[str, Any] = {method: {} for method in METHODS}
    for params, found in zip(wanted, checkpoint.items([(params, partial(_recover, params)) for params in wanted]), strict=True):
        method, seed, losses = params["method"], params["seed"], found["losses"]
        data[method][str(seed)] = found
        mmlu = BenchmarkResult.from_dict(found["mmlu"]).score("mmlu").mean
        print(f"{method} seed {seed}: KL {losses[0]:.3f} -> {losses[-1]:.3f}, MMLU {mmlu:.3f}", flush=True)
    return data, {"model": MODEL, "density": DENSITY, "recipe": RECIPE, "text": TEXT, "dtype": DTYPE,
                  "limits": LIMITS}, list(SEEDS)


def _recover(params: dict) -> dict:
    dense, tokenizer = load_model(params["model"])
    plan = common.fit_methods(dense, tokenizer, [params["method"]], [params["density"]])[params["method"], params["density"]]
    recipe = LoraRecipe(**params["recipe"], seed=params["seed"])
    train = token_sequences(tokenizer, "training", tokens=recipe.tokens, length=recipe.length, seed=params["seed"])
    model, _ = load_model(params["model"], dtype=common.dtype_named(params["dtype"]))
    recovered, losses = recover(model, plan, recipe, train)
    quality = evaluate_pair(dense, recovered, plan, common.evaluation_ids(tokenizer, **params["text"])).to_json()
    install(recovered, plan)
    scores = {group: claws_benchmarks.score(recovered, tokenizer, group, limit) for group, limit in params["limits"].items()}
    return {"losses": losses, "quality": quality, **scores}

