"""Every claim of the papers that this book tests, each with the verdicts that its stored results give."""

from sparsity_lib.claims.base import OUTCOMES, Claim, Judged, Test, judge, together
from sparsity_lib.claims.claws import CLAWS
from sparsity_lib.claims.cwic import ACTIVE, FLOPS
from sparsity_lib.claims.nm import NM
from sparsity_lib.claims.scap import SCAP
from sparsity_lib.claims.teal import TEAL

#: Paper -> its claims, in the order of the page.
PAPERS: dict[str, tuple[Claim, ...]] = {
    "CLAWS": CLAWS, "CWIC, active parameters": ACTIVE, "CWIC, FLOPs": FLOPS, "SCAP": SCAP, "N:M": NM, "TEAL": TEAL,
}

__all__ = ["OUTCOMES", "PAPERS", "Claim", "Judged", "Test", "judge", "together"]
