"""Thresholds of one granular layer, and the running statistics of its inputs that they are measured in."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch import distributed as dist

from sparsity_lib.cwic.config import CWICConfig

#: Steps of Weiszfeld's iteration towards the geometric median.
WEISZFELD = 8


class Thresholds(nn.Module):
    """theta [stripes, in], learned, and m and sigma [in], exponential moving averages of batch statistics (section 3.4).

    All are float32, and stay float32 when the model is cast. The module is called `sparsity` inside its layer, which is how
    the library tells these tensors from weights.
    """

    def __init__(self, stripes: int, width: int, config: CWICConfig, *, centred: bool, device=None) -> None:
        super().__init__()
        self.config, self.centred = config, centred and config.normalise
        self.theta = nn.Parameter(torch.zeros(stripes, width, device=device))
        self.register_buffer("mean", torch.zeros(width, device=device))
        self.register_buffer("std", torch.ones(width, device=device))
        #: Batches seen; the first one's statistics are taken as they are.
        self.register_buffer("batches", torch.zeros((), dtype=torch.long, device=device))

    def clamp(self) -> None:
        """theta = max(0, theta), after every update."""
        self.theta.data.clamp_(min=0)

    @torch.no_grad()
    def observe(self, x: Tensor, valid: Tensor | None = None) -> None:
        """Move the running statistics towards those of x [tokens, in]; `valid` [tokens] leaves padding out.

        With several processes, those of all their tokens. Channels whose statistics are not finite stay as they are, so
        that a diverging step leaves no trace.
        """
        x = x.detach().float()
        x = x if valid is None else x[valid]
        if not len(x) and _across() == 1:
            return
        mean, std = (_moments if self.config.statistics == "moments" else _released)(x)
        keep = torch.where(self.batches > 0, self.config.momentum, 0.0)
        good = mean.isfinite() & std.isfinite()
        for running, new in ((self.mean, mean), (self.std, std)):
            running.copy_(torch.where(good, running * keep + new * (1 - keep), running))
        self.batches += 1

    def rule(self) -> tuple[Tensor, Tensor, Tensor]:
        """m, s and the kernel's width eps = alpha sigma: x is kept where |x - m| >= theta s."""
        mean = self.mean if self.centred else torch.zeros_like(self.mean)
        scale = self.std if self.config.normalise else torch.ones_like(self.std)
        return mean, scale, self.std * self.config.bandwidth

    def _apply(self, fn, recurse=True):
        before = {name: t.data for name, t in (*self._parameters.items(), *self._buffers.items()) if t.is_floating_point()}
        super()._apply(fn, recurse)
        for name, old in before.items():
            now = getattr(self, name)
            if now.dtype != torch.float32:  # moved and cast: keep the move, undo the cast
                now.data = old.to(device=now.device)
        return self

    def extra_repr(self) -> str:
        return f"stripes={self.theta.shape[0]}, width={self.theta.shape[1]}"


def _across() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and (uncorrected) standard deviation over the tokens of all processes."""
    if _across() == 1:
        centre = x.mean(0)
        return centre, (x - centre).square().mean(0).sqrt()
    first = torch.cat([x.sum(0), x.new_tensor([len(x)])])
    dist.all_reduce(first)
    centre, tokens = first[:-1] / first[-1], first[-1]
    second = (x - centre).square().sum(0)  # in a second round: a sum of squares of large numbers would lose the deviation
    dist.all_reduce(second)
    return centre, (second / tokens).sqrt()


def _released(x: Tensor) -> tuple[Tensor, Tensor]:
    """Geometric median by Weiszfeld's iteration from the mean, and E|x - m| / sqrt(2 / pi), sigma where x is normal."""
    centre = x.mean(0)
    for _ in range(WEISZFELD):
        weight = 1 / (x - centre).norm(dim=-1, keepdim=True).clamp_min(1e-6)
        centre = (weight * x).sum(0) / weight.sum()
    both = torch.stack([centre, (x - centre).abs().mean(0) / math.sqrt(2 / math.pi)])
    if (processes := _across()) > 1:  # the mean of the processes' medians stands for the median of all
        dist.all_reduce(both)
        both /= processes
    return both[0], both[1]
