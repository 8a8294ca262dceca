"""Statistics streamed over calibration text: each needs the same memory however many tokens pass.

Memory, for a site of width C: `LogHistogram` 1 MiB; `SecondMoment` 8 C^2 bytes; `ColumnSquares` 8 C bytes; `GradientSize`
40 C bytes, and 1.5 KiB * C more where the median is wanted.
"""

from __future__ import annotations

import math
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from sparsity_lib.errors import SparsityError


class Collector(Protocol):
    """Something that reads values (and perhaps gradients) batch by batch."""

    needs_grad: ClassVar[bool]

    def key(self) -> str:
        """Equal for collectors that would collect the same from the same stream."""

    def update(self, values: Tensor, grad: Tensor | None = None) -> None:
        """Take in `values` [..., C], and dLoss/dvalues of the same shape if `needs_grad`."""


def refuse_broken(values: Tensor, what: str) -> None:
    """Raise SparsityError where `values` are not finite; `what` they are opens the message."""
    if not torch.isfinite(values).all():
        raise SparsityError(
            f"{what} on the calibration text hold NaN or infinity. "
            "Fix: load the model in float32 or bfloat16, and check its weights."
        )


class LogHistogram:
    """Quantiles of non-negative numbers from a histogram over the leading bits of float32.

    Bins are 2**-9 of their value wide (8 exponent and 9 mantissa bits), so a quantile is off by at
    most 0.2% of itself, at any scale, without a range to choose beforehand.
    """

    needs_grad: ClassVar[bool] = False
    SHIFT = 14

    def __init__(self) -> None:
        self.counts = torch.zeros(1 << (31 - self.SHIFT), dtype=torch.int64)
        self.low, self.high = math.inf, 0.0

    def key(self) -> str:
        return "log_histogram"

    def update(self, values: Tensor, grad: Tensor | None = None) -> None:
        refuse_broken(values, "Scores")
        values = values.detach().float()
        if values.numel() == 0:  # an expert that no token was routed to
            return
        self.low, self.high = min(self.low, float(values.min())), max(self.high, float(values.max()))
        bits = values.contiguous().view(torch.int32).flatten() >> self.SHIFT
        self.counts += torch.bincount(bits, minlength=len(self.counts)).cpu()

    def quantile(self, level: float) -> float:
        """The value below which a share `level` of all numbers lies, linear inside its bin.

        It never leaves the range of the numbers, so a quantile of equal ones is that number exactly.
        """
        total = self.numbers()
        if total == 0:
            raise SparsityError("A quantile was asked for before any calibration text was read.")
        below = self.counts.cumsum(0)
        rank = level * total
        index = int(torch.searchsorted(below, torch.tensor(rank, dtype=torch.float64).ceil().long().clamp_min(1)))
        edges = torch.tensor([index, index + 1], dtype=torch.int32).bitwise_left_shift(self.SHIFT).view(torch.float32)
        before = int(below[index] - self.counts[index])
        inside = (rank - before) / max(1, int(self.counts[index]))
        found = float(edges[0] + (edges[1] - edges[0]) * min(1.0, max(0.0, inside)))
        return min(self.high, max(self.low, found))

    def numbers(self) -> int:
        """How many numbers were read."""
        return int(self.counts.sum())


class ColumnSquares:
    """sum_t x_ti^2 of every entry i in float64, [C]."""

    needs_grad: ClassVar[bool] = False

    def __init__(self, width: int) -> None:
        self.total = torch.zeros(width, dtype=torch.float64)
        self.tokens = 0

    def key(self) -> str:
        return "column_squares"

    def update(self, values: Tensor, grad: Tensor | None = None) -> None:
        refuse_broken(values, "Inputs")
        rows = values.detach().flatten(0, -2)
        self.total += rows.double().square().sum(0).cpu()
        self.tokens += len(rows)

    def rms(self) -> Tensor:
        """sqrt(mean over tokens of x_ti^2), [C]: the column's norm over the text but for one factor for all columns."""
        if self.tokens == 0:
            raise SparsityError("Column norms were asked for before any calibration text was read.")
        return (self.total / self.tokens).sqrt()


class SecondMoment:
    """sum_t x_t x_t^T in float64, [C, C]."""

    needs_grad: ClassVar[bool] = False

    def __init__(self, width: int) -> None:
        self.total = torch.zeros(width, width, dtype=torch.float64)
        self.tokens = 0

    def key(self) -> str:
        return "second_moment"

    def update(self, values: Tensor, grad: Tensor | None = None) -> None:
        refuse_broken(values, "Inputs")
        rows = values.detach().float().flatten(0, -2)
        self.total += (rows.T @ rows).double().cpu()  # float32 inside a batch, float64 across batches
        self.tokens += len(rows)

    def result(self) -> Tensor:
        return self.total / max(1, self.tokens)


class GradientSize:
    """How large dL/dz_j typically is, per entry j, with L the loss summed over tokens.

    `result()` has, each [C] in float64: `rms`, `mean`, `product_rms` (see parts.saliency), `max`, and
    `median` if asked for. The median is read off a histogram of 8 bins an octave between 2**-40 and
    2**8: it lies in the bin of the true one, so it is off by less than 12.5% of itself.
    """

    needs_grad: ClassVar[bool] = True
    BINS, OCTAVE_BITS, LOWEST = 384, 3, -40

    def __init__(self, width: int, *, skip_first: bool = False, median: bool = False) -> None:
        self.skip_first = skip_first
        self.sums = torch.zeros(4, width, dtype=torch.float64)  # grad^2, |grad|, (z grad)^2, z^2
        self.largest = torch.zeros(width)
        self.tokens = 0
        self.bins = torch.zeros(width, self.BINS, dtype=torch.int32) if median else None

    def key(self) -> str:
        return f"gradient_size:{self.skip_first}:{self.bins is not None}"

    def update(self, values: Tensor, grad: Tensor | None = None) -> None:
        assert grad is not None
        refuse_broken(grad, "Gradients")
        values, grad = values.detach().float(), grad.detach().float()
        if self.skip_first and values.dim() == 3:
            values, grad = values[:, 1:], grad[:, 1:]
        z, size = values.flatten(0, -2).cpu(), grad.flatten(0, -2).abs().cpu()
        self.sums += torch.stack(
            [size.square().sum(0), size.sum(0), (z * size).square().sum(0), z.square().sum(0)]
        ).double()
        self.largest = torch.maximum(self.largest, size.amax(0))
        self.tokens += len(size)
        if self.bins is not None:
            self._count(size)

    def _count(self, size: Tensor) -> None:
        lowest = (127 + self.LOWEST) << self.OCTAVE_BITS
        index = (size.contiguous().view(torch.int32) >> (23 - self.OCTAVE_BITS)) - lowest
        index = index.clamp_(0, self.BINS - 1).long() + torch.arange(size.shape[1]) * self.BINS
        counts = torch.bincount(index.flatten(), minlength=self.bins.numel())
        self.bins += counts.view_as(self.bins).int()

    def result(self) -> dict[str, Tensor]:
        if self.tokens == 0:
            raise SparsityError("A saliency was asked for before any calibration text was read.")
        grad2, grad1, product2, value2 = self.sums
        found = {
            "rms": (grad2 / self.tokens).sqrt(),
            "mean": grad1 / self.tokens,
            "product_rms": (product2 / value2.clamp_min(1e-30)).sqrt(),
            "max": self.largest.double(),
        }
        if self.bins is not None:
            found["median"] = self._median()
        return found

    def _median(self) -> Tensor:
        below = self.bins.long().cumsum(1)
        half = self.tokens / 2
        index = (below < half).sum(1).clamp_max(self.BINS - 1)
        count = self.bins.gather(1, index[:, None])[:, 0]
        before = below.gather(1, index[:, None])[:, 0] - count
        inside = (half - before) / count.clamp_min(1)
        per_octave = 1 << self.OCTAVE_BITS
        octave, step = index // per_octave, index % per_octave
        low = (1 + step.double() / per_octave) * torch.exp2(octave.double() + self.LOWEST)
        median = low + inside.clamp(0, 1) * torch.exp2(octave.double() + self.LOWEST) / per_octave
        return torch.where(index == 0, torch.zeros_like(median), median)


def bytes_needed(collector: Collector) -> int:
    """Memory a collector holds, in bytes (what `fit` reports)."""
    tensors = [value for value in vars(collector).values() if isinstance(value, Tensor)]
    return math.ceil(sum(t.numel() * t.element_size() for t in tensors))
