/* The explorer: reads the curves, speeds and masks that the build has put into the page. No network, no library. */
(function () {
  "use strict";
  const holder = document.getElementById("explorer-data");
  if (!holder) return;
  const data = JSON.parse(holder.textContent);
  const $ = (name) => document.getElementById("explorer-" + name);
  const SKIPPED = 0, OWN = 1, KL = 2, LOW = 3, HIGH = 4, PPL = 5;
  const BOX = { left: 52, right: 628, top: 12, bottom: 278 }, SVG = "http://www.w3.org/2000/svg";
  const LEAST = 0.005, MOST = 10;

  const percent = (share) => Math.round(100 * share) + "%";
  const digits = (v) => (v >= 100 ? v.toFixed(0) : v >= 10 ? v.toFixed(1) : v >= 1 ? v.toFixed(2) : v.toFixed(3));

  /* A curve read at one share: logarithms are linear between neighbours; null outside of what was measured. */
  function read(points, share) {
    if (!points || share < points[0][SKIPPED] || share > points[points.length - 1][SKIPPED]) return null;
    let i = 1;
    while (i < points.length - 1 && points[i][SKIPPED] < share) i += 1;
    const a = points[i - 1], b = points[i], gap = b[SKIPPED] - a[SKIPPED], w = gap > 0 ? (share - a[SKIPPED]) / gap : 0;
    return a.map((value, k) => k === SKIPPED ? share : k === OWN ? value + w * (b[k] - value)
      : Math.exp(Math.log(Math.max(value, 1e-9)) * (1 - w) + Math.log(Math.max(b[k], 1e-9)) * w));
  }

  /* Times as fast as dense: time is linear in the share between measured settings; null beyond them. */
  function speed(model, method, share) {
    const measured = data.models[model].speeds[data.methods[method].place] || [];
    if (measured.length < 2 || share > measured[measured.length - 1][0] * 1.02) return null;
    for (let i = 1; i < measured.length; i += 1) {
      const [x0, r0] = measured[i - 1], [x1, r1] = measured[i];
      if (share <= x1 || i === measured.length - 1) return 1 / (1 / r0 + (1 / r1 - 1 / r0) * (share - x0) / (x1 - x0));
    }
    return null;
  }

  const x = (share) => BOX.left + (BOX.right - BOX.left) * share / 0.6;
  function y(kl) {
    const t = (Math.log(kl) - Math.log(LEAST)) / (Math.log(MOST) - Math.log(LEAST));
    return BOX.bottom - (BOX.bottom - BOX.top) * Math.min(1, Math.max(0, t));
  }
  function draw(parent, name, attributes, text) {
    const node = document.createElementNS(SVG, name);
    for (const key of Object.keys(attributes)) node.setAttribute(key, attributes[key]);
    if (text !== undefined) node.textContent = text;
    parent.appendChild(node);
    return node;
  }

  function chart(model, method, share) {
    const svg = $("chart"), title = $("chart-title"), curves = data.models[model].curves;
    while (svg.lastChild !== title) svg.removeChild(svg.lastChild);
    for (const kl of [0.01, 0.1, 1, 10]) {
      draw(svg, "line", { x1: BOX.left, x2: BOX.right, y1: y(kl), y2: y(kl), stroke: "#d9d9d9" });
      draw(svg, "text", { x: BOX.left - 6, y: y(kl) + 4, "text-anchor": "end" }, String(kl));
    }
    for (let p = 0; p <= 60; p += 10) draw(svg, "text", { x: x(p / 100), y: BOX.bottom + 18, "text-anchor": "middle" }, p + "%");
    draw(svg, "text", { x: (BOX.left + BOX.right) / 2, y: BOX.bottom + 36, "text-anchor": "middle" }, "share of all weights skipped");
    draw(svg, "text", { x: 12, y: (BOX.top + BOX.bottom) / 2, "text-anchor": "middle",
      transform: "rotate(-90 12 " + (BOX.top + BOX.bottom) / 2 + ")" }, "KL (nats per token)");
    const order = Object.keys(curves).filter((m) => m !== method).concat(curves[method] ? [method] : []);
    for (const m of order) {
      const points = curves[m], chosen = m === method, look = data.methods[m];
      if (chosen) {
        const band = points.map((p) => x(p[SKIPPED]) + "," + y(p[LOW])).concat(
          points.slice().reverse().map((p) => x(p[SKIPPED]) + "," + y(p[HIGH])));
        draw(svg, "polygon", { points: band.join(" "), fill: look.color, opacity: 0.2 });
      }
      draw(svg, "polyline", { points: points.map((p) => x(p[SKIPPED]) + "," + y(p[KL])).join(" "), fill: "none", stroke: look.color,
        "stroke-width": chosen ? 3 : 1.2, "stroke-dasharray": look.bound ? "4 4" : "none" });
      if (chosen) for (const p of points) draw(svg, "circle", { cx: x(p[SKIPPED]), cy: y(p[KL]), r: 3.5, fill: look.color });
    }
    draw(svg, "line", { x1: x(share), x2: x(share), y1: BOX.top, y2: BOX.bottom, stroke: "#000", "stroke-dasharray": "2 3" });
    title.textContent = "KL against share of weights skipped on " + data.models[model].label + "; the chosen method is " +
      data.methods[method].label + ".";
  }

  function cell(row, tag, text, scope) {
    const node = document.createElement(tag);
    node.textContent = text;
    if (scope) node.scope = scope;
    row.appendChild(node);
    return node;
  }

  function all(model, method, share) {
    const table = $("all"), found = [];
    for (const m of Object.keys(data.models[model].curves)) {
      const point = read(data.models[model].curves[m], share);
      found.push([m, point, point && speed(model, m, share)]);
    }
    found.sort((a, b) => (a[1] ? a[1][KL] : Infinity) - (b[1] ? b[1][KL] : Infinity));
    table.textContent = "";
    const head = table.createTHead().insertRow();
    for (const name of ["method", "KL (nats per token)", "perplexity", "times as fast", "dropped where it decides"]) cell(head, "th", name, "col");
    const body = table.createTBody();
    for (const [m, point, fast] of found) {
      const row = body.insertRow();
      if (m === method) row.className = "chosen";
      cell(row, "th", data.methods[m].label + (data.methods[m].bound ? " (a bound)" : ""), "row");
      cell(row, "td", point ? digits(point[KL]) + " [" + digits(point[LOW]) + ", " + digits(point[HIGH]) + "]" : "not measured here");
      cell(row, "td", point ? digits(point[PPL]) : "–");
      cell(row, "td", fast && !data.methods[m].bound ? fast.toFixed(2) : "–");
      cell(row, "td", point ? percent(point[OWN]) : "–");
    }
  }

  function mask(model, method, point) {
    const shown = data.models[model].masks, name = data.methods[method].masks, figure = $("masks");
    figure.hidden = !(shown && name && point);
    if (figure.hidden) return;
    const bytes = atob(shown.ranks[name]), columns = data.masks.channels, rows = shown.tokens.length, size = 7, left = 108;
    const canvas = $("mask"), context = canvas.getContext("2d"), cut = 255 * point[OWN];
    canvas.width = left + columns * size;
    canvas.height = rows * (size + 4);
    context.fillStyle = "#fff";
    context.fillRect(0, 0, canvas.width, canvas.height);
    context.font = "10px sans-serif";
    context.textBaseline = "middle";
    context.textAlign = "right";
    let kept = 0;
    for (let r = 0; r < rows; r += 1) {
      const top = r * (size + 4);
      context.fillStyle = "#000";
      context.fillText(shown.tokens[r].trim().slice(0, 16) || "·", left - 6, top + size / 2 + 2);
      for (let c = 0; c < columns; c += 1) {
        const keeps = bytes.charCodeAt(r * columns + c) >= cut;
        kept += keeps ? 1 : 0;
        context.fillStyle = keeps ? data.methods[method].color : "#ececec";
        context.fillRect(left + c * size, top + 2, size - 1, size);
      }
    }
    const where = data.methods[method].place === "neurons" ? "neurons" : "inputs of gate and up";
    const text = "Which of the first " + columns + " " + (name === "larosa" ? "rotated " : "") + where + " of layer " + shown.layer +
      " each token keeps (dark) at this share: " + percent(kept / (rows * columns)) + " of those shown.";
    canvas.setAttribute("aria-label", text);
    $("mask-text").textContent = text + (data.masks.by[name] === "token" ? " Every token keeps as many." : " A threshold: tokens keep more or fewer.");
  }

  function update() {
    const model = $("model").value, method = $("method").value, share = Number($("share").value) / 100;
    const point = read(data.models[model].curves[method], share), fast = speed(model, method, share), look = data.methods[method];
    $("share-text").textContent = percent(share);
    $("share").setAttribute("aria-valuetext", percent(share) + " of all weights skipped");
    if (point) {
      $("answer").textContent = look.label + " on " + data.models[model].label + " with " + percent(share) + " of all weights skipped: KL " +
        digits(point[KL]) + " [" + digits(point[LOW]) + ", " + digits(point[HIGH]) + "], perplexity " + digits(point[PPL]) + ", " +
        (look.bound ? "a bound, not a method." : fast ? fast.toFixed(2) + " times as fast as dense decoding." : "speed not measured at this share.");
    } else {
      const points = data.models[model].curves[method];
      $("answer").textContent = look.label + " was measured on " + data.models[model].label + " from " + percent(points[0][SKIPPED]) + " to " +
        percent(points[points.length - 1][SKIPPED]) + " of all weights skipped, not at " + percent(share) + ".";
    }
    chart(model, method, share);
    all(model, method, share);
    mask(model, method, point);
  }

  function options(select, names, label) {
    for (const name of names) {
      const option = document.createElement("option");
      option.value = name;
      option.textContent = label(name);
      select.appendChild(option);
    }
  }

  options($("model"), Object.keys(data.models), (m) => data.models[m].label);
  options($("method"), Object.keys(data.methods), (m) => data.methods[m].label);
  $("method").value = data.methods.larosa ? "larosa" : Object.keys(data.methods)[0];
  for (const name of ["model", "method", "share"]) $(name).addEventListener("input", update);
  function pick(event) {
    const box = $("chart").getBoundingClientRect(), at = (event.clientX - box.left) / box.width * 640;
    $("share").value = Math.round(60 * Math.min(1, Math.max(0, (at - BOX.left) / (BOX.right - BOX.left))));
    update();
  }
  $("chart").addEventListener("pointerdown", pick);
  $("chart").addEventListener("pointermove", (event) => { if (event.buttons) pick(event); });
  update();
})();
