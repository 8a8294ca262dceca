"""The whole model over all of the text, block after block: what a model needs whose blocks stay on disk.

An ordinary model runs batch after batch, which keeps fewer hidden states; what comes out is the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sparsity_lib import lm, project
from sparsity_lib.blocks import Blocks
from sparsity_lib.errors import SparsityError
from sparsity_lib.passes import Batch, Text, run_backward
from sparsity_lib.progress import track
from sparsity_lib.sites import find_sites
from sparsity_lib.stored import is_streamed


def text_of(model: nn.Module, stream: Sequence[Tensor | Batch]) -> Text:
    """Text for passes through the whole model, in the order that suits where its weights are."""
    return ByBlock(model, stream) if is_streamed(model) else Text(model, stream)


@torch.no_grad()
def final_states(model: nn.Module, batches: Sequence[Tensor]) -> Iterator[Tensor]:
    """Final hidden states [batch, tokens, hidden] of every batch of token ids, as `lm.hidden_states` gives them.

    Every site sees every token once, in the order of the batches.
    """
    device = next(model.parameters()).device
    if not is_streamed(model):
        for batch in batches:
            yield lm.hidden_states(model, batch.to(device))
        return
    with Blocks(model, batches, find_sites(model)) as blocks:
        for _ in track(blocks.blocks, desc="running blocks", unit="block"):
            blocks.advance()
        for number, batch in enumerate(batches):
            blocks.choose(number)
            yield lm.hidden_states(model, batch.to(device))


class ByBlock(Text):
    """Passes that read each block once: forward, and for gradients once more on the way back.

    For gradients, what arrives at each block is kept in temporary files, and each block's forward is run again on the way
    back. Memory: the hidden states that arrive at one block, their gradients, and what one batch leaves in one block. Disk: the
    hidden states that arrive at all blocks; raises SparsityError where they find no room.
    """

    def run(self, needs_grad: bool = False, desc: str = "calibrating") -> None:
        if needs_grad and isinstance(self.stream[0], Tensor):
            lm.check_head(self.model)
        with project.scratch("sparsity-") as kept, Blocks(self.model, self.stream, find_sites(self.model)) as blocks:
            self.watching = not needs_grad  # with gradients, sites are to be seen on the way back, when these come by
            try:
                for layer in track(range(len(blocks.blocks)), desc=desc, unit="block"):
                    if needs_grad:
                        _write(blocks, kept / f"{layer}.safetensors")
                    blocks.advance()
                self.watching = True
                if needs_grad:
                    self._back(blocks, kept, desc)
                else:
                    blocks.run()
            finally:
                self.watching = True

    def _back(self, blocks: Blocks, kept: Path, desc: str) -> None:
        """From the loss to the first block, one after the other."""
        gradients = []
        for number, batch in enumerate(self.stream):
            leaf = blocks.choose(number, with_gradient=True)
            run_backward(self.model, batch)
            gradients.append(leaf.grad)
        for layer in track(range(len(blocks.blocks) - 1, -1, -1), desc=f"{desc}, back", unit="block"):
            file = kept / f"{layer}.safetensors"
            blocks.back(_read(file, self.device))
            for number, gradient in enumerate(gradients):
                leaf = blocks.choose(number, with_gradient=True)
                with torch.enable_grad():
                    blocks.output(number).backward(gradient)
                gradients[number] = leaf.grad
            file.unlink()


def _write(blocks: Blocks, file: Path) -> None:
    """Keep what arrives at the current block."""
    try:
        save_file({str(i): each.contiguous() for i, each in enumerate(blocks.hidden)}, file)
    except (OSError, SafetensorError) as error:
        needed = len(blocks.blocks) * sum(each.nbytes for each in blocks.hidden)
        raise SparsityError(
            f"cannot write the hidden states of block {blocks.layer} in {file.parent.parent}: {error}. All {len(blocks.blocks)} "
            f"blocks take {needed:,} bytes. Fix: {project.ELSEWHERE}, or take less text.") from error


def _read(file: Path, device: torch.device) -> list[Tensor]:
    """What `_write` kept, batch by batch."""
    try:
        found = load_file(file, device=str(device))
        return [found[str(i)] for i in range(len(found))]
    except (OSError, SafetensorError, KeyError) as error:
        raise SparsityError(
            f"cannot read back the hidden states in {file}: {error}. Fix: run it again, with TMPDIR=/a/folder in which nothing "
            "removes or changes files that are in use.") from error
