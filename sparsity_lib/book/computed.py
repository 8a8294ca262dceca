"""What pages may ask the build to compute, by name: blocks for the directive `computed`, words for the role of that name."""

from __future__ import annotations

import importlib
from collections.abc import Callable

from sparsity_lib.errors import SparsityError, refuse, unknown

#: Name -> "module:function" that returns MyST text, from the words after the name, each one argument.
BLOCKS = {
    "claims-counts": "sparsity_lib.claims.page:counts",
    "claims-overview": "sparsity_lib.claims.page:overview",
    "claims-blocks": "sparsity_lib.claims.page:blocks",
    "slips-cwic": "sparsity_lib.claims.page:cwic_rows",
    "slips-scap": "sparsity_lib.claims.page:scap_rows",
    "choose-ranking": "sparsity_lib.book.choose:ranking",
    "explorer": "sparsity_lib.book.explorer:page",
    "provenance-results": "sparsity_lib.book.provenance:stored",
    "provenance-details": "sparsity_lib.book.provenance:details",
    "provenance-machines": "sparsity_lib.book.provenance:machines",
    "provenance-versions": "sparsity_lib.book.provenance:versions",
    "provenance-assets": "sparsity_lib.book.provenance:assets",
    "provenance-checksums": "sparsity_lib.book.provenance:checksums",
    "provenance-chapters": "sparsity_lib.book.provenance:chapters",
}
#: The same for a few words inside a sentence.
WORDS = {
    "claims-summary": "sparsity_lib.claims.page:summary",
    "choose-advice": "sparsity_lib.book.choose:advice",
}


def compute(name: str, argument: str = "", table: dict[str, str] = BLOCKS) -> str:
    """The text called `name`; `argument` is what the page says after it. Raises SparsityError for a name that is not there."""
    if name not in table:
        raise unknown("computed text", name, table)
    module, _, function = table[name].partition(":")
    make: Callable[..., str] = getattr(importlib.import_module(module), function)
    try:
        text = make(argument) if argument else make()
    except TypeError as error:
        raise refuse(f"argument of {name}", argument, "what the function takes", str(error)) from error
    if not text.strip():
        raise SparsityError(f"{name} {argument} has computed nothing.")
    return text
