"""Tiny, randomly initialised models of every family, and plain references for what the library does to them."""

import copy

import numpy as np
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    BertConfig,
    CohereConfig,
    DistilBertConfig,
    FalconConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    MptConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
    RobertaConfig,
    ViTConfig,
)

VOCABULARY, HIDDEN, WIDTH, LAYERS = 61, 32, 48, 2

_COMMON = {
    "vocab_size": VOCABULARY, "hidden_size": HIDDEN, "intermediate_size": WIDTH, "num_hidden_layers": LAYERS,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.2,
}
_ENCODER = {k: v for k, v in _COMMON.items() if k not in ("num_key_value_heads", "bos_token_id", "eos_token_id")}
_FALCON = {k: v for k, v in _COMMON.items() if k not in ("intermediate_size", "num_key_value_heads")}

DECODERS = {
    "llama": lambda: LlamaConfig(**_COMMON, tie_word_embeddings=False),
    "mistral": lambda: MistralConfig(**_COMMON, sliding_window=8),
    "qwen2": lambda: Qwen2Config(**_COMMON),
    "qwen3": lambda: Qwen3Config(**_COMMON, head_dim=8),
    "gemma2": lambda: Gemma2Config(**_COMMON, head_dim=8, query_pre_attn_scalar=8, final_logit_softcapping=5.0),
    "gemma3": lambda: Gemma3TextConfig(**_COMMON, head_dim=8, query_pre_attn_scalar=8),
    "cohere": lambda: CohereConfig(**_COMMON, logit_scale=0.25),
    "granite": lambda: GraniteConfig(**_COMMON, logits_scaling=4.0),
    "phi3": lambda: Phi3Config(**_COMMON),
    "mixtral": lambda: MixtralConfig(**_COMMON, num_local_experts=4, num_experts_per_tok=2),
    "falcon": lambda: FalconConfig(**_FALCON, ffn_hidden_size=WIDTH, parallel_attn=True, new_decoder_architecture=False),
    "falcon_new": lambda: FalconConfig(
        **_FALCON, ffn_hidden_size=WIDTH, parallel_attn=True, new_decoder_architecture=True, num_kv_heads=2
    ),
    "mpt": lambda: MptConfig(
        d_model=HIDDEN, n_heads=4, n_layers=LAYERS, initializer_range=0.2, max_seq_len=64, vocab_size=VOCABULARY
    ),
    "gpt2": lambda: GPT2Config(
        vocab_size=VOCABULARY, n_embd=HIDDEN, n_head=4, n_layer=LAYERS, n_inner=WIDTH, n_positions=64,
        bos_token_id=1, eos_token_id=2, initializer_range=0.2,
    ),
}
GATED = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "mixtral", "cohere", "granite")
OTHERS = {
    "bert": lambda: BertConfig(**_ENCODER),
    "roberta": lambda: RobertaConfig(**_ENCODER),
    "distilbert": lambda: DistilBertConfig(
        vocab_size=VOCABULARY, dim=HIDDEN, hidden_dim=WIDTH, n_layers=LAYERS, n_heads=4, max_position_embeddings=64,
        initializer_range=0.2,
    ),
    "vit": lambda: ViTConfig(
        hidden_size=HIDDEN, intermediate_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=4, image_size=8, patch_size=4,
        initializer_range=0.2,
    ),
}


def config(family="llama", **changes):
    made = {**DECODERS, **OTHERS}[family]()
    for name, value in changes.items():
        setattr(made, name, value)
    return made


def tiny(family="llama", seed=0, dtype=torch.float32, **changes):
    """A model of `family` in evaluation mode; equal for equal arguments."""
    torch.manual_seed(seed)
    auto = AutoModelForCausalLM if family in DECODERS else (
        AutoModelForImageClassification if family == "vit" else AutoModelForSequenceClassification
    )
    return auto.from_config(copy.deepcopy(config(family, **changes)), dtype=dtype).eval()


def tokens(sequences=3, length=12, seed=0):
    return torch.randint(3, VOCABULARY, (sequences, length), generator=torch.Generator().manual_seed(seed))


def inputs(family="llama", sequences=2, length=8, seed=0):
    """Keyword inputs of a model of `family`."""
    if family == "vit":
        return {"pixel_values": torch.randn(sequences, 3, 8, 8, generator=torch.Generator().manual_seed(seed))}
    return {"input_ids": tokens(sequences, length, seed)}


@torch.no_grad()
def outputs(model, family="llama", **options):
    """Logits of a whole forward."""
    return model(**inputs(family, **options)).logits.clone()


def mlp_of(model, layer=0):
    return model.model.layers[layer].mlp


def seen_by(model, module, ids, *, output=False):
    """What reaches (or leaves) `module` on `ids`, [sequences * tokens, width], by a hook of the test's own."""
    found = []

    def before(_, args):
        found.append(args[0].detach().flatten(0, -2).clone())

    def after(_, args, out):
        found.append(out.detach().flatten(0, -2).clone())

    handle = module.register_forward_hook(after) if output else module.register_forward_pre_hook(before)
    with torch.no_grad():
        model(input_ids=ids)
    handle.remove()
    return torch.cat(found)


def numpy_of(tensor):
    """For references in numpy."""
    return tensor.detach().double().numpy()


def silu(x):
    """Of a numpy array."""
    return x / (1 + np.exp(-x))
