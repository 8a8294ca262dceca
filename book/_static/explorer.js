/* The explorer: reads the curves, speeds and masks that the build has put into the page. No network, no library. */
(function () {
  "use strict";
  const holder = document.getElementById("explorer-data");
  if (!holder) return;
  const data = JSON.parse(holder.textContent);
  const $ = (name) => document.getElementById("explorer-" + name);
  /* Columns of a point. */
  const SKIPPED = 0, OWN = 1, KL = 2, LOW = 3, HIGH = 4, PPL = 5, SHOWN = 6;
  const SVG = "http://www.w3.org/2000/svg", ALL = "all";
  /* The chart's own units; on a phone fewer of them, so that its letters stay readable. */
  const PHONE = window.matchMedia("(max-width: 600px)");
  const sized = () => (PHONE.matches ? { width: 360, height: 330 } : { width: 640, height: 330 });
  const box = () => ({ left: 64, right: sized().width - 14, top: 12, bottom: sized().height - 52 });

  const percent = (share) => Math.round(100 * share) + "%";
  const digits = (v) => (v >= 1e5 ? "over 100,000" : v >= 1000 ? Number(v.toPrecision(2)).toLocaleString("en") : v >= 100 ? v.toFixed(0) : v >= 10 ? v.toFixed(1) : v >= 1 ? v.toFixed(2) : v.toFixed(3));
  const interval = (p) => digits(p[KL]) + " [" + digits(p[LOW]) + ", " + digits(p[HIGH]) + "]";

  /* A curve read at one share: KL and perplexity lie on lines of logarithms between neighbours; null outside of what was measured. */
  function read(points, share) {
    if (share < points[0][SKIPPED] || share > points[points.length - 1][SKIPPED]) return null;
    let i = 1;
    while (i < points.length - 1 && points[i][SKIPPED] < share) i += 1;
    const a = points[i - 1], b = points[i], gap = b[SKIPPED] - a[SKIPPED], w = gap > 0 ? (share - a[SKIPPED]) / gap : 0;
    const log = (v) => Math.log(Math.max(v, 1e-12));
    return a.map((v, k) => (k >= KL && k <= PPL ? Math.exp(log(v) * (1 - w) + log(b[k]) * w) : v + w * (b[k] - v)));
  }

  /* Times as fast as dense: time lies on a line between measured settings; null beyond them. */
  function speed(curve, share) {
    const known = curve.speeds;
    if (known.length < 2 || share > known[known.length - 1][0] * 1.02) return null;
    let i = 1;
    while (i < known.length - 1 && known[i][0] < share) i += 1;
    const [x0, r0] = known[i - 1], [x1, r1] = known[i], w = Math.min(1, (share - x0) / (x1 - x0));
    return 1 / ((1 - w) / r0 + w / r1);
  }

  function element(parent, name, attributes, text) {
    const node = document.createElementNS(SVG, name);
    for (const key of Object.keys(attributes)) node.setAttribute(key, attributes[key]);
    if (text !== undefined) node.textContent = text;
    parent.appendChild(node);
    return node;
  }

  const curves = () => data.models[$("model").value].curves;
  const shown = () => Object.keys(curves()).filter((n) => $("sites").value === ALL || curves()[n].sites === $("sites").value);
  const called = (curve) => curve.label + ($("sites").value === ALL ? ", " + data.sites[curve.sites] : "") + (curve.bound ? " (a bound)" : "");

  /* The axes: shares up to the next ten percent, decades of KL. */
  function scales() {
    const points = shown().flatMap((n) => curves()[n].points);
    const most = Math.ceil(Math.max(...points.map((p) => p[SKIPPED])) * 10 - 1e-9) / 10;
    const low = Math.floor(Math.log10(Math.max(1e-4, Math.min(...points.map((p) => p[KL])))));
    const high = Math.ceil(Math.log10(Math.max(...points.map((p) => p[KL]))));
    const clamp = (t) => Math.min(1, Math.max(0, t));
    const b = box();
    return {
      most, low, high,
      x: (share) => b.left + (b.right - b.left) * clamp(share / most),
      y: (kl) => b.bottom - (b.bottom - b.top) * clamp((Math.log10(Math.max(kl, 1e-12)) - low) / (high - low)),
      share: (px) => most * clamp((px - b.left) / (b.right - b.left)),
    };
  }

  function chart(method, share) {
    const svg = $("chart"), title = $("chart-title"), s = scales(), BOX = box(), step = s.most > 0.35 ? 10 : 5;
    svg.setAttribute("viewBox", "0 0 " + sized().width + " " + sized().height);
    while (svg.lastChild !== title) svg.removeChild(svg.lastChild);
    for (let d = s.low; d <= s.high; d += 1) {
      const kl = Math.pow(10, d);
      element(svg, "line", { x1: BOX.left, x2: BOX.right, y1: s.y(kl), y2: s.y(kl), class: "grid" });
      element(svg, "text", { x: BOX.left - 6, y: s.y(kl) + 4, "text-anchor": "end" }, String(Number(kl.toPrecision(1))));
    }
    for (let p = 0; p <= Math.round(100 * s.most); p += step) {
      element(svg, "line", { x1: s.x(p / 100), x2: s.x(p / 100), y1: BOX.top, y2: BOX.bottom, class: "grid" });
      element(svg, "text", { x: s.x(p / 100), y: BOX.bottom + 19, "text-anchor": "middle" }, String(p));
    }
    const middle = (BOX.top + BOX.bottom) / 2;
    element(svg, "text", { x: (BOX.left + BOX.right) / 2, y: BOX.bottom + 43, "text-anchor": "middle" }, "weights skipped (% of all weights)");
    element(svg, "text", { x: 14, y: middle, "text-anchor": "middle", transform: "rotate(-90 14 " + middle + ")" }, "KL (nats per token)");
    for (const name of shown().filter((n) => n !== method).concat([method])) {
      const curve = curves()[name], chosen = name === method, at = (p, k) => s.x(p[SKIPPED]) + "," + s.y(p[k]);
      if (chosen) {
        const band = curve.points.map((p) => at(p, LOW)).concat(curve.points.slice().reverse().map((p) => at(p, HIGH)));
        element(svg, "polygon", { points: band.join(" "), fill: curve.color, opacity: 0.2 });
      }
      element(svg, "polyline", { points: curve.points.map((p) => at(p, KL)).join(" "), fill: "none", stroke: curve.color,
        "stroke-width": chosen ? 3 : 1.3, "stroke-dasharray": curve.dash || "none" });
      if (chosen) for (const p of curve.points) element(svg, "circle", { cx: s.x(p[SKIPPED]), cy: s.y(p[KL]), r: 3.5, fill: curve.color });
    }
    element(svg, "line", { x1: s.x(share), x2: s.x(share), y1: BOX.top, y2: BOX.bottom, stroke: "#000", "stroke-dasharray": "3 3" });
    title.textContent = "KL to the dense model against the share of all weights skipped, " + data.models[$("model").value].label + ", " +
      shown().length + " curves, " + called(curves()[method]) + " drawn thick. The table below has the numbers.";
  }

  function cell(row, tag, text, scope) {
    const node = document.createElement(tag);
    node.textContent = text;
    if (scope) node.scope = scope;
    row.appendChild(node);
    return node;
  }

  /* A short piece of the curve's line, before its name. */
  function swatch(node, curve) {
    const svg = document.createElementNS(SVG, "svg");
    svg.setAttribute("viewBox", "0 0 26 8");
    svg.setAttribute("aria-hidden", "true");
    element(svg, "line", { x1: 1, x2: 25, y1: 4, y2: 4, stroke: curve.color, "stroke-width": 3, "stroke-dasharray": curve.dash || "none" });
    node.prepend(svg);
  }

  function table(method, share) {
    const all = $("all");
    const found = shown().map((name) => [name, curves()[name], read(curves()[name].points, share)]);
    found.sort((a, b) => (a[2] ? a[2][KL] : Infinity) - (b[2] ? b[2][KL] : Infinity));
    all.textContent = "";
    const dense = data.models[$("model").value].dense;
    $("caption").textContent = "All methods with " + percent(share) + " of all weights skipped, the closest to the dense model first" +
      (dense ? " (its perplexity: " + digits(dense) + ")." : ".");
    const head = all.createTHead().insertRow(), body = all.createTBody();
    for (const name of ["method", "KL [95% interval] (nats per token)", "perplexity", "decoding, times as fast as dense",
      "dropped at its sites"]) cell(head, "th", name, "col");
    for (const [name, curve, point] of found) {
      const row = body.insertRow(), fast = point && !curve.bound ? speed(curve, share) : null;
      if (name === method) row.className = "chosen";
      swatch(cell(row, "th", called(curve), "row"), curve);
      cell(row, "td", point ? interval(point) : "not measured here");
      cell(row, "td", point ? digits(point[PPL]) : "–");
      cell(row, "td", fast ? fast.toFixed(2) : "–");
      cell(row, "td", point ? percent(point[OWN]) : "–");
    }
  }

  function mask(method, share, point) {
    const curve = curves()[method], kept = data.models[$("model").value].masks, figure = $("masks");
    figure.hidden = !(kept && curve.score && point);
    if (figure.hidden) return;
    const bytes = atob(kept.ranks[curve.score]), columns = data.masks.channels, rows = kept.tokens.length;
    const size = 6, gap = 5, left = 96, context = $("mask").getContext("2d"), cut = 255 * point[SHOWN];
    $("mask").width = left + columns * size;
    $("mask").height = rows * (size + gap) + gap;
    context.fillStyle = "#fff";
    context.fillRect(0, 0, $("mask").width, $("mask").height);
    context.font = "11px sans-serif";
    context.textBaseline = "middle";
    context.textAlign = "right";
    let count = 0;
    for (let r = 0; r < rows; r += 1) {
      const top = r * (size + gap) + gap;
      context.fillStyle = "#000";
      context.fillText(kept.tokens[r].trim().slice(0, 16) || "·", left - 6, top + size / 2 + 1);
      for (let c = 0; c < columns; c += 1) {
        const keeps = bytes.charCodeAt(r * columns + c) >= cut;
        count += keeps ? 1 : 0;
        context.fillStyle = keeps ? curve.color : "#e6e6e6";
        context.fillRect(left + c * size, top, size - 1, size);
      }
    }
    const rotated = curve.score === "input_rotated" ? "rotated " : "";
    const text = "A mask of " + curve.label + " with " + percent(share) + " of all weights skipped: which of the first " + columns + " " + rotated +
      curve.entries + " in layer " + kept.layer + " each token keeps (dark), " + percent(count / (rows * columns)) + " of those shown. " +
      (data.masks.ranked[curve.score] === "token" ? "Every token keeps the same number." : "One threshold decides, so that tokens keep more or fewer.");
    $("mask").setAttribute("aria-label", text);
    $("mask-text").textContent = text;
  }

  function answer(method, share, point) {
    const curve = curves()[method], label = data.models[$("model").value].label, points = curve.points;
    if (!point) {
      return curve.label + " was measured on " + label + " from " + percent(points[0][SKIPPED]) + " to " +
        percent(points[points.length - 1][SKIPPED]) + " of all weights skipped, not at " + percent(share) + ".";
    }
    const fast = curve.bound ? null : speed(curve, share);
    return curve.label + " on " + label + ", " + percent(share) + " of all weights skipped (" + percent(point[OWN]) + " of " +
      data.sites[curve.sites] + "): KL " + interval(point) + " nats per token, perplexity " + digits(point[PPL]) + "; " +
      (curve.bound ? "a bound, not a method." : fast ? "decodes " + fast.toFixed(2) + " times as fast as dense." : "its speed was not measured there.");
  }

  function update() {
    const method = $("method").value, share = Number($("share").value) / 100, point = read(curves()[method].points, share);
    $("share-text").textContent = percent(share);
    $("share").setAttribute("aria-valuetext", percent(share) + " of all weights skipped");
    $("answer").textContent = answer(method, share, point);
    chart(method, share);
    table(method, share);
    mask(method, share, point);
  }

  /* Fills a list anew and keeps what was chosen, where it is still there. */
  function options(select, pairs, wanted) {
    const before = wanted || select.value;
    select.textContent = "";
    for (const [value, label] of pairs) select.add(new Option(label, value));
    if (pairs.some(([value]) => value === before)) select.value = before;
  }

  function refill(wanted) {
    const there = new Set(Object.values(curves()).map((c) => c.sites));
    options($("sites"), [[ALL, "anywhere"], ...Object.entries(data.sites).filter(([name]) => there.has(name))]);
    options($("method"), shown().map((name) => [name, called(curves()[name])]), wanted);
    $("share").max = String(Math.round(100 * scales().most));
    update();
  }

  options($("model"), Object.entries(data.models).map(([name, model]) => [name, model.label]));
  for (const name of ["model", "sites"]) $(name).addEventListener("input", () => refill());
  for (const name of ["method", "share"]) $(name).addEventListener("input", update);
  function pick(event) {
    const at = $("chart").getBoundingClientRect();
    $("share").value = String(Math.round(100 * scales().share((event.clientX - at.left) / at.width * sized().width)));
    update();
  }
  $("chart").addEventListener("pointerdown", pick);
  $("chart").addEventListener("pointermove", (event) => { if (event.buttons) pick(event); });
  PHONE.addEventListener("change", update);
  refill("spread head" in curves() ? "spread head" : "larosa inputs");
})();
