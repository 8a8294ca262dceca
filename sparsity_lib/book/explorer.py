"""The explorer: a page that answers without a server, from the stored curves, speeds and masks, as HTML and JSON."""

from __future__ import annotations

import json
from typing import Any

from sphinx.application import Sphinx

from sparsity_lib import results, style
from sparsity_lib.book.curves import BOUNDS, PLACE, curves, speeds
from sparsity_lib.experiments.claws_report import short

PAGE, SCRIPT = "book/explorer", "explorer.js"
MASKS = "explorer_masks"


def data() -> dict[str, Any]:
    """What explorer.js reads: models with their curves, measured speeds and masks; methods with their looks."""
    used = sorted({method for found in curves().values() for method in found}, key=list(style.LOOKS).index)
    masks = results.load(MASKS) if MASKS in results.names() else None
    return {
        "methods": {m: {"label": style.look(m).label, "color": style.look(m).color, "place": PLACE.get(m, "inputs"),
                        "bound": m in BOUNDS, "masks": MASK_OF.get(m)} for m in used},
        "models": {
            model: {
                "label": short(model), "speeds": speeds().get(model, {}),
                "curves": {m: [[_round(v) for v in (p.skipped, p.own, p.kl.value, p.kl.low, p.kl.high, p.perplexity)] for p in points]
                           for m, points in found.items()},
                "masks": None if masks is None else masks.data[model],
            } for model, found in curves().items()
        },
        "masks": None if masks is None else {"by": masks.manifest["params"]["by"], "channels": masks.manifest["params"]["channels"]},
    }


#: Method of a curve -> method whose scores show its mask.
MASK_OF = {"cats": "cats", "claws": "claws", "oracle": "oracle", "teal": "teal", "teal_greedy": "teal", "scap": "teal",
           "inputs_topk": "teal", "larosa": "larosa", "wina": "wina"}


def _round(value: float) -> float:
    return float(f"{value:.4g}")


def page() -> str:
    """The explorer's HTML as a raw block; explorer.js fills it in."""
    text = json.dumps(data(), separators=(",", ":"), allow_nan=False).replace("</", "<\\/")
    return f"```{{raw}} html\n{_HTML.replace('DATA', text)}\n```\n"


_HTML = """\
<form id="explorer" class="explorer" aria-label="Explorer" onsubmit="return false">
<noscript><p>The explorer needs JavaScript. The same numbers are in the tables of the chapters.</p></noscript>
<div class="explorer-controls">
<p><label for="explorer-model">Model</label> <select id="explorer-model"></select></p>
<p><label for="explorer-method">Method</label> <select id="explorer-method"></select></p>
<p class="wide"><label for="explorer-share">Share of all weights skipped: <output id="explorer-share-text" for="explorer-share"></output></label>
<input id="explorer-share" type="range" min="0" max="60" step="1" value="20"></p>
</div>
<p id="explorer-answer" role="status" aria-live="polite"></p>
<figure class="explorer-figure"><svg id="explorer-chart" viewBox="0 0 640 320" role="img" aria-labelledby="explorer-chart-title">
<title id="explorer-chart-title"></title></svg>
<figcaption>KL to the dense model by share of all weights skipped. Click or touch to set the share. Thick: the chosen method, with its 95%
interval; thin: the others; dashed: bounds that no method can use.</figcaption></figure>
<div class="explorer-table" tabindex="0" role="region" aria-label="All methods at this share"><table id="explorer-all"></table></div>
<figure class="explorer-figure" id="explorer-masks"><canvas id="explorer-mask" role="img" aria-label="Mask"></canvas>
<figcaption id="explorer-mask-text"></figcaption></figure>
</form>
<script type="application/json" id="explorer-data">DATA</script>"""


def scripts(app: Sphinx, page: str, template: str, context: dict[str, Any], doctree: Any) -> None:
    """Sphinx's hook: the script goes to its own page only."""
    if page == PAGE:
        app.add_js_file(SCRIPT, loading_method="defer")
