"""How sweeps grow with workers, as a table from the stored measurement; how to make it, where it is not there."""

from __future__ import annotations

from sparsity_lib import results
from sparsity_lib.bench.scaling import efficiency
from sparsity_lib.book.markdown import number, table

RESULT = "bench/scaling"
NAMES = {"processes": "local processes", "dask": "a Dask cluster of this machine"}


def loads() -> str:
    """A table: a row a place and number of workers; a sweep's seconds, what is left of one worker's pace, where it went."""
    if RESULT not in results.names():
        return f"The measurement is not there yet; `make results R={RESULT}` makes it.\n"
    found = results.load(RESULT)
    rows = []
    for kind, points in found.data.items():
        pace = efficiency(points)
        rows += [[NAMES[kind], int(workers), number(point["span"], point["spans"][0], point["spans"][-1]),
                  number(100 * pace[int(workers)]), number(point["task"]), number(100 * point["busy"]), number(point["start"])]
                 for workers, point in points.items()]
    params, cores = found.manifest["params"], found.manifest["machine"]["cores"]
    most = max(params["workers"])
    caption = (f"Weak scaling on {cores} cores, {params['tasks']} tasks for every worker: the median of {params['rounds']} "
               f"sweeps, with the shortest and the longest. Pace: the time that one worker took over that of so many, who had so "
               f"many times the work; {cores} cores allow {100 * min(1, cores / most):.0f}% with {most} workers.")
    return table(["where", "workers", "seconds", "pace (%)", "a task (s)", "workers busy (%)", "to start (s)"], rows, caption,
                 "tab-scaling")
