"""The small networks: one configuration of transformers for each style, about 1.3 million weights each.

They are as wide and deep as fits seven of them, in bfloat16, into 20 MB, and as was trained in a few minutes on two
cores. What they are for is the shape of their activations: which function the FFN has, and how its inputs come about.
After so little text they predict about as well as a table of token pairs would, so that they say little about what
sparsity costs a good model.
"""

from __future__ import annotations

from transformers import (
    FalconConfig,
    GPT2Config,
    LlamaConfig,
    Mamba2Config,
    MixtralConfig,
    MptConfig,
    PreTrainedConfig,
    ViTConfig,
)

VOCABULARY, LENGTH, HIDDEN, HEADS = 2048, 512, 128, 4
# No padding token: transformers would keep the embedding of the one that it shares with the end of a document at zero.
_TEXT = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}
_ROTARY = {
    **_TEXT, "hidden_size": HIDDEN, "num_attention_heads": HEADS, "max_position_embeddings": LENGTH, "tie_word_embeddings": True,
}

#: name -> configuration; "small-llama-relu" is made of "small-llama".
STYLES: dict[str, PreTrainedConfig] = {
    "small-gpt2": GPT2Config(
        **_TEXT, n_embd=HIDDEN, n_layer=5, n_head=HEADS, n_positions=LENGTH, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    ),
    "small-falcon": FalconConfig(**_ROTARY, num_hidden_layers=6, multi_query=True, parallel_attn=True, bias=False),
    "small-mpt": MptConfig(**_TEXT, d_model=HIDDEN, n_layers=5, n_heads=HEADS, max_seq_len=LENGTH),
    "small-llama": LlamaConfig(**_ROTARY, num_hidden_layers=5, num_key_value_heads=HEADS, intermediate_size=344),
    "small-mixtral": MixtralConfig(
        **_ROTARY, num_hidden_layers=4, num_key_value_heads=2, intermediate_size=128, num_local_experts=4,
        num_experts_per_tok=2, sliding_window=None,
    ),
    "small-mamba2": Mamba2Config(
        **_TEXT, hidden_size=HIDDEN, num_hidden_layers=8, num_heads=8, head_dim=32, expand=2, state_size=32, n_groups=1,
        chunk_size=32, tie_word_embeddings=True, time_step_limit=(0.0, 100.0),  # not infinity, which JSON cannot hold
    ),
    "small-vit": ViTConfig(
        hidden_size=64, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4, image_size=8, patch_size=2,
        num_channels=1, num_labels=10,
    ),
}
