"""The library's docstrings as reStructuredText, which Sphinx reads: they are written to be read in an editor."""

from __future__ import annotations

import inspect
import re
import sys
from typing import Any

from sphinx.pycode import ModuleAnalyzer

_CODE = re.compile(r"(`+[^`]+`+)")
_UNDERLINE = re.compile(r"^-{3,}$")
_ROLE_LIKE = re.compile(r"(?<=\w)_(?=\W|$)")


def convert(lines: list[str]) -> list[str]:
    """Lines of a docstring, ready for Sphinx.

    `name` becomes code; bars, stars and trailing underscores, which mean something to Sphinx, stand for themselves; an
    indented block that follows an empty line, outside of NumPy's sections, is shown as it is.
    """
    out: list[str] = []
    in_section, literal = False, False
    for place, line in enumerate(lines):
        following = lines[place + 1] if place + 1 < len(lines) else ""
        if line and not line.startswith(" "):
            literal = False
            in_section = in_section or bool(_UNDERLINE.match(following))
        if literal or line.lstrip().startswith(">>>"):
            out.append(line)
            continue
        opens = line.startswith("    ") and not in_section and (not out or not out[-1].strip())
        if opens and not line.lstrip().startswith(("-", ">>>")):
            literal = True
            out += ["::", "", line]
            continue
        out.append(line if _UNDERLINE.match(line) else _prose(line))
    return out


def _prose(line: str) -> str:
    pieces = _CODE.split(line)
    for i, piece in enumerate(pieces):
        if i % 2:
            pieces[i] = "``" + piece.strip("`") + "``"
        else:
            piece = piece.replace("\\", "\\\\").replace("|", "\\|").replace("*", "\\*")
            piece = _ROLE_LIKE.sub(r"\\_", piece)
            pieces[i] = "\\ " + piece if i and piece[:1].isalnum() else piece  # code ends only before a break
    return "".join(pieces)


#: Values in signatures that are no Python, which Sphinx would therefore print unread -> what stands for them.
_VALUES = ((re.compile(r"<factory>|<function <lambda>>|<object object at [^>]*>"), "..."),
           (re.compile(r"<function (?:[\w.]+\.)?(\w+)(?: at [^>]*)?>"), r"\1"),
           (re.compile(r"<class '(?:[\w.]+\.)?(\w+)'>"), r"\1"))


def signature(app: Any, what: str, name: str, obj: Any, options: Any, text: str | None, returns: str | None) -> Any:
    """Sphinx's hook: a signature whose default values can be read."""
    for pattern, instead in _VALUES if text else ():
        text = pattern.sub(instead, text)
    return text, returns


def skip(app: Any, what: str, name: str, obj: Any, skipped: bool, options: Any) -> bool | None:
    """Sphinx's hook: what a class overrides without a word of its own is described once, where it comes from."""
    module, holder = (app.env.temp_data.get(f"autodoc:{kind}") for kind in ("module", "class"))
    holder = getattr(sys.modules.get(module), holder or "", None)
    return True if what == "class" and isinstance(holder, type) and repeats(holder, name) else None


def repeats(holder: type, name: str) -> bool:
    """Whether a base of a class has a member of this name, and the class itself no docstring nor comment for its own."""
    if not any(name in vars(base) or name in vars(base).get("__annotations__", ()) for base in holder.__mro__[1:-1]):
        return False
    own = vars(holder).get(name)
    if inspect.isroutine(own) or isinstance(own, property | staticmethod | classmethod):
        return not own.__doc__
    return (holder.__qualname__, name) not in ModuleAnalyzer.for_module(holder.__module__).find_attr_docs()


#: What napoleon would take for "type: description" at its first colon.
_COMMENTS = ("attribute", "data", "property")
_kept: dict[str, list[str]] = {}


def process(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Sphinx's hook, called once a docstring, before napoleon's."""
    lines[:] = convert(lines)
    _kept[name] = list(lines)


def restore(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Sphinx's hook, called once a docstring, after napoleon's: comments on attributes stay as they were."""
    kept = _kept.pop(name, lines)
    if what in _COMMENTS:
        lines[:] = kept
