"""The box on every chapter that says how to run it with another model, made from the chapter's parameters."""

from __future__ import annotations

import html
import json

from docutils import nodes
from sphinx.application import Sphinx

from sparsity_lib.book import launch
from sparsity_lib.notebooks import parameters_of
from sparsity_lib.parameters import Parameter

#: Parameters that take a reader's own model.
MODELS = ("model", "models")


def example(known: dict[str, Parameter]) -> str:
    """Assignments that a reader would make first: their own model, and the first number with a range as it is."""
    pairs = [f"{p.name}={json.dumps(['YOUR_MODEL'], separators=(',', ':')) if p.listed else 'YOUR_MODEL'}"
             for p in known.values() if p.name in MODELS]
    number = next((p for p in known.values() if p.name not in MODELS and p.interval and not p.listed), None)
    return " ".join([*pairs, *([f"{number.name}={json.dumps(number.default)}"] if number else [])])


def command(chapter: str) -> str:
    """The command line that runs a chapter with other parameters."""
    pairs = example(parameters_of(chapter))
    quote = "'" if '"' in pairs else '"'
    return f"make run NB={chapter} P={quote}{pairs}{quote}"


def box(chapter: str) -> nodes.container:
    """The box: buttons where there is a repository, the command, and what may be changed."""
    known = parameters_of(chapter)
    own = any(name in known for name in MODELS)
    title = "Run this chapter with your model" if own else "Run this chapter with other settings"
    buttons = "".join(f'<a class="launch" href="{html.escape(url)}">Open in {service}</a>'
                      for service, url in launch.links(chapter).items())
    rows = "".join(
        f'<tr><th scope="row">{_code(p.name)}</th><td>{_code(json.dumps(p.default))}</td><td>{html.escape(p.allowed())}</td>'
        f"<td>{html.escape(p.help)}</td></tr>" for p in known.values())
    head = "".join(f'<th scope="col">{name}</th>' for name in ("parameter", "default", "allowed", "what it is"))
    found = nodes.container(classes=["rerun"])
    found += nodes.raw("", f'<p class="rerun-title"><strong>{title}</strong> {buttons}</p>', format="html")
    found += nodes.literal_block(command(chapter), command(chapter), language="bash")
    found += nodes.raw(
        "", "<details><summary>What you may change</summary>"
        '<div class="rerun-scroll" tabindex="0" role="region" aria-label="Parameters of this chapter">'
        f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div></details>", format="html")
    return found


def _code(text: str) -> str:
    return f"<code>{html.escape(text)}</code>"


def place(app: Sphinx, doctree: nodes.document) -> None:
    """Sphinx's hook: put the box below the first paragraphs of a chapter."""
    folder, _, chapter = app.env.docname.rpartition("/")
    top = next(iter(doctree.findall(nodes.section)), None)
    if folder == "notebooks" and top is not None and parameters_of(chapter):
        top.insert(_after_opening(top.children), box(chapter))


def _after_opening(children: list[nodes.Node]) -> int:
    """Behind the title and the paragraphs that follow it."""
    opening = (nodes.title, nodes.paragraph, nodes.comment, nodes.target)
    return next((place for place, child in enumerate(children) if not isinstance(child, opening)), len(children))
