"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const nodes = data.nodes;
  const LANES = ["forward", "gradient", "curvature"];
  const WIDTH = 170, HEIGHT = 34, GAP = 14, ROW = 52, LANE_GAP = 50, HEADER = 20, INSET = 10;
  const MANY = 6; // a unit's lane with more nodes is one box until it is opened
  const $ = (id) => document.getElementById(id);

  // --- the graph ------------------------------------------------------------------------------

  nodes.forEach((n, i) => { n.id = i; n.users = []; n.made = []; n.result = ""; });
  nodes.forEach((n) => {
    for (const [, j] of n.inputs) if (!nodes[j].users.includes(n.id)) nodes[j].users.push(n.id);
    for (const j of n.forward) nodes[j].made.push(n.id);
  });
  const ends = nodes.find((n) => n.role === "output");
  for (const [where, j] of ends ? ends.inputs : []) nodes[j].result ||= where;
  const generated = (n) => n.role === "gradient" || n.role === "curvature";
  const isLeaf = (n) => n.role === "parameter" || n.role === "buffer";
  const shown = nodes.filter((n) => n.shape && n.role !== "output");

  const closed = new Set(); // modules that are one box a lane
  const opened = new Set(); // units whose lanes are shown node by node
  const prefixes = (path) => path ? path.split(".").map((_, i, p) => p.slice(0, i + 1).join(".")) : [];
  const modules = new Set(nodes.flatMap((n) => prefixes(n.module)));
  const collapse = (depth) => {
    closed.clear(); opened.clear();
    for (const m of modules) if (m.split(".").length === depth) closed.add(m);
  };

  // The same layout as layout.py.
  function fill() {
    const blocks = [], whole = new Map(), blockOf = new Map(), boxOf = new Map();
    const block = (id, module, one) => ({ id, module, whole: one, region: -1, structure: "",
      nodes: { forward: [], gradient: [], curvature: [] } });
    const takes = (b, n) => {
      if (n.role === "input" && b.nodes.forward[0].role !== "input") return false;
      const other = n.regions.length && b.region >= 0 && n.regions[0] !== b.region;
      return !b.whole && b.module === n.module && !other;
    };
    for (const n of shown) {
      if (n.role !== "forward" && n.role !== "input") continue;
      const path = n.role === "input" ? undefined : prefixes(n.module).find((p) => closed.has(p));
      let b;
      if (path !== undefined) {
        if (!whole.has(path)) { whole.set(path, block("module " + path, path, true)); blocks.push(whole.get(path)); }
        b = whole.get(path);
      } else {
        if (!blocks.length || !takes(blocks[blocks.length - 1], n)) blocks.push(block("unit " + n.name, n.module, false));
        b = blocks[blocks.length - 1];
        if (n.regions.length) { b.region = n.regions[0]; b.structure = n.structure; }
      }
      blockOf.set(n.id, b); b.nodes.forward.push(n);
    }
    for (const n of shown) {
      if (blockOf.has(n.id)) continue;
      const near = [...n.forward, n.id].map((j) => blockOf.get(blockOf.has(j) ? j : nodes[j].users[0])).filter(Boolean);
      if (!near.length) continue;
      const b = near[near.length - 1];
      if (generated(n)) b.nodes[n.role].push(n);
      else if (isLeaf(n) && !b.whole) b.nodes.forward.unshift(n);
    }
    const boxes = [];
    for (const b of blocks) {
      b.lanes = {};
      for (const lane of LANES) {
        const list = b.nodes[lane];
        const one = b.whole || (list.length > MANY && !opened.has(b.id));
        b.lanes[lane] = list.length && one
          ? [{ id: b.id + " " + lane, lane, members: list, block: b }]
          : list.map((n) => ({ id: n.name, lane, members: [n], block: b }));
        for (const box of b.lanes[lane]) { boxes.push(box); for (const n of box.members) boxOf.set(n.id, box); }
      }
    }
    return { blocks, boxes, boxOf };
  }

  function rowsOf(boxes) {
    const level = new Map(), rows = [];
    for (const box of boxes) {
      let at = 0;
      if (box.members.length === 1) for (const [, j] of box.members[0].inputs) if (level.has(j)) at = Math.max(at, level.get(j) + 1);
      for (const n of box.members) level.set(n.id, at);
      (rows[at] ||= []).push(box);
    }
    return rows;
  }

  function place({ blocks }) {
    const frames = [], open = [], step = WIDTH + GAP, start = {};
    let left = 0, y = 0;
    for (const b of blocks) { b.rows = {}; for (const lane of LANES) b.rows[lane] = rowsOf(b.lanes[lane]); }
    for (const lane of LANES) {
      const columns = Math.max(1, ...blocks.map((b) => Math.max(0, ...b.rows[lane].map((r) => r.length))));
      start[lane] = [left, columns];
      left += columns * step + LANE_GAP;
    }
    const right = left - LANE_GAP - GAP;
    const around = (module) => {
      const path = prefixes(module);
      while (open.length && (open.length > path.length || path[open.length - 1] !== open[open.length - 1][0])) {
        const [name, top] = open.pop(), out = INSET * Math.max(1, 6 - open.length);
        frames.push({ label: name, kind: "module", x: -out, y: top, w: right + 2 * out, h: y - GAP / 2 + 4 - top });
        y += INSET;
      }
      for (const name of path.slice(open.length)) { open.push([name, y]); y += HEADER; }
    };
    for (const b of blocks) {
      around(b.module);
      const count = Math.max(...LANES.map((lane) => b.rows[lane].length));
      for (const lane of LANES) b.rows[lane].forEach((row, i) => {
        const level = lane === "forward" ? i : count - 1 - i, [x, columns] = start[lane];
        row.forEach((box, k) => {
          box.x = x + (k + (columns - row.length) / 2) * step + WIDTH / 2;
          box.y = y + level * ROW + HEIGHT / 2;
        });
      });
      const bottom = y + count * ROW - (ROW - HEIGHT);
      if (b.region >= 0 && !b.whole) frames.push({ label: b.structure, kind: "region", block: b, x: -4, y: y - 4, w: right + 8, h: bottom - y + 8 });
      y = bottom + GAP;
    }
    around("");
    frames.sort((a, b) => (a.kind === "region") - (b.kind === "region") || a.y - b.y);
    return { frames, right, bottom: y };
  }

  // --- drawing --------------------------------------------------------------------------------

  const escape = (s) => String(s).replace(/[&<>"']/g, (c) => "&#" + c.charCodeAt(0) + ";");
  const units = (v) => { let i = 0; while (v >= 999.5 && i < 5) { v /= 1000; i++; } return `${+v.toPrecision(3)} ${["", "k", "M", "G", "T", "P"][i]}`.trim(); };
  const short = (op) => { const p = op.split("."); return p.length === 3 ? p[1] : op; };
  const cut = (s, n = 28) => s.length > n ? s.slice(0, n - 1) + "…" : s;
  let view, size, zoom = 1, chosen = null, boxesById = new Map(), elements = new Map(), byExact = false, reads = false;

  function text(box) {
    if (box.members.length > 1) {
      const cost = box.members.reduce((t, n) => t + n.flops, 0);
      return [box.lane, `${box.members.length} nodes${cost ? ", " + units(cost) + " FLOPs" : ""}`];
    }
    const n = box.members[0];
    return [cut(n.result ? `${n.name}` : n.name), cut(`${short(n.op)} ${n.shape}`)];
  }

  function fillOf(box) {
    if (byExact) return box.lane !== "curvature" ? "" : `var(--${box.members.every((n) => n.exact) ? "exact" : "approximate"})`;
    const kinds = new Set(box.members.map((n) => n.structure).filter(Boolean));
    return kinds.size === 1 ? data.colors[[...kinds][0]] || "#e0cdf0" : "";
  }

  function curve(a, b) {
    if (a.y === b.y) {
      const s = b.x > a.x ? 1 : -1;
      return `M${a.x + s * WIDTH / 2},${a.y}L${b.x - s * WIDTH / 2},${b.y}`;
    }
    const s = b.y > a.y ? 1 : -1, y0 = a.y + s * HEIGHT / 2, y1 = b.y - s * HEIGHT / 2, m = (y0 + y1) / 2;
    return `M${a.x},${y0}C${a.x},${m} ${b.x},${m} ${b.x},${y1}`;
  }

  function draw() {
    view = fill(); size = place(view);
    boxesById = new Map(view.boxes.map((b) => [b.id, b]));
    const parts = ['<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="6" markerHeight="6" orient="auto"><path d="M0,0L8,4L0,8z" fill="var(--edge)"/></marker></defs>'];
    for (const f of size.frames) {
      parts.push(`<rect class="${f.kind}" x="${f.x}" y="${f.y}" width="${f.w}" height="${f.h}" rx="5"/>`);
      if (f.kind === "module") parts.push(`<text class="label" data-module="${escape(f.label)}" x="${f.x + 6}" y="${f.y + 13}">${closed.has(f.label) ? "▸" : "▾"} ${escape(f.label)}</text>`);
      else parts.push(`<text class="small" x="${f.x + f.w - 4}" y="${f.y + 10}">${escape(f.label)}</text>`);
    }
    const pairs = new Map();
    for (const n of shown) for (const [, j] of n.inputs) {
      const a = view.boxOf.get(j), b = view.boxOf.get(n.id);
      if (!a || !b || a === b) continue;
      const across = a.lane === "forward" && b.lane !== "forward";
      if (!across || reads) pairs.set(a.id + "\n" + b.id, [a, b, across]);
    }
    for (const [a, b, across] of pairs.values()) parts.push(`<path class="edge${across ? " read" : ""}" d="${curve(a, b)}" marker-end="url(#tip)"/>`);
    parts.push('<g id="hot"></g>');
    view.boxes.forEach((box, i) => {
      const n = box.members[0], [first, second] = text(box), color = fillOf(box);
      const rough = box.lane === "curvature" && box.members.some((m) => !m.exact);
      const result = box.members.length === 1 && n.result;
      parts.push(`<g class="box${rough ? " approximate" : ""}${result ? " result" : ""}" id="box${i}" data-box="${escape(box.id)}" role="button" aria-label="${escape(first + ", " + second)}" transform="translate(${box.x - WIDTH / 2},${box.y - HEIGHT / 2})"><title>${escape(n.line || box.id)}</title><rect width="${WIDTH}" height="${HEIGHT}" rx="6"${color ? ` style="fill:${color}"` : ""}/><text x="${WIDTH / 2}" y="14">${escape(first)}</text><text x="${WIDTH / 2}" y="27">${escape(second)}</text></g>`);
    });
    const svg = $("svg");
    svg.innerHTML = parts.join("");
    elements = new Map([...svg.querySelectorAll(".box")].map((e) => [e.dataset.box, e]));
    scale();
    mark();
  }

  function scale() {
    const out = INSET * 6 + 6, svg = $("svg");
    const w = size.right + 2 * out, h = size.bottom + 30;
    svg.setAttribute("viewBox", `${-out} -12 ${w} ${h}`);
    svg.setAttribute("width", w * zoom); svg.setAttribute("height", h * zoom);
    svg.style.width = w * zoom + "px"; svg.style.height = h * zoom + "px";
  }

  function zoomTo(value) {
    const pane = $("canvas"), before = zoom;
    zoom = Math.min(4, Math.max(0.02, value));
    const cx = pane.scrollLeft + pane.clientWidth / 2, cy = pane.scrollTop + pane.clientHeight / 2;
    scale();
    pane.scrollLeft = cx * zoom / before - pane.clientWidth / 2;
    pane.scrollTop = cy * zoom / before - pane.clientHeight / 2;
  }
  const fit = () => zoomTo(Math.min(1.2, ($("canvas").clientWidth - 16) / (size.right + 12 * INSET + 12)));

  // --- choosing -------------------------------------------------------------------------------

  function mark() {
    for (const e of elements.values()) e.classList.remove("chosen", "near");
    const hot = $("hot");
    hot.innerHTML = "";
    const box = chosen && boxesById.get(chosen.box);
    if (!box) { $("svg").removeAttribute("aria-activedescendant"); return; }
    elements.get(box.id).classList.add("chosen");
    $("svg").setAttribute("aria-activedescendant", elements.get(box.id).id);
    const members = chosen.node === undefined ? box.members : [nodes[chosen.node]];
    const lines = new Set();
    for (const n of members) {
      for (const [, j] of n.inputs) { const o = view.boxOf.get(j); if (o && o !== box) { elements.get(o.id).classList.add("near"); lines.add(curve(o, box)); } }
      for (const j of n.users) { const o = view.boxOf.get(j); if (o && o !== box) { elements.get(o.id).classList.add("near"); lines.add(curve(box, o)); } }
    }
    hot.innerHTML = [...lines].slice(0, 400).map((d) => `<path class="edge hot" d="${d}"/>`).join("");
  }

  function show(box, center) {
    if (!center) return;
    const pane = $("canvas"), out = INSET * 6 + 6;
    pane.scrollTo({ left: (box.x + out) * zoom - pane.clientWidth / 2, top: (box.y + 12) * zoom - pane.clientHeight / 2 });
  }

  function chooseBox(id, center = false) {
    const box = boxesById.get(id);
    if (!box) return;
    chosen = { box: id, node: box.members.length === 1 ? box.members[0].id : undefined };
    mark(); show(box, center);
    if (chosen.node === undefined) describeBox(box); else describe(nodes[chosen.node]);
  }

  function chooseNode(id) {
    const n = nodes[id];
    let redraw = false;
    for (const p of prefixes((n.forward.length ? nodes[n.forward[n.forward.length - 1]] : n).module)) redraw = closed.delete(p) || redraw;
    if (redraw) draw();
    let box = view.boxOf.get(id);
    if (box && box.members.length > 1) { opened.add(box.block.id); draw(); box = view.boxOf.get(id); tree(); }
    else if (redraw) tree();
    if (!box) { chosen = null; mark(); describe(n); return; }
    if (zoom < 0.5) zoomTo(0.9);
    chosen = { box: box.id, node: id };
    mark(); show(box, true); describe(n);
  }

  const button = (id, prefix = "") => `<button data-node="${id}">${escape(prefix + nodes[id].name)}</button>`;
  const list = (title, items) => items.length ? `<h2>${title} (${items.length})</h2><div class="list">${items.slice(0, 200).join("")}</div>` : "";

  function describe(n) {
    const rows = [["operator", n.op], ["role", n.role], ["result", n.result], ["shape", `${n.shape} ${n.dtype}`], ["module", n.module], ["structure", n.structure],
      ["region", n.regions.join(" ")], [n.role === "curvature" ? "curvature" : "", n.exact ? "exact" : "approximate"],
      ["FLOPs", n.flops ? n.flops.toLocaleString("en") : ""], ["bytes", n.bytes ? n.bytes.toLocaleString("en") : ""]];
    $("details").innerHTML = `<h3>${escape(n.name)}</h3>` +
      (n.formula ? `<p class="formula">${escape(n.formula)}</p>` : "") +
      "<dl>" + rows.filter(([k, v]) => k && v).map(([k, v]) => `<dt>${k}</dt><dd>${escape(v)}</dd>`).join("") + "</dl>" +
      (n.line ? `<h2>Source</h2><p><code>${escape(n.line)}</code></p>` : "") +
      list("Operands", n.inputs.map(([where, j]) => button(j, where + ": "))) +
      list("Used by", n.users.map((j) => button(j))) +
      list("Generated from", n.forward.map((j) => button(j))) +
      list("Generated from this", n.made.map((j) => button(j)));
  }

  function describeBox(box) {
    const total = (key) => box.members.reduce((t, n) => t + n[key], 0);
    $("details").innerHTML = `<h3>${escape(box.block.module || "(top)")}: ${box.lane}</h3><dl>` +
      `<dt>nodes</dt><dd>${box.members.length}</dd><dt>FLOPs</dt><dd>${total("flops").toLocaleString("en")}</dd></dl>` +
      '<p><button id="expand">Open (Enter)</button></p>' + list("Nodes", box.members.map((n) => button(n.id)));
    $("expand").onclick = () => toggleBox(box);
  }

  function toggleBox(box) {
    if (box.block.whole) closed.delete(box.block.module);
    else if (box.members.length > 1) opened.add(box.block.id);
    else if (opened.has(box.block.id)) opened.delete(box.block.id);
    else if (box.block.module) closed.add(box.block.module);
    else return;
    const first = box.members[0].id;
    draw(); tree();
    const again = view.boxOf.get(first);
    if (again) chooseBox(again.id, true);
  }

  function toggleModule(path) {
    if (!closed.delete(path)) { for (const m of modules) if (m.startsWith(path + ".")) closed.delete(m); closed.add(path); }
    draw(); tree();
  }

  function move(key) {
    const here = chosen && boxesById.get(chosen.box);
    if (!here) { if (view.boxes.length) chooseBox(view.boxes[0].id, true); return; }
    const vertical = key === "ArrowUp" || key === "ArrowDown", sign = key === "ArrowDown" || key === "ArrowRight" ? 1 : -1;
    let best = null, least = Infinity;
    for (const b of view.boxes) {
      const dx = b.x - here.x, dy = b.y - here.y, ahead = sign * (vertical ? dy : dx);
      if (ahead <= 0) continue;
      const cost = vertical ? ahead + 3 * Math.abs(dx) : ahead + 3 * Math.abs(dy);
      if (cost < least) { least = cost; best = b; }
    }
    if (best) chooseBox(best.id, true);
  }

  // --- the tree, search, values ---------------------------------------------------------------

  function tree() {
    const top = Math.max(1, ...data.modules.map((m) => m.flops[2]));
    const made = (rows, depth, prefix) => rows.filter((m) => m.path.split(".").length === depth && m.path.startsWith(prefix)).map((m) => {
      const inner = made(rows, depth + 1, m.path + ".");
      const folded = closed.has(m.path) || prefixes(m.path).some((p) => closed.has(p));
      const title = `${m.type}, ${m.parameters.toLocaleString("en")} parameters, curvature ${units(m.flops[2])} FLOPs, ${m.exact[0]} of ${m.exact[1]} diagonals exact`;
      const seen = modules.has(m.path);
      return `<li><div>${seen ? `<button data-toggle="${escape(m.path)}" aria-expanded="${!folded}" aria-label="${folded ? "Open" : "Close"} ${escape(m.path)}">${folded ? "▸" : "▾"}</button>` : ""}` +
        `<button data-module="${escape(m.path)}" title="${escape(title)}">${escape(m.path.split(".").pop())}</button><span class="type">${escape(m.type)}</span>` +
        `<span class="bar" style="--share:${(100 * m.flops[2] / top).toFixed(0)}%" title="${escape(title)}"></span></div>${inner && !closed.has(m.path) ? `<ul>${inner}</ul>` : ""}</li>`;
    }).join("");
    $("tree").innerHTML = made(data.modules, 1, "");
  }

  function goToModule(path) {
    const box = view.boxes.find((b) => b.block.module === path || b.block.module.startsWith(path + ".")) ||
      view.boxes.find((b) => prefixes(path).includes(b.block.module));
    if (box) chooseBox(box.id, true);
  }

  function search() {
    const words = $("search").value.toLowerCase().split(/\s+/).filter(Boolean), results = $("results");
    if (!words.length) { results.hidden = true; results.innerHTML = ""; return; }
    const hits = nodes.filter((n) => { const t = `${n.name} ${n.op} ${n.role} ${n.module} ${n.structure} ${n.line} ${n.result}`.toLowerCase(); return words.every((w) => t.includes(w)); });
    hits.sort((a, b) => !a.name.toLowerCase().startsWith(words[0]) - !b.name.toLowerCase().startsWith(words[0]) || a.name.length - b.name.length);
    results.hidden = false;
    results.innerHTML = `<li>${hits.length} found</li>` + hits.slice(0, 50).map((n) => `<li><button data-node="${n.id}">${escape(n.name)} <span class="type">${escape(short(n.op))} ${escape(n.role)}</span></button></li>`).join("");
  }

  function values() {
    if (!data.values.length) return;
    $("values").hidden = false;
    const number = (v) => v === 0 ? "0" : v.toExponential(2), percent = (v) => (100 * v).toFixed(1) + "%";
    $("diagonals").innerHTML = data.values.map((v, i) => `<article class="diagonal"><h3>${escape(v.name)}</h3>
      <p>[${v.shape.join(", ")}], mean ${number(v.mean)}, from ${number(v.min)} to ${number(v.max)}</p>
      <canvas id="map${i}" role="img" aria-label="Heat map of the diagonal of ${escape(v.name)}"></canvas>
      <p>orange positive, blue negative; stronger is larger (logarithm of the magnitude)</p>${bars(v)}
      <p>${percent(v.negative)} negative, ${percent(v.zero)} zero${v.infinite ? `, ${v.infinite} not finite` : ""}</p>
      <p>largest: ${v.largest.map(([at, x]) => `[${at.join(", ")}] ${number(x)}`).join("; ")}</p></article>`).join("");
    data.values.forEach((v, i) => {
      const canvas = $("map" + i), rows = v.map.length, columns = rows ? v.map[0].length : 0;
      if (!rows) return;
      canvas.width = columns; canvas.height = rows;
      const context = canvas.getContext("2d"), image = context.createImageData(columns, rows);
      v.map.flat().forEach((x, at) => {
        const strength = x && v.top ? Math.max(0, 1 + Math.log10(Math.abs(x) / v.top) / 4) : 0;
        image.data.set(x === null ? [136, 136, 136, 255] : [...(x < 0 ? [33, 102, 196] : [214, 110, 0]), 255 * strength], 4 * at);
      });
      context.putImageData(image, 0, 0);
    });
  }

  function bars(v) {
    const h = v.histogram, n = h.positive.length, top = Math.max(1, ...h.positive, ...h.negative);
    if (!n) return "";
    const column = (list, color, shift) => list.map((c, i) => c ? `<rect x="${i * 10 + shift}" y="${50 - 48 * c / top}" width="4.5" height="${48 * c / top}" fill="${color}"/>` : "").join("");
    return `<svg viewBox="0 0 ${n * 10} 64" preserveAspectRatio="none" role="img" aria-label="Histogram of magnitudes">${column(h.positive, "#d66e00", 0)}${column(h.negative, "#2166c4", 4.5)}<line x1="0" x2="${n * 10}" y1="50" y2="50" stroke="var(--line)"/></svg><p>magnitudes from ${(10 ** h.low).toExponential(1)} to ${(10 ** h.high).toExponential(1)}</p>`;
  }

  function legend() {
    const present = new Set(nodes.map((n) => n.structure));
    const colors = byExact ? { "exact curvature": "var(--exact)", "approximate curvature": "var(--approximate)" } : data.colors;
    $("legend").innerHTML = Object.entries(colors).filter(([k]) => byExact || present.has(k)).map(([k, c]) => `<span style="background:${c}">${k}</span>`).join("") +
      `<em>dashed: approximate; thick: a result; lanes: forward ↓, gradient ↑, curvature ↑; ${nodes.length} nodes</em>`;
  }

  // --- events ---------------------------------------------------------------------------------

  document.addEventListener("click", (event) => {
    const target = event.target.closest("[data-node],[data-toggle],[data-box],[data-module]");
    if (!event.target.closest(".search")) $("results").hidden = true;
    if (!target) return;
    const { node, toggle, box, module } = target.dataset;
    if (node !== undefined) { $("results").hidden = true; chooseNode(+node); }
    else if (toggle !== undefined) toggleModule(toggle);
    else if (box !== undefined) { chooseBox(box); $("svg").focus({ preventScroll: true }); }
    else if (target.closest("svg")) toggleModule(module);
    else goToModule(module);
  });
  $("svg").addEventListener("dblclick", (event) => {
    const target = event.target.closest("[data-box]");
    if (target) toggleBox(boxesById.get(target.dataset.box));
  });
  $("svg").addEventListener("keydown", (event) => {
    if (event.key.startsWith("Arrow")) { move(event.key); event.preventDefault(); }
    else if (event.key === "Enter" && chosen && boxesById.has(chosen.box)) toggleBox(boxesById.get(chosen.box));
    else if (event.key === "Escape") { chosen = null; mark(); $("details").innerHTML = help; }
  });
  document.addEventListener("keydown", (event) => {
    if (event.target.tagName === "INPUT" || event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === "/") { $("search").focus(); event.preventDefault(); }
    else if (event.key === "+") zoomTo(zoom * 1.25);
    else if (event.key === "-") zoomTo(zoom / 1.25);
    else if (event.key === "0") fit();
  });
  $("search").addEventListener("input", search);
  $("search").addEventListener("keydown", (event) => {
    const first = $("results").querySelector("button");
    if (event.key === "Enter" && first) first.click();
    else if (event.key === "ArrowDown" && first) { first.focus(); event.preventDefault(); }
    else if (event.key === "Escape") { $("search").value = ""; search(); $("svg").focus(); }
  });
  $("results").addEventListener("keydown", (event) => {
    const item = event.target.closest("li"), next = event.key === "ArrowDown" ? item.nextElementSibling : event.key === "ArrowUp" ? item.previousElementSibling : null;
    if (next) { (next.querySelector("button") || $("search")).focus(); event.preventDefault(); }
    else if (event.key === "Escape") { $("results").hidden = true; $("search").focus(); }
  });
  $("canvas").addEventListener("wheel", (event) => { if (event.ctrlKey) { zoomTo(zoom * (event.deltaY < 0 ? 1.15 : 1 / 1.15)); event.preventDefault(); } }, { passive: false });
  $("in").onclick = () => zoomTo(zoom * 1.25);
  $("out").onclick = () => zoomTo(zoom / 1.25);
  $("fit").onclick = fit;
  $("open").onclick = () => { closed.clear(); for (const n of shown) opened.add("unit " + n.name); draw(); tree(); };
  $("close").onclick = () => { collapse(1); draw(); tree(); };
  $("color").onchange = (event) => { byExact = event.target.checked; legend(); draw(); };
  $("reads").onchange = (event) => { reads = event.target.checked; draw(); };
  $("theme").onclick = () => {
    const root = document.documentElement, dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    root.dataset.theme = dark ? "light" : "dark";
  };

  const help = '<div class="help"><h2>Details</h2><p>Click a node, or search. In the graph arrow keys move, Enter opens or closes, Escape lets go; / searches, + and − zoom, 0 fits.</p></div>';
  $("details").innerHTML = help;
  $("table").textContent = data.summary;
  collapse(data.depth);
  legend(); tree(); values(); draw(); fit();
  document.documentElement.dataset.ready = Math.round(performance.now());
})();
