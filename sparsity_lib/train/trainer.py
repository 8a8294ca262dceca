"""One training loop for everything that the book trains: any module, any loss, one process or many.

    accelerate launch --num_processes 2 train.py      # the same call to `train` in each process; without GPUs: torchrun

What happens at step t is a function of the recipe, the data and the weights, and of nothing else: the order of the
rows is known beforehand, and random generators are seeded anew at every step. So a run that was killed goes on from
its last checkpoint with the very losses it would have had.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import DistributedType
from torch import Tensor, nn

from sparsity_lib.checks import count, positive
from sparsity_lib.errors import Diverged, SparsityError
from sparsity_lib.progress import bar
from sparsity_lib.train import checkpoints as store
from sparsity_lib.train.data import Data, Rows, fingerprint
from sparsity_lib.train.losses import Loss
from sparsity_lib.train.recipe import TrainRecipe
from sparsity_lib.train.sharding import fill, plain, shard, whole

_PLAIN = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)


@dataclass(frozen=True)
class Trained:
    """What a run gave. losses: the mean loss of each step. seen: `unit`s ("token" or "row") trained on, over all
    processes. seconds: time spent training, that of interrupted calls included. resumed: the step it went on from.
    """

    losses: list[float]
    unit: str
    seen: int
    seconds: float
    resumed: int

    @property
    def per_second(self) -> float:
        """Tokens (or rows) a second."""
        return self.seen / self.seconds if self.seconds else math.inf


def train(
    module: nn.Module, loss: Loss, data: Data, recipe: TrainRecipe, *, checkpoints: str | os.PathLike | None = None,
    every: int = 100, scale: Callable[[str, nn.Parameter], float] | None = None,
    after: Callable[[nn.Module, int], None] | None = None, about: Mapping[str, Any] | None = None,
    blocks: Sequence[nn.Module] | None = None, title: str = "training",
) -> Trained:
    """Train the parameters of `module` that require gradients, in place.

    Parameters
    ----------
    module
        Trained parameters in float32. Under `accelerate launch` it moves to the process's device; else it stays.
    loss
        Called with (module, batch, step); returns the mean loss over the batch. Its randomness must come from torch.
    data
        A tensor [rows, ...] or a dict of such; a batch has the same form.
    checkpoints
        A folder of this run's own. Where it holds checkpoints, training goes on from the last.
    every
        Steps from one checkpoint to the next; the last step always makes one.
    scale
        (name, parameter) -> factor on its learning rate.
    after
        Called with (module, step) after each update, to project parameters back to where they are allowed.
    about
        Plain data, of what the recipe does not say, that checkpoints must agree on to go on from them.
    blocks
        Split weights, gradients and moments between the processes instead of keeping all in each, these modules one by one
        and then the rest (`sharding.shard`). Checkpoints are the same either way, and the module stays split afterwards. One
        process splits nothing.
    title
        What the progress bar is called.

    Raises
    ------
    SparsityError
        If nothing is to be trained, the data is too little, the module cannot be split, the checkpoints are of another run or
        damaged, or a loss or gradient is not finite: the module then keeps the weights from before that step, and the message
        names the last good checkpoint.
    """
    count("every", every)
    folder = None if checkpoints is None else Path(checkpoints)
    with store.alone(folder) if folder is not None and int(os.environ.get("RANK", "0")) == 0 else contextlib.nullcontext():
        return _train(module, loss, data, recipe, folder, every, scale, after, about, blocks, title)


def _train(
    module: nn.Module, loss: Loss, data: Data, recipe: TrainRecipe, folder: Path | None, every: int,
    scale: Callable[[str, nn.Parameter], float] | None, after: Callable[[nn.Module, int], None] | None,
    about: Mapping[str, Any] | None, blocks: Sequence[nn.Module] | None, title: str,
) -> Trained:
    run = _Run(module, loss, data, recipe, folder, scale, about or {}, blocks)
    training = [(m, m.training) for m in module.modules()]
    devices = [run.device] if run.device.type == "cuda" else []
    try:
        module.train()
        with torch.random.fork_rng(devices), run.progress(title) as progress:
            run.accelerator.wait_for_everyone()
            start = time.monotonic()
            for step in range(run.step, recipe.steps):
                value = run.update(step)
                if after is not None:
                    with torch.no_grad():
                        after(module, step)
                now = time.monotonic()
                run.done(value, now - start)
                start = now
                if run.step % every == 0 or run.step == recipe.steps:
                    run.save()
                progress.update(run.batch_size)
                progress.set_postfix(loss=f"{value:.3f}", refresh=False)
    finally:
        for m, flag in training:
            m.training = flag
    return Trained(run.losses, run.rows.unit, run.step * run.batch_size, run.seconds, run.resumed)


class _Objective(nn.Module):
    """Module and loss as one: distributed training must see every forward, whatever of the module the loss calls."""

    def __init__(self, module: nn.Module, loss: Loss) -> None:
        super().__init__()
        self.module = module
        self.__dict__["loss"] = loss  # not as a submodule: a teacher inside the loss is not trained

    def forward(self, batch: Data, step: int) -> Tensor:
        return self.loss(self.module, batch, step)


class _Run:
    """The state of one run in one process."""

    def __init__(self, module, loss, data, recipe: TrainRecipe, folder: Path | None, scale, extra: Mapping[str, Any],
                 blocks: Sequence[nn.Module] | None) -> None:
        unused = DistributedDataParallelKwargs(find_unused_parameters=True)  # an expert may get no token of a batch
        # Without a GPU, accelerate takes each of torchrun's processes for the only one unless it is told.
        cpu = int(os.environ.get("WORLD_SIZE", "1")) > 1 and not torch.accelerator.is_available()
        # Mixed precision is ours (torch.autocast), because accelerate fixes it once for a whole process.
        self.accelerator = Accelerator(cpu=cpu, mixed_precision="no", device_placement=False, kwargs_handlers=[unused])
        if self.accelerator.distributed_type not in _PLAIN:
            raise SparsityError(
                f"{self.accelerator.distributed_type.value} splits the weights in a way that these checkpoints do not know. "
                "Fix: accelerate launch with plain data parallelism, and train(blocks=...) to split them."
            )
        self.module, self.recipe, self.folder, self.extra = module, recipe, folder, extra
        self.rows = Rows(data, recipe, self.accelerator.process_index, self.accelerator.num_processes)
        self.batch_size = self.rows.size(recipe)
        self.trained = _trained(module)
        self._check_trained()
        many, objective = self.accelerator.num_processes > 1, _Objective(module, loss)
        self.sharded = many and blocks is not None
        if folder is not None:
            self.about = self._about()
        if self.sharded:
            shard(objective, blocks, self.accelerator.device)
            self.trained = _trained(module)  # they are others now
        elif many:
            module.to(self.accelerator.device)
        self.device = next(iter(self.trained.values())).device
        self.optimiser = torch.optim.AdamW(_groups(self.trained, recipe, scale), betas=recipe.betas)
        self.losses: list[float] = []
        self.seconds, self.step, self.resumed = 0.0, 0, 0
        if folder is not None:
            self._resume()
        self.objective = self.accelerator.prepare_model(objective) if many and not self.sharded else objective

    def _check_trained(self) -> None:
        if not self.trained:
            raise SparsityError("Nothing is to be trained: no parameter requires a gradient. Fix: module.requires_grad_(True).")
        for name, parameter in self.trained.items():
            if parameter.dtype not in (torch.float32, torch.float64):
                raise SparsityError(
                    f"{name} is {parameter.dtype}, in which small updates are lost. Fix: module.float(); "
                    'precision="bf16" computes in bfloat16 all the same.'
                )

    def _state(self) -> dict[str, Tensor]:
        """What training changes: trained parameters, and the buffers that a checkpoint of the module would hold."""
        kept = self.module.state_dict().keys()
        return {**self.trained, **{name: b for name, b in self.module.named_buffers() if name in kept}}

    def _about(self) -> dict[str, Any]:
        frozen = {name: p for name, p in self.module.named_parameters() if not p.requires_grad}
        about = {"recipe": self.recipe.to_json(), "data": self.rows.fingerprint(), "frozen weights": fingerprint(frozen)}
        return {**about, **self.extra}

    def _resume(self) -> None:
        saved = store.latest(self.folder)
        if saved is None:
            return
        state = self._state()
        store.check_same(saved, self.about, {name: tensor.shape for name, tensor in state.items()})
        for name, tensor in state.items():
            fill(tensor, saved.state[name])
        for key, moment in saved.moments.items():
            name, _, kind = key.rpartition(":")
            parameter = self.trained[name]
            own = moment if kind == "step" else fill(torch.zeros_like(parameter, requires_grad=False), moment)
            self.optimiser.state[parameter][kind] = own
        self.step = self.resumed = saved.step
        self.losses, self.seconds = list(saved.about["losses"]), saved.about["seconds"]

    def save(self) -> None:
        """Write a checkpoint, from one process for all."""
        first = self.accelerator.is_main_process
        if self.folder is None or not (first or self.sharded):
            return
        state = self._state()
        moments = {f"{name}:{kind}": m for name, p in self.trained.items() for kind, m in self.optimiser.state[p].items()}
        if self.sharded:
            state, moments = whole(state, keep=first), whole(moments, keep=first)
        if first:
            about = {**self.about, "losses": self.losses, "seconds": self.seconds}
            store.save(self.folder, self.step, about, state, moments)

    def done(self, value: float, seconds: float) -> None:
        self.losses.append(value)
        self.seconds += seconds
        self.step += 1

    def update(self, step: int) -> float:
        """One update of the weights; returns the mean loss of the batch over all processes."""
        for group in self.optimiser.param_groups:
            group["lr"] = group["peak"] * self.recipe.rate(step)
        total, pieces = torch.zeros((), dtype=torch.float64, device=self.device), self.recipe.accumulation
        for place, batch in enumerate(self.rows.pieces(step, self.device)):
            torch.manual_seed(_seed(self.recipe.seed, step, place, self.accelerator.process_index))
            # split gradients are added up piece by piece: kept whole until the last, they would take as much as the weights
            now = self.sharded or place == pieces - 1
            with contextlib.nullcontext() if now else self.accelerator.no_sync(self.objective):
                part = self._loss(batch, step)
                self.accelerator.backward(part / pieces)
            total += part.detach().double() / pieces
        value = float(self.accelerator.reduce(total, "mean"))
        norm = float(plain(self.accelerator.clip_grad_norm_(self.trained.values(), self.recipe.clip)))
        if not (math.isfinite(value) and math.isfinite(norm)):
            self.optimiser.zero_grad(set_to_none=True)
            raise self._diverged("loss" if not math.isfinite(value) else "gradient", step)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        return value

    def _loss(self, batch: Data, step: int) -> Tensor:
        # autocast remembers the weights it has rounded, of blocks too that are no longer gathered
        with torch.autocast(
                self.device.type, torch.bfloat16, enabled=self.recipe.precision == "bf16", cache_enabled=not self.sharded):
            found = self.objective(batch, step)
        if not isinstance(found, Tensor) or found.dim() or not found.requires_grad:
            shown = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise SparsityError(f"The loss is {shown}, without a gradient or no scalar. Fix: return the mean over the batch.")
        return found

    def _diverged(self, what: str, step: int) -> Diverged:
        good = store.steps_in(self.folder) if self.folder is not None else []
        where = f"The last good checkpoint is {store.path_of(self.folder, good[-1])}." if good else "There is no checkpoint."
        return Diverged(
            f"The {what} at step {step} is not finite; the weights are those before it. {where} "
            "Fix: a smaller learning rate, a longer warm-up, or float32."
        )

    @contextlib.contextmanager
    def progress(self, title: str) -> Iterator[Any]:
        """A bar over the whole run, in the first process alone."""
        total, seen = self.recipe.steps * self.batch_size, self.step * self.batch_size
        with bar(total=total, desc=title, unit=self.rows.unit, initial=seen, unit_scale=True) as shown:
            if not self.accelerator.is_main_process:
                shown.disable = True
            yield shown


def _trained(module: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def _groups(trained: dict[str, nn.Parameter], recipe: TrainRecipe, scale) -> list[dict[str, Any]]:
    """One group of AdamW for each learning rate and weight decay."""
    found: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in trained.items():
        factor = 1.0 if scale is None else positive(f"scale of {name}", scale(name, parameter))
        found.setdefault((factor, recipe.weight_decay if parameter.dim() > 1 else 0.0), []).append(parameter)
    return [
        {"params": chosen, "lr": recipe.learning_rate * factor, "peak": recipe.learning_rate * factor, "weight_decay": decay}
        for (factor, decay), chosen in found.items()
    ]


def _seed(*parts: int) -> int:
    """A seed that differs for every step, piece and process."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1
