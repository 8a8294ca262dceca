"""The explorer: a page that answers without a server, from the stored curves, speeds and masks, as HTML and JSON."""

from __future__ import annotations

import json
from typing import Any

from sphinx.application import Sphinx

from sparsity_lib import results, style
from sparsity_lib.book.curves import BOUNDS, SITES, Curve, curves, dense_perplexities
from sparsity_lib.book.speeds import points
from sparsity_lib.experiments.claws_report import short

PAGE, SCRIPT = "book/explorer", "explorer.js"
MASKS = "explorer_masks"
#: Method, or method and sites -> the score of `explorer_masks` that shows its mask.
SCORES = {
    "cats": "gate", "gate_topk": "gate", "claws": "gate_saliency", "oracle": "down", "scap down": "down_threshold",
    "scap": "input_threshold", "teal": "input_threshold", "teal_greedy": "input_threshold", "inputs_topk": "input",
    "larosa": "input_rotated", "wina": "input_norm",
}
#: The entries that a score's mask shows: kind of site, and what a reader calls them.
SHOWN = {"gate": ("gate", "FFN neurons"), "down": ("down_in", "down inputs"), "input": ("up_in", "gate and up inputs")}


def data() -> dict[str, Any]:
    """What explorer.js reads: the names of sites, and by model its curves, measured speeds, dense perplexity and masks."""
    stored = results.load(MASKS) if MASKS in results.names() else None
    return {
        "sites": SITES,
        "models": {
            model: {
                "label": short(model), "curves": {name: _curve(model, curve) for name, curve in found.items()},
                "dense": dense_perplexities().get(model), "masks": None if stored is None else stored.data[model],
            } for model, found in curves().items()
        },
        "masks": None if stored is None else {"ranked": stored.manifest["params"]["ranked"],
                                              "channels": stored.manifest["params"]["channels"]},
    }


def _curve(model: str, curve: Curve) -> dict[str, Any]:
    """A curve's look, measured speeds, score, and points: share skipped, share dropped at its sites, KL and its interval,
    perplexity, share dropped where its mask is shown."""
    look, score = style.look(curve.method), SCORES.get(curve.name, SCORES.get(curve.method))
    kind, entries = SHOWN[score.partition("_")[0]] if score else ("", "")
    return {
        "label": look.label, "color": look.color, "dash": _dash(look), "sites": curve.sites, "bound": curve.method in BOUNDS,
        "result": curve.result, "score": score, "entries": entries,
        "speeds": [list(point) for point in points(model, curve.method)],
        "points": [[_short(v) for v in (p.skipped, curve.own(p), p.kl.value, p.kl.low, p.kl.high, p.perplexity,
                                        p.sites.get(kind, 0.0))] for p in curve.points],
    }


def _dash(look: style.Look) -> str:
    """A look's line as SVG draws it."""
    return " ".join(str(3 * length) for length in look.linestyle[1]) if isinstance(look.linestyle, tuple) else ""


def _short(value: float) -> float:
    return float(f"{value:.4g}")


def page() -> str:
    """The explorer's HTML as a raw block; explorer.js fills it in."""
    text = json.dumps(data(), separators=(",", ":"), allow_nan=False).replace("</", "<\\/")
    holder = f'<script type="application/json" id="explorer-data">{text}</script>'
    return f"```{{raw}} html\n{_HTML}{holder}\n```\n"


_HTML = """\
<div id="explorer" class="explorer">
<noscript><p>The explorer needs JavaScript. Its numbers are in the tables of the chapters.</p></noscript>
<div class="explorer-controls">
<p><label for="explorer-model">Model</label> <select id="explorer-model"></select></p>
<p><label for="explorer-sites">Where entries are dropped</label> <select id="explorer-sites"></select></p>
<p><label for="explorer-method">Method</label> <select id="explorer-method"></select></p>
<p class="explorer-wide">
<label for="explorer-share">Share of all weights skipped: <strong id="explorer-share-text"></strong></label>
<input id="explorer-share" type="range" min="1" max="60" step="1" value="15"></p>
</div>
<p id="explorer-answer" class="explorer-answer" role="status"></p>
<figure class="explorer-figure">
<svg id="explorer-chart" viewBox="0 0 640 330" role="img" aria-labelledby="explorer-chart-title">
<title id="explorer-chart-title"></title></svg>
<figcaption>Distance to the dense model by share of all weights skipped. Click or touch the picture to set the share. Thick:
the chosen method, with its 95% interval (shaded) and the measured points; thin: the others, named in the table below; grey:
bounds, which are no methods.</figcaption>
</figure>
<p id="explorer-caption"></p>
<div class="explorer-scroll" tabindex="0" role="region" aria-label="All methods at this share">
<table id="explorer-all" aria-labelledby="explorer-caption"></table></div>
<figure class="explorer-figure" id="explorer-masks" hidden>
<div class="explorer-scroll" tabindex="0" role="region" aria-label="Mask"><canvas id="explorer-mask" role="img"></canvas></div>
<figcaption id="explorer-mask-text"></figcaption>
</figure>
</div>
"""


def scripts(app: Sphinx, page: str, template: str, context: dict[str, Any], doctree: Any) -> None:
    """Sphinx's hook: the script goes to its own page only."""
    if page == PAGE:
        app.add_js_file(SCRIPT, loading_method="defer")
