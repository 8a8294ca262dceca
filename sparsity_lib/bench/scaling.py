"""Weak scaling of sweeps: as many tasks a worker for 1, 2 and 4 workers, by processes and by a Dask cluster of this machine.

A task is products of matrices that fit into a core's cache, on one thread, so that cores, not memory, are what workers need.
With a core for each worker, and sweeps that cost nothing, a run takes as long with four workers as with one.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from sparsity_lib import project, sweep
from sparsity_lib.errors import SparsityError
from sparsity_lib.sweep_processes import Processes

WORKERS, PLACES = (1, 2, 4), ("processes", "dask")
#: Tasks a worker, and what one multiplies: PRODUCTS times SIZE x SIZE by SIZE x SIZE, in float32.
TASKS, PRODUCTS, SIZE = 4, 400, 512
#: Sweeps of each kind, of which the one of median length is kept.
ROUNDS = 3


def run(checkpoint) -> tuple[Any, dict, list[int]]:
    """One item a place and number of workers, here, where the environment has no say."""
    shape = {"tasks": TASKS, "products": PRODUCTS, "size": SIZE, "rounds": ROUNDS}
    data: dict[str, Any] = {}
    for kind in PLACES:
        for workers in WORKERS:
            params = {"place": kind, "workers": workers, **shape}
            data.setdefault(kind, {})[str(workers)] = checkpoint.item(params, partial(repeated, kind, workers, **shape))
        print(table(kind, data[kind]), flush=True)
    return data, {"places": PLACES, "workers": WORKERS, **shape}, []


def work(products: int, size: int) -> list[float]:
    """A task: multiply on one thread; when it began and ended, in seconds since the epoch."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    begin = time.time()
    x, weight = torch.ones(size, size), torch.eye(size)
    for _ in range(products):
        x = x @ weight
    end = time.time()
    torch.set_num_threads(threads)
    return [begin, end]


def repeated(kind: str, workers: int, tasks: int, products: int, size: int, rounds: int) -> dict[str, Any]:
    """`measure` several times: the one of median span, and all spans."""
    found = sorted((measure(kind, workers, tasks, products, size) for _ in range(rounds)), key=lambda each: each["span"])
    return {**found[len(found) // 2], "spans": [each["span"] for each in found]}


def measure(kind: str, workers: int, tasks: int, products: int, size: int) -> dict[str, float]:
    """Seconds of one sweep of `tasks` tasks a worker.

    `span`: from the first task's begin to the last one's end. `task`: a task's median. `start`: from the call until the first
    task began, which is when workers load the library. `busy`: share of the span that a worker computes, mean over workers.
    """
    wanted = [sweep.Task(f"product {index}", partial(work, products, size)) for index in range(tasks * workers)]
    found: list[list[float]] = []
    begin = time.time()
    with_place(kind, workers, lambda place: sweep.drive(wanted, lambda _, outcome: found.append(outcome.value), place))
    starts, ends = zip(*found, strict=True)
    lasted = [end - start for start, end in found]
    span = max(ends) - min(starts)
    return {"span": span, "task": statistics.median(lasted), "start": min(starts) - begin, "busy": sum(lasted) / (workers * span)}


def with_place(kind: str, workers: int, use: Callable[[sweep.Place], None]) -> None:
    """Run something with a place of so many workers, each of one thread; Dask's are there before it begins."""
    if kind == "processes":
        use(Processes(workers))
        return
    try:
        from distributed import LocalCluster
    except ImportError:
        raise SparsityError("bench/scaling measures Dask too. Fix: pip install '.[cluster]' in the checkout.") from None
    from sparsity_lib.sweep_cluster import Cluster

    with LocalCluster(n_workers=workers, threads_per_worker=1, dashboard_address=None) as local:
        use(Cluster(local.scheduler_address, project.code_hash()))


def efficiency(points: dict[str, dict[str, float]]) -> dict[int, float]:
    """Workers -> the span of one worker over that of so many, who have so many times the work: 1 where nothing is lost."""
    return {int(workers): points["1"]["span"] / point["span"] for workers, point in points.items()}


def table(kind: str, points: dict[str, dict[str, float]]) -> str:
    """The figures of one place as text."""
    shares = efficiency(points)
    return "\n".join(
        f"{kind}, {workers} workers: {point['span']:.1f} s, efficiency {shares[int(workers)]:.0%}; a task {point['task']:.2f} s, "
        f"workers busy {point['busy']:.0%}, {point['start']:.1f} s to start" for workers, point in points.items())
