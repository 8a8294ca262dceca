"""Gated FFN blocks under CATS' and CLAWS' masks: real masks of the embedded models, and their like at larger sizes."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from sparsity_lib import ops
from sparsity_lib.assets.models import load_model
from sparsity_lib.bench.matvec import onednn, onednn_can, onednn_pack
from sparsity_lib.bench.timing import ReadBandwidth, interleaved
from sparsity_lib.fit import fit
from sparsity_lib.methods import claws
from sparsity_lib.observe import activations

REAL = ("smollm2-135m-instruct", "gemma3-270m")
#: Hidden size and neurons of larger models, with random weights of bfloat16.
SHAPES = {"Llama-3.2-1B": (2048, 8192), "Llama-3.2-3B": (3072, 8192), "Mistral-7B": (4096, 14336)}
DENSITY = 0.5
ROUNDS = 21


def run(checkpoint) -> tuple[Any, dict, list[int]]:
    """One item a model."""
    data = {}
    for name in REAL:
        data[name] = checkpoint.item({"model": name, "density": DENSITY, "rounds": ROUNDS}, partial(real, name))
        print(line(name, data[name]), flush=True)
    for name, (hidden, neurons) in SHAPES.items():
        for masks in ("scattered", "clustered"):
            params = {"hidden": hidden, "neurons": neurons, "density": DENSITY, "rounds": ROUNDS, "masks": masks}
            title = f"{name}, {masks} masks"
            data[title] = checkpoint.item(params, partial(shaped, hidden, neurons, masks))
            print(line(title, data[title]), flush=True)
    return data, {"density": DENSITY, "rounds": ROUNDS, "shapes": SHAPES, "threads": torch.get_num_threads()}, [0]


class _Block:
    """One gated FFN: torch's dense ways to compute it, and ours."""

    def __init__(self, gate: Tensor, up: Tensor, down: Tensor, activation: str) -> None:
        self.plain = [w.to(torch.bfloat16).contiguous() for w in (gate, up, down)]
        self.reordered = [onednn_pack(w, 1) for w in self.plain] if onednn_can(torch.bfloat16) else None
        gate, *rest = (ops.pack(w, skip) for w, skip in zip(self.plain, ("outputs", "outputs", "inputs"), strict=True))
        self.packed = [gate, *ops.pair(*rest)]
        self.activation = activation

    def _act(self, x: Tensor) -> Tensor:
        return functional.silu(x) if self.activation == "silu" else functional.gelu(x, approximate="tanh")

    def eager(self, x: Tensor) -> Tensor:
        gate, up, down = self.plain
        return functional.linear(self._act(functional.linear(x, gate)) * functional.linear(x, up), down)

    def onednn(self, x: Tensor) -> Tensor:
        gate, up, down = self.reordered
        return onednn(self._act(onednn(x, gate)) * onednn(x, up), down)

    def sparse(self, x: Tensor, k: int, saliency: Tensor | None) -> Tensor:
        return ops.glu(x, *self.packed, activation=self.activation, k=k, saliency=saliency)

    def bytes(self, k: int) -> tuple[float, float]:
        """Bytes that the dense and the sparse block read."""
        gate, up, down = self.packed
        return gate.bytes + up.bytes + down.bytes, gate.bytes + k * (up.row_bytes + down.row_bytes)


def _measure(blocks: list[_Block], inputs: list[list[Tensor]], saliencies: list[Tensor | None], k: int) -> dict[str, Any]:
    """Times of all blocks one after the other, for one token a round; inputs[token][block]."""
    bandwidth = ReadBandwidth()

    def all_blocks(step):
        def run(turn: int) -> None:
            for block, x, c in zip(blocks, inputs[turn % len(inputs)], saliencies, strict=True):
                step(block, x, c)

        return run

    cases = {
        "torch linear": all_blocks(lambda b, x, c: b.eager(x)),
        "sparse": all_blocks(lambda b, x, c: b.sparse(x, k, c)),
        "full": all_blocks(lambda b, x, c: b.sparse(x, b.packed[0].outputs, c)),
        "read": bandwidth,
    }
    if blocks[0].reordered:
        cases["torch oneDNN, packed weights"] = all_blocks(lambda b, x, c: b.onednn(x))
    times = interleaved(cases, ROUNDS, desc="GLU blocks")
    best = min((t.median, n) for n, t in times.items() if n.startswith("torch"))
    dense, sparse = (sum(each) for each in zip(*(b.bytes(k) for b in blocks), strict=True))
    speed = bandwidth.bytes / times["read"].median
    seconds = times["sparse"].median
    return {
        "times": {n: t.to_json() for n, t in times.items()}, "best_dense": best[1], "bandwidth": speed,
        "bytes_allow": dense / sparse, "speedup": best[0] / seconds, "over_ours_dense": times["full"].median / seconds,
        "share_of_bandwidth": sparse / seconds / speed,
    }


def real(name: str, tokens: int = 32) -> dict[str, Any]:
    """All FFN blocks of an embedded model, with its own activations and CLAWS' saliencies."""
    model, tokenizer = load_model(name)
    from sparsity_lib.experiments.common import evaluation_ids

    plan = fit(claws(DENSITY), model, tokenizer, tokens=2048)
    seen = activations(model, "up_in", evaluation_ids(tokenizer, 1, tokens))
    activation = "silu" if "silu" in str(model.config.get_text_config().to_dict().get("hidden_act")) else "gelu_tanh"
    mlps = [layer.mlp for layer in model.base_model.layers]
    blocks = [_Block(*(p.weight.detach() for p in (m.gate_proj, m.up_proj, m.down_proj)), activation) for m in mlps]
    flat = [layer.reshape(-1, layer.shape[-1]).to(torch.bfloat16) for layer in seen]
    inputs = [[layer[t : t + 1] for layer in flat] for t in range(tokens)]
    k = plan.recipe.rules[0].select.count(blocks[0].packed[0].outputs)
    return _measure(blocks, inputs, [plan.tensors[f"{i}.gate.saliency"] for i in range(len(blocks))], k)


def shaped(hidden: int, neurons: int, masks: str) -> dict[str, Any]:
    """Two blocks of a larger model's shape; half of the neurons survive, scattered or side by side."""
    draw = torch.Generator().manual_seed(0)
    blocks = [
        _Block(*(torch.randn(*shape, generator=draw).mul_(shape[1] ** -0.5) for shape in
                 ((neurons, hidden), (neurons, hidden), (hidden, neurons))), "silu") for _ in range(2)
    ]
    inputs = [[torch.randn(1, hidden, generator=draw).to(torch.bfloat16) for _ in blocks] for _ in range(8)]
    k = round(DENSITY * neurons)
    near = torch.where((torch.arange(neurons) // 32) % round(1 / DENSITY) == 0, 1e6, 1.0)  # runs of 32 neurons
    return _measure(blocks, inputs, [near if masks == "clustered" else None] * len(blocks), k)


def line(name: str, found: dict[str, Any]) -> str:
    """The figures of one model as text."""
    return (
        f"{name}: {found['speedup']:.2f}x of torch's best ({found['best_dense']}), {found['over_ours_dense']:.2f}x of our dense; "
        f"bytes allow {found['bytes_allow']:.2f}x; {100 * found['share_of_bandwidth']:.0f}% of bandwidth"
    )
