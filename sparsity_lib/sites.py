"""Sites: the places in a transformer where activations can be dropped and weights left unread.

    qkv_in   input of the query, key and value projections
    o_in     input of the attention output projection
    up_in    input of the up (and gate) projection
    gate     act(W_gate x) of a gated FFN: an entry stands for a row of W_up and a column of W_down
    down_in  input of the down projection
    in_proj_in, out_proj_in
             inputs of the two projections around a mixer that is no attention, such as Mamba2's state space
    head_in  input of a language model's head; counted to the last block

They are found from a model's structure: the longest stack of equal blocks, the linear layers in each
block, which of them lie in attention or beside a convolution, and how their widths fit together. Llama,
Mistral, Qwen, Gemma, Falcon, MPT, GPT-2, Mixtral, Mamba2, BERT-like encoders and ViT are covered by the
same few rules.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from sparsity_lib.errors import SparsityError, unknown
from sparsity_lib.experts import is_experts, plain_experts, weights_in
from sparsity_lib.stored import held

QKV_IN, O_IN, UP_IN, GATE, DOWN_IN = "qkv_in", "o_in", "up_in", "gate", "down_in"
IN_PROJ_IN, OUT_PROJ_IN, HEAD_IN = "in_proj_in", "out_proj_in", "head_in"
KINDS = (QKV_IN, O_IN, UP_IN, GATE, DOWN_IN, IN_PROJ_IN, OUT_PROJ_IN, HEAD_IN)
FFN_KINDS = (UP_IN, GATE, DOWN_IN)

_ATTENTION = re.compile(r"attn|attention", re.I)
_CROSS = re.compile(r"cross|encoder_attn", re.I)


@dataclass(frozen=True)
class Linear:
    """One weight matrix [out, in]; `role` is q, k, v, o, qkv, gate, up, gate_up, down, in_proj, out_proj or head.

    `per_token` counts how many such matrices a token reads: 1, or the experts it is routed to.
    """

    name: str
    layer: int
    role: str
    inputs: int
    outputs: int
    per_token: int = 1

    @property
    def weights(self) -> int:
        """Weights a dense forward reads for one token."""
        return self.inputs * self.outputs * self.per_token

    @property
    def in_ffn(self) -> bool:
        return self.role in ("gate", "up", "gate_up", "down")

    @property
    def in_mixer(self) -> bool:
        return self.role in ("in_proj", "out_proj")


@dataclass(frozen=True)
class Site:
    """One site of one block. Entries select columns of `column_readers` and rows of `row_readers`."""

    layer: int
    kind: str
    block: str
    width: int
    column_readers: tuple[str, ...]
    row_readers: tuple[str, ...] = ()
    experts: bool = False
    model: nn.Module = field(repr=False, compare=False, default=None)
    act: str | None = None

    @property
    def name(self) -> str:
        return f"{self.layer}.{self.kind}"

    def input_weight(self, reader: str) -> Tensor:
        """The weight of a column reader as [out, in]; read from disk where the block stays there."""
        with held(self.model.get_submodule(self.block)):
            module = self.model.get_submodule(reader)
            return module.weight.T if isinstance(module, Conv1D) else module.weight

    def input_shape(self, reader: str) -> tuple[int, int]:
        """(out, in) of that weight, which is not read."""
        shape = tuple(self.model.get_submodule(reader).weight.shape)
        return shape[::-1] if isinstance(self.model.get_submodule(reader), Conv1D) else shape


@dataclass(frozen=True)
class SiteMap:
    """All sites and linear layers of a model, by structure."""

    sites: dict[tuple[int, str], Site]
    #: Those of the blocks.
    linears: tuple[Linear, ...]
    blocks: tuple[str, ...]
    #: The language model's head, where there is one that is a plain linear layer.
    head: Linear | None = None

    @property
    def readable(self) -> tuple[Linear, ...]:
        """All linear layers that read a site: those of the blocks, and the head."""
        return self.linears if self.head is None else (*self.linears, self.head)

    @property
    def layers(self) -> int:
        return len(self.blocks)

    def kinds(self) -> tuple[str, ...]:
        """The kinds of sites that every block has; the head is in none."""
        return tuple(k for k in KINDS if k != HEAD_IN and all((i, k) in self.sites for i in range(self.layers)))

    def narrowed(self, site: Site, roles: tuple[str, ...]) -> Site:
        """The site with those of its column readers alone that have these roles: the others go on reading it dense.

        Raises
        ------
        SparsityError
            If no layer with such a role reads the site as its own matrix.
        """
        names = {linear.name: linear.role for linear in self.readable if linear.layer == site.layer}
        found = {names[reader]: reader for reader in site.column_readers}
        for role in roles:
            if role not in found:
                raise unknown(f"reader of site {site.name}", role, found)
        return replace(site, column_readers=tuple(reader for role, reader in found.items() if role in roles))

    def whole(self, site: Site) -> Site:
        """A gate site whose entries stand for rows of the gate projection too, as they are chosen before it is computed."""
        gates = tuple(linear.name for linear in self.linears if linear.layer == site.layer and linear.role == "gate")
        return replace(site, row_readers=(*gates, *site.row_readers))

    def of_kind(self, kind: str) -> list[Site]:
        """The sites of one kind, layer by layer.

        Raises
        ------
        SparsityError
            If the kind is unknown, or the model lacks it (say, `gate` in a model without a GLU).
        """
        if kind not in KINDS:
            raise unknown("site", kind, KINDS)
        found = [self.sites[i, kind] for i in range(self.layers) if (i, kind) in self.sites]
        if not found:
            why = " It has no gated FFN (GLU) whose gate can be read." if kind == GATE else ""
            raise SparsityError(
                f"This model has no site {kind!r}.{why} Fix: choose among its sites: {', '.join(self.kinds())}."
            )
        return found


def find_sites(model: nn.Module) -> SiteMap:
    """Find the sites of a transformer by structure; works on meta-device models too.

    Raises
    ------
    SparsityError
        If no stack of blocks with linear layers is found, or their widths do not fit together.
    """
    stack, blocks = _longest_stack(model)
    sites: dict[tuple[int, str], Site] = {}
    linears: list[Linear] = []
    for layer, block in enumerate(blocks):
        for site, readers in _block_sites(model, f"{stack}.{layer}", block, layer):
            sites[layer, site.kind] = site
            linears.extend(readers)
    if not sites:
        raise SparsityError(
            f"{type(model).__name__} has no attention or FFN projections to sparsify. "
            "Fix: use a transformer decoder, encoder or ViT."
        )
    head = _head(model, len(blocks) - 1)
    if head is not None:
        last = f"{stack}.{len(blocks) - 1}"
        sites[head.layer, HEAD_IN] = Site(head.layer, HEAD_IN, last, head.inputs, (head.name,), model=model)
    return SiteMap(sites, tuple(dict.fromkeys(linears)), tuple(f"{stack}.{i}" for i in range(len(blocks))), head)


def _head(model: nn.Module, layer: int) -> Linear | None:
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if not isinstance(head, nn.Linear):
        return None
    name = next(name for name, module in model.named_modules() if module is head)
    return Linear(name, layer, "head", *_shape(head))


def _longest_stack(model: nn.Module) -> tuple[str, nn.ModuleList]:
    stacks = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m)]
    stacks = [(name, m) for name, m in stacks if all(weights_in(block) for block in m)]
    if not stacks:
        raise SparsityError(
            f"{type(model).__name__} has no stack of transformer blocks. "
            "Fix: pass the model itself, not a wrapper without layers."
        )
    return max(stacks, key=lambda item: weights_in(item[1]))


def _shape(module: nn.Module) -> tuple[int, int]:
    if isinstance(module, Conv1D):
        return tuple(module.weight.shape)
    return module.in_features, module.out_features


def _block_sites(model, prefix: str, block: nn.Module, layer: int) -> Iterable[tuple[Site, list[Linear]]]:
    mixers = _mixers(prefix, block)
    taken = {name for found in mixers for name, _ in found}
    attention, ffn = [], []
    for name, module in block.named_modules():
        full = f"{prefix}.{name}"
        if isinstance(module, (nn.Linear, Conv1D)) and not _CROSS.search(name) and full not in taken:
            (attention if _ATTENTION.search(name) else ffn).append((full, module))
    if mixers:
        yield from _mixer_sites(model, prefix, mixers, layer)
    if len(attention) >= 2:
        yield from _attention_sites(model, prefix, attention, layer)
    experts = [(f"{prefix}.{n}", m) for n, m in block.named_modules() if is_experts(m)]
    if experts:
        yield from _expert_sites(model, prefix, *experts[0], layer)
    elif len(ffn) >= 2:
        yield from _ffn_sites(model, prefix, ffn, layer)


def _mixers(prefix: str, block: nn.Module) -> list[list[tuple[str, nn.Module]]]:
    """For each module of the block that mixes tokens by a convolution (and what follows it): its own linear layers."""
    found = []
    for name, module in block.named_modules():
        children = dict(module.named_children())
        linears = [(".".join(filter(None, (prefix, name, n))), m) for n, m in children.items() if isinstance(m, nn.Linear)]
        if linears and any(isinstance(child, nn.Conv1d) for child in children.values()):
            found.append(linears)
    return found


def _mixer_sites(model, prefix, mixers, layer):
    if len(mixers) > 1 or len(mixers[0]) != 2:
        names = ", ".join(name for found in mixers for name, _ in found)
        raise SparsityError(f"The mixer of block {layer} is not one input and one output projection: {names}.")
    for (name, module), kind, role in zip(mixers[0], (IN_PROJ_IN, OUT_PROJ_IN), ("in_proj", "out_proj"), strict=True):
        reader = Linear(name, layer, role, *_shape(module))
        yield Site(layer, kind, prefix, reader.inputs, (name,), model=model), [reader]


def _attention_sites(model, prefix, found, layer):
    *inputs, (out_name, out) = found
    roles = {3: ("q", "k", "v"), 1: ("qkv",)}.get(len(inputs))
    widths = {_shape(m)[0] for _, m in inputs}
    if roles is None or len(widths) != 1:
        names = ", ".join(n for n, _ in found)
        raise SparsityError(f"The attention projections of block {layer} are not q, k, v, o or a fused qkv, o: {names}.")
    letters = tuple(n.rsplit(".", 1)[-1][0] for n, _ in inputs)  # OPT lists k before q
    roles = letters if sorted(letters) == ["k", "q", "v"] else roles
    readers = [Linear(n, layer, role, *_shape(m)) for role, (n, m) in zip(roles, inputs, strict=True)]
    yield Site(layer, QKV_IN, prefix, widths.pop(), tuple(n for n, _ in inputs), model=model), readers
    last = Linear(out_name, layer, "o", *_shape(out))
    yield Site(layer, O_IN, prefix, last.inputs, (out_name,), model=model), [last]


def _ffn_sites(model, prefix, found, layer):
    *ups, (down_name, down) = found
    width, down_in = _shape(ups[0][1])[0], _shape(down)[0]
    outs = [_shape(m)[1] for _, m in ups]
    fused = len(ups) == 1 and outs[0] == 2 * down_in
    if len(ups) > 2 or not (fused or set(outs) == {down_in}) or len({_shape(m)[0] for _, m in ups}) != 1:
        names = ", ".join(n for n, _ in found)
        raise SparsityError(f"The FFN projections of block {layer} are not (gate,) up and down: {names}.")
    last = Linear(down_name, layer, "down", *_shape(down))
    if len(ups) == 2 and not re.search(r"gate|w1", ups[0][0].rsplit(".", 1)[-1]):
        ups = ups[::-1]
    roles = ("gate", "up") if len(ups) == 2 else ("gate_up",) if fused else ("up",)
    readers = [Linear(n, layer, role, *_shape(m)) for role, (n, m) in zip(roles, ups, strict=True)]
    yield Site(layer, UP_IN, prefix, width, tuple(n for n, _ in ups), model=model), readers
    yield Site(layer, DOWN_IN, prefix, down_in, (down_name,), model=model), [last]
    act = _activation(model, ups[0][0].rsplit(".", 1)[0]) if len(ups) == 2 else None
    if act is not None:
        yield Site(layer, GATE, prefix, down_in, (down_name,), (ups[1][0],), model=model, act=act), []


def _expert_sites(model, prefix, name, experts, layer):
    if not plain_experts(experts):
        kind = type(experts).__name__
        raise SparsityError(f"The experts of block {layer} ({kind}) are not laid out or gated as Mixtral's are.")
    _, double, width = experts.gate_up_proj.shape
    config = getattr(model, "config", None)
    routed = getattr(config, "num_experts_per_tok", None) or getattr(config, "top_k_experts", None) or 1
    up = Linear(f"{name}.gate_up_proj", layer, "gate_up", width, double, routed)
    down = Linear(f"{name}.down_proj", layer, "down", double // 2, experts.down_proj.shape[1], routed)
    shared = {"experts": True, "model": model}
    yield Site(layer, UP_IN, prefix, width, (up.name,), **shared), [up]
    yield Site(layer, DOWN_IN, prefix, double // 2, (down.name,), **shared), [down]
    yield Site(layer, GATE, prefix, double // 2, (down.name,), (up.name,), **shared), []


def _activation(model: nn.Module, owner: str) -> str | None:
    """The activation module of a gated FFN: its child without parameters that drops nothing."""
    for name, child in model.get_submodule(owner).named_children():
        plain = not isinstance(child, (nn.Dropout, nn.Identity)) and next(child.parameters(), None) is None
        if plain and not isinstance(child, (nn.ModuleDict, nn.ModuleList)):
            return f"{owner}.{name}"
    return None
