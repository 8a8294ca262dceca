"""Texts with each token marked by the weights it read: HTML that needs no network, for a page of its own or inside another.

A token's level, 1 to 5, shows in the ground's strength, in the height of the bar under it, and as a digit where asked for, so
that colour alone carries nothing. A text is one stop of the Tab key; arrow keys, Home and End go from token to token, and what
the chosen one read is said aloud. Without scripts all texts stand there with their bars, and a table holds every number.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sparsity_lib.errors import SparsityError
from sparsity_lib.experiments.cwic_tokens import KINDS

LEVELS = 5
Token = Sequence[Any]

_STYLE = """
.tokens { --ink: #1a1a1a; --paper: #ffffff; --bar: #0b5cad; --edge: #5c6470; color: var(--ink); background: var(--paper);
  font: 1rem/2.1 system-ui, sans-serif; padding: 1rem; border: 1px solid var(--edge); border-radius: 6px; }
html[data-theme="dark"] .tokens { --ink: #ececec; --paper: #14181e; --bar: #7cc4f0; --edge: #8b94a1; }
@media (prefers-color-scheme: dark) { html:not([data-theme]) .tokens {
  --ink: #ececec; --paper: #14181e; --bar: #7cc4f0; --edge: #8b94a1; } }
.tokens label { margin-right: 1.5rem; } .tokens select { font: inherit; color: inherit; background: inherit; }
.tokens [role="listbox"] { margin: 0.75rem 0; white-space: pre-wrap; overflow-wrap: anywhere; }
.tokens [role="option"] { padding: 0.1em 0; border-bottom: solid var(--bar); cursor: pointer; }
.tokens [role="option"]:focus { outline: 3px solid var(--ink); outline-offset: 1px; }
.tokens .digit { display: none; font-size: 0.7em; font-weight: 700; vertical-align: super; }
.tokens.numbered .digit { display: inline; }
.tokens .said { min-height: 2.2em; font-weight: 600; }
.tokens table { border-collapse: collapse; font-size: 0.9rem; line-height: 1.4; }
.tokens th, .tokens td { border: 1px solid var(--edge); padding: 0.15rem 0.5rem; text-align: left; }
""" + "\n".join(
    f".tokens .level{i} {{ border-bottom-width: {2 * i - 1}px; "
    f"background: color-mix(in srgb, var(--bar) {6 * (i - 1)}%, transparent); }}" for i in range(1, LEVELS + 1))

_SCRIPT = """
(function () {
  for (const box of document.querySelectorAll(".tokens:not([data-ready])")) {
    box.dataset.ready = "yes";
    const lists = [...box.querySelectorAll('[role="listbox"]')], said = box.querySelector(".said");
    const pick = box.querySelector("select"), digits = box.querySelector('input[type="checkbox"]');
    const show = () => lists.forEach((list, i) => { list.closest("section").hidden = i !== Number(pick.value); });
    const choose = (list, next, focus) => {
      for (const token of list.children) { token.tabIndex = -1; token.setAttribute("aria-selected", "false"); }
      next.tabIndex = 0; next.setAttribute("aria-selected", "true");
      if (focus) next.focus();
      said.textContent = next.dataset.say;
    };
    for (const list of lists) {
      const tokens = [...list.children];
      tokens[0].tabIndex = 0;
      list.addEventListener("click", e => { const t = e.target.closest('[role="option"]'); if (t) choose(list, t, true); });
      list.addEventListener("focusin", e => choose(list, e.target, false));
      list.addEventListener("keydown", e => {
        const at = tokens.indexOf(document.activeElement);
        const to = { ArrowRight: at + 1, ArrowDown: at + 10, ArrowLeft: at - 1, ArrowUp: at - 10, Home: 0,
                     End: tokens.length - 1 }[e.key];
        if (to === undefined || at < 0) return;
        e.preventDefault();
        choose(list, tokens[Math.max(0, Math.min(tokens.length - 1, to))], true);
      });
    }
    pick.addEventListener("change", show);
    digits.addEventListener("change", () => box.classList.toggle("numbered", digits.checked));
    box.querySelector(".controls").hidden = false;
    show();
  }
})();
"""


def levels(read: Sequence[float]) -> list[int]:
    """1 for the fifth of a text's tokens that read least, up to 5 for the fifth that read most; equal tokens are of one level."""
    values = np.asarray(read, dtype=float)
    edges = np.quantile(values, np.arange(1, LEVELS) / LEVELS)
    return (np.searchsorted(edges, values, side="left") + 1).tolist()


def fragment(texts: Sequence[Mapping[str, Any]], dense: int, name: str) -> str:
    """The texts as a piece of HTML with its style and script inside.

    Parameters
    ----------
    texts
        {"prompt": tokens before the answer, "tokens": [[piece, weights read, kind], ...]} each.
    dense
        Weights that a token of the dense model reads.
    name
        The model's, for headings.

    Raises
    ------
    SparsityError
        If there is no text, or one is empty.
    """
    if not texts or not all(text["tokens"] for text in texts):
        raise SparsityError("There is nothing to show. Fix: texts of at least one token each.")
    options = "".join(f'<option value="{i}">text {i + 1}</option>' for i in range(len(texts)))
    sections = "".join(_section(i, text, dense) for i, text in enumerate(texts))
    return (
        f'<style>{_STYLE}</style>\n<div class="tokens"><p><strong>{html.escape(name)}</strong>: the taller the bar under a '
        "token, the more weights it read. With a token chosen, arrow keys go on to others.</p>\n"
        f'<p class="controls" hidden><label>Show <select>{options}</select></label>'
        '<label><input type="checkbox"> levels as digits</label></p>\n'
        f'{sections}<p class="said" role="status" aria-live="polite"></p></div>\n<script>{_SCRIPT}</script>')


def _section(number: int, text: Mapping[str, Any], dense: int) -> str:
    tokens = text["tokens"]
    found = levels([token[1] for token in tokens])
    shown = "".join(_token(token, level, dense) for token, level in zip(tokens, found, strict=True))
    rows = "".join(
        f"<tr><td>{i + 1}</td><td><code>{html.escape(_visible(piece))}</code></td><td>{100 * read / dense:.1f}</td>"
        f"<td>{level}</td><td>{html.escape(kind)}</td><td>{'prompt' if i < text['prompt'] else 'answer'}</td></tr>"
        for i, ((piece, read, kind), level) in enumerate(zip(tokens, found, strict=True)))
    head = "".join(f'<th scope="col">{c}</th>' for c in ("place", "token", "weights read (%)", "level", "kind", "part"))
    return (
        f'<section aria-label="text {number + 1}"><div role="listbox" aria-label="tokens of text {number + 1}" '
        f'aria-orientation="horizontal">{shown}</div><details><summary>text {number + 1} as a table</summary>'
        f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></details></section>\n")


def _token(token: Token, level: int, dense: int) -> str:
    piece, read, kind = token
    say = html.escape(f"{_visible(piece)}: reads {100 * read / dense:.1f}% of the weights, level {level} of {LEVELS} ({kind})",
                      quote=True)
    return (
        f'<span role="option" aria-selected="false" tabindex="-1" class="level{level}" title="{say}" data-say="{say}">'
        f'{html.escape(piece)}<span class="digit" aria-hidden="true">{level}</span></span>')


def _visible(piece: str) -> str:
    """A token's text with spaces and line breaks that can be seen."""
    return piece.replace("\n", "↵").replace(" ", "␣") or "(nothing)"


def page(texts: Sequence[Mapping[str, Any]], dense: int, name: str) -> str:
    """A whole page of its own; arguments as for `fragment`."""
    kinds = "".join(f"<dt>{kind}</dt><dd>{html.escape(what)}</dd>" for kind, what in KINDS.items())
    title = f"Compute by token: {html.escape(name)}"
    style = (":root { color-scheme: light dark; } "
             "body { max-width: 50rem; margin: 2rem auto; padding: 0 1rem; font-family: system-ui, sans-serif; }")
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title><meta name="viewport" '
        f'content="width=device-width, initial-scale=1"><style>{style}</style></head>\n'
        f"<body><main><h1>{title}</h1>\n{fragment(texts, dense, name)}\n<h2>Kinds of tokens</h2><dl>{kinds}</dl></main></body>"
        "</html>\n")
