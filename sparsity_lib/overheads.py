"""What a method costs besides the weights it skips: memory that it adds, and operations for each token.

Memory: what a plan stores (thresholds, norms, saliencies, rotations, low-rank factors), float32 as installed, and the
second copy of a head whose inputs are dropped while its rows are read as well, by token where it is tied to the embedding,
by likely word where outputs are refined: columns need a layout of their own.
Operations: scores and selections as the parts count them (none where a prompt has chosen for all tokens after it), and two
for each weight that transforms and repairs read. A product that skips nothing takes two operations a weight as well, so all
figures compare with `dense_operations`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from sparsity_lib.accounting import weights_per_token
from sparsity_lib.recipe import Recipe
from sparsity_lib.sites import HEAD_IN, find_sites


@dataclass(frozen=True)
class Overheads:
    """Per model (bytes) and per sparse token (operations)."""

    #: Bytes of the plan's tensors.
    tensor_bytes: int
    #: Bytes of weights that are held twice.
    copy_bytes: int
    #: Bytes of the dense model's weights.
    dense_bytes: int
    #: Operations for ranking and choosing.
    choosing: int
    #: Operations of products that the dense model does not have.
    products: int
    #: Operations of the dense model's products.
    dense_operations: int

    @property
    def memory(self) -> float:
        """What is added, as a share of the dense model's bytes."""
        return (self.tensor_bytes + self.copy_bytes) / self.dense_bytes

    @property
    def operations(self) -> float:
        """What is added, as a share of the dense model's operations."""
        return (self.choosing + self.products) / self.dense_operations

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Overheads:
        return Overheads(**data)


def overheads(recipe: Recipe | None, model: nn.Module) -> Overheads:
    """Count what `recipe` adds to `model`; nothing has to be fitted. None is the dense model.

    Raises
    ------
    SparsityError
        If the model lacks a kind of site.
    """
    parameters = {id(p): p for p in model.parameters()}.values()
    tensors = choosing = products = copy = 0
    for rule, site in recipe.placed(find_sites(model)) if recipe else ():
        read = rule.transform.weights_read(site) + sum(piece.weights_read(site) for piece in rule.repair)
        shapes = rule.shapes(site).values()
        tensors += 4 * sum(_numbers(shape) for shape in shapes)
        choosing += sum(piece.operations(site) for piece in rule.parts() if not (rule.score.of_prompt and piece is rule.select))
        products += 2 * read
        if site.kind == HEAD_IN:
            weight = model.get_output_embeddings().weight
            by_rows = weight is model.get_input_embeddings().weight or any(piece.kind == "refine" for piece in rule.repair)
            copy += by_rows * weight.numel() * weight.element_size()
    return Overheads(tensors, copy, sum(p.numel() * p.element_size() for p in parameters), choosing, products,
                     2 * weights_per_token(model))


def _numbers(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count
