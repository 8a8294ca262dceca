"""Small disks and read-only ones, seen by this process alone: a mount namespace, where the system grants one."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

from sparsity_lib.stress.base import NotHereError

_NEWNS, _NEWUSER = 0x00020000, 0x10000000
_PRIVATE, _REC, _RDONLY, _REMOUNT, _BIND = 1 << 18, 1 << 14, 1, 32, 4096


def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mount.argtypes = (ctypes.c_char_p, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_ulong, ctypes.c_char_p)
    return libc


def private() -> None:
    """Leave the namespace of mounts; raises NotHereError where that is not allowed. Call it in a process of your own."""
    if not hasattr(os, "getuid") or not Path("/proc/self/ns/mnt").exists():
        raise NotHereError("only Linux has mount namespaces")
    libc, user, group = _libc(), os.getuid(), os.getgid()
    if libc.unshare(_NEWNS if user == 0 else _NEWNS | _NEWUSER):
        raise NotHereError(f"a mount namespace was not granted ({os.strerror(ctypes.get_errno())})")
    if user != 0:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
        Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    if libc.mount(b"none", b"/", None, _PRIVATE | _REC, None):
        raise NotHereError(f"mounts cannot be made private ({os.strerror(ctypes.get_errno())})")


def disk(folder: Path, size: int) -> None:
    """Mount an empty disk of `size` bytes at a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    if _libc().mount(b"tmpfs", os.fsencode(folder), b"tmpfs", 0, f"size={size}".encode()):
        raise NotHereError(f"no disk could be mounted ({os.strerror(ctypes.get_errno())})")


def lift(folder: Path) -> None:
    """Unmount it."""
    _libc().umount2(os.fsencode(folder), 2)


def read_only(folder: Path) -> None:
    """Make a folder read-only for this process and its children, root included."""
    libc, path = _libc(), os.fsencode(folder)
    if libc.mount(path, path, None, _BIND, None) or libc.mount(b"none", path, None, _REMOUNT | _BIND | _RDONLY, None):
        raise NotHereError(f"a folder cannot be made read-only ({os.strerror(ctypes.get_errno())})")
