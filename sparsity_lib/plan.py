"""A plan is a recipe fitted to one model: the recipe, the tensors, and where they came from."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from sparsity_lib import sealed
from sparsity_lib.errors import SparsityError, shown
from sparsity_lib.recipe import Recipe
from sparsity_lib.sites import KINDS, SiteMap, find_sites

FORMAT = "sparsity-plan-2"


@dataclass(frozen=True)
class Plan:
    """Thresholds, saliencies and rotations of one recipe on one model.

    Parameters
    ----------
    recipe
        What is done.
    tensors
        float32, named "LAYER.SITE.NAME" ("3.gate.saliency").
    widths
        "LAYER.SITE" -> width; what a model must match for the plan to fit it.
    calibration
        Text, tokens and seed the plan was fitted on; plain data.
    """

    recipe: Recipe
    tensors: Mapping[str, Tensor]
    widths: Mapping[str, int]
    calibration: Mapping[str, Any] = field(default_factory=dict)

    def check_fits(self, sites: SiteMap) -> None:
        """Raise SparsityError if the plan was fitted to a model of another shape."""
        for rule in self.recipe.rules:
            found = {site.name: site for site in sites.of_kind(rule.site)}
            planned = {name: w for name, w in self.widths.items() if name.split(".")[1] == rule.site}
            if {n: s.width for n, s in found.items()} != planned:
                raise SparsityError(
                    f"The plan was fitted to {len(planned)} blocks with {rule.site} width {sorted(set(planned.values()))}; "
                    f"this model has {len(found)} with {sorted({s.width for s in found.values()})}. "
                    "Fix: fit the recipe to this model."
                )
        for rule, site in self.recipe.placed(sites):
            for tensor, shape in rule.shapes(site).items():
                stored = self.tensors.get(f"{site.name}.{tensor}")
                if stored is None or tuple(stored.shape) != shape:
                    got = "nothing" if stored is None else list(stored.shape)
                    raise SparsityError(
                        f"The plan holds {got} for {site.name}.{tensor}, expected {list(shape)}. Fix: fit it again."
                    )

    def with_density(self, density: float) -> Plan:
        """The same plan at another density, where nothing fitted depends on it (top-k, not thresholds)."""
        recipe = self.recipe.with_density(density)
        for rule in recipe.rules:
            fitted = [p.kind for p in rule.parts() if p.follows_mask or (p is rule.select and not p.any_density)]
            if fitted:
                raise SparsityError(
                    f"The {fitted[0]} of site {rule.site!r} was fitted to its density. "
                    f"Fix: fit recipe.with_density({density})."
                )
        return dataclasses.replace(self, recipe=recipe)

    def save(self, path: str | os.PathLike) -> Path:
        """Write one safetensors file; a file that is there already is replaced whole or not at all."""
        path = Path(path)
        meta = {
            "format": FORMAT,
            "recipe": self.recipe.dumps(),
            "widths": json.dumps(dict(self.widths)),
            "calibration": json.dumps(dict(self.calibration)),
        }
        try:
            sealed.write(path, self.tensors, meta)
        except (OSError, SafetensorError) as error:
            raise SparsityError(
                f"The plan could not be written to {path}: {error}. Fix: free space or choose another folder."
            ) from None
        return path

    @staticmethod
    def load(path: str | os.PathLike) -> Plan:
        """Read a plan written by `save`.

        Raises
        ------
        SparsityError
            If the file is missing, truncated, damaged (by its checksum), or no plan.
        """
        try:
            tensors, meta = sealed.read(path, FORMAT)
        except ValueError as error:
            raise SparsityError(f"{path} is not a readable plan: {error}. Fix: fit and save it again.") from None
        try:
            widths, calibration = _read_widths(meta["widths"]), json.loads(meta["calibration"])
            if not isinstance(calibration, dict) or any(t.dtype != torch.float32 for t in tensors.values()):
                raise ValueError("its calibration is no object, or its tensors are not float32")
            recipe = Recipe.from_json(meta["recipe"])
        except (KeyError, ValueError, RecursionError) as error:
            raise SparsityError(f"{path} has broken metadata: {error}. Fix: fit and save it again.") from None
        return Plan(recipe, tensors, widths, calibration)

    @staticmethod
    def empty(recipe: Recipe, model: nn.Module) -> Plan:
        """A plan of the right shapes with nothing fitted yet, to be filled by a checkpoint's tensors."""
        sites = find_sites(model)
        tensors, widths = {}, {}
        for rule, site in recipe.placed(sites):
            rule.check(site)
            widths[site.name] = site.width
            for name, shape in rule.shapes(site).items():
                tensors[f"{site.name}.{name}"] = torch.zeros(shape, device="meta")
        return Plan(recipe, tensors, widths)


def _read_widths(text: str) -> dict[str, int]:
    widths = json.loads(text)
    if not isinstance(widths, dict):
        raise ValueError("its widths are no object")
    for name, width in widths.items():
        layer, _, kind = name.partition(".")
        if not layer.isdecimal() or kind not in KINDS or type(width) is not int:
            raise ValueError(f"{shown(name)}: {shown(width)} is no site's width")
    return widths
