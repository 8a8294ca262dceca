"""A language model as two halves: blocks that give hidden states, and a head applied to some of them.

Gemma's logits are 262,144 wide: for 512 tokens they would take half a gigabyte, so nothing here
ever holds more than `HEAD_ELEMENTS` of them at a time (16 MB in float32: larger blocks go back to the operating
system after each use, and fetching them anew took half of the time).
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from sparsity_lib.errors import SparsityError, refuse

#: Logits in memory at a time, and the most rows of them.
HEAD_ELEMENTS = 1 << 22
HEAD_CHUNK = 128


def check_ids(ids: Tensor) -> Tensor:
    """Token ids as [sequences, tokens], or SparsityError."""
    if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.dtype not in (torch.int64, torch.int32) or ids.numel() == 0:
        shown = f"{type(ids).__name__} {tuple(getattr(ids, 'shape', ()))}"
        raise refuse("ids", shown, "a LongTensor [sequences, tokens], not empty", "see assets.token_sequences")
    return ids


def hidden_states(model: nn.Module, ids: Tensor, **inputs) -> Tensor:
    """Final hidden states [batch, tokens, hidden] of a causal language model, head left out."""
    if model.get_output_embeddings() is None:
        raise SparsityError(f"{type(model).__name__} has no language-model head. Fix: load it with AutoModelForCausalLM.")
    return model.base_model(input_ids=ids, use_cache=False, **inputs).last_hidden_state


def with_cache(model: nn.Module, cache: object) -> dict[str, object]:
    """The keyword argument by which the forward takes keys and values: transformers gives it another name from 5.24 on."""
    return {"cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values": cache, "use_cache": True}


def cache_of(output: Mapping[str, Any]) -> Any:
    """Keys and values among what a forward returned, under either name."""
    return output["cache" if "cache" in output else "past_key_values"]


def show_head(model: nn.Module, hidden: Tensor) -> None:
    """Show hidden states to what is attached to the head's input, without the head's product: it is wide and not wanted."""
    head = model.get_output_embeddings()
    for hook in tuple(head._forward_pre_hooks.values()):
        hook(head, (hidden,))


def logits(model: nn.Module, hidden: Tensor) -> Tensor:
    """The head on hidden states [rows, hidden] -> float32 logits [rows, vocabulary].

    Scaled and capped as the model's own forward does; `check_head` tells whether that is all it does.
    """
    return scaled(model, model.get_output_embeddings()(hidden))


def scaled(model: nn.Module, raw: Tensor) -> Tensor:
    """What the head gives [rows, vocabulary] -> float32 logits: what models do to them after the head."""
    found = raw.float()
    config = model.config.get_text_config()
    if factor := getattr(config, "logit_scale", None):  # Cohere; a product with 1 would read and write all of them again
        found = found * factor
    if divisor := getattr(config, "logits_scaling", None):  # Granite
        found = found / divisor
    cap = getattr(config, "final_logit_softcapping", None)  # Gemma
    return cap * torch.tanh(found / cap) if cap else found


@torch.no_grad()
def check_head(model: nn.Module) -> None:
    """Raise SparsityError where `logits` of `hidden_states` are not the model's own: it does something else to them."""
    ids = torch.arange(4, device=next(model.parameters()).device)[None]
    hidden = hidden_states(model, ids)
    expected, found = model(input_ids=ids, use_cache=False).logits[0].float(), logits(model, hidden[0])
    tolerance = 1e-4 if hidden.dtype == torch.float32 else 0.05
    if not expected.isfinite().all():
        return  # a broken model: others say so, and more clearly
    near = {"rtol": tolerance, "atol": tolerance * float(expected.std())}
    if expected.shape != found.shape or not torch.allclose(found, expected, **near):
        raise SparsityError(
            f"{type(model).__name__} changes its logits after the head in a way this library does not know. "
            "Fix: teach sparsity_lib.lm.logits that step."
        )


def chunks(rows: int, model: nn.Module) -> Iterator[slice]:
    """Slices that cover `rows` rows of hidden states, each as many as the head is given at a time."""
    size = min(HEAD_CHUNK, max(1, HEAD_ELEMENTS // model.get_output_embeddings().weight.shape[0]))
    for start in range(0, rows, size):
        yield slice(start, min(start + size, rows))


def backward_next_token_loss(model: nn.Module, ids: Tensor) -> float:
    """Back-propagate the next-token loss, summed over tokens, through the blocks; returns it in nats.

    The head is applied chunk by chunk and its gradient collected at the hidden states, so that
    few rows of logits exist at a time.
    """
    if ids.shape[1] < 2:
        raise SparsityError("Sequences of one token have no next token to predict. Fix: at least two tokens each.")
    hidden = hidden_states(model, ids)
    top = hidden.detach()[:, :-1].flatten(0, 1)
    targets = ids[:, 1:].flatten()
    grad, total = torch.empty_like(top), 0.0
    for piece in chunks(len(top), model):
        rows = top[piece].requires_grad_(True)
        with torch.enable_grad():
            loss = functional.cross_entropy(logits(model, rows), targets[piece], reduction="sum")
        grad[piece] = torch.autograd.grad(loss, rows)[0]
        total += float(loss.detach())
    full = torch.zeros_like(hidden)
    full[:, :-1] = grad.view(len(ids), -1, grad.shape[-1])
    hidden.backward(full)
    return total
