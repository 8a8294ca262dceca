"""CWIC on the small Llama: both losses along their schedules, frozen weights and LoRA, TEAL and smaller dense networks.

A run of the whole schedule passes 2x, 3x, ... 6x on its way, as the papers' do, and goes on at 6x for a sixth of its steps.
"""

from __future__ import annotations

import copy
import dataclasses
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from sparsity_lib.accounting import account, weights_per_token
from sparsity_lib.assets.cache import remove
from sparsity_lib.assets.models import load_model
from sparsity_lib.evaluate.quality import evaluate, evaluate_other
from sparsity_lib.experiments import common
from sparsity_lib.experiments.cwic_common import rounded, run_of, spec, training_text, work_folder
from sparsity_lib.experiments.smallnets import RECIPES
from sparsity_lib.experiments.smallnets_styles import STYLES
from sparsity_lib.fit import fit_many
from sparsity_lib.greedy import greedy
from sparsity_lib.install import installed
from sparsity_lib.methods.head import with_head
from sparsity_lib.methods.larosa import density_for_share
from sparsity_lib.methods.teal import teal
from sparsity_lib.recipe import Recipe
from sparsity_lib.sites import find_sites
from sparsity_lib.train.losses import next_token
from sparsity_lib.train.trainer import train

MODEL = "small-llama"
#: 614,400 tokens of training a run; the network itself has seen 2.25 million.
TRAIN = {"steps": 600, "batch": 4, "length": 256}
#: 32 sequences of evaluation text.
TEXT = {"sequences": 32, "length": 256}
#: Peak learning rates: the active-parameter paper has 5e-5 for a thousand times as many weights, the FLOP paper names none.
RATE = {"active": 1e-3, "flops": 3e-4}
SEEDS = (0, 1, 2)
STRIPE = 32
#: Whole-model ratios that TEAL, which leaves the head dense, is asked for.
TEAL = (1.25, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0)
#: Text of the greedy search.
SEARCH = {"tokens": 4096, "length": 256, "highest": 0.99}
CALIBRATION = {"tokens": 8192, "length": 256, "batch_size": 8}
#: Hidden and FFN width of dense networks with a half, a third and a sixth of the weights.
TWINS = {"2x": (88, 224), "3x": (64, 208), "6x": (40, 150)}


def stripes(width: int | None) -> dict[str, int] | None:
    """Stripes of one width in all matrices, twice that in the head, which has sixteen times as many outputs."""
    return None if width is None else {**dict.fromkeys(("q", "k", "v", "o", "gate"), width), "head": 2 * width}


def runs() -> dict[str, dict[str, Any]]:
    """Name -> run. The schedules to 6x with three seeds each; then 3x as the goal, with all, only some, or no weights trained."""
    shared = {"model": MODEL, "text": TEXT, "stripe": stripes(STRIPE)}
    found = {}
    for loss in ("active", "flops"):
        for seed in SEEDS:
            more = {"keep": "small-llama-cwic-6x", "watch": True} if (loss, seed) == ("active", 0) else {}
            found[f"{loss} {seed}"] = spec(**shared, loss=loss, **TRAIN, rate=RATE[loss], seed=seed, **more)
    for mode in ("all", "thresholds", "lora"):
        more = {"keep": "small-llama-cwic-3x"} if mode == "all" else {}
        found[f"3x {mode}"] = spec(**shared, final=3.0, mode=mode, **TRAIN, rate=RATE["active"], **more)
    return found


def run(checkpoint) -> tuple[Any, dict, list[int]]:
    """One item a run, a way of TEAL's, and a smaller dense network."""
    wanted = [({"run": name, **params}, partial(run_of, params)) for name, params in runs().items()]
    ways = {way: {"teal": way, "ratios": TEAL, "text": TEXT, "calibration": CALIBRATION, "search": SEARCH, "model": MODEL}
            for way in ("uniform", "greedy")}
    wanted += [(params, partial(measure_teal, params)) for params in ways.values()]
    twins = {name: {"twin": name, "widths": widths, "text": TEXT, "recipe": twin_recipe().to_json(), "model": MODEL}
             for name, widths in TWINS.items()}
    wanted += [(params, partial(train_twin, params)) for params in twins.values()]
    found = checkpoint.items(wanted)
    names = list(runs())
    data = {"runs": dict(zip(names, found, strict=False)), "teal": dict(zip(ways, found[len(names) :], strict=False)),
            "twins": dict(zip(twins, found[len(names) + len(ways) :], strict=True))}
    data["files"] = {params["keep"]: data["runs"][name].pop("files") for name, params in runs().items() if "keep" in params}
    return data, {"runs": runs(), "teal": ways, "twins": twins}, list(SEEDS)


def density_at(ratio: float, model: nn.Module) -> float:
    """Share of the linear layers' weights to keep so that the whole model, its head in full, reads 1 / ratio of its weights."""
    covered, dense = sum(linear.weights for linear in find_sites(model).linears), weights_per_token(model)
    return round(1 - dense * (1 - 1 / ratio) / covered, 6)


def _headed(density: float) -> Recipe:
    return with_head(teal(density))


def measure_teal(params: dict) -> dict[str, Any]:
    """Quality and ratio of TEAL on the dense network: uniform, by its greedy search, or uniform and at the head too.

    With `sources`, the head's way is calibrated on training text from these.
    """
    model, tokenizer = load_model(params["model"])
    ids = common.evaluation_ids(tokenizer, **params["text"])
    if params["teal"] == "head":
        wanted = [_headed(density_for_share(_headed, model, 1 - 1 / ratio)) for ratio in params["ratios"]]
        text = dict(params["calibration"])
        if "sources" in params:
            text["ids"] = training_text(tokenizer, params["sources"], text.pop("tokens"), text.pop("length"))
        plans = fit_many(wanted, model, tokenizer, **text)
    elif params["teal"] == "uniform":
        plans = fit_many([teal(density_at(r, model)) for r in params["ratios"]], model, tokenizer, **params["calibration"])
    else:
        densities = [density_at(ratio, model) for ratio in params["ratios"]]
        targets = [round(1 - d, 6) for d in densities]
        path = greedy(teal(), model, tokenizer, target=max(targets), **params["search"])
        plans = path.plans(targets, model, tokenizer, **params["calibration"])
    named = dict(zip(map(str, params["ratios"]), plans, strict=True))
    quality = evaluate(model, named, ids, batch_size=4, every=params.get("every", 1))
    points = []
    for name, plan in named.items():
        with installed(model, plan):
            skipped = account(model, ids=ids[:8]).skipped
        points.append({"asked": float(name), "ratio": 1 / (1 - skipped), "quality": rounded(quality[name].to_json())})
    return {"points": points, "dense": rounded(quality["dense"].to_json()), "ids": common.fingerprint(ids)}


def twin_recipe():
    """As many tokens as the teacher has seen, by its recipe."""
    return dataclasses.replace(RECIPES["small-llama-origin"], steps=1100, passes=2)


def train_twin(params: dict) -> dict[str, Any]:
    """A dense Llama of fewer weights, trained from nothing on the teacher's text."""
    teacher, tokenizer = load_model(params["model"])
    recipe, (hidden, ffn) = twin_recipe(), params["widths"]
    style = copy.deepcopy(STYLES[MODEL]).to_dict()
    style |= {"hidden_size": hidden, "intermediate_size": ffn, "head_dim": hidden // style["num_attention_heads"]}
    torch.manual_seed(recipe.seed)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**style))
    length = teacher.config.max_position_embeddings
    rows = training_text(tokenizer, ("boolq-train", "hellaswag-train"), recipe.steps * recipe.batch * length // 2, length)
    folder = work_folder(params)
    made = train(model, next_token, rows, recipe, checkpoints=folder, every=50, title=f"dense {params['twin']}")
    ids = common.evaluation_ids(tokenizer, **params["text"])
    quality = evaluate_other(teacher, model.eval().requires_grad_(False), ids, batch_size=4)
    remove(folder)
    ratio = weights_per_token(teacher) / weights_per_token(model)
    return {"ratio": ratio, "weights": weights_per_token(model), "quality": rounded(quality.to_json()), "tokens": made.seen,
            "seconds": made.seconds, "ids": common.fingerprint(ids)}
