"""Train the small networks of the book from nothing, on real text and real images, into results/models/.

Each is an item of its own, and inside an item the trainer's checkpoints carry on, so that an interrupted run loses at
most `EVERY` steps. Two have a common origin that is not kept: small-llama and small-llama-relu read the same further text
in the same order, and differ by the ReLUs alone.
"""

from __future__ import annotations

import copy
import math
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForImageClassification

from sparsity_lib import project
from sparsity_lib.assets.cache import remove
from sparsity_lib.assets.convert import quiet_bars
from sparsity_lib.assets.digits import digits
from sparsity_lib.assets.keep import keep_checkpoint
from sparsity_lib.assets.smallnets import SMALL, folder_of
from sparsity_lib.assets.texts import passages, token_sequences
from sparsity_lib.drelu import relufy
from sparsity_lib.evaluate.quality import evaluate
from sparsity_lib.experiments.common import fingerprint
from sparsity_lib.experiments.smallnets_styles import LENGTH, STYLES, VOCABULARY
from sparsity_lib.train.losses import labelled, next_token
from sparsity_lib.train.recipe import TrainRecipe
from sparsity_lib.train.tokenizer import bytes_of_tokens, train_tokenizer
from sparsity_lib.train.trainer import Trained, train

#: The training sources that are prose, as the calibration and evaluation texts are: half of the tokens from each.
SOURCES = ("boolq-train", "hellaswag-train")
#: Every n-th of their passages teaches the tokenizer.
TOKENIZER = {"vocabulary": VOCABULARY, "max_length": LENGTH, "every": 4}
#: 64 sequences of 512 tokens, which no training text overlaps.
EVALUATION = {"tokens": 64 * LENGTH, "length": LENGTH, "seed": 0}
_LANGUAGE = {
    "steps": 800, "batch": 4, "learning_rate": 3e-3, "warmup": 40, "floor": 0.1, "weight_decay": 0.1, "betas": (0.9, 0.95),
    "precision": "bf16",
}
RECIPES = {
    **dict.fromkeys(SMALL, TrainRecipe(**_LANGUAGE)),
    # The scan runs without its kernel here, at half the speed of the others.
    "small-mamba2": TrainRecipe(**{**_LANGUAGE, "steps": 500}),
    # Part of the same text once more, with a smaller learning rate since the weights are trained.
    **dict.fromkeys(("small-llama", "small-llama-relu"),
                    TrainRecipe(**{**_LANGUAGE, "steps": 300, "learning_rate": 1.5e-3, "warmup": 15, "seed": 1})),
    "small-llama-origin": TrainRecipe(**_LANGUAGE),
    "small-vit": TrainRecipe(
        steps=1500, batch=64, learning_rate=2e-3, warmup=75, weight_decay=0.1, betas=(0.9, 0.95), passes=100),
}
#: What two networks are before they read on.
ORIGIN = "small-llama-origin"
FROM_ORIGIN = ("small-llama", "small-llama-relu")
EVERY = 50
#: Steps that a point of the stored loss curves averages.
CURVE = 20


def run(checkpoint) -> tuple[Any, dict, list[int]]:
    """One item a network: what it was trained with, its losses, its quality, and the checksums of its files."""
    data: dict[str, Any] = {}
    for name in (ORIGIN, *SMALL):
        params = {"model": name, "recipe": RECIPES[name].to_json(), "config": _described(name)}
        if name != "small-vit":
            params |= {"sources": SOURCES, "tokenizer": TOKENIZER, "evaluation": EVALUATION, "length": LENGTH}
        if name in FROM_ORIGIN:
            params["from"] = data[ORIGIN]["files"]  # trained anew where the origin was
        data[name] = checkpoint.item(params, partial(_make, name))
        if name != ORIGIN:
            remove(_work(name))
        print(f"{name}: {_summary(data[name])}", flush=True)
    origin = data.pop(ORIGIN)
    for name in FROM_ORIGIN:
        data[name] |= {"origin": origin, "seen": origin["seen"] + data[name]["seen"]}
    remove(_work(ORIGIN))
    return data, {"sources": SOURCES, "tokenizer": TOKENIZER, "evaluation": EVALUATION, "length": LENGTH,
                  "recipes": {name: recipe.to_json() for name, recipe in RECIPES.items()}}, [0, 1]


def _described(name: str) -> dict:
    style = STYLES["small-llama" if name in (ORIGIN, *FROM_ORIGIN) else name]
    return {k: v for k, v in style.to_diff_dict().items() if k != "transformers_version"}


def _summary(found: dict) -> str:
    quality = found["evaluation"]
    speed = f"{found['seconds']:.0f} s, {found['per_second']:.0f} {found['unit']}s/s"
    if "accuracy" in quality:
        return f"accuracy {quality['accuracy']:.3f} ({speed})"
    return f"{quality['loss']:.3f} nats a token, {quality['bits_per_byte']:.3f} bits a byte ({speed})"


def _work(name: str) -> Path:
    """Where the trainer's checkpoints of one network are until it is finished."""
    return project.root() / "results" / ".partial" / "smallnets-training" / name


@cache
def _tokenizer():
    chosen = [passage for source in SOURCES for passage in passages("training", source)[:: TOKENIZER["every"]]]
    return train_tokenizer(chosen, TOKENIZER["vocabulary"], TOKENIZER["max_length"])


def _start(name: str) -> nn.Module:
    """The network before training: random weights by its recipe's seed, or those of the network it is made of."""
    if name in FROM_ORIGIN:
        if not _place(ORIGIN).is_dir():  # its item was kept, its folder was not
            _make(ORIGIN)
        origin = _stored(AutoModelForCausalLM, ORIGIN)
        return relufy(origin) if name == "small-llama-relu" else origin
    torch.manual_seed(RECIPES[name].seed)
    auto = AutoModelForImageClassification if name == "small-vit" else AutoModelForCausalLM
    return auto.from_config(copy.deepcopy(STYLES["small-llama" if name == ORIGIN else name]))


def _place(name: str) -> Path:
    """Where a finished network is written; the origin's is gone when the run ends."""
    return _work(name) / "finished" if name == ORIGIN else folder_of(name)


def _stored(auto, name: str) -> nn.Module:
    """A finished network, in float32 and in evaluation mode."""
    with quiet_bars():
        return auto.from_pretrained(_place(name), dtype=torch.float32).eval()


def _make(name: str) -> dict:
    model, recipe, vision = _start(name), RECIPES[name], name == "small-vit"
    if vision:
        data, loss = digits("training"), labelled
    else:
        data, loss = _training_text(recipe), next_token
    mixture = name == "small-mixtral"
    if mixture:
        model.config.output_router_logits = True  # the loss then keeps the experts' loads alike
    made = train(model, loss, data, recipe, checkpoints=_work(name), every=EVERY, title=name)
    if mixture:
        model.config.output_router_logits = False
    files = keep_checkpoint(model, None if vision else _tokenizer(), _place(name))
    return {
        "parameters": sum(p.numel() for p in model.parameters()), "files": files, **_described_run(made),
        "evaluation": _accuracy(name) if vision else _quality(name),
    }


def _training_text(recipe: TrainRecipe) -> Tensor:
    """Just as much as the recipe reads, [sequences, tokens]; the trainer mixes the sources."""
    each = recipe.steps * recipe.batch * LENGTH // len(SOURCES)
    return torch.cat([token_sequences(_tokenizer(), "training", source=s, tokens=each, length=LENGTH) for s in SOURCES])


def _described_run(made: Trained) -> dict:
    curve = torch.tensor(made.losses, dtype=torch.float64).split(CURVE)
    return {
        "curve": {"steps": CURVE, "losses": [round(float(piece.mean()), 5) for piece in curve]}, "unit": made.unit,
        "seen": made.seen, "seconds": made.seconds, "per_second": made.per_second, "final_loss": made.losses[-1],
    }


def _quality(name: str) -> dict:
    """Loss of the stored weights on evaluation text, computed in float32."""
    model = _stored(AutoModelForCausalLM, name).requires_grad_(False)
    ids = token_sequences(_tokenizer(), "evaluation", **EVALUATION)
    found = evaluate(model, {}, ids)["dense"]
    return {
        "loss": sum(found.nll) / sum(found.tokens), "tokens": sum(found.tokens),
        "bits_per_byte": sum(found.nll) / math.log(2) / _bytes_of(ids),
        "text": fingerprint(ids),
    }


def _bytes_of(ids: Tensor) -> int:
    """Bytes of text that the predicted tokens stand for: all but the first of each sequence."""
    return int(bytes_of_tokens(_tokenizer())[ids[:, 1:]].sum())


@torch.no_grad()
def _accuracy(name: str) -> dict:
    model = _stored(AutoModelForImageClassification, name)
    held = digits("evaluation")
    right = model(pixel_values=held["pixel_values"]).logits.argmax(-1) == held["labels"]
    return {"accuracy": float(right.double().mean()), "images": len(right)}
