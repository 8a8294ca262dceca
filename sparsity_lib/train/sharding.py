"""Weights, gradients and moments split between processes (FSDP), so that no device has to hold all of them.

torch's `fully_shard` does it. accelerate's plugin calls the same function, but on GPUs alone, which two processes of a test on
any machine are not; and by rules of its own, which leave out a teacher, and a head whose weight a loss uses outside of the
model's forward. Here the outermost module is the trainer's own, of which module and loss are parts: what lies outside of all
blocks (embedding, last norm, head) is gathered when its forward begins and freed when gradients are there, so a loss may use it
as it likes, chunk by chunk and again in the backward pass.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch import distributed as dist

from sparsity_lib.errors import SparsityError

try:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor, distribute_tensor
except ImportError:  # torch built without torch.distributed: nothing is ever split there
    fully_shard, DTensor = None, ()

_FIX = "Fix: train without splitting the weights (shard off)"


def shard(root: nn.Module, blocks: Sequence[nn.Module], device: torch.device) -> None:
    """Split the parameters of `root` between all processes, in place; they become DTensors, rows of each in every process.

    Each block is gathered only while it computes. Gradients come out as means over the processes, split likewise.

    Parameters
    ----------
    root
        The module whose forward computes the loss.
    blocks
        Modules inside of it that compute one after the other, such as the blocks of a decoder.
    device
        Of this process; everything is moved there, block by block.

    Raises
    ------
    SparsityError
        If torch cannot do it, or the module cannot be cut that way: no blocks, blocks that share weights with each other or with
        what is outside of them, trained parameters of several dtypes, or a parameter that is a single number.
    """
    _check(root, blocks)
    mesh = _mesh(device)
    for block in blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(root, mesh=mesh)


def shard_frozen(model: nn.Module, base: nn.Module, blocks: Sequence[nn.Module], device: torch.device) -> None:
    """Split the blocks of a model that is not trained, in place; the rest, its head among it, is whole in every process.

    `base` is the part of `model` whose forward runs all blocks. Raises SparsityError as `shard` does.
    """
    _check(base, blocks)
    mesh, inside = _mesh(device), {id(p) for block in blocks for p in block.parameters()}
    rest = {p for p in base.parameters() if id(p) not in inside}
    for block in blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(base, mesh=mesh, ignored_params=rest)
    model.to(device)
    if hasattr(base, "reset_iter_state"):  # torch notes every forward until a backward, and here none will come
        base.register_forward_hook(lambda module, *_: module.reset_iter_state())


def whole(tensors: Mapping[str, Tensor], *, keep: bool = True) -> dict[str, Tensor]:
    """The tensors on the CPU, put together where they are split; every process must ask for the same ones.

    With `keep` off the process only takes part, and gets an empty dict. Tensors under two names stay one tensor.
    """
    found: dict[str, Tensor] = {}
    first: dict[int, str] = {}
    for name, tensor in tensors.items():
        if (known := first.setdefault(id(tensor), name)) != name:
            if keep:
                found[name] = found[known]
            continue
        full = tensor.detach()
        full = full.full_tensor() if isinstance(full, DTensor) else full
        if keep:
            found[name] = full.cpu()
    return found


@torch.no_grad()
def fill(tensor: Tensor, full: Tensor) -> Tensor:
    """Copy `full` [the whole shape] into `tensor`, or this process's part of it where `tensor` is split; returns `tensor`."""
    if isinstance(tensor, DTensor):
        full = distribute_tensor(full.to(tensor.device), tensor.device_mesh, tensor.placements, src_data_rank=None)
    return tensor.copy_(full)


def plain(tensor: Tensor) -> Tensor:
    """A small result of computing with split tensors, such as their norm, as an ordinary tensor in every process."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def is_split(module: nn.Module) -> bool:
    """Whether `shard` was here."""
    return any(isinstance(p, DTensor) for p in module.parameters())


def _mesh(device: torch.device):
    return init_device_mesh(device.type, (dist.get_world_size(),))


def _check(root: nn.Module, blocks: Sequence[nn.Module]) -> None:
    """Everything that torch would refuse later, or not at all."""
    if fully_shard is None:
        raise SparsityError(f"torch {torch.__version__} has no fully_shard. Fix: a build with torch.distributed, 2.10 or newer.")
    kind = type(root).__name__
    if is_split(root):
        raise SparsityError(f"{kind} is split between processes already. Fix: load it anew.")
    if not blocks:
        raise SparsityError(f"{kind} has no blocks to split. {_FIX}.")
    owners: dict[int, int] = {}
    for number, block in enumerate(blocks):
        for name, parameter in block.named_parameters():
            if owners.setdefault(id(parameter), number) != number:
                raise SparsityError(f"{name} belongs to two blocks, which cannot be split one by one. {_FIX}.")
    inside = {module for block in blocks for module in block.modules()}
    for place, module in root.named_modules():
        for name, parameter in module.named_parameters(place, recurse=False):
            if module not in inside and id(parameter) in owners:
                raise SparsityError(f"{name} is also in a block, which cannot be split without it. {_FIX}.")
            if not parameter.dim():
                raise SparsityError(f"{name} is a single number, which cannot be split. {_FIX}.")
    dtypes = {p.dtype for p in root.parameters() if p.requires_grad}
    if len(dtypes) > 1:
        names = ", ".join(sorted(map(str, dtypes)))
        raise SparsityError(f"Trained parameters are {names}; split, they must be of one dtype. {_FIX}.")
