"""What calibrating from disk costs, as a table from the stored measurement; how to make it, where it is not there."""

from __future__ import annotations

from sparsity_lib import results
from sparsity_lib.book.markdown import number, table

RESULT = "bench/streaming"
CAPTION = (
    "Calibration of models with random weights in published shapes, on {tokens} tokens. Memory is the peak above what the "
    "libraries take: the process's own, and the weights mapped from their files, which the system may drop. Ordinary: the same "
    "with the whole model loaded, where it was measured. Allowed: what the system let the process hold, cached files included.")
NAMES = {"teal": "TEAL", "wina": "WINA", "claws": "CLAWS"}


def costs() -> str:
    """A table: a row a size and recipe; bytes of the model and of its largest block, peaks, minutes."""
    if RESULT not in results.names():
        return f"The measurement is not there yet; `make results R={RESULT}` makes it.\n"
    rows, kept = [], results.load(RESULT)
    for size, found in kept.data.items():
        for recipe, name in NAMES.items():
            of, whole = (found["cases"].get(f"{recipe} {how}") for how in ("streamed", "ordinary"))
            if of is not None:
                ordinary = _gib(whole, "anonymous", "files")
                rows.append([size, name, number(found["bytes"] / 2**30), number(found["block"] / 2**30), _gib(of, "anonymous"),
                             _gib(of, "files"), ordinary,
                             number(of["limit"] / 2**30) if "limit" in of else None, number((of["open"] + of["seconds"]) / 60)])
    return table(["model", "recipe", "weights (GiB)", "a block (GiB)", "own memory (GiB)", "mapped (GiB)", "ordinary, both (GiB)",
                  "allowed (GiB)", "minutes"], rows, CAPTION.format(tokens=kept.manifest["params"]["tokens"]), "tab-streaming")


def _gib(found: dict | None, *kinds: str):
    above = None if found is None else found["above"]
    return None if above is None else number(sum(above[kind] for kind in kinds) / 2**30)
