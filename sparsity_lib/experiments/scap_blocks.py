"""SCAP's figure 9: the time of one gated FFN block against the share of its weights skipped, as CATS skips and as SCAP does."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from sparsity_lib import ops
from sparsity_lib.bench.timing import interleaved
from sparsity_lib.evaluate.bootstrap import Interval

#: Shape of a block of Llama 3.2 1B.
HIDDEN, NEURONS = 2048, 8192
FFN = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6)
#: Inputs that thresholds are read from, and that are timed.
TOKENS = 32


class Block:
    """down(silu(gate x) * up x) with random bfloat16 weights; thresholds are quantiles over its own activations."""

    def __init__(self, hidden: int = HIDDEN, neurons: int = NEURONS, seed: int = 0) -> None:
        draw = torch.Generator().manual_seed(seed)
        shapes = ((neurons, hidden), (neurons, hidden), (hidden, neurons))
        self.weights = [torch.randn(*s, generator=draw).mul_(s[1] ** -0.5).bfloat16() for s in shapes]
        self.x = torch.randn(TOKENS, hidden, generator=draw).bfloat16()
        gate, up, down = self.weights
        self.both, self.down = ops.pack(torch.cat([gate, up]), "inputs"), ops.pack(down, "inputs")
        self.cats_gate, paired = ops.pack(gate, "outputs"), ops.pair(ops.pack(up, "outputs"), ops.pack(down, "inputs"))
        self.cats_up, self.cats_down = paired
        self.g = functional.silu(functional.linear(self.x, gate))

    def dense(self, x: Tensor) -> Tensor:
        """torch's own products."""
        gate, up, down = self.weights
        return functional.linear(functional.silu(functional.linear(x, gate)) * functional.linear(x, up), down)

    def cats(self, x: Tensor, threshold: float) -> Tensor:
        """Gate first; then the rows of up and the columns of down of the neurons kept."""
        return ops.glu(x, self.cats_gate, self.cats_up, self.cats_down, activation="silu", threshold=threshold)

    def scap(self, x: Tensor, up: float, down: float) -> Tensor:
        """Two products that leave columns out, whatever stands between them."""
        return ops.input_sparse(self.product(x, up), self.down, threshold=down)

    def product(self, x: Tensor, up: float) -> Tensor:
        """silu(gate x) * up x from the inputs beyond a threshold."""
        gate, up = ops.input_sparse(x, self.both, threshold=up).chunk(2, -1)
        return functional.silu(gate) * up

    def thresholds(self, ffn: float) -> tuple[float, float, float]:
        """Of CATS' gate, SCAP's x and SCAP's product where each skips a share `ffn` of the block: 2/3 of the neurons' share for
        CATS; for SCAP the same sparsity at both sites."""
        if ffn == 0:
            return -1.0, -1.0, -1.0
        up = quantile(self.x, ffn)
        return quantile(self.g, 1.5 * ffn), up, quantile(self.product(self.x, up), ffn)


def quantile(x: Tensor, level: float) -> float:
    """The value that a share `level` of |x| does not pass."""
    return float(x.abs().float().flatten().kthvalue(max(1, round(level * x.numel())))[0])


def measure(block: Block, rounds: int = 11) -> dict[str, dict[float, Interval]]:
    """"cats" and "scap": share skipped -> milliseconds (median, quartiles) of one token; "dense": torch's, at 0. In turn."""
    tokens = block.x.split(1)
    cases = {("dense", 0.0): lambda turn: block.dense(tokens[turn % TOKENS])}
    for ffn in FFN:
        gate, up, down = block.thresholds(ffn)
        cases["cats", ffn] = lambda turn, t=gate: block.cats(tokens[turn % TOKENS], t)
        cases["scap", ffn] = lambda turn, t=up, s=down: block.scap(tokens[turn % TOKENS], t, s)
    found: dict[str, dict[float, Interval]] = {}
    for (method, ffn), times in interleaved(cases, rounds, desc="one FFN block").items():
        each = times.to_json()
        found.setdefault(method, {})[ffn] = Interval(*(each[k] / 1e3 for k in ("median_us", "low_us", "high_us")))
    return found
