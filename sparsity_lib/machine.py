"""What a result was computed on and with: written into every manifest, never a name or a path of the machine."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

#: Packages whose version can change a number.
PACKAGES = ("torch", "transformers", "lm_eval", "datasets", "tokenizers", "peft", "numpy", "sparsity-lib")
#: Instruction sets that decide how fast, and in which order, numbers are added.
FLAGS = (
    "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8",
    "asimd", "asimddp", "bf16", "i8mm", "sve",
)


def versions() -> dict[str, str]:
    """Python's and each package's version ('not installed' where missing)."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def describe() -> dict[str, object]:
    """CPU model, usable cores, memory in GiB, instruction sets, system; the GPU's name if torch sees one."""
    info = _cpuinfo()
    model = info.get("model name") or info.get("CPU part") or platform.processor() or platform.machine()
    flags = set((info.get("flags") or info.get("Features") or "").split())
    found: dict[str, object] = {
        "cpu": model, "cores": _cores(), "memory_gib": _memory(), "isa": [flag for flag in FLAGS if flag in flags],
        "system": f"{platform.system()} {platform.machine()}",
    }
    gpu = _gpu()
    return {**found, "gpu": gpu} if gpu else found


def _cpuinfo() -> dict[str, str]:
    try:
        block = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
    except OSError:
        return {}
    pairs = (line.partition(":") for line in block.splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _memory() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (ValueError, OSError, AttributeError):
        return None


def _gpu() -> str | None:
    import sys

    torch = sys.modules.get("torch")  # not imported for this alone
    return torch.cuda.get_device_name(0) if torch is not None and torch.cuda.is_available() else None


def commit(folder: Path) -> str:
    """The checkout's git commit, marked '+changes' where files differ from it; 'unknown' outside git."""
    try:
        head = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=folder, capture_output=True, text=True, check=True, timeout=20)
        status = subprocess.run(
            ["git", "status", "--porcelain", "--", "sparsity_lib", "kernels", "requirements.lock"], cwd=folder,
            capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return head.stdout.strip() + ("+changes" if status.stdout.strip() else "")
