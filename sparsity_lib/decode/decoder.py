"""Decoding with weights left unread: the whole model in one compiled call for each token."""

from __future__ import annotations

import ctypes
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sparsity_lib import lm
from sparsity_lib.checks import count
from sparsity_lib.decode import structures
from sparsity_lib.decode.granular import Granular, GranularSource
from sparsity_lib.decode.rules import PLACES, Choice, check_once, planned
from sparsity_lib.decode.sources import ModelSource, RandomSource
from sparsity_lib.errors import SparsityError, refuse
from sparsity_lib.install import installed, installed_on
from sparsity_lib.ops import library
from sparsity_lib.ops.packed import Packed, pack, pair
from sparsity_lib.ops.reference import ACTIVATIONS
from sparsity_lib.parts.refine import Refine
from sparsity_lib.parts.select import LAWS
from sparsity_lib.plan import Plan
from sparsity_lib.progress import track
from sparsity_lib.sites import HEAD_IN, find_sites

_CACHES = {torch.float32: 0, torch.bfloat16: 1}


def source_of(model: nn.Module) -> ModelSource:
    """A Hugging Face model as the decoder reads it."""
    return GranularSource(model) if model.__dict__.get("_cwic") is not None else ModelSource(model)


class Decoder:
    """A decoder-only model whose tokens are computed by the compiled operators, dense or under a plan.

        decoder = Decoder(model, plan)
        tokens = decoder.generate(ids, max_new_tokens=100)

    The prompt is read by the Hugging Face model itself (with the plan installed); from then on one compiled call makes a
    token: no Python between layers, a static cache, masks chosen inside. Weights are packed once, in the layout that their
    site needs; sums are float32, so a bfloat16 model's numbers differ from Hugging Face's by the roundings in between.

    Parameters
    ----------
    model
        A Hugging Face decoder (Llama, Mistral, Qwen, Gemma), float32 or bfloat16, dense or made granular by `cwic.convert`;
        or a `ModelSource`.
    plan
        What is left out; None for the dense model.
    format, group
        Of the packed weights (see `ops.pack`); by default the model's own dtype.
    capacity
        Tokens that the cache holds, prompt included.
    choices
        Without a plan: (layer, site, width) -> what is kept there, or None for all; also asked about the head's inputs, site
        "head_in" of the last layer.

    Raises
    ------
    SparsityError
        If the model's structure or a part of the plan has no compiled counterpart, or there is no compiled library.
    """

    def __init__(
        self, model: nn.Module | ModelSource, plan: Plan | None = None, *, format: str | None = None, group: int = 32,
        capacity: int = 2048, choices: Callable[[int, str, int], Choice | None] | None = None,
    ) -> None:
        self._native = library.load()
        if self._native is None:
            fix = "use model.generate, or install a C++ compiler and the package again"
            raise SparsityError(f"There is no compiled library to decode with. Fix: {fix}.")
        if isinstance(model, nn.Module) and installed_on(model) is not None:
            raise SparsityError("The decoder starts from the dense model. Fix: uninstall(model), and pass the plan.")
        self.source = model if isinstance(model, ModelSource) else source_of(model)
        device = self.source.embedding().device
        if device.type != "cpu":
            raise refuse("device of the model", str(device), "the CPU", "model.cpu(), or model.generate where it is")
        if self.source.dtype not in _CACHES:
            raise refuse("dtype of the model", self.source.dtype, "torch.float32 or torch.bfloat16")
        if plan is not None:
            if isinstance(self.source, GranularSource):
                raise SparsityError("A granular model drops what its own thresholds say. Fix: leave the plan out.")
            plan.check_fits(sites := find_sites(self.source.model))
        self.architecture, self.plan = self.source.architecture, plan
        self.capacity = count("capacity", capacity)
        self.position = 0
        #: Bytes of weights and cache read for the last token, and of thresholds where stripes or neurons have their own.
        self.bytes_read = 0.0
        self._format, self._group = format, group
        self._choices = choices or self.source.choice if plan is None else planned(plan, sites)
        self._alive: list[Any] = []  # what the structures point to
        self._model = self._build()
        self._logits = torch.empty(self.architecture.vocabulary)
        self._bytes = ctypes.c_double()
        self._start_library()

    def _start_library(self) -> None:
        sizes = (ctypes.c_int64 * 3)()
        self._native.sparsity_decode_sizes(sizes)
        if list(sizes) != [ctypes.sizeof(s) for s in (structures.Site, structures.Layer, structures.Model)]:
            raise SparsityError("The compiled library was built from other sources. Fix: pip install the package again.")
        library.check(self._native.sparsity_decoder_check(ctypes.byref(self._model)), "decode")

    def _keep(self, tensor: Tensor | None) -> int | None:
        if tensor is None:
            return None
        tensor = tensor.detach().float().cpu().contiguous()
        self._alive.append(tensor)
        return tensor.data_ptr()

    def _pack(self, weight: Tensor, skip: str) -> structures.Weight:
        packed: Packed = pack(weight.detach(), skip, self._format, self._group)
        self._alive.append(packed)
        structure = library.weight_of(packed)
        structure.rounded = int(self.source.dtype == torch.bfloat16)
        return structure

    def _site(self, choice: Choice | None) -> structures.Site:
        if choice is None:
            return structures.Site()
        each = choice.threshold if isinstance(choice.threshold, Tensor) else None
        rule = library.Select(self._keep(choice.shift), self._keep(choice.scale), self._keep(each),
                              0.0 if each is not None else choice.threshold,
                              int(choice.k is not None), choice.k or 0, choice.group or 0, int(choice.repair),
                              0 if choice.law is None else 1 + list(LAWS).index(choice.law), int(choice.with_sign))
        site = structures.Site(select=rule, active=1)
        low = choice.lowering()
        for name, flag, matrix in (("rotation", "rotated", None if choice.rotation is None else choice.rotation.T),
                                   ("low", "lowered", low)):
            if matrix is not None:
                self._alive.append(packed := pack(matrix.to(self.source.dtype), "outputs"))
                setattr(site, name, library.weight_of(packed)), setattr(site, flag, 1)
        return site

    def _stripes(self, parts: list[Granular]) -> tuple[structures.Stripes, Tensor]:
        """The stripes of matrices that read the same x, one matrix after the other, and their biases."""
        found, first = [], 0
        for part in parts:
            packed = pack(part.weight, "inputs", self._format, self._group, part.width)
            self._alive += (packed, part)
            for stripe in library.stripes_of(packed, part.thresholds, part.shift, None, self.source.dtype == torch.bfloat16):
                stripe.first += first
                found.append(stripe)
            first += packed.outputs
        self._alive.append(all_of_them := (library.Stripe * len(found))(*found))
        return structures.Stripes(all_of_them, len(found)), torch.cat([part.bias for part in parts])

    def _build(self) -> structures.Model:
        a = self.architecture
        tables = self.source.rotations(self.capacity)
        kinds = list(tables)
        if len(kinds) > 2:
            raise SparsityError(f"The decoder knows models with two kinds of rotations, this one has {len(kinds)}.")
        shape = (a.layers, 2, a.kv_heads, self.capacity, a.head_dim)
        self.cache = torch.zeros(shape, dtype=self.source.dtype)
        layers = (structures.Layer * a.layers)()
        for i in track(range(a.layers), desc="packing weights", unit="layer"):
            self._fill(layers[i], i, kinds.index(a.kinds[i]))
        embedding = self._pack(self.source.embedding(), "outputs")
        cosine, sine = ((ctypes.c_void_p * 2)(*(self._keep(tables[k][n]) for k in kinds)) for n in (0, 1))
        self._alive.append(layers)
        return structures.Model(
            layers=ctypes.cast(layers, ctypes.POINTER(structures.Layer)), layer_count=a.layers, hidden=a.hidden, heads=a.heads,
            kv_heads=a.kv_heads, head_dim=a.head_dim, neurons=a.neurons, capacity=self.capacity, vocabulary=a.vocabulary,
            embedding=embedding, **self._head(embedding), final_norm=self._keep(self.source.final_norm()),
            cosine=cosine, sine=sine, eps=a.eps, scaling=a.scaling,
            embedding_scale=float(torch.tensor(a.embedding_scale, dtype=self.source.dtype)),  # as Hugging Face rounds it
            attention_cap=a.attention_cap, logit_cap=a.logit_cap, logit_factor=1.0,
            activation=ACTIVATIONS[a.activation], cache_format=_CACHES[self.source.dtype])

    def _head(self, embedding: structures.Weight) -> dict[str, Any]:
        """The fields of structures.Model that say what the head is.

        Where inputs are dropped it is packed by inputs; a table that it is tied to stays as well, for its rows.
        """
        a, own, striped = self.architecture, self.source.head(), self.source.granular_head()
        choice = self._choices(a.layers - 1, HEAD_IN, a.hidden) if self._choices else None
        if striped is not None:
            check_once(HEAD_IN, choice)
            stripes, bias = self._stripes([striped])
            return {"head": embedding, "stripes_head": stripes, "head_bias": self._keep(bias)}

        def whole() -> structures.Weight:
            return embedding if own is None else self._pack(own, "outputs")

        if choice is None:
            return {"head": whole()}
        choice.check(HEAD_IN, a.hidden)
        weight, bias = choice.absorbed([self.source.embedding() if own is None else own], None)
        found = {"head": self._pack(weight, "inputs"), "at_head": self._site(choice), "head_bias": self._keep(bias)}
        if choice.refine:
            found |= {"head_rows": whole(), "refined": Refine(choice.refine).count(a.vocabulary)}
        return found

    def _fill(self, layer: structures.Layer, i: int, rope: int) -> None:
        a, source = self.architecture, self.source
        widths = {"qkv_in": a.hidden, "o_in": a.heads * a.head_dim, "up_in": a.hidden, "gate": a.neurons, "down_in": a.neurons}
        choices = {site: self._choices(i, site, width) for site, width in widths.items()}
        for site, choice in choices.items():
            if choice is not None:
                choice.check(site, widths[site])
        if choices["gate"] is not None and (choices["down_in"] is not None or choices["up_in"] is not None):
            raise SparsityError("The decoder drops neurons by the gate or inputs of the FFN, not both. Fix: leave one out.")
        for name, tensor in source.norms(i).items():
            setattr(layer, name, self._keep(tensor))
        for site, choice in choices.items():
            setattr(layer, PLACES[site], self._site(choice))

        def project(name: str, site: str, matrices: str) -> None:
            """Pack the projection behind a site: `matrices` joined to one, by inputs where the site drops any."""
            stripes = [source.granular(i, m) for m in matrices.split()]
            if None not in stripes:
                check_once(site, choices[site])
                found, bias = self._stripes(stripes)
                setattr(layer, f"stripes_{name}", found), setattr(layer, f"{name}_bias", self._keep(bias))
                return
            weights, biases = zip(*((source.matrix(i, m).detach(), source.bias(i, m)) for m in matrices.split()), strict=True)
            bias = None if biases[0] is None else torch.cat([b.detach() for b in biases])
            weight, bias = (choices[site] or Choice()).absorbed(weights, bias)
            setattr(layer, name, self._pack(weight, "outputs" if choices[site] is None else "inputs"))
            setattr(layer, f"{name}_bias", self._keep(bias))

        project("qkv", "qkv_in", "q k v")
        project("o", "o_in", "o")
        if choices["up_in"] is not None:
            project("gate_up", "up_in", "gate up")
        else:
            project("gate", "up_in", "gate")
            if choices["gate"] is None:
                project("up", "up_in", "up")
        if choices["gate"] is None:
            project("down", "down_in", "down")
        else:  # rows of a neuron side by side: both are read, or neither
            up, down = (pack(source.matrix(i, n).detach(), skip, self._format, self._group)
                        for n, skip in (("up", "outputs"), ("down", "inputs")))
            self._alive += (both := pair(up, down))
            layer.up, layer.down = map(library.weight_of, both)
            layer.up_bias, layer.down_bias = self._keep(source.bias(i, "up")), self._keep(source.bias(i, "down"))
        layer.keys, layer.values = self.cache[i, 0].data_ptr(), self.cache[i, 1].data_ptr()
        layer.window, layer.rope = a.windows[i], rope

    def step(self, token: int) -> Tensor:
        """Logits [vocabulary] (float32, overwritten by the next call) after one more token.

        Raises
        ------
        SparsityError
            If the cache is full or the token is none of the vocabulary's.
        """
        token = operator.index(token)
        if not 0 <= token < self.architecture.vocabulary:
            raise refuse("token", token, f"a whole number in [0, {self.architecture.vocabulary})")
        if self.position >= self.capacity:
            raise SparsityError(f"The cache holds {self.capacity} tokens and is full. Fix: Decoder(..., capacity=...).")
        status = self._native.sparsity_decode(
            ctypes.byref(self._model), ctypes.c_int64(token), ctypes.c_int64(self.position),
            ctypes.c_void_p(self._logits.data_ptr()), ctypes.byref(self._bytes), torch.get_num_threads())
        library.check(status, "decode")
        self.position += 1
        self.bytes_read = self._bytes.value
        return self._logits

    @torch.no_grad()
    def prefill(self, ids: Tensor) -> Tensor:
        """Read a prompt [1, tokens] with the Hugging Face model, plan installed; returns the logits after it."""
        if isinstance(self.source, RandomSource):
            raise SparsityError("Random weights have no prompt to read: no Hugging Face model holds them. Fix: use step.")
        if ids.dim() != 2 or len(ids) != 1 or not ids.shape[1] or ids.shape[1] > self.capacity:
            raise refuse("shape of ids", tuple(ids.shape), f"(1, tokens) with 1 to {self.capacity} tokens")
        with installed(self.source.model, self.plan):
            found = self.source.model(input_ids=ids, use_cache=True, logits_to_keep=1)
        for i, layer in enumerate(lm.cache_of(found).layers):
            for n, kept in enumerate((layer.keys, layer.values)):
                start = ids.shape[1] - kept.shape[2]  # sliding layers keep their last tokens only
                self.cache[i, n, :, start : ids.shape[1]] = kept[0]
        self.position = ids.shape[1]
        return found.logits[0, -1].float()

    def reset(self) -> None:
        """Forget all tokens."""
        self.position = 0

    def generate(self, ids: Tensor, max_new_tokens: int, eos: int | None = None) -> Tensor:
        """Greedy continuation of a prompt [1, tokens]: the new tokens [1, up to max_new_tokens]."""
        count("max_new_tokens", max_new_tokens)
        if ids.shape[-1] + max_new_tokens - 1 > self.capacity:
            needed = ids.shape[-1] + max_new_tokens - 1
            fix = f"Decoder(..., capacity={needed})"
            raise SparsityError(f"The cache holds {self.capacity} tokens, {needed} are needed. Fix: {fix}.")
        found = [int(self.prefill(ids).argmax())]
        while len(found) < max_new_tokens and found[-1] != eos:
            found.append(int(self.step(found[-1]).argmax()))
        return torch.tensor([found])
