"""The operators on a GPU, in Triton. Triton is imported with the first GPU tensor, so that a machine without it works."""

from __future__ import annotations

import os
import sys
import warnings
from functools import cache
from importlib.util import find_spec
from types import ModuleType

from sparsity_lib.errors import SparsityError, unknown

#: Environment variable: "interpret" sends CPU tensors through Triton's interpreter (slow; how the kernels are tested without a
#: GPU), "off" gives GPU tensors to plain PyTorch.
SWITCH = "SPARSITY_TRITON"
MODES = ("interpret", "off")


@cache
def load(device: str) -> ModuleType | None:
    """The module with the operators (`launch`) for tensors on a kind of device, or None where plain PyTorch or C++ does it.

    Raises
    ------
    SparsityError
        If the environment asks for what is unknown, or for the interpreter after Triton was imported without it.
    """
    wanted = os.environ.get(SWITCH, "")
    if wanted and wanted not in MODES:
        raise unknown(SWITCH, wanted, MODES)
    if wanted == "off" or device != "cuda" and wanted != "interpret":
        return None
    if find_spec("triton") is None:
        if wanted == "interpret":
            raise SparsityError(f"{SWITCH} = 'interpret', but Triton is missing. Fix: pip install triton.")
        warnings.warn("Triton is missing, plain PyTorch does the operators' work, slowly. Fix: pip install triton.", stacklevel=3)
        return None
    if wanted == "interpret":
        _interpret()
    from sparsity_lib.ops.gpu import launch

    return launch


def _interpret() -> None:
    """Have Triton interpret its kernels, which it decides where it is imported."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        return
    if "triton" in sys.modules:
        raise SparsityError(
            f"{SWITCH} = 'interpret', but Triton was imported before. Fix: set TRITON_INTERPRET=1 before Python starts, too.")
    os.environ["TRITON_INTERPRET"] = "1"
