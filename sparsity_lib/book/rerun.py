"""The box on every chapter that says how to run it with another model, made from the chapter's parameters."""

from __future__ import annotations

import html
import json
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx

from sparsity_lib.book import launch
from sparsity_lib.notebooks import parameters_of
from sparsity_lib.parameters import Parameter


def example(known: dict[str, Parameter]) -> str:
    """An assignment that a reader would make first: their own model, and the first other parameter as it is."""
    pairs = []
    for parameter in known.values():
        if parameter.name in ("model", "models"):
            value = json.dumps(["YOUR_MODEL"]) if parameter.listed else "YOUR_MODEL"
            pairs.insert(0, f"{parameter.name}={value}")
    other = next((p for p in known.values() if p.name not in ("model", "models") and p.interval and not p.listed), None)
    if other is not None:
        pairs.append(f"{other.name}={json.dumps(other.default)}")
    return " ".join(pairs)


def command(chapter: str) -> str:
    """The command line that runs a chapter with another model."""
    pairs = example(parameters_of(chapter))
    quote = "'" if '"' in pairs else '"'
    return f"make run NB={chapter} P={quote}{pairs}{quote}"


def box(chapter: str) -> str:
    """The box as HTML."""
    known = parameters_of(chapter)
    rows = "".join(
        f"<tr><th scope=row><code>{html.escape(p.name)}</code></th><td><code>{html.escape(json.dumps(p.default))}</code></td>"
        f"<td>{html.escape(p.allowed())}</td><td>{html.escape(p.help)}</td></tr>" for p in known.values())
    found = launch.links(chapter)
    buttons = "".join(f'<a class="launch" href="{html.escape(url)}">Open in {service}</a>' for service, url in found.items())
    return (
        f'<aside class="rerun" aria-label="Run this chapter yourself"><p><strong>Run this chapter with your model</strong> '
        f'<span class="launches">{buttons}</span></p>'
        f"<pre tabindex=0><code>{html.escape(command(chapter))}</code></pre>"
        f"<details><summary>What you may change</summary><div class=rerun-table tabindex=0><table><thead><tr><th scope=col>parameter"
        f"</th><th scope=col>default</th><th scope=col>allowed</th><th scope=col>what it is</th></tr></thead><tbody>{rows}</tbody>"
        f"</table></div></details></aside>")


def place(app: Sphinx, doctree: nodes.document) -> None:
    """Sphinx's hook: put the box below the first paragraphs of a chapter."""
    folder, _, chapter = app.env.docname.rpartition("/")
    if folder != "notebooks":
        return
    top = next(iter(doctree.findall(nodes.section)), None)
    if top is None:
        return
    at = _after_opening(top.children)
    top.insert(at, nodes.raw("", box(chapter), format="html"))


def _after_opening(children: list[Any]) -> int:
    """Behind the title and the paragraphs that follow it."""
    for place, child in enumerate(children[1:], start=1):
        if not isinstance(child, nodes.paragraph | nodes.comment | nodes.target):
            return place
    return len(children)
