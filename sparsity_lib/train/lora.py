"""LoRA recovery: low-rank adapters trained while the masks are on, by one recipe for every method.

The teacher is the same model, dense and without adapters; the loss is KL(teacher || student) on training
text, so no label of any benchmark is used. The masks follow the live gate activations: no gradient flows
through a dropped entry, and saliencies or thresholds stay as calibrated.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn import functional

from sparsity_lib import lm
from sparsity_lib.checks import count, positive
from sparsity_lib.errors import SparsityError
from sparsity_lib.install import install, installed_on, uninstall
from sparsity_lib.plan import Plan
from sparsity_lib.sites import GATE, find_sites
from sparsity_lib.train.losses import with_gradient
from sparsity_lib.train.recipe import TrainRecipe
from sparsity_lib.train.trainer import train


@dataclass(frozen=True)
class LoraRecipe:
    """One training recipe, the same for all methods it compares.

    Adapters of `rank` (scaled by alpha / rank) sit on all linears of the blocks. AdamW, linear warm-up over a tenth
    of the steps and cosine decay to zero.
    """

    steps: int = 60
    sequences: int = 4
    length: int = 256
    rank: int = 16
    alpha: float = 32.0
    learning_rate: float = 5e-4
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "sequences", "rank"):
            count(name, getattr(self, name))
        count("length", self.length, minimum=2)
        count("seed", self.seed, minimum=0)
        positive("learning_rate", self.learning_rate)
        positive("alpha", self.alpha)

    @property
    def tokens(self) -> int:
        """Training tokens seen."""
        return self.steps * self.sequences * self.length

    def to_json(self) -> dict:
        return dataclasses.asdict(self)


def recover(model: nn.Module, plan: Plan, recipe: LoraRecipe, ids: Tensor) -> tuple[nn.Module, list[float]]:
    """Train adapters under `plan`'s masks and merge them; returns the merged dense weights' model and the losses.

    Parameters
    ----------
    model
        Dense; changed in place: its linears get the merged adapters. `install(model, plan)` makes it sparse again.
    ids
        Training text, token ids [sequences >= steps * recipe.sequences, tokens].

    Raises
    ------
    SparsityError
        If the plan masks linear inputs, as the oracle does (adapters beside a masked linear would see unmasked
        inputs, and merging would change the function), the model is sparse already, or there is too little text.
    """
    if installed_on(model) is not None:
        raise SparsityError("Recovery starts from the dense model. Fix: uninstall(model) first.")
    if any(r.site != GATE or getattr(r.score, "on_product", False) for r in plan.recipe.rules):
        method = plan.recipe.method
        raise SparsityError(f"LoRA recovery works on gate-site recipes, not on {method!r}. Fix: use cats or claws.")
    needed = recipe.steps * recipe.sequences
    if len(lm.check_ids(ids)) < needed:
        few = f"{len(ids)} training sequences are too few: the recipe needs {needed}"
        raise SparsityError(f"{few}. Fix: fewer steps or more text.")
    torch.manual_seed(recipe.seed)
    targets = [linear.name for linear in find_sites(model).linears]
    install(model, plan)
    adapted, training, was = None, model.training, [(p, p.requires_grad) for p in model.parameters()]
    try:
        adapted = get_peft_model(model, _config(recipe, targets))
        losses = _train(adapted, recipe, ids)
        merged = adapted.merge_and_unload()
    except BaseException:  # Ctrl-C too: half-trained adapters are no result
        if adapted is not None:
            adapted.unload().train(training)
        for parameter, wanted in was:
            parameter.requires_grad_(wanted)
        raise
    finally:
        uninstall(model)
    for parameter in merged.parameters():
        parameter.requires_grad_(False)
    return merged.eval(), losses


def _config(recipe: LoraRecipe, targets: list[str]) -> LoraConfig:
    return LoraConfig(r=recipe.rank, lora_alpha=recipe.alpha, lora_dropout=0.0, target_modules=targets, task_type="CAUSAL_LM")


def _train(adapted: PeftModel, recipe: LoraRecipe, ids: Tensor) -> list[float]:
    plain = TrainRecipe(
        steps=recipe.steps, batch=recipe.sequences, learning_rate=recipe.learning_rate, warmup=recipe.steps // 10 or 1,
        seed=recipe.seed,
    )
    return train(adapted, _divergence, ids, plain, title="LoRA recovery").losses


def _divergence(adapted: PeftModel, batch: Tensor, step: int = 0) -> Tensor:
    """KL(dense teacher || student) of one batch, nats per token."""
    model = adapted.get_base_model()
    with torch.no_grad(), adapted.disable_adapter(), _masks_off(model):
        teacher = lm.hidden_states(model, batch).flatten(0, 1)
    student = lm.hidden_states(model, batch)
    top = student.detach().flatten(0, 1)
    grad, total = torch.empty_like(top), 0.0
    for piece in lm.chunks(len(top), model):
        rows = top[piece].requires_grad_(True)
        target = functional.log_softmax(lm.logits(model, teacher[piece]), dim=-1)
        own = functional.log_softmax(lm.logits(model, rows), dim=-1)
        loss = functional.kl_div(own, target, log_target=True, reduction="sum") / len(top)
        grad[piece] = torch.autograd.grad(loss, rows)[0]
        total += float(loss.detach())
    return with_gradient(student, grad.view_as(student), total)


@contextmanager
def _masks_off(model: nn.Module) -> Iterator[None]:
    """Run the teacher: the same model with every sparsifier passing its input through."""
    sparsifiers = installed_on(model).sparsifiers.values()
    for sparsifier in sparsifiers:
        sparsifier.enabled = False
    try:
        yield
    finally:
        for sparsifier in sparsifiers:
            sparsifier.enabled = True
