"""Where signed activations lie, streamed: mean and spread, quantiles, and the peak of a kernel density estimate.

Memory: `Distribution()` 2 MiB for all entries together; with `channels`, 4 KiB a channel (none without a histogram).
"""

from __future__ import annotations

import math
from typing import ClassVar

import numpy as np
import torch
from scipy.signal import fftconvolve
from torch import Tensor

from sparsity_lib.collectors import refuse_broken
from sparsity_lib.errors import SparsityError, refuse

#: Scott's rule is applied to at most this many numbers, about as many as SCAP's release draws from a layer's
#: activations: the bandwidth then does not shrink with the calibration text.
SCOTT_NUMBERS = 200_000
#: A density is never laid out on more points than these (128 MiB).
MOST_POINTS = 1 << 24


class Distribution:
    """Mean, variance and extremes in float64, and a histogram over the sign and leading bits of float32.

    For all entries together bins are 2**-9 of their value wide at any scale. With `channels`, each channel has a
    histogram of its own with bins of a sixteenth between 2**-16 and 2**16; what is nearer to zero counts as in the first
    bin, and quantiles never leave a channel's extremes.

    Parameters
    ----------
    channels
        Describe each of that many channels; None describes all entries of the site together.
    histogram
        False keeps the moments only.
    """

    needs_grad: ClassVar[bool] = False

    def __init__(self, channels: int | None = None, *, histogram: bool = True) -> None:
        self.channels = channels
        rows = channels or 1
        # mantissa bits of a bin, lowest exponent (biased), octaves
        self._bits, self._lowest, octaves = (9, 0, 256) if channels is None else (4, 127 - 16, 32)
        self.side = octaves << self._bits
        self.count = 0
        self.mean = torch.zeros(rows, dtype=torch.float64)
        self.squares = torch.zeros(rows, dtype=torch.float64)  # sum of (x - mean)^2
        self.low, self.high = torch.full((rows,), math.inf), torch.full((rows,), -math.inf)
        kind = torch.int64 if channels is None else torch.int32
        self.bins = torch.zeros(rows, 2 * self.side, dtype=kind) if histogram else None

    def key(self) -> str:
        return f"distribution:{self.channels}:{self.bins is not None}"

    def update(self, values: Tensor, grad: Tensor | None = None) -> None:
        refuse_broken(values, "Activations")
        rows = values.detach().float().cpu()
        rows = rows.reshape(1, -1) if self.channels is None else rows.flatten(0, -2).T
        if rows.numel() == 0:  # an expert that no token was routed to
            return
        self._moments(rows.double())
        self.low, self.high = torch.minimum(self.low, rows.amin(1)), torch.maximum(self.high, rows.amax(1))
        if self.bins is not None:
            place = self._place(rows.contiguous()) + torch.arange(len(rows))[:, None] * self.bins.shape[1]
            self.bins += torch.bincount(place.flatten(), minlength=self.bins.numel()).view_as(self.bins).to(self.bins.dtype)

    def _moments(self, rows: Tensor) -> None:
        """Merge a batch's mean and squares (Chan's update: no difference of large sums)."""
        number = rows.shape[1]
        mean = rows.mean(1)
        apart = mean - self.mean
        total = self.count + number
        self.squares += (rows - mean[:, None]).square().sum(1) + apart.square() * (self.count * number / total)
        self.mean += apart * (number / total)
        self.count = total

    def _place(self, rows: Tensor) -> Tensor:
        """Bin of every value, in ascending order of values."""
        size = (rows.abs().view(torch.int32) >> (23 - self._bits)) - (self._lowest << self._bits)
        size = size.clamp_(0, self.side - 1).long()
        return torch.where(rows < 0, self.side - 1 - size, self.side + size)

    def _edges(self) -> Tensor:
        """Edges of all bins in ascending order, float64 [2 * side + 1]; zero lies between the two middle ones."""
        places = torch.arange(1, self.side + 1, dtype=torch.int32) + (self._lowest << self._bits)
        up = places.bitwise_left_shift(23 - self._bits).view(torch.float32).double()
        up = torch.where(up > 0, up, torch.inf).clamp_max(torch.finfo(torch.float32).max)  # the last leaves int32
        return torch.cat([-up.flip(0), torch.zeros(1, dtype=torch.float64), up])

    def numbers(self) -> int:
        """How many numbers were read: all, or of each channel."""
        return self.count

    def _check_read(self) -> None:
        if self.count == 0:
            raise SparsityError("A statistic was asked for before any calibration text was read.")

    def center(self) -> Tensor:
        """The mean, float64 [rows]."""
        self._check_read()
        return self.mean

    def std(self) -> Tensor:
        """Standard deviation (of a sample: divided by n - 1), float64 [rows]."""
        self._check_read()
        return (self.squares / max(1, self.count - 1)).sqrt()

    def quantile(self, level: float) -> Tensor:
        """The value below which a share `level` of the numbers lies, linear inside its bin, float64 [rows]."""
        self._check_read()
        below = self.bins.cumsum(1, dtype=torch.int64)
        rank = level * self.count
        index = torch.searchsorted(below, torch.full((len(below), 1), max(1, math.ceil(rank))))
        inside = self.bins.gather(1, index)
        before = below.gather(1, index) - inside
        share = ((rank - before) / inside).clamp(0, 1)[:, 0]
        edges, index = self._edges(), index[:, 0]
        found = edges[index] + (edges[index + 1] - edges[index]) * share
        return found.clamp(self.low.double(), self.high.double())

    def share_below(self, value: float) -> Tensor:
        """Share of the numbers below `value`, linear inside its bin: what `quantile` undoes, float64 [rows]."""
        edges, below = self._edges(), self.bins.cumsum(1, dtype=torch.int64).double()
        index = int(torch.searchsorted(edges, torch.tensor(value, dtype=torch.float64), right=True)) - 1
        index = min(max(index, 0), len(edges) - 2)
        inside = self.bins[:, index]
        share = min(1.0, max(0.0, (value - float(edges[index])) / float(edges[index + 1] - edges[index])))
        return (below[:, index] - inside * (1 - share)) / self.numbers()

    def mode(self, bandwidth: float = 0.5, points: int = 32) -> float:
        """Where a Gaussian kernel density estimate of all numbers peaks.

        The kernel's deviation is `bandwidth` times Scott's rule, std * min(n, SCOTT_NUMBERS)**(-1/5); `points` grid points
        lie within one of it. Constant activations peak where they are.
        """
        if self.channels is not None:
            raise refuse("channels of a mode", self.channels, "None")
        low, high, width = float(self.low), float(self.high), float(self.std())
        width *= bandwidth * min(self.count, SCOTT_NUMBERS) ** -0.2
        if low == high or width == 0:
            return low if low == high else float(self.mean)
        used = self.bins[0].nonzero()[:, 0]
        edges = self._edges()
        centres = ((edges[used] + edges[used + 1]) / 2).clamp(low, high)
        return density_peak(centres.numpy(), self.bins[0, used].double().numpy(), width, points)


def density_peak(values: np.ndarray, counts: np.ndarray, width: float, points: int = 32) -> float:
    """Where the sum of Gaussians of deviation `width` at `values`, `counts` high, is largest.

    The values are shared out to the neighbours on a grid of step width / points, smoothed by one convolution, and the
    largest point moved to the top of the parabola through it and its neighbours.

    Raises
    ------
    SparsityError
        If the grid would have more than `MOST_POINTS` points.
    """
    low, step = values.min(), width / points
    cells = int((values.max() - low) / step) + 2
    if cells > MOST_POINTS:
        least = width * cells / MOST_POINTS
        raise refuse("width of the kernel", width, f"at least {least:.3g} on this range", "a larger bandwidth or fewer points")
    place = (values - low) / step
    left = place.astype(np.int64)
    share = place - left
    heights = np.bincount(left, counts * (1 - share), cells) + np.bincount(left + 1, counts * share, cells)
    kernel = np.exp(-0.5 * (np.arange(-6 * points, 6 * points + 1) / points) ** 2)
    density = fftconvolve(heights, kernel)[6 * points : 6 * points + cells]
    top = int(density.argmax())
    if 0 < top < cells - 1:
        before, at, after = density[top - 1 : top + 2]
        bend = before - 2 * at + after
        return float(low + step * (top + (0.5 * (before - after) / bend if bend < 0 else 0.0)))
    return float(low + step * top)
