"""The structures of decode_args.h, as ctypes sees them."""

from __future__ import annotations

import ctypes

from sparsity_lib.ops.library import Select, Stripe, Weight

_POINTER, _LONG, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_float


class Site(ctypes.Structure):
    _fields_ = [("select", Select), ("rotation", Weight), ("low", Weight), ("active", _INT), ("rotated", _INT), ("lowered", _INT)]


class Stripes(ctypes.Structure):
    _fields_ = [("first", ctypes.POINTER(Stripe)), ("count", _LONG)]


_SIZES = ("layer_count", "hidden", "heads", "kv_heads", "head_dim", "neurons", "capacity", "vocabulary")
_NORMS = ("norm_attention", "norm_after_attention", "norm_ffn", "norm_after_ffn", "norm_q", "norm_k")
_WEIGHTS = ("qkv", "o", "gate", "up", "gate_up", "down")
_BIASES = ("qkv_bias", "o_bias", "gate_bias", "up_bias", "gate_up_bias", "down_bias")
_SITES = ("at_qkv", "at_o", "at_up", "at_gate", "at_down")
_STRIPES = ("stripes_qkv", "stripes_o", "stripes_gate")


class Layer(ctypes.Structure):
    _fields_ = [
        *((name, _POINTER) for name in _NORMS), *((name, Weight) for name in _WEIGHTS), *((name, _POINTER) for name in _BIASES),
        *((name, Site) for name in _SITES), *((name, Stripes) for name in _STRIPES),
        ("keys", _POINTER), ("values", _POINTER), ("window", _INT), ("rope", _INT),
    ]


class Model(ctypes.Structure):
    """decode_args.h: Decoder."""

    _fields_ = [
        ("layers", ctypes.POINTER(Layer)),
        *((name, _LONG) for name in _SIZES),
        ("embedding", Weight), ("head", Weight), ("stripes_head", Stripes),
        ("at_head", Site), ("head_rows", Weight), ("refined", _LONG),
        ("final_norm", _POINTER), ("head_bias", _POINTER), ("cosine", _POINTER * 2), ("sine", _POINTER * 2),
        *((name, _FLOAT) for name in ("eps", "scaling", "embedding_scale", "attention_cap", "logit_cap", "logit_factor")),
        ("activation", _INT), ("cache_format", _INT),
    ]
