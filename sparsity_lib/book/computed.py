"""What pages may ask the build to compute, by name: blocks for the directive `computed`, words for the role of that name."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping

from sparsity_lib.errors import SparsityError, unknown

#: Name -> "module:function" that returns MyST text; what the page says after the name is its one argument.
BLOCKS = {
    "chapters": "sparsity_lib.book.start:chapters",
    "claims-counts": "sparsity_lib.claims.page:counts",
    "claims-index": "sparsity_lib.claims.page:index",
    "claims-blocks": "sparsity_lib.claims.page:blocks",
    "slips-cwic": "sparsity_lib.claims.page:slips_cwic",
    "slips-scap": "sparsity_lib.claims.page:slips_scap",
    "choose-advice": "sparsity_lib.book.choose:advice",
    "choose-ranking": "sparsity_lib.book.choose:ranking",
    "choose-trained": "sparsity_lib.book.choose:trained",
    "choose-tasks": "sparsity_lib.book.choose:by_tasks",
    "explorer": "sparsity_lib.book.explorer:page",
    "launch": "sparsity_lib.book.launch:how",
    "provenance-results": "sparsity_lib.book.provenance:stored",
    "provenance-details": "sparsity_lib.book.provenance:details",
    "provenance-machines": "sparsity_lib.book.provenance:machines",
    "provenance-versions": "sparsity_lib.book.provenance:versions",
    "provenance-assets": "sparsity_lib.book.provenance:assets",
    "provenance-checksums": "sparsity_lib.book.provenance:checksums",
    "provenance-chapters": "sparsity_lib.book.provenance:chapters",
    "trust-trials": "sparsity_lib.stress.page:trials",
    "trust-arithmetic": "sparsity_lib.stress.page:arithmetic",
    "trust-licences": "sparsity_lib.stress.page:licences",
    "streaming-costs": "sparsity_lib.book.streaming:costs",
    "scaling-loads": "sparsity_lib.book.scaling:loads",
}
#: The same for a few words inside a sentence.
WORDS = {
    "claims-summary": "sparsity_lib.claims.page:summary",
    "trust-summary": "sparsity_lib.stress.page:summary",
    "rounding-summary": "sparsity_lib.book.rounding:summary",
}


def compute(name: str, argument: str = "", table: Mapping[str, str] = BLOCKS) -> str:
    """The text called `name`.

    Raises
    ------
    SparsityError
        For a name that is not there, results that are damaged, and a text that came out empty.
    """
    if name not in table:
        raise unknown("computed text", name, table)
    module, _, function = table[name].partition(":")
    make: Callable[..., str] = getattr(importlib.import_module(module), function)
    text = make(argument) if argument else make()
    if not text.strip():
        raise SparsityError(f"computed text {name} {argument} came out empty.")
    return text
