"""What this machine can do: products of one weight with ever more tokens, between the memory's roof and the arithmetic's."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional

from sparsity_lib.bench.timing import ReadBandwidth, interleaved

TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
WIDTH, COPIES = 3072, 4


@dataclass(frozen=True)
class Roofline:
    """bandwidth: bytes a second that reading reaches. points: (operations a byte, operations a second), by tokens."""

    bandwidth: float
    points: tuple[tuple[float, float], ...]

    @property
    def peak(self) -> float:
        """The most operations a second that any of the products reached."""
        return max(speed for _, speed in self.points)

    @property
    def ridge(self) -> float:
        """Operations a byte from which on arithmetic is the limit, not memory."""
        return self.peak / self.bandwidth


def measure(dtype: torch.dtype = torch.bfloat16, rounds: int = 5) -> Roofline:
    """Time W x for a square W and 1 to 512 tokens; weights take turns, so that no cache holds what is read."""
    weights = [torch.randn(WIDTH, WIDTH).to(dtype) for _ in range(COPIES)]
    inputs = {tokens: torch.randn(tokens, WIDTH).to(dtype) for tokens in TOKENS}
    reading = ReadBandwidth(128)
    cases = {str(n): lambda turn, x=x: functional.linear(x, weights[turn % COPIES]) for n, x in inputs.items()}
    times = interleaved({**cases, "read": reading}, rounds, desc="roofline")
    points = []
    for tokens in TOKENS:
        operations, size = 2 * tokens * WIDTH**2, dtype.itemsize * (WIDTH**2 + 2 * tokens * WIDTH)
        points.append((operations / size, operations / times[str(tokens)].median))
    return Roofline(reading.bytes / times["read"].median, tuple(points))
