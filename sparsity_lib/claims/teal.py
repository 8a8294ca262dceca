"""TEAL's claim on its allocation, which a chapter tests."""

from __future__ import annotations

from sparsity_lib.claims.base import Claim, Stored, Test, renamed
from sparsity_lib.experiments import teal_report
from sparsity_lib.verdicts import Verdict


def _greedy(stored: Stored) -> list[Verdict]:
    data = teal_report.in_order(stored["teal_allocation"].data)
    ways = ("greedy", "greedy, by output")
    return [renamed(teal_report.verdict_greedy(data, name, way=way), "T1") for name in data for way in ways]


TEAL = (
    Claim("T1", "a greedy allocation of sparsity within each block loses less than a uniform one",
          "teal", ("fig-allocation", "tab-allocation"), (Test("KL of both allocations at 50%", _greedy, ("teal_allocation",)),)),
)
