"""Facts of N:M patterns that need no model: metadata, how many masks there are, how much energy a pattern retains.

Retained energy is the share of sum x_i^2 that the kept entries hold, in expectation over independent inputs of one
distribution: E[sum over the N largest of M of x^2] / (M E[x^2]).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from scipy.integrate import quad
from scipy.special import betainc
from scipy.stats import expon, halfnorm
from torch import Tensor

from sparsity_lib.checks import count, fraction
from sparsity_lib.errors import refuse, unknown
from sparsity_lib.parts.base import as_float32

#: Distributions of the inputs, by that of their size |x|, with E[x^2] = 1.
DISTRIBUTIONS = {"gaussian": halfnorm(), "laplace": expon(scale=math.sqrt(0.5))}
#: Sizes beyond this one hold less than 1e-20 of the energy.
FAR = 40.0


def metadata_bits(n: int, m: int) -> float:
    """Bits of metadata an element: log2 of the number of masks of a group, over its size. 0.646 for 2:4."""
    return math.log2(patterns(n, m)) / m


def patterns(n: int, m: int, width: int | None = None) -> int:
    """How many masks N:M allows in `width` channels (a multiple of m; one group by default): C(m, n)^(width / m).

    Patterns compare over one width: in 16 channels 2:4 has 1296 masks, 4:8 has 4900, 8:16 has 12870.
    """
    check_nm(n, m)
    if width is None:
        return math.comb(m, n)
    if count("width", width) % m:
        raise refuse("width", width, f"a multiple of m = {m}")
    return math.comb(m, n) ** (width // m)


def comparators(m: int) -> float:
    """Comparators an element of a bitonic network that sorts groups of m = 2^k: k (k + 1) / 4. A model of what selecting takes.

    Raises SparsityError unless m is a power of two of at least 2.
    """
    if count("m", m) < 2 or m & (m - 1):
        raise refuse("m", m, "a power of two of at least 2")
    k = m.bit_length() - 1
    return k * (k + 1) / 4


def choices(n: int, m: int) -> int:
    """Channels of a group that may be its j-th survivor, for any j: m - n + 1; so many weights a multiplier chooses from."""
    check_nm(n, m)
    return m - n + 1


def retained_energy(n: int, m: int, distribution: str = "gaussian") -> float:
    """Share of the energy that the n largest of m independent inputs hold, by integrating over one input's size.

    An input that is larger than a share u of all is kept if at most n - 1 of the other m - 1 are larger, with
    probability I_u(m - n, n), the regularised incomplete beta function. Any m: a token's top-k is k of its width.
    """
    check_nm(n, m)
    if n == m:
        return 1.0
    return _energy(distribution, lambda share: float(betainc(m - n, n, share)))


def retained_energy_unstructured(density: float, distribution: str = "gaussian") -> float:
    """The limit of `retained_energy` for ever larger groups: all inputs above one quantile are kept."""
    fraction("density", density)
    return _energy(distribution, lambda share: 1.0, 1 - density)


def measured_energy(x: Tensor, mask: Tensor) -> float:
    """Share of sum x^2 that a mask of x's shape keeps, all tokens together, in float64."""
    if x.shape != mask.shape or mask.dtype != torch.bool:
        raise refuse("mask", f"{mask.dtype} {tuple(mask.shape)}", f"a boolean tensor of x's shape {tuple(x.shape)}")
    square = as_float32(x).double().square()
    return float((square * mask).sum() / square.sum())


def _energy(distribution: str, kept: Callable[[float], float], start: float = 0.0) -> float:
    """E[x^2 P(kept)] / E[x^2], where an input larger than a share u >= `start` of all is kept with probability kept(u)."""
    if not isinstance(distribution, str) or distribution not in DISTRIBUTIONS:
        raise unknown("distribution", distribution, DISTRIBUTIONS)
    size = DISTRIBUTIONS[distribution]
    low = float(size.ppf(start))
    edges = [low, *(float(size.ppf(u)) for u in (0.1, 0.3, 0.5, 0.7, 0.9, 0.99) if u > start), FAR]
    pieces = zip(edges, edges[1:], strict=False)  # in pieces, because quad overlooks a narrow step in a wide range
    return min(1.0, sum(quad(lambda a: a * a * size.pdf(a) * kept(size.cdf(a)), *piece, epsabs=1e-10)[0] for piece in pieces))


def check_nm(n: int, m: int) -> None:
    """Raise SparsityError unless 1 <= n <= m, whole numbers."""
    if count("n", n) > count("m", m):
        raise refuse("n", n, f"a whole number in [1, m = {m}]")
