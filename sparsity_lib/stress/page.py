"""The page "How far you can trust this": its tables, from results/stress.json and from the environment that builds it."""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Iterable
from typing import Any

from sparsity_lib import project, results
from sparsity_lib.book.markdown import listed, plain, plural, table

NAME, COMMAND = "stress", "make stress"
_NOT_RUN = f"Not run yet: `{COMMAND}` runs it.\n"


def _trials() -> list[dict[str, Any]]:
    return results.load(NAME).data["trials"] if NAME in results.names() else []


def summary() -> str:
    """How many attempts there were and how they ended, in a sentence."""
    found = _trials()
    if not found:
        return f"The trials have not been run yet ({COMMAND} runs them)"
    tried, right, refused, lost = (sum(each[key] for each in found) for key in ("tried", "right", "refused", "lost"))
    ends = f"{right:,} gave the right result, {refused:,} were refused with a clear error, {lost or 'none'} had another end"
    return f"{plural(len(found), 'trial')} with {tried:,} attempts: {ends}"


def trials(group: str) -> str:
    """A table of one group's trials, and below it whatever was lost or could not be tried."""
    found = [each for each in _trials() if each["group"] == group]
    if not found:
        return _NOT_RUN
    rows = [[f"`{each['name']}`", plain(each["tried_what"]), plain(each["holds"]), each["tried"], each["right"], each["refused"],
             each["lost"]] for each in found]
    text = table(["trial", "what is tried", "what has to hold", "tried", "right", "refused", "lost"], rows)
    odd = [f"- `{each['name']}` lost: {plain(what)}" for each in found for what in each["described"]]
    odd += [f"- `{each['name']}` could not be made there: {plain(each['not_here'])}" for each in found if "not_here" in each]
    return text + ("\n" + "\n".join(odd) + "\n" if odd else "")


def arithmetic() -> str:
    """A table of the largest differences that threads and instruction sets made."""
    facts = next((each["facts"] for each in _trials() if each["name"] == "other-arithmetic"), None)
    if not facts:
        return _NOT_RUN
    kinds = sorted({kind for found in facts.values() for kind in found})
    rows = [[name, *(_tiny(found.get(kind)) for kind in kinds)] for name, found in facts.items()]
    return table(["compared with one thread and the best instruction set", *kinds], rows,
                 "Largest difference, in units of the largest number of its kind. 0: equal to the bit.", "tab-arithmetic")


def _tiny(value: float | None) -> str | None:
    return None if value is None else "0" if value == 0 else f'<span class="num">{value:.0e}</span>'


def licences() -> str:
    """A table of the locked packages by licence, as the packages themselves state it."""
    groups: dict[str, list[str]] = {}
    for name in locked():
        groups.setdefault(licence(name), []).append(name)
    rows = [[plain(stated), len(names), plain(", ".join(names))] for stated, names in sorted(groups.items(), key=_by_size)]
    return table(["licence", "packages", "which"], rows, "Licences of the packages in `requirements.lock`.", "tab-licences")


def _by_size(entry: tuple[str, list[str]]) -> tuple[int, str]:
    return -len(entry[1]), entry[0]


def locked() -> list[str]:
    """Names in the lock."""
    lines = (project.root() / "requirements.lock").read_text().splitlines()
    return [line.partition("==")[0].strip() for line in lines if "==" in line and not line.startswith("#")]


#: Beginnings of the long forms in which packages state the same licences.
_SAME = (
    (r"^(the )?mit\b", "MIT"), (r"^(the )?apache(-2| 2| software|\b.*version 2|\b.*2\.0|$)", "Apache-2.0"),
    (r"^(new bsd|bsd[- ]3|3-clause bsd|modified bsd)", "BSD-3-Clause"), (r"^(bsd[- ]2|simplified bsd)", "BSD-2-Clause"),
    (r"^(bsd|bsd license)$", "BSD"), (r"^(isc)", "ISC"), (r"^(mpl|mozilla)", "MPL-2.0"), (r"^(psf|python software)", "PSF-2.0"),
)


def licence(package: str) -> str:
    """What an installed package says its licence is: SPDX where it can be told, else its own words, cut."""
    try:
        about = importlib.metadata.metadata(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed here"
    classified = [each.rpartition("::")[2].strip() for each in about.get_all("Classifier", []) if each.startswith("License ::")]
    stated = [about.get("License-Expression"), *_named(classified), (about.get("License") or "").strip().split("\n")[0]]
    text = next((each for each in stated if each), "not stated")
    return next((short for pattern, short in _SAME if re.match(pattern, text.lower())), text[:120])


def _named(classified: Iterable[str]) -> list[str]:
    found = [each.removesuffix(" License") for each in classified if each not in ("OSI Approved", "Other/Proprietary License")]
    return [listed(found)] if found else []
