"""Training a granular model against the dense one it was made of, with the book's trainer.

    registry = convert(model, CWICConfig(stripe=64))
    made = train_cwic(model, teacher, rows, CWICRecipe(TrainRecipe(...), budget.active(steps, final=3.0)))

Like every run of the trainer it goes on from its last checkpoint with the losses it would have had, stops at a loss that
is not finite with the last good checkpoint named, and refuses checkpoints of another model, recipe or data.
"""

from __future__ import annotations

import copy
import dataclasses
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparsity_lib import lm
from sparsity_lib.checks import count, fraction, positive
from sparsity_lib.cwic.adapters import add_adapters, merge_adapters
from sparsity_lib.cwic.budget import Budget, budget_loss, spent
from sparsity_lib.cwic.convert import Registry, registry_of
from sparsity_lib.cwic.history import History, StepRecord
from sparsity_lib.cwic.losses import distil
from sparsity_lib.errors import SparsityError, refuse, unknown
from sparsity_lib.sites import SiteMap, find_sites
from sparsity_lib.train.checkpoints import latest
from sparsity_lib.train.data import Data
from sparsity_lib.train.packing import PADDING, model_inputs, positions
from sparsity_lib.train.recipe import TrainRecipe
from sparsity_lib.train.sharding import is_split, shard_frozen
from sparsity_lib.train.trainer import Trained, train

MODES = {
    "all": "weights, embeddings and thresholds",
    "thresholds": "thresholds alone; weights stay frozen",
    "lora": "thresholds, and low-rank adapters on the matrices of the blocks",
}


@dataclass(frozen=True)
class CWICRecipe:
    """One run: how it is trained, the budget, and what is trained.

    Parameters
    ----------
    train, budget
        The trainer's recipe, and the target with its schedule.
    mode
        One of `MODES`.
    eta
        Thresholds of n inputs learn at eta sqrt(n) times the learning rate.
    mse
        Weight of the mean squared error of the last hidden states (an ablation of the active-parameter version).
    rank, alpha
        Of the adapters in mode "lora".
    """

    train: TrainRecipe
    budget: Budget
    mode: str = "all"
    eta: float = 1.0
    mse: float = 0.0
    rank: int = 16
    alpha: float = 32.0

    def __post_init__(self) -> None:
        if not isinstance(self.train, TrainRecipe) or not isinstance(self.budget, Budget):
            raise refuse("recipe", type(self.budget).__name__, "CWICRecipe(TrainRecipe(...), Budget(...))")
        if self.mode not in MODES:
            raise unknown("mode", self.mode, MODES)
        positive("eta", self.eta)
        fraction("mse", self.mse, zero=True) if self.mse <= 1 else positive("mse", self.mse)
        count("rank", self.rank)
        positive("alpha", self.alpha)

    def to_json(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "train": self.train.to_json(), "budget": self.budget.to_json()}


@dataclass(frozen=True)
class CWICTrained:
    """What a run gave: the trainer's figures, and a record of every step."""

    run: Trained
    history: list[StepRecord]


def teacher_of(model: nn.Module, *, share: bool = False) -> nn.Module:
    """A frozen copy of the dense model to distil from; take it before `convert`.

    With `share` it holds the same weight tensors, for runs that leave them as they are ("thresholds", "lora").
    """
    if model.__dict__.get("_cwic") is not None:
        raise SparsityError("The teacher is the dense model. Fix: teacher_of(model) before convert(model, ...).")
    memo = {id(t): t for t in (*model.parameters(), *model.buffers())} if share else {}
    made = copy.deepcopy(model, memo).eval()
    return made if share else made.requires_grad_(False)


def train_cwic(
    model: nn.Module, teacher: nn.Module, data: Data, recipe: CWICRecipe, *, checkpoints: str | os.PathLike | None = None,
    every: int = 100, on_step: Callable[[StepRecord, nn.Module], None] | None = None, shard: bool = False, title: str = "CWIC",
) -> CWICTrained:
    """Train a converted model in place; adapters are merged at the end.

    Parameters
    ----------
    model
        After `convert`, its trained parameters in float32.
    teacher
        From `teacher_of`.
    data
        Token ids [rows, tokens], or what `packing.pack` gives.
    checkpoints, every
        As for `train`. The records are kept there too.
    on_step
        Called with each step's record and the model, in the first process.
    shard
        Split student, teacher, gradients and moments between the processes, block by block (FSDP), in mode "all". The model
        stays split afterwards: `model.save_pretrained(folder)`, called in every process, writes it whole. One process splits
        nothing.

    Raises
    ------
    SparsityError
        As `train` does; if the model is not converted, there is no data, the teacher has another vocabulary, or the weights
        are to be split in a mode that leaves them as they are.
    """
    registry = registry_of(model)
    _check(model, teacher, data, recipe)
    if shard and recipe.mode != "all":
        why = f'false in mode "{recipe.mode}", whose weights are frozen and shared with the teacher'
        raise refuse("shard", shard, why, 'mode "all"')
    folder = None if checkpoints is None else Path(checkpoints)
    adapted = _choose_trained(model, registry, recipe)
    history = History(folder, on_step)
    saved = latest(folder) if folder is not None else None
    history.resume(saved.step if saved is not None else 0)
    objective = _Objective(registry, teacher, recipe, history)

    def after(module: nn.Module, step: int) -> None:
        registry.clamp()
        history.done(module, step)

    try:
        run = train(
            model, objective, data, recipe.train, checkpoints=folder, every=every, scale=registry.scale(recipe.eta), after=after,
            about={"cwic": _about(registry, recipe)}, blocks=_blocks(model, registry.sites) if shard else None, title=title)
    except BaseException:
        history.drop()
        raise
    finally:
        registry.ledger.costs, registry.ledger.valid, registry.ledger.moved = {}, None, None
    if adapted:
        merge_adapters(model)
    return CWICTrained(run, history.records)


class _Objective:
    """The loss of one piece of a batch; the teacher is no part of what is trained."""

    def __init__(self, registry: Registry, teacher: nn.Module, recipe: CWICRecipe, history: History) -> None:
        self.registry, self.teacher, self.recipe, self.history = registry, teacher, recipe, history
        self.placed = False

    def __call__(self, model: nn.Module, batch: Tensor | Mapping[str, Tensor], step: int) -> Tensor:
        ids, segments = (batch, None) if isinstance(batch, Tensor) else (batch["input_ids"], batch.get("segments"))
        valid = None if segments is None else (segments != PADDING).flatten()
        self._place_teacher(model, ids.device)
        inputs = model_inputs(model, ids, segments)
        with torch.no_grad():
            reference = _hidden(self.teacher, inputs)
        self.registry.take_costs()
        self.registry.ledger.valid, self.registry.ledger.moved = valid, set()
        hidden = _hidden(model, inputs)
        found = distil(
            model, self.teacher, hidden, reference, registry=self.registry, valid=valid, mse=self.recipe.mse > 0)
        budget = self.recipe.budget
        cost = spent(self.registry, self.registry.take_costs(), budget, valid=valid,
                     attention=attention_operations(model, ids, segments))
        self.registry.ledger.valid = None
        target = budget.target(step)
        loss = found.loss + budget.weight * budget_loss(cost.ratio, target).to(found.loss.dtype)
        if found.mse is not None:
            loss = loss + self.recipe.mse * found.mse
        self.history.piece(
            loss=loss.detach(), kl=found.loss.detach(), forward_kl=found.forward_kl.detach(),
            reverse_kl=found.reverse_kl.detach(), mse=None if found.mse is None else found.mse.detach(),
            ratio=cost.ratio.detach(), target=target, head_ratio=cost.head_ratio,
            tokens=float(ids.numel() if valid is None else valid.sum()))
        return loss


    def _place_teacher(self, model: nn.Module, device: torch.device) -> None:
        """Once, when the student is where it stays."""
        if self.placed:
            return
        if is_split(model):
            shard_frozen(self.teacher, self.teacher.base_model, _blocks(self.teacher, find_sites(self.teacher)), device)
        else:
            self.teacher.to(device)
        self.placed = True


def attention_operations(model: nn.Module, ids: Tensor, segments: Tensor | None) -> float:
    """Operations a token for QK^T and PV of all layers: 4 heads head_dim (multiply and add, twice) times the tokens seen."""
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    if segments is None:
        seen = (ids.shape[1] + 1) / 2
    else:
        chosen = segments != PADDING
        seen = float((positions(segments)[chosen] + 1).double().mean())
    return 4.0 * config.num_hidden_layers * heads * size * seen


def _hidden(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    rest = {name: value for name, value in inputs.items() if name != "input_ids"}
    return lm.hidden_states(model, inputs["input_ids"], **rest)


def _blocks(model: nn.Module, sites: SiteMap) -> list[nn.Module]:
    return [model.get_submodule(name) for name in sites.blocks]


def _about(registry: Registry, recipe: CWICRecipe) -> dict[str, Any]:
    return {"config": registry.config.to_json(), "recipe": recipe.to_json()}


def _choose_trained(model: nn.Module, registry: Registry, recipe: CWICRecipe) -> bool:
    """Freeze and unfreeze by the mode; returns whether adapters were added."""
    model.requires_grad_(recipe.mode == "all")
    for theta in registry.thresholds().values():
        theta.requires_grad_(True)
    if recipe.mode != "lora":
        return False
    add_adapters(model, registry, recipe.rank, recipe.alpha, recipe.train.seed)
    return True


def _check(model: nn.Module, teacher: nn.Module, data: Data, recipe: CWICRecipe) -> None:
    for module in model.modules():
        again = getattr(module, "_gradient_checkpointing_func", None)
        if getattr(module, "gradient_checkpointing", False) and getattr(again, "keywords", {}).get("use_reentrant", True):
            raise SparsityError("Reentrant checkpointing loses the gradients of what masks cost. Fix: "
                                'model.activation_checkpointing_enable({"use_reentrant": False}).')
    if teacher.__dict__.get("_cwic") is not None:
        raise SparsityError("The teacher is granular too. Fix: teacher_of(model) before convert(model, ...).")
    own, other = (m.get_output_embeddings().weight.shape[0] for m in (model, teacher))
    if own != other:
        raise refuse("vocabulary of the teacher", other, f"the student's, {own}")
    ids = data if isinstance(data, Tensor) else data.get("input_ids") if isinstance(data, Mapping) else None
    if ids is None:
        raise refuse("data", type(data).__name__, 'token ids [rows, tokens], or {"input_ids": ..., "segments": ...}')
    lm.check_ids(ids)
    if ids.shape[1] < 2:
        raise SparsityError("Rows of one token have no next token to predict. Fix: longer rows.")
    shared = {id(p) for p in teacher.parameters()}
    if recipe.mode == "all" and any(id(p) in shared for p in model.parameters()):
        raise SparsityError('The teacher shares weights that mode "all" changes. Fix: teacher_of(model, share=False).')
