"""Text that passes through a model block by block: what comes before a block is computed once, not once a pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from sparsity_lib.errors import SparsityError
from sparsity_lib.passes import Batch, Text, evaluating, forward
from sparsity_lib.sites import Site, SiteMap


class _Reached(Exception):
    """All that was wanted of a forward has been computed."""


class Blocks(Text):
    """Runs one block at a time over all of the text, on hidden states kept from the block before.

        with Blocks(model, stream, sites) as blocks:
            blocks.run()        # passes through the first block: its taps see what they see in the whole model
            blocks.advance()    # and on to the next, through whatever is attached to this one

    The model's own forward is used, which masks and positions come from; blocks already passed hand their input on, and
    the forward ends where nothing more is wanted. Memory: one hidden state a token of the text.
    """

    def __init__(self, model: nn.Module, stream: Sequence[Tensor | Batch], sites: SiteMap) -> None:
        super().__init__(model, stream)
        self.blocks = [model.get_submodule(name) for name in sites.blocks]
        #: The block that `run` runs, and what arrives there: for each batch [batch, tokens, hidden].
        self.layer, self.hidden = 0, []
        #: A site after which nothing of a pass is wanted.
        self.stop_at: Site | None = None
        self._number = 0
        self._passed: list[tuple[nn.Module, Callable | None]] = []
        self._entry = None

    def __enter__(self) -> Blocks:
        self.hidden = self._arriving(self.blocks[0])
        self._entry = self.blocks[0].register_forward_pre_hook(self._substitute, with_kwargs=True)
        return self

    def __exit__(self, *error) -> None:
        if self._entry is not None:
            self._entry.remove()
        for block, own in self._passed:
            block.__dict__.pop("forward", None)
            if own is not None:
                block.__dict__["forward"] = own
        self._passed.clear()

    @property
    def nbytes(self) -> int:
        """Bytes that the hidden states take."""
        return sum(hidden.nbytes for hidden in self.hidden)

    def run(self, needs_grad: bool = False, desc: str = "") -> None:
        """One pass of all the text through the current block."""
        if needs_grad:
            raise SparsityError(
                "A saliency needs the gradient of the whole model's loss, which no single block has. Fix: sequential=False."
            )
        self.outputs(keep=False)

    def outputs(self, keep: bool = True) -> list[Tensor]:
        """What the current block makes of every batch, [batch, tokens, hidden]."""
        found: list[Tensor] = []
        self._feed(self._leaving(found if keep else None), range(len(self.stream)))
        return found

    def output(self, number: int) -> Tensor:
        """What the current block makes of batch `number`, [batch, tokens, hidden], with gradients for what asks for them."""
        found: list[Tensor] = []
        self._feed(self._leaving(found), [number], grad=torch.is_grad_enabled())
        return found[0]

    def ahead(self, hidden: list[Tensor]) -> list[Tensor]:
        """What arrives at the next block if `hidden` arrives at this one."""
        own, self.hidden = self.hidden, hidden
        try:
            return self._arriving(self.blocks[self.layer + 1])
        finally:
            self.hidden = own

    def advance(self) -> None:
        """Go on to the next block, with the hidden states that reach it."""
        block, shape = self.blocks[self.layer], []
        watch = block.register_forward_hook(lambda module, args, out: shape.append(len(out) if isinstance(out, tuple) else 0))
        try:
            self.hidden = self._arriving(self.blocks[self.layer + 1])
        finally:
            watch.remove()
        self._entry.remove()
        self._passed.append((block, block.__dict__.get("forward")))
        block.forward = _handing_on(shape[0])
        self.layer += 1
        self._entry = self.blocks[self.layer].register_forward_pre_hook(self._substitute, with_kwargs=True)

    def reached(self, site: Site) -> None:
        if site is self.stop_at and not site.experts:  # experts are called one after the other
            raise _Reached

    def _arriving(self, block: nn.Module) -> list[Tensor]:
        """The hidden states of every batch that come to `block`."""
        found: list[Tensor] = []

        def into(module: nn.Module, args: tuple, kwargs: dict) -> None:
            found.append(_hidden(args, kwargs).detach())
            raise _Reached

        self._feed(block.register_forward_pre_hook(into, with_kwargs=True), range(len(self.stream)))
        return found

    def _leaving(self, found: list[Tensor] | None):
        """A hook at the end of the current block that adds what leaves it to `found`, and ends the forward."""

        def out_of(module: nn.Module, args: tuple, out: Tensor | tuple) -> None:
            if found is not None:
                found.append(out[0] if isinstance(out, tuple) else out)
            raise _Reached

        return self.blocks[self.layer].register_forward_hook(out_of)

    def _feed(self, handle, numbers: Iterable[int], grad: bool = False) -> None:
        try:
            with evaluating(self.model), torch.set_grad_enabled(grad):
                for number in numbers:
                    self._number = number
                    try:
                        forward(self.model, self.stream[number])
                    except _Reached:
                        continue
        finally:
            handle.remove()

    def _substitute(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        hidden = self.hidden[self._number]
        return ((hidden, *args[1:]), kwargs) if args else ((), {**kwargs, "hidden_states": hidden})


def _hidden(args: tuple, kwargs: dict) -> Tensor:
    return args[0] if args else kwargs["hidden_states"]


def _handing_on(length: int) -> Callable:
    """A block's forward that returns its input: as it is, or first in a tuple of `length`."""

    def forward(*args, **kwargs):
        hidden = _hidden(args, kwargs)
        return (hidden, *[None] * (length - 1)) if length else hidden

    return forward
