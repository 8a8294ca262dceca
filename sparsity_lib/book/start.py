"""What the start page takes from the table of contents."""

from __future__ import annotations

from sparsity_lib.book.markdown import chapters as names
from sparsity_lib.book.markdown import link


def chapters() -> str:
    """The chapters that are there, as a numbered list of links."""
    return "\n".join(f"{number}. {link(f'notebooks/{name}')}" for number, name in enumerate(names(), start=1)) + "\n"
