"""Training data: rows of tensors, their order, and which of them a process computes at a step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
import xxhash
from torch import Tensor

from sparsity_lib.errors import SparsityError, refuse
from sparsity_lib.train.recipe import TrainRecipe

#: One tensor [rows, ...], or several with equally many rows (images and labels).
Data = Tensor | Mapping[str, Tensor]


class Rows:
    """The batches of one run: a function of the data's size, the recipe and the process, so that a resumed run
    needs no reader's state.

    The data is gone through in random order, and in a new one at each pass.

    Raises SparsityError for data without rows, of unequal lengths, or too little for the recipe.
    """

    def __init__(self, data: Data, recipe: TrainRecipe, process: int = 0, processes: int = 1) -> None:
        self.data = data
        self.tensors = {"": data} if isinstance(data, Tensor) else dict(data) if isinstance(data, Mapping) else {}
        if not self.tensors or not all(isinstance(t, Tensor) and t.dim() for t in self.tensors.values()):
            raise refuse("data", type(data).__name__, "a tensor [rows, ...], or a dict of them")
        lengths = {name: len(t) for name, t in self.tensors.items()}
        if len(set(lengths.values())) != 1:
            raise refuse("data", lengths, "tensors with equally many rows")
        rows, wanted = next(iter(lengths.values())), recipe.steps * recipe.batch
        if rows * recipe.passes < wanted:
            times = f" in {recipe.passes} passes" if recipe.passes > 1 else ""
            few = f"{rows} training sequences{times} are too few: the recipe needs {wanted}"
            raise SparsityError(f"{few}. Fix: fewer steps, more text, or more passes.")
        if recipe.batch % (processes * recipe.accumulation):
            raise refuse(
                "batch", recipe.batch, f"a multiple of {processes} processes times {recipe.accumulation} accumulated pieces")
        generator = torch.Generator().manual_seed(recipe.seed)
        order = torch.cat([torch.randperm(rows, generator=generator) for _ in range(-(-wanted // rows))])[:wanted]
        # [steps, pieces, rows of this process]: what processes compute together at a time lies side by side
        self.order = order.view(recipe.steps, recipe.accumulation, processes, -1)[:, :, process]

    def pieces(self, step: int, device: torch.device) -> Iterator[Data]:
        """The pieces of this process's part of the batch at `step`."""
        for rows in self.order[step]:
            taken = {name: tensor[rows.to(tensor.device)].to(device) for name, tensor in self.tensors.items()}
            yield taken[""] if isinstance(self.data, Tensor) else taken

    @property
    def unit(self) -> str:
        """What is counted: tokens, or whole rows where the data is no text."""
        return "token" if self._width() else "row"

    def size(self, recipe: TrainRecipe) -> int:
        """Tokens (or rows) of one batch, over all processes."""
        return recipe.batch * (self._width() or 1)

    def _width(self) -> int:
        ids = self.tensors.get("", self.tensors.get("input_ids"))
        return ids.shape[1] if ids is not None and ids.dim() == 2 and not ids.is_floating_point() else 0

    def fingerprint(self) -> str:
        """Checksum of names, shapes and contents."""
        return fingerprint(self.tensors)


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """xxh3 checksum of named tensors: tells whether two runs read the same."""
    digest = xxhash.xxh3_128()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name}\0{tensor.dtype}\0{list(tensor.shape)}\0".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
