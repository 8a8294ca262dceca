"""Where every stored number comes from: the manifests of `results/`, the assets and the chapters, as MyST text."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from functools import cache
from typing import Any

from sparsity_lib import project, results
from sparsity_lib.assets import ASSETS
from sparsity_lib.book import markdown
from sparsity_lib.book.markdown import number, table, whole
from sparsity_lib.claims.page import slug
from sparsity_lib.notebooks import parameters_of


@cache
def manifests() -> dict[str, dict[str, Any]]:
    """Name of a stored result -> its manifest."""
    return {name: results.load(name).manifest for name in results.names()}


def sha256(path: Any) -> str:
    """The checksum of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _numbered(field: str) -> dict[str, str]:
    """Canonical text of a manifest's field -> a letter, by first appearance: equal machines (or versions) share one."""
    found: dict[str, str] = {}
    for manifest in manifests().values():
        text = json.dumps(manifest[field], sort_keys=True)
        found.setdefault(text, chr(ord("A") + len(found)))
    return found


def _letter(field: str, manifest: Mapping[str, Any]) -> str:
    return _numbered(field)[json.dumps(manifest[field], sort_keys=True)]


def duration(seconds: float) -> str:
    """Seconds in the unit that suits: 49 s, 13 min, 1.1 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def stored() -> str:
    """A table of the stored results."""
    rows = [[f"[`{name}`](#{slug(name)})", whole(m["date"]), whole(duration(m["seconds"])),
             ", ".join(map(str, m["seeds"])) or "none",
             _letter("machine", m), _letter("versions", m), f"`{m['commit'][:9]}`" + ("+" if "+" in m["commit"] else "")]
            for name, m in manifests().items()]
    return table(["result", "made on", "took", "seeds", "machine", "versions", "commit"], rows,
                 "Stored results. Machines and versions: by the letters of the next tables. A plus: the library had changes that "
                 "were not committed.", "tab-results")


def details() -> str:
    """A block a stored result: its command, the hash of the library, its parameters."""
    parts = []
    for name, m in manifests().items():
        code = ", ".join(f"`{c}`" for c in m.get("code", ())) or "not recorded"
        params = json.dumps(m["params"], indent=1, sort_keys=True)
        parts.append(f"({slug(name)})=\n:::{{dropdown}} {name}\n`{m['command']}` made it; the library's hash was {code}"
                     f"{' (more than one: resumed after a change)' if len(m.get('code', ())) > 1 else ''}.\n\n"
                     f"```json\n{params}\n```\n:::\n")
    return "\n".join(parts)


def machines() -> str:
    """A table of the machines that results were computed on."""
    rows = []
    for text, letter in _numbered("machine").items():
        m = json.loads(text)
        memory = None if m["memory_gib"] is None else number(m["memory_gib"])
        rows.append([letter, m["cpu"], m["cores"], m.get("gpu", "none"), memory, ", ".join(m["isa"]), m["system"]])
    return table(["", "processor", "cores used", "GPU", "memory (GiB)", "instruction sets", "system"], rows,
                 "Machines.", "tab-machines")


def versions() -> str:
    """A table of the versions of what can change a number, a column for each set."""
    sets = {letter: json.loads(text) for text, letter in _numbered("versions").items()}
    packages = sorted({name for found in sets.values() for name in found})
    rows = [[name, *(f"{found.get(name, '–')}" for found in sets.values())] for name in packages]
    caption = "Versions that the results were computed with. `requirements.lock` pins every package."
    return table(["package", *sets], rows, caption, "tab-versions")


def assets() -> str:
    """A table of what is fetched: wheels used as data files, those of one asset together."""
    rows = [[asset.name, ", ".join(f"`{wheel.package}` {wheel.version}" for wheel in asset.wheels),
             sum(wheel.megabytes for wheel in asset.wheels), ", ".join(dict.fromkeys(wheel.licence for wheel in asset.wheels)),
             asset.what]
            for asset in ASSETS.values()]
    return table(["asset", "packages", "MB", "licence", "what it is"], rows,
                 "Models, texts and scripts, from packages of the Python index that are read as data files, not imported.",
                 "tab-assets")


def checksums() -> str:
    """Checksums of every stored result, trained network and asset, as `sha256sum -c` reads them."""
    folder = project.root()
    files = [folder / "results" / f"{name}.json" for name in results.names()]
    files += sorted(path for path in (folder / "results" / results.MODELS).rglob("*") if path.is_file())
    own = "\n".join(f"{sha256(path)}  {path.relative_to(folder).as_posix()}" for path in files)
    wheels = {wheel.filename: wheel.sha256 for asset in ASSETS.values() for wheel in asset.wheels}
    fetched = "\n".join(f"{checksum}  {name}" for name, checksum in wheels.items())
    return (f"Stored results and trained networks, for `sha256sum -c` in the project's folder:\n\n```text\n{own}\n```\n\n"
            f"Assets, as `make assets` checks them:\n\n```text\n{fetched}\n```\n")


def chapters() -> str:
    """A table of the chapters: parameters that a reader may change, and what reruns a chapter."""
    rows = []
    for name in markdown.chapters():
        defaults = ", ".join(f"`{p.name}={p.default!r}`" for p in parameters_of(name).values())
        file = project.root() / "notebooks" / f"{name}.ipynb"
        rows.append([name, defaults, f"`{sha256(file)[:12]}`"])
    return table(["chapter", "parameters as committed", "sha256 begins"], rows,
                 "Chapters. `make refresh NB=CHAPTER` executes one anew; its live numbers are kept with tolerances in "
                 "`notebooks/records/`.", "tab-chapters")
