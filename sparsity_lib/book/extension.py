"""The Sphinx extension of the book: text that the build computes, pasted where a page asks for it.

    :::{computed} claims-blocks SCAP          {computed}`claims-summary`
    :::

Nothing is executed that a page contains; both only call functions named in `computed.BLOCKS` and `computed.WORDS`. So the
same text is there in the full build and in the one from committed outputs.
"""

from __future__ import annotations

from typing import Any

from docutils import nodes
from docutils.statemachine import StringList
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective, SphinxRole

from sparsity_lib.book import docstrings, explorer, rerun
from sparsity_lib.book.computed import BLOCKS, WORDS, compute
from sparsity_lib.errors import SparsityError


class Computed(SphinxDirective):
    """A block of MyST text that a function of the library returns; its headings become sections of the page."""

    required_arguments = 1
    final_argument_whitespace = True

    def run(self) -> list[nodes.Node]:
        name, _, argument = self.arguments[0].partition(" ")
        self.env.note_reread()  # what it depends on are results, which Sphinx does not watch
        try:
            text = compute(name, argument.strip(), BLOCKS)
        except SparsityError as error:
            raise self.error(str(error)) from error
        holder = nodes.Element()
        lines = StringList(text.splitlines(), source=self.get_location())
        self.state.nested_parse(lines, self.content_offset, holder, match_titles=True)
        return holder.children


class ComputedWords(SphinxRole):
    """A few words that a function of the library returns."""

    def run(self) -> tuple[list[nodes.Node], list[nodes.system_message]]:
        name, _, argument = self.text.partition(" ")
        self.env.note_reread()
        try:
            return [nodes.Text(compute(name, argument.strip(), WORDS))], []
        except SparsityError as error:
            return [], [self.inliner.reporter.error(str(error), line=self.lineno)]


def without_thebe(app: Sphinx) -> None:
    """Disconnect an extension of Jupyter Book that this book has no use for: its script raises an error on every page."""
    for listener in [each for listeners in app.events.listeners.values() for each in listeners]:
        if getattr(listener.handler, "__module__", "").partition(".")[0] == "sphinx_thebe":
            app.disconnect(listener.id)


def accessible(app: Sphinx, page: str, template: str, context: dict[str, Any], doctree: Any) -> None:
    """Sphinx's hook: entries of the bibliography are items of a list; the role that docutils gives them is deprecated."""
    if "body" in context:
        context["body"] = context["body"].replace('role="doc-biblioentry"', 'role="listitem"')


def setup(app: Sphinx) -> dict[str, Any]:
    """Register everything; called by Sphinx."""
    app.add_directive("computed", Computed)
    app.add_role("computed", ComputedWords())
    app.setup_extension("sphinx.ext.autodoc")
    app.setup_extension("sphinx.ext.napoleon")
    app.connect("autodoc-process-signature", docstrings.signature)
    app.connect("autodoc-skip-member", docstrings.skip)
    app.connect("autodoc-process-docstring", docstrings.process, priority=400)  # napoleon's hook has 500
    app.connect("autodoc-process-docstring", docstrings.restore, priority=600)
    app.connect("builder-inited", without_thebe)
    app.connect("doctree-read", rerun.place)
    app.connect("html-page-context", explorer.scripts)
    app.connect("html-page-context", accessible)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
