"""Learned repairs, trained block by block: each block's output is drawn to what the dense block puts out.

    trained = train_repairs(model, plan, tokenizer)      # plan: fitted, with "ls" or "lpts" in its recipe
    install(model, trained.plan)

No label and no other block's error is used (arXiv 2509.22166: mean square error of the block's output, AdamW at 1e-4,
256 sequences of 512 tokens once). Masks follow the live values and are constants to the gradient, which flows through
kept entries only.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sparsity_lib import lm
from sparsity_lib.attach import Attached
from sparsity_lib.blocks import Blocks
from sparsity_lib.checks import count, positive
from sparsity_lib.errors import SparsityError, refuse, unknown
from sparsity_lib.fit import calibration_stream
from sparsity_lib.install import installed_on
from sparsity_lib.plan import Plan
from sparsity_lib.sites import find_sites
from sparsity_lib.sparsifier import Sparsifier, put_on
from sparsity_lib.train.recipe import TrainRecipe
from sparsity_lib.train.trainer import train

#: What reaches a block while its repairs are trained.
INPUTS = ("dense", "sparse")
#: What is minimised: the mean square error, or that in units of what the dense block puts out in the same channel or token.
ERRORS = ("mean square", "by channel", "by token")
#: Batches on which a block's error is read before and after.
CHECKED = 8


@dataclass(frozen=True)
class RepairRecipe:
    """How repairs are trained; the defaults are the paper's, but for the seed and `clip`.

    Parameters
    ----------
    sequences, length
        Text: how many sequences of how many tokens.
    batch
        Sequences a step.
    epochs
        How often the text is gone through, in random order.
    learning_rate
        Of AdamW without weight decay (which would draw scales to 0), constant.
    clip
        Largest norm of a block's gradient.
    inputs
        "dense": a block gets what reaches it in the dense model. "sparse": what the blocks before it, pruned and repaired,
        make of the text; its output is still drawn to that of the dense model, so that it also learns to make up for them.
    error
        "mean square" (the paper's), which a channel or token a hundred times as large as the others has nearly for itself;
        "by channel": each channel's errors are divided by the root mean square that it has in the dense block's output;
        "by token": each token's errors are divided by the root mean square of what the dense block makes of it.
    """

    sequences: int = 256
    length: int = 512
    batch: int = 1
    epochs: int = 1
    learning_rate: float = 1e-4
    clip: float = 1.0
    inputs: str = "dense"
    error: str = "mean square"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("sequences", "batch", "epochs"):
            count(name, getattr(self, name))
        count("length", self.length, minimum=2)
        count("seed", self.seed, minimum=0)
        for name in ("learning_rate", "clip"):
            positive(name, getattr(self, name))
        if not isinstance(self.inputs, str) or self.inputs not in INPUTS:
            raise unknown("inputs", self.inputs, INPUTS)
        if not isinstance(self.error, str) or self.error not in ERRORS:
            raise unknown("error", self.error, ERRORS)
        if self.sequences % self.batch:
            raise refuse("batch", self.batch, f"a divisor of the {self.sequences} sequences")

    def to_json(self) -> dict:
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class TrainedRepairs:
    """What training gave. losses: the recipe's error at every step, by block ([] where a block has nothing to train).
    before, after: that error on the first `CHECKED` batches at the start and at the end, by block.
    """

    plan: Plan
    losses: list[list[float]]
    before: list[float]
    after: list[float]


def train_repairs(
    model: nn.Module, plan: Plan, tokenizer=None, *, ids: Tensor | None = None, recipe: RepairRecipe | None = None,
    source: str | None = None,
) -> TrainedRepairs:
    """Train the learned tensors of `plan` (`Part.trained`), one block after the other; the model is left as it was.

    Parameters
    ----------
    model
        Dense, in evaluation as it was when the plan was fitted.
    tokenizer
        Needed where the embedded calibration text is used, from `source` (all sources by default).
    ids
        Own text, token ids [sequences >= recipe.sequences, tokens].
    recipe
        `RepairRecipe()` if left out.

    Raises
    ------
    SparsityError
        If nothing in the plan is to be trained, the model is sparse or of another shape, there is too little text, or a
        loss or gradient is not finite (the message names block and step).
    """
    recipe = recipe or RepairRecipe()
    if installed_on(model) is not None:
        raise SparsityError("Repairs are trained from the dense model. Fix: uninstall(model) first.")
    sites = find_sites(model)
    plan.check_fits(sites)
    if not any(piece.trained(site) for rule, site in plan.recipe.placed(sites) for piece in rule.parts()):
        raise SparsityError(
            f"{plan.recipe.method!r} has nothing to be trained. Fix: a learned part, as in recipes.nm(repair='ls')."
        )
    if ids is not None and len(lm.check_ids(ids)) < recipe.sequences:
        few = f"{len(ids)} training sequences are too few: the recipe needs {recipe.sequences}"
        raise SparsityError(f"{few}. Fix: fewer sequences or more text.")
    ids = None if ids is None else ids[: recipe.sequences]
    tokens = recipe.sequences * recipe.length
    stream, text = calibration_stream(tokenizer, ids, None, tokens, recipe.length, source, recipe.seed, recipe.batch)
    frozen = [(p, p.requires_grad) for p in model.parameters()]
    tensors, done = dict(plan.tensors), []
    try:
        model.requires_grad_(False)
        with Blocks(model, stream, sites) as blocks:
            dense = blocks.hidden
            for layer in range(sites.layers):
                with _Block(blocks, plan, layer, dense, recipe.error) as block:
                    done.append(block.train(recipe))
                    tensors.update(block.trained())
                    if layer + 1 < sites.layers:
                        dense = block.advance(recipe.inputs)
    finally:
        for parameter, wanted in frozen:
            parameter.requires_grad_(wanted)
    losses, before, after = (list(column) for column in zip(*done, strict=True))
    described = {**plan.calibration, "repairs": {**recipe.to_json(), "text": text}}
    return TrainedRepairs(dataclasses.replace(plan, tensors=tensors, calibration=described), losses, before, after)


class _Block:
    """One block with its sparsifiers on, whose learned tensors are parameters."""

    def __init__(self, blocks: Blocks, plan: Plan, layer: int, dense: list[Tensor], error: str) -> None:
        self.blocks, self.layer, self.dense = blocks, layer, dense
        self.handle = Attached()
        self.sparsifiers: dict[str, Sparsifier] = {}
        self.parameters: dict[str, nn.Parameter] = {}
        for rule, site in plan.recipe.placed(find_sites(blocks.model)):
            if site.layer != layer:
                continue
            sparsifier = Sparsifier(rule, site, plan.recipe.token_share, blocks.device)
            sparsifier.fill({name: plan.tensors[f"{site.name}.{name}"] for name in rule.shapes(site)})
            for name in (name for piece in rule.parts() for name in piece.trained(site)):
                # Buffers that happen to be parameters: a checkpoint's layout knows them as fitted tensors.
                parameter = sparsifier._buffers[name] = nn.Parameter(sparsifier._buffers[name])
                self.parameters[f"{site.name}.{name}"] = parameter
            self.sparsifiers[site.name] = sparsifier
            self.handle.add(put_on(blocks.model, site, sparsifier).remove)
        self.by_token = error == "by token"
        self.units = self.sizes() if error == "by channel" else 1.0

    def __enter__(self) -> _Block:
        return self

    def __exit__(self, *error) -> None:
        self.handle.remove()

    def train(self, recipe: RepairRecipe) -> tuple[list[float], float, float]:
        """Losses of all steps, and the error before and after."""
        if not self.parameters:
            return [], self.error(), self.error()
        before, batches = self.error(), len(self.blocks.stream)
        plain = TrainRecipe(
            steps=batches * recipe.epochs, batch=1, learning_rate=recipe.learning_rate, floor=1.0, clip=recipe.clip,
            passes=recipe.epochs, seed=recipe.seed,
        )
        module = nn.ParameterList(self.parameters.values())
        try:
            found = train(module, self._loss, torch.arange(batches), plain, title=f"repairs of block {self.layer}")
        except SparsityError as error:
            raise SparsityError(f"Repairs of block {self.layer}: {error}") from None
        return found.losses, before, self.error()

    def _loss(self, module: nn.Module, numbers: Tensor, step: int) -> Tensor:
        return self._square(int(numbers[0]))

    def _square(self, number: int) -> Tensor:
        """Mean square error of the block's output for one batch, in this block's units."""
        with torch.no_grad():
            target = self.target(number).float()
            units = target.square().mean(-1, keepdim=True).sqrt().clamp_min(1e-30) if self.by_token else self.units
        return ((self.blocks.output(number).float() - target) / units).square().mean()

    @torch.no_grad()
    def sizes(self) -> Tensor:
        """Root mean square of each channel of the dense block's output [hidden], over the first batches; 1 for dead ones."""
        outputs = torch.cat([self.target(n).float().flatten(0, -2) for n in range(min(CHECKED, len(self.blocks.stream)))])
        size = outputs.square().mean(0).sqrt()
        return torch.where(size > 0, size, 1.0)

    def target(self, number: int) -> Tensor:
        """What the dense block makes of the dense model's hidden states."""
        own, self.blocks.hidden = self.blocks.hidden, self.dense
        self.enable(False)
        try:
            return self.blocks.output(number)
        finally:
            self.blocks.hidden = own
            self.enable(True)

    @torch.no_grad()
    def error(self) -> float:
        """The loss, averaged over the first batches."""
        numbers = range(min(CHECKED, len(self.blocks.stream)))
        return sum(float(self._square(number)) for number in numbers) / len(numbers)

    def enable(self, on: bool) -> None:
        for sparsifier in self.sparsifiers.values():
            sparsifier.enabled = on

    def trained(self) -> dict[str, Tensor]:
        """The learned tensors by their names in a plan."""
        return {name: parameter.detach().clone() for name, parameter in self.parameters.items()}

    @torch.no_grad()
    def advance(self, inputs: str) -> list[Tensor]:
        """Go on to the next block, and return the dense model's hidden states there."""
        self.enable(False)
        if inputs == "dense":
            self.blocks.advance()
            return self.blocks.hidden
        dense = self.blocks.ahead(self.dense)
        self.enable(True)
        self.blocks.advance()
        return dense
