"""Sparse models as Hugging Face checkpoints: a "quantisation" method that transformers restores by itself.

config.json carries {"quantization_config": {"quant_method": "sparsity_lib", "recipe": ...}}, the
safetensors carry the plan's tensors under each block's `sparsity` child. Where this library was not
imported, transformers warns about an unknown method and runs the model DENSE: import sparsity_lib
first, or start `python -m sparsity_lib lm_eval ...`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch import distributed as dist
from transformers import PreTrainedModel
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from sparsity_lib.errors import SparsityError, unknown
from sparsity_lib.recipe import Recipe

if TYPE_CHECKING:
    from sparsity_lib.plan import Plan

METHOD = "sparsity_lib"
#: Methods that are layers of their own instead of a recipe: kind -> module whose `restore(model, data)` puts them in.
LAYERS = {"cwic": "sparsity_lib.cwic.export"}


@register_quantization_config(METHOD)
class SparsityConfig(QuantizationConfigMixin):
    """The recipe and where it was calibrated, as config.json keeps them; or what the model's own sparse layers are."""

    def __init__(self, recipe: dict[str, Any] | None = None, calibration: dict[str, Any] | None = None,
                 layers: dict[str, Any] | None = None, **ignored) -> None:
        self.quant_method = METHOD
        self.recipe = recipe
        self.calibration = calibration or {}
        if layers is not None:
            self.layers = layers


@register_quantizer(METHOD)
class SparsityQuantizer(HfQuantizer):
    """Puts sparsifiers into a model before its weights are loaded, so that their tensors have a place."""

    requires_calibration = True

    def validate_environment(self, *args, **kwargs) -> None:
        layers = getattr(self.quantization_config, "layers", None)
        if layers is not None and layers.get("kind") not in LAYERS:
            raise unknown("kind of sparse layers in config.json", layers.get("kind"), LAYERS)
        if self.quantization_config.recipe is None and layers is None:
            raise SparsityError(
                "The checkpoint's config.json names this library but holds no recipe. Fix: save the sparse model again."
            )

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs) -> PreTrainedModel:
        from sparsity_lib.install import install  # install needs this module: the import cannot be at the top
        from sparsity_lib.plan import Plan

        model._keep_in_fp32_modules_strict = set(model._keep_in_fp32_modules_strict or ()) | {"sparsity"}
        layers = getattr(self.quantization_config, "layers", None)
        if layers is not None:
            return import_module(LAYERS[layers["kind"]]).restore(model, layers)
        recipe = Recipe.from_json(self.quantization_config.recipe)
        plan = Plan.empty(recipe, model)
        plan.calibration.update(self.quantization_config.calibration)
        return install(model, plan)

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, Tensor] | None, dict[str, str]]:
        """What to save, where not simply the model's state: weights that training split between processes, whole in the first."""
        from sparsity_lib.train.sharding import is_split, whole  # training needs this module: the import cannot be at the top

        if not is_split(model):
            return None, {}
        return whole(model.state_dict(keep_vars=True), keep=dist.get_rank() == 0), {}

    def is_serializable(self, *args, **kwargs) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_qat_trainable(self) -> bool:
        return True


def mark(model: nn.Module, plan: Plan) -> None:
    """Make `save_pretrained` write the recipe. Models that carry a real quantisation keep theirs."""
    mark_as(model, SparsityConfig(plan.recipe.to_json(), dict(plan.calibration)))


def mark_as(model: nn.Module, described: SparsityConfig) -> None:
    """Make `save_pretrained` write `described`, likewise."""
    config = getattr(model, "config", None)
    present = getattr(config, "quantization_config", None)
    if config is None or not (present is None or isinstance(present, SparsityConfig)):
        return
    config.quantization_config = described
    model.hf_quantizer = SparsityQuantizer(described)


def unmark(model: nn.Module) -> None:
    """Undo `mark`."""
    config = getattr(model, "config", None)
    if isinstance(getattr(config, "quantization_config", None), SparsityConfig):
        del config.quantization_config
        model.hf_quantizer = None
        model.is_quantized = False
