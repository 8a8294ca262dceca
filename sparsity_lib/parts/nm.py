"""N:M selection (arXiv 2509.22166): of every M consecutive channels exactly N stay."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from sparsity_lib.checks import count, fraction
from sparsity_lib.errors import SparsityError, refuse
from sparsity_lib.parts.base import Select, part
from sparsity_lib.parts.select import exact_topk
from sparsity_lib.sites import Site

#: Largest M: a group's mask fits a 64-bit word.
LARGEST = 64
#: Up to this M all pairs of a group are compared; beyond it sorting the group is faster.
PAIRWISE = 8


@part("n_of_m")
@dataclass(frozen=True)
class NofM(Select):
    """Keep exactly the N largest scores of every group of M consecutive channels.

    Equal scores: the lower index stays. NaN ranks above every number. The density is N / M; another density means the
    nearest N (at least 1) of the same M, as a top-k takes the nearest whole number of entries.

    Parameters
    ----------
    n, m
        1 <= n <= m <= 64.
    pad
        Where M does not divide the width, the last group is short. False refuses such sites. True keeps min(N, size) of
        it: what padding the channels with zeros to a multiple of M would give.
    """

    any_density: ClassVar[bool] = True

    n: int
    m: int
    pad: bool = False

    def __post_init__(self) -> None:
        check_pattern(self.n, self.m)
        if not isinstance(self.pad, bool):
            raise refuse("pad", self.pad, "true or false")

    @property
    def density(self) -> float:
        return self.n / self.m

    def with_density(self, density: float) -> NofM:
        return dataclasses.replace(self, n=nearest_n(density, self.m))

    def check(self, site: Site) -> None:
        check_width(site.width, self.m, self.pad, f"width of site {site.name}")

    def __call__(self, scores: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        return n_of_m_mask(scores, self.n, self.m, pad=self.pad)

    def kept(self, width: int) -> float:
        check_width(width, self.m, self.pad)
        return (width // self.m * self.n + min(self.n, width % self.m)) / width


def n_of_m_mask(scores: Tensor, n: int, m: int, *, pad: bool = False) -> Tensor:
    """Boolean mask [..., width] of the n largest float32 (or narrower) scores in every m consecutive ones.

    Exactly n in every group, whatever ties there are: the lower index wins, and NaN ranks above every number. `pad`: the
    last group may be short and then keeps min(n, its size).

    Raises
    ------
    SparsityError
        If the pattern is out of range, or m does not divide the width and `pad` is not set.
    """
    check_pattern(n, m)
    width = scores.shape[-1]
    check_width(width, m, pad)
    whole = width - width % m
    if n == m:
        return torch.ones_like(scores, dtype=torch.bool)
    mask = _groups(scores[..., :whole].unflatten(-1, (-1, m)), n).flatten(-2)
    if whole == width:
        return mask
    return torch.cat([mask, exact_topk(scores[..., whole:], min(n, width - whole))], dim=-1)


def _groups(groups: Tensor, n: int) -> Tensor:
    """The mask of groups [..., m], n < m."""
    if groups.device.type != "cpu":
        return exact_topk(groups, n)
    # NumPy on one core: with threads, a dozen passes over little data would wait for each other more than they compute
    values = groups.detach().to(torch.promote_types(groups.dtype, torch.float32)).reshape(-1, groups.shape[-1]).numpy()
    few = len(values) and values.shape[1] <= PAIRWISE and not np.isnan(values).any()
    return torch.from_numpy(_by_pairs(values, n) if few else _by_bound(values, n)).view(groups.shape)


def _by_pairs(groups: np.ndarray, n: int) -> np.ndarray:
    """Count for each entry how many of its group come before it, all groups [rows, m] at once; no NaN."""
    planes = np.ascontiguousarray(groups.T)
    last = len(planes) - 1
    ranks = np.repeat(np.arange(last, -1, -1, dtype=np.int8)[:, None], planes.shape[1], axis=1)  # all later ones are larger
    for apart in range(1, last + 1):
        first = (planes[:-apart] >= planes[apart:]).view(np.int8)  # of equal ones the lower index comes first
        ranks[apart:] += first
        ranks[:-apart] -= first
    return np.ascontiguousarray((ranks < n).T)


def _by_bound(groups: np.ndarray, n: int) -> np.ndarray:
    """Keep what is at least the n-th largest of its group [rows, m]; look again where more than n are."""
    place = groups.shape[1] - n
    ordered = np.sort(groups, axis=1)  # a network for rows as short as these; NaN comes last
    bound, below = ordered[:, place], ordered[:, place - 1]
    mask = groups >= bound[:, None]
    odd = np.isnan(ordered[:, -1])
    if odd.any():
        order = np.lexsort((-groups[odd], ~np.isnan(groups[odd])), axis=1)  # NaN first, then by size, then by index
        chosen = np.zeros_like(mask[odd])
        np.put_along_axis(chosen, order[:, :n], True, axis=1)
        mask[odd] = chosen
    tied = np.flatnonzero((bound == below) & ~odd)
    if len(tied):
        rows, limit = groups[tied], bound[tied, None]
        larger, equal = rows > limit, rows == limit
        missing = n - larger.sum(1, keepdims=True)
        mask[tied] = larger | (equal & (equal.cumsum(1, dtype=np.int8) <= missing))
    return mask


def nearest_n(density: float, m: int) -> int:
    """The N for which N / M is nearest to a density in (0, 1], at least 1."""
    return max(1, round(fraction("density", density) * m))


def check_pattern(n: int, m: int) -> None:
    """Raise SparsityError unless 1 <= n <= m <= 64, whole numbers."""
    if count("m", m) > LARGEST:
        raise refuse("m", m, f"a whole number in [1, {LARGEST}]")
    if count("n", n) > m:
        raise refuse("n", n, f"a whole number in [1, m = {m}]")


def check_width(width: int, m: int, pad: bool, name: str = "width") -> None:
    """Raise SparsityError where groups of m do not fill the width and are not to be padded."""
    if width % m and not pad:
        divisors = [d for d in range(2, LARGEST + 1) if width % d == 0]
        other = f"an M that divides it ({', '.join(map(str, divisors))}), or " if divisors else ""
        raise SparsityError(
            f"{name} = {width} is not divisible by M = {m}. Fix: {other}pad=True, whose last group has {width % m} channels."
        )


def pattern_of(text: str) -> tuple[int, int]:
    """(8, 16) of "8:16".

    Raises
    ------
    SparsityError
        If it is not of the form N:M, or out of range.
    """
    left, colon, right = text.partition(":") if isinstance(text, str) else ("", "", "")
    if not (colon and left.isdecimal() and right.isdecimal()):
        raise refuse("pattern", text, 'a text N:M, as in "8:16"')
    check_pattern(int(left), int(right))
    return int(left), int(right)
