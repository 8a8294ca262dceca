"""The module that drops entries at one site: transform, score, select, repair, back."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from sparsity_lib.attach import Attached, attach, attach_outputs
from sparsity_lib.errors import SparsityError
from sparsity_lib.recipe import Rule
from sparsity_lib.sites import Site


class Sparsifier(nn.Module):
    """x [..., width] -> x with the dropped entries' contribution gone.

        z = transform(x); mask = select(score(z)); z' = repair(mask * z); x' = inverse(z')

    Repairs of the layers' outputs follow in `output`. Fitted tensors are float32 buffers and stay float32 when the
    model is cast: a threshold rounded to bfloat16 keeps a different number of entries.
    """

    def __init__(self, rule: Rule, site: Site, token_share: float = 1.0, device: torch.device | str = "cpu") -> None:
        super().__init__()
        self.rule, self.width, self.token_share = rule, site.width, token_share
        self.flat = site.experts  # tokens of all sequences arrive in one row, so "the last share" has no meaning
        self.on_product = getattr(rule.score, "on_product", False)
        #: Repairs of z, and of the outputs of the layers that read it.
        self.inner = tuple(piece for piece in rule.repair if not piece.on_outputs)
        self.outer = tuple(piece for piece in rule.repair if piece.on_outputs)
        self._last = len(site.column_readers) - 1
        self._dropped: Tensor | None = None
        self._prompt: Mapping[str, Tensor] | None = None
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
        transform = self.rule.transform
        tensors = transform.of_token(x, self._buffers)
        z = transform.forward(x, tensors)
        mask = self.mask(z)
        kept = plain = z * mask
        for repair in self.inner:
            kept = repair(kept, z, mask, tensors)
        if self.recorder is not None:
            # Zeros need no weights; but of neurons chosen beforehand the gate's row is read before one is known.
            self.recorder((mask if self.rule.score.beforehand else mask & (z != 0)).sum(-1))
        out = transform.inverse(kept, tensors)
        if self.outer:  # kept until the last layer that reads the site has made its output
            self._dropped = (x - (out if kept is plain else transform.inverse(plain, tensors))).to(x.dtype)
        return out.to(x.dtype)

    def output(self, y: Tensor, reader: int, layer: nn.Module) -> Tensor:
        """What takes the place of y [..., out], which `layer`, number `reader` of the site, made of `forward`'s result."""
        dropped = self._dropped
        if not self.enabled or dropped is None:
            return y
        if reader == self._last:
            self._dropped = None
        repaired = y
        for repair in self.outer:
            repaired = repair.output(repaired, dropped, layer, reader, self._buffers)
        start = self._dense_tokens(y)
        repaired = repaired.to(y.dtype)
        return torch.cat([y[..., :start, :], repaired[..., start:, :]], dim=-2) if start else repaired

    def mask(self, z: Tensor) -> Tensor:
        """The entries of z [..., width] that are kept."""
        start, tensors = self._dense_tokens(z), self._buffers
        if self.rule.score.of_prompt:
            tensors = {**tensors, **self._of_prompt(z.detach(), start)}
        mask = self.rule.select(self.rule.score(z.detach(), tensors), tensors)
        if start:
            mask[..., :start, :] = True
        return mask

    def _of_prompt(self, z: Tensor, start: int) -> Mapping[str, Tensor]:
        """What the score takes from the sequences' dense first parts; tokens generated one by one have those of the last."""
        if start:
            self._prompt = self.rule.score.prompt(z[..., :start, :])
        if self._prompt is None or any(len(each) != len(z) for each in self._prompt.values()):
            raise SparsityError(
                f"The score {self.rule.score.kind!r} ranks by a prompt, and these {len(z)} sequences of {z.shape[-2]} tokens "
                "have none that is dense. Fix: run the prompt first, with at least two tokens, in the same batch."
            )
        return self._prompt

    def _dense_tokens(self, z: Tensor) -> int:
        """How many tokens at the beginning of each sequence are left as they are."""
        tokens = z.shape[-2] if z.dim() > 2 else 1
        return tokens - round(self.token_share * tokens) if self.token_share < 1 and tokens > 1 else 0

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


def put_on(model: nn.Module, site: Site, sparsifier: Sparsifier) -> Attached:
    """Attach a sparsifier to its site, and to the outputs of the layers that read it where a repair changes them."""
    handle = attach(model, site, sparsifier, on_product=sparsifier.on_product)
    if sparsifier.outer:
        handle.add(attach_outputs(model, site, sparsifier.output).remove)
    return handle
