"""ReLUfication: a Llama whose FFN is down(relu(gate x) * relu(up x)), and how one is made of a SwiGLU Llama.

Two ReLUs (dReLU, Song et al. 2024, TurboSparse): a neuron is exactly zero unless both halves are positive. The weights
stay; the function does not, so the model must be trained further. Importing this module teaches transformers the
architecture, which `load_model` does by itself; elsewhere `import sparsity_lib.drelu` first.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP

from sparsity_lib.errors import SparsityError, refuse


class LlamaDReluConfig(LlamaConfig):
    """A Llama's configuration; its `hidden_act` has to be relu."""

    model_type = "llama_drelu"


class LlamaDReluMLP(LlamaMLP):
    """down(relu(gate x) * relu(up x))."""

    def forward(self, x: Tensor) -> Tensor:
        # The gate's ReLU is a module, which is where a gate site is read; the other is a plain function.
        return self.down_proj(self.act_fn(self.gate_proj(x)) * functional.relu(self.up_proj(x)))


class LlamaDReluForCausalLM(LlamaForCausalLM):
    """Llama with dReLU FFNs."""

    config_class = LlamaDReluConfig

    def __init__(self, config: LlamaDReluConfig) -> None:
        if config.hidden_act != "relu":
            raise refuse("hidden_act", config.hidden_act, "relu", "drelu.relufy(model) converts a Llama")
        super().__init__(config)
        for layer in self.model.layers:
            layer.mlp = LlamaDReluMLP(config)
        self.post_init()


AutoConfig.register(LlamaDReluConfig.model_type, LlamaDReluConfig, exist_ok=True)
AutoModelForCausalLM.register(LlamaDReluConfig, LlamaDReluForCausalLM, exist_ok=True)


def relufy(model: LlamaForCausalLM) -> LlamaDReluForCausalLM:
    """A dReLU copy of a Llama with the same weights; train it further before use.

    Raises
    ------
    SparsityError
        If the model is no plain Llama.
    """
    if type(model) is not LlamaForCausalLM:
        raise SparsityError(f"ReLUfication knows Llama, not {type(model).__name__}. Fix: load a LlamaForCausalLM.")
    plain = {k: v for k, v in model.config.to_dict().items() if k not in ("model_type", "architectures", "hidden_act")}
    made = LlamaDReluForCausalLM(LlamaDReluConfig(**plain, hidden_act="relu")).to(model.device, model.dtype)
    made.load_state_dict(model.state_dict())
    return made.train(model.training)
