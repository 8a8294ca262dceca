"""The GPU that a measurement needs."""

from __future__ import annotations

import torch

from sparsity_lib.errors import SparsityError
from sparsity_lib.ops import gpu


def cuda_device(name: str, *, compiled: bool = True) -> str:
    """The GPU's name, for the measurement `name`.

    Raises
    ------
    SparsityError
        Without a CUDA device, or, with `compiled`, where the kernels would not be Triton's, compiled.
    """
    if not torch.cuda.is_available():
        raise SparsityError(f"{name} measures on a GPU, and torch finds no CUDA device. Fix: run it where there is one.")
    backend = gpu.load("cuda") if compiled else None
    if compiled and (backend is None or backend.triton.knobs.runtime.interpret):
        raise SparsityError(f"{name} measures compiled kernels. Fix: install triton, unset {gpu.SWITCH} and TRITON_INTERPRET.")
    return torch.cuda.get_device_name()
