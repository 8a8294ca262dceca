"""The operators on a GPU, in Triton; imported with the first GPU tensor, so that a machine without Triton works.

TRITON_INTERPRET=1, set before Python starts, is Triton's own switch: its interpreter then runs the kernels on CPU tensors,
slowly. That is how they are tested without a GPU.
"""

from __future__ import annotations

import os
import warnings
from functools import cache
from importlib.util import find_spec
from types import ModuleType

from sparsity_lib.errors import SparsityError, unknown

#: Environment variable: "off" gives GPU tensors to plain PyTorch.
SWITCH = "SPARSITY_TRITON"


@cache
def load(device: str) -> ModuleType | None:
    """The module with the operators (`launch`) for tensors on a kind of device, or None where plain PyTorch or C++ does it.

    Raises
    ------
    SparsityError
        If the environment asks for what is unknown, or asked for the interpreter too late.
    """
    wanted = os.environ.get(SWITCH, "")
    if wanted not in ("", "off"):
        raise unknown(SWITCH, wanted, ("off",))
    if wanted == "off" or device != "cuda" and os.environ.get("TRITON_INTERPRET", "0") == "0":
        return None
    if find_spec("triton") is None:
        if device == "cuda":
            fix = "Fix: pip install triton."
            warnings.warn(f"Triton is missing, plain PyTorch does the operators' work, slowly. {fix}", stacklevel=3)
        return None
    import triton
    from triton.runtime.interpreter import InterpretedFunction

    interpreted = triton.knobs.runtime.interpret
    if isinstance(triton.language.sum, InterpretedFunction) != interpreted:
        raise SparsityError("TRITON_INTERPRET was changed after Triton's import. Fix: set it before Python starts.")
    if device != "cuda" and not interpreted:
        return None
    from sparsity_lib.ops.gpu import launch

    return launch
