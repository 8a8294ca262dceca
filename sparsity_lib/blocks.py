"""Text that passes through a model block by block: what comes before a block is computed once, not once a pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from sparsity_lib.errors import SparsityError
from sparsity_lib.passes import Batch, Text, evaluating, forward
from sparsity_lib.sites import Site, SiteMap
from sparsity_lib.stored import held


class _Reached(Exception):
    """All that was wanted of a forward has been computed."""


class Blocks(Text):
    """Runs one block at a time over all of the text, on hidden states kept from the block before.

        with Blocks(model, stream, sites) as blocks:
            blocks.run()        # passes through the first block: its taps see what they see in the whole model
            blocks.advance()    # and on to the next, through whatever is attached to this one

    The model's own forward is used, which masks and positions come from; blocks already passed hand their input on, and
    the forward ends where nothing more is wanted. After the last block `run` runs what follows the blocks. The current
    block's weights are held, where they stay on disk otherwise. Memory: one hidden state a token of the text, two with
    `carry`.

    Parameters
    ----------
    carry
        Keep what the first `run` of a block makes of the text, for `advance`, which then runs nothing: right where what is
        attached changes nothing.
    """

    def __init__(
        self, model: nn.Module, stream: Sequence[Tensor | Batch], sites: SiteMap, *, carry: bool = False
    ) -> None:
        super().__init__(model, stream)
        self.blocks = [model.get_submodule(name) for name in sites.blocks]
        #: The block that `run` runs, and what arrives there: for each batch [batch, tokens, hidden].
        self.layer, self.hidden = 0, []
        self._carry, self._next = carry, None
        self._held = ExitStack()
        #: A site after which nothing of a pass is wanted.
        self.stop_at: Site | None = None
        self._number = self._length = 0
        self._passed: list[tuple[nn.Module, Callable | None]] = []
        self._entry = None

    def __enter__(self) -> Blocks:
        self.hidden = self._arriving(self.blocks[0])
        self._enter(0)
        return self

    def __exit__(self, *error) -> None:
        if self._entry is not None:
            self._entry.remove()
        while self._passed:
            self._restore()
        self._held.close()

    @property
    def nbytes(self) -> int:
        """Bytes that the hidden states take."""
        return sum(hidden.nbytes for hidden in (*self.hidden, *(self._next or ())))

    def run(self, needs_grad: bool = False, desc: str = "") -> None:
        """One pass of all the text through the current block."""
        if needs_grad:
            raise SparsityError(
                "A saliency needs the gradient of the whole model's loss, which no single block has. Fix: sequential=False."
            )
        if self.layer == len(self.blocks):
            self._feed(None, range(len(self.stream)))
        elif self._carry and self._next is None:
            self._next = self._onward()
        else:
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
        """Go on to the next block, with the hidden states that reach it; after the last, to what follows the blocks."""
        self.hidden, self._next = self._onward() if self._next is None else self._next, None
        block = self.blocks[self.layer]
        self._passed.append((block, block.__dict__.get("forward")))
        block.forward = _handing_on(self._length)
        self._enter(self.layer + 1)

    def choose(self, number: int, with_gradient: bool = False) -> Tensor:
        """Let batch `number` be what comes with the model's next forward, and return what arrives of it at the block.

        With `with_gradient` that is a leaf whose gradient is kept.
        """
        self._number = number
        if with_gradient:
            self.hidden[number] = self.hidden[number].detach().requires_grad_(True)
        return self.hidden[number]

    def back(self, hidden: list[Tensor]) -> None:
        """Return to the block before, at which `hidden` arrives."""
        self._restore()
        self.hidden, self._next = hidden, None
        self._enter(self.layer - 1)

    def _enter(self, layer: int) -> None:
        """Make `layer` the current one: its weights are held, and what arrives at it is put in place."""
        if self._entry is not None:
            self._entry.remove()
        self._held.close()
        self.layer, last = layer, layer == len(self.blocks)
        if not last:
            self._held.enter_context(held(self.blocks[layer]))
        self._entry = self.blocks[layer - last].register_forward_pre_hook(self._substitute, with_kwargs=True)

    def _restore(self) -> None:
        """Give the block passed last its own forward again."""
        block, own = self._passed.pop()
        block.__dict__.pop("forward", None)
        if own is not None:
            block.__dict__["forward"] = own

    def _onward(self) -> list[Tensor]:
        """What arrives at the next block, and in passing how this one's outputs are laid out."""
        def note(module: nn.Module, args: tuple, out: Tensor | tuple) -> None:
            self._length = len(out) if isinstance(out, tuple) else 0

        watch = self.blocks[self.layer].register_forward_hook(note)
        try:
            last = self.layer + 1 == len(self.blocks)
            return self.outputs() if last else self._arriving(self.blocks[self.layer + 1])
        finally:
            watch.remove()

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
            if handle is not None:
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
