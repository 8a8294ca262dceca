"""The module that drops entries at one site: transform, score, select, repair, back."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from sparsity_lib.recipe import Rule
from sparsity_lib.sites import Site


class Sparsifier(nn.Module):
    """x [..., width] -> x with the dropped entries' contribution gone.

        z = transform(x); mask = select(score(z)); z' = repair(mask * z); x' = inverse(z')

    Fitted tensors are float32 buffers and stay float32 when the model is cast: a threshold rounded
    to bfloat16 keeps a different number of entries.
    """

    def __init__(self, rule: Rule, site: Site, token_share: float = 1.0, device: torch.device | str = "cpu") -> None:
        super().__init__()
        self.rule, self.width, self.token_share = rule, site.width, token_share
        self.flat = site.experts  # tokens of all sequences arrive in one row, so "the last share" has no meaning
        self.on_product = getattr(rule.score, "on_product", False)
        #: Off: the site passes its input through (the dense teacher of a recovery).
        self.enabled = True
        #: Called with the number of entries kept by every token [...]; set by `accounting`.
        self.recorder: Callable[[Tensor], None] | None = None
        for name, shape in rule.shapes(site).items():
            self.register_buffer(name, torch.zeros(shape, dtype=torch.float32, device=device))

    def fill(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over fitted tensors; those on the meta device are still to come (from a checkpoint)."""
        for name, tensor in tensors.items():
            if tensor.device.type != "meta":
                self.get_buffer(name).copy_(tensor)

    def forward(self, x: Tensor) -> Tensor:
        if not self.enabled:
            return x
        tensors = self._buffers
        z = self.rule.transform.forward(x, tensors)
        mask = self.mask(z)
        kept = z * mask
        for repair in self.rule.repair:
            kept = repair(kept, z, mask, tensors)
        if self.recorder is not None:
            self.recorder((mask & (z != 0)).sum(-1))
        return self.rule.transform.inverse(kept, tensors).to(x.dtype)

    def mask(self, z: Tensor) -> Tensor:
        """The entries of z [..., width] that are kept."""
        mask = self.rule.select(self.rule.score(z.detach(), self._buffers), self._buffers)
        tokens = z.shape[-2] if z.dim() > 2 else 1
        if self.token_share < 1 and tokens > 1:
            start = tokens - round(self.token_share * tokens)
            mask[..., :start, :] = True
        return mask

    def _apply(self, fn, recurse=True):
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, buffer in self._buffers.items():
            if buffer.dtype != torch.float32:  # moved and cast: keep the move, undo the cast
                self._buffers[name] = before[name].to(device=buffer.device)
        return self

    def extra_repr(self) -> str:
        rule = self.rule
        return f"{rule.site}: {rule.transform.kind} > {rule.score.kind} > {rule.select.kind}, width={self.width}"
