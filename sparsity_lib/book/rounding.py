"""What a changed last bit does to a sparse model's answers, in words from the stored measurement."""

from __future__ import annotations

import math

from sparsity_lib import results
from sparsity_lib.book.markdown import listed
from sparsity_lib.experiments.claws_report import short
from sparsity_lib.experiments.rounding import SHARES
from sparsity_lib.experiments.rounding_report import extremes

RESULT = "rounding"


def summary() -> str:
    """Answers that turn over and the change of the mean KL, by model: a sentence without its end."""
    if RESULT not in results.names():
        return f"not measured yet (`make results R={RESULT}`)"
    found = results.load(RESULT)
    documents = found.manifest["params"]["task"]["limit"]
    parts = []
    for model in (name for name in SHARES if name in found.data):
        of = extremes(found.data, model, "by token")
        parts.append(f"on {short(model)} {of['fewest']} to {of['changed']} of {documents} answers turn over, by method, and KL "
                     f"changes by at most {math.ceil(100 * of['shift'])}% of itself")
    return listed(parts)
