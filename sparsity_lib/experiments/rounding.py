"""What becomes of a rounding error: the last bit of the embedding changed, dense, with fixed masks, with masks chosen by token.

Everything in float32. Another batch, number of threads or processor adds up sums in another order, which changes last bits too.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sparsity_lib import lm
from sparsity_lib.accounting import weights_per_token
from sparsity_lib.assets.texts import token_sequences
from sparsity_lib.evaluate.benchmarks import BACKENDS, run_benchmarks
from sparsity_lib.experiments import common
from sparsity_lib.experiments.compare_common import density_at, maker
from sparsity_lib.fit import fit_many
from sparsity_lib.install import installed
from sparsity_lib.parts.select import TopK
from sparsity_lib.plan import Plan
from sparsity_lib.sites import find_sites
from sparsity_lib.weights import WeightPruning, pruned_weights

#: Share of all weights that is skipped: what every method reaches on that model.
SHARES = {"smollm2-135m-instruct": 0.3, "gemma3-270m": 0.1}
#: No mask; masks that are the same for all tokens; masks chosen anew for each.
METHODS = ("dense", "magnitude", "cats", "claws", "teal", "wina", "inputs_topk", "larosa", "nm")
#: Of N:M activations, whose N is the one that comes nearest to the share.
GROUP = 16
TEXT = {"sequences": 8, "length": 128}
EVERY = {"smollm2-135m-instruct": 1, "gemma3-270m": 4}
DRAWS = 2
TASK = {"name": "piqa", "limit": 200}


def run(checkpoint) -> tuple[Any, dict, list[int]]:
    """One item a model and method."""
    settings = {"text": TEXT, "draws": DRAWS, "task": TASK, "calibration": common.CALIBRATION}
    wanted = [{"model": name, "method": method, "share": SHARES[name], "every": EVERY[name], **settings,
               **({"group": GROUP} if method == "nm" else {})} for name in common.MODELS for method in METHODS]
    data: dict[str, Any] = {}
    for params, found in zip(wanted, checkpoint.items([(params, partial(measure, params)) for params in wanted]), strict=True):
        data.setdefault(params["model"], {})[params["method"]] = found
        print(line(params["model"], params["method"], found), flush=True)
    return data, {"shares": SHARES, "every": EVERY, "methods": METHODS, **settings}, [0]


def measure(params: dict[str, Any]) -> dict[str, Any]:
    """One method: what the changed bit makes of hidden states, predictions, KL and answers.

    Returns
    -------
    dict
        `layers`: by block, mean over tokens of |h' - h| / |h|; of |log p'(x) - log p(x)| over tokens the `mean`, `median` and
        `most`; `agree`: share of tokens with the same likeliest word; `kl` from the dense model by sequence, unchanged and
        in every draw; `tokens` of each; `answers` to the task unchanged and changed, as 0 and 1.
    """
    model, tokenizer = common.in_float32(params["model"])
    ids = common.evaluation_ids(tokenizer, **params["text"])
    dense = [_run(model, nullcontext, row, params["every"])[1] for row in ids]
    plan = plan_of(model, tokenizer, params)
    within = partial(installed, model, plan) if plan else partial(_static, model, params)
    rows: dict[str, list[Any]] = {"layers": [], "gaps": [], "agree": [], "kl": []}
    for row, truth in zip(ids, dense, strict=True):
        plain, chosen = _run(model, within, row, params["every"])
        kl = [divergence(truth, chosen)]
        for draw in range(params["draws"]):
            with last_bit(model, draw):
                changed, other = _run(model, within, row, params["every"])
            rows["layers"].append(torch.stack([_relative(a, b) for a, b in zip(plain, changed, strict=True)]))
            targets = row[1:][:: params["every"], None]
            rows["gaps"].append((other.gather(-1, targets) - chosen.gather(-1, targets)).abs().flatten())
            rows["agree"].append((other.argmax(-1) == chosen.argmax(-1)).float().mean())
            kl.append(divergence(truth, other))
        rows["kl"].append(kl)
    gaps = torch.cat(rows["gaps"])
    return {
        "layers": torch.stack(rows["layers"]).mean(0).tolist(), "mean": float(gaps.mean()), "median": float(gaps.median()),
        "most": float(gaps.max()), "agree": float(torch.stack(rows["agree"]).mean()), "kl": rows["kl"],
        "tokens": [len(truth) for truth in dense], "answers": answers(model, tokenizer, within, params["task"]),
    }


def plan_of(model: nn.Module, tokenizer: Any, params: dict[str, Any]) -> Plan | None:
    """The method's plan at the share; None of those that have none."""
    method = params["method"]
    if method in ("dense", "magnitude"):
        return None
    if method == "nm":
        sites, total = find_sites(model), weights_per_token(model)
        recipe = min((maker(method)(n / params["group"]) for n in range(1, params["group"])),
                     key=lambda made: abs(made.skipped(sites, total) - params["share"]))
    else:
        ids = token_sequences(tokenizer, "calibration", tokens=256, length=256, seed=1)
        recipe = maker(method)(density_at(method, params["share"], model, ids))
    return fit_many([recipe], model, tokenizer, **params["calibration"])[0]


def _static(model: nn.Module, params: dict[str, Any]) -> AbstractContextManager:
    if params["method"] == "dense":
        return nullcontext()
    sparsity = params["share"] * weights_per_token(model) / sum(linear.weights for linear in find_sites(model).linears)
    return pruned_weights(model, WeightPruning(TopK(1 - sparsity), "magnitude"))


@contextmanager
def last_bit(model: nn.Module, draw: int) -> Iterator[None]:
    """The embedding's output times 1 + 2^-23 or 1 - 2^-23, by dimension: the smallest step of a float32, or the next."""
    def change(module: nn.Module, args: Any, out: Tensor) -> Tensor:
        sign = torch.randint(0, 2, out.shape[-1:], generator=torch.Generator().manual_seed(draw)).mul_(2).sub_(1)
        return out * (1 + torch.finfo(torch.float32).eps * sign.to(out))

    handle = model.get_input_embeddings().register_forward_hook(change)
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def _run(
    model: nn.Module, within: Callable[[], AbstractContextManager], row: Tensor, every: int
) -> tuple[list[Tensor], Tensor]:
    """Hidden states [tokens, hidden] after every block, and log-probabilities [predicted, vocabulary] of every n-th token."""
    found: list[Tensor] = []
    blocks = [model.get_submodule(name) for name in find_sites(model).blocks]
    handles = [block.register_forward_hook(lambda module, args, out: found.append((out[0] if isinstance(out, tuple) else out)[0]))
               for block in blocks]
    try:
        with within():
            last = lm.hidden_states(model, row[None])[0]
    finally:
        for handle in handles:
            handle.remove()
    return found, lm.logits(model, last[:-1][::every]).log_softmax(-1)


def _relative(one: Tensor, other: Tensor) -> Tensor:
    return ((one - other).norm(dim=-1) / one.norm(dim=-1)).mean()


def divergence(one: Tensor, other: Tensor) -> float:
    """Sum over tokens of KL(one || other), of log-probabilities."""
    return float((one.exp() * (one - other)).sum(-1).double().sum())


def answers(
    model: nn.Module, tokenizer: Any, within: Callable[[], AbstractContextManager], task: dict[str, Any]
) -> list[list[float]]:
    """By document, whether it was answered rightly: unchanged, and with the bit changed.

    By the same engine: where one of the two cannot be packed, because rounding moves its predictions too far, both go unpacked.
    """
    for backend in BACKENDS:
        found = []
        for change in (nullcontext(), last_bit(model, 0)):
            with within(), change, warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Benchmarks run unpacked")
                found.append(run_benchmarks(model, tokenizer, task["name"], limit=task["limit"], backend=backend))
        if all(result.backend == backend for result in found):
            break
    return [list(result.tasks[task["name"]].values["acc"]) for result in found]


def line(name: str, method: str, found: dict[str, Any]) -> str:
    """One item as text."""
    before, after = (sum(a) for a in found["answers"])
    flips = sum(a != b for a, b in zip(*found["answers"], strict=True))
    kl = " ".join(f"{value:.4f}" for value in divergences(found))
    return (f"{name} {method}: hidden {found['layers'][0]:.1e} to {found['layers'][-1]:.1e}; a token's log p changes by "
            f"{found['mean']:.1e} (median {found['median']:.1e}, most {found['most']:.1e}); KL {kl}; "
            f"answers right {before:.0f}, {after:.0f}, changed {flips}")


def divergences(found: dict[str, Any]) -> list[float]:
    """KL from the dense model in nats a token, unchanged and in every draw."""
    return [sum(draw) / sum(found["tokens"]) for draw in zip(*found["kl"], strict=True)]
