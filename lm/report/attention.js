"use strict";
(async () => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const byId = (id) => document.getElementById(id);
  const weightOf = (step) => (step / 255) ** 2;
  const percent = (share) => (share === 0 ? "0%" : share < 0.001 ? "<0.1%" : `${(100 * share).toFixed(1)}%`);
  const likely = (part) => percent(Math.max(part, 0.5) / 10000); // what is rounded to nothing is not 0
  const STRONG = 0.6; // from this shade on, text is written in the colour of the ground

  async function unpacked(text) {
    const letters = atob(text), raw = new Uint8Array(letters.length);
    for (let i = 0; i < raw.length; i++) raw[i] = letters.charCodeAt(i);
    const stream = new Blob([raw]).stream().pipeThrough(new DecompressionStream("deflate"));
    return new Uint8Array(await new Response(stream).arrayBuffer());
  }

  // One element of a group can be reached with the tab key; arrow keys go to the others.
  function roam(group, items, columns, enter) {
    items.forEach((item, i) => { item.tabIndex = i ? -1 : 0; });
    group.onkeydown = (event) => {
      const at = items.indexOf(event.target.closest("[tabindex]"));
      const step = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: columns, ArrowUp: -columns }[event.key];
      let to = step === undefined ? { Home: 0, End: items.length - 1 }[event.key] : at + step;
      if (at < 0 || to === undefined) return;
      event.preventDefault();
      if (to < 0 || to >= items.length) return;
      items[at].tabIndex = -1;
      items[to].tabIndex = 0;
      items[to].focus();
      items[to].scrollIntoView({ block: "nearest", inline: "nearest" });
      if (enter) enter(items[to]);
    };
  }

  function shade(element, share) {
    if (element.share === share) return;
    element.share = share;
    element.style.setProperty("--shade", share.toFixed(3));
    element.classList.toggle("strong", share > STRONG);
  }

  // Colours of the 256 steps, from the ground to the colour of attention, as the theme has them; red is the low byte.
  const ramp = new Uint32Array(256);
  const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  function mix() {
    const [ground, heat] = ["--ground", "--heat"].map((name) => [1, 3, 5].map((i) => parseInt(css(name).slice(i, i + 2), 16)));
    for (let q = 0; q < 256; q++) {
      const [red, green, blue] = ground.map((a, c) => Math.round(a + ((heat[c] - a) * q) / 255));
      ramp[q] = (0xff000000 | (blue << 16) | (green << 8) | red) >>> 0;
    }
  }

  function picture(canvas, steps, rows, columns) {
    const pixels = new Uint32Array(rows * columns);
    for (let i = 0; i < pixels.length; i++) pixels[i] = ramp[steps[i]];
    canvas.width = columns;
    canvas.height = rows;
    canvas.getContext("2d").putImageData(new ImageData(new Uint8ClampedArray(pixels.buffer), columns, rows), 0, 0);
    return canvas;
  }

  // A map no larger than it is seen: of each block of weights the largest, so that thin lines stay.
  const THUMB = 136;
  function thumbnail(canvas, weights, T, S) {
    const rows = Math.min(T, THUMB), columns = Math.min(S, THUMB);
    const most = new Uint8Array(rows * columns);
    for (let t = 0; t < T; t++) {
      const line = Math.floor((t * rows) / T) * columns;
      for (let s = 0; s < S; s++) {
        const at = line + Math.floor((s * columns) / S);
        if (weights[t * S + s] > most[at]) most[at] = weights[t * S + s];
      }
    }
    picture(canvas, most, rows, columns);
  }

  const map = byId("map"), readout = byId("readout");
  const heads = [...document.querySelectorAll("button.head")];
  let kind, weights, T, S, layer, head, cell, left, top, ratio, sentence, held = null, at = null;

  function open(button) {
    const { kind: k, layer: l, head: h } = button.dataset;
    const old = kind;
    kind = data.kinds[k];
    [T, S] = [data.names[kind.queries].length, data.names[kind.keys].length];
    [layer, head] = [Number(l), Number(h)];
    weights = of(kind, layer, head);
    heads.forEach((other) => other.setAttribute("aria-pressed", String(other === button)));
    byId("which").textContent = `${kind.title}: layer ${kind.layers[layer]}, head ${head}`;
    if (kind !== old) {
      held = at = null;
      fill(byId("queries"), data.names[kind.queries], true);
      fill(byId("keys"), data.names[kind.keys], false);
    }
    large();
    look(at === null ? T - 1 : at);
  }

  function of(kind, layer, head) {
    const size = data.names[kind.queries].length * data.names[kind.keys].length;
    const start = (layer * kind.heads + head) * size;
    return kind.bytes.subarray(start, start + size);
  }

  function fill(line, names, queries) {
    const items = names.map((name, place) => {
      const item = document.createElement("button");
      item.type = "button";
      item.className = "token";
      item.textContent = name;
      const enter = () => (queries ? held === null && look(place) : seen(place));
      item.onmouseenter = enter;
      item.onfocus = enter;
      if (queries) item.onclick = () => { held = held === place ? null : place; look(place); };
      else item.onmouseleave = item.onblur = () => look(at);
      return item;
    });
    line.replaceChildren(...items);
    roam(line, items, 1);
  }

  // Where the token at a place looks.
  function look(place) {
    at = place;
    const row = weights.subarray(place * S, (place + 1) * S);
    [...byId("keys").children].forEach((item, s) => shade(item, row[s] / 255));
    [...byId("queries").children].forEach((item, t) => {
      shade(item, 0);
      item.classList.toggle("here", t === place);
      item.classList.toggle("held", t === held);
      item.setAttribute("aria-pressed", String(t === held));
    });
    const said = largest(row, data.names[kind.keys]);
    sentence = `${called(kind.queries, place)} looks at ${said || "nothing"}`;
    readout.textContent = sentence;
    mark();
  }

  // Who looks at the token at a place.
  function seen(place) {
    const column = Array.from({ length: T }, (_, t) => weights[t * S + place]);
    [...byId("queries").children].forEach((item, t) => shade(item, column[t] / 255));
    const said = largest(column, data.names[kind.queries]);
    readout.textContent = `${one(at, place)}; it is seen by ${said || "no token"}`;
  }

  const largest = (steps, names) => [...steps.keys()]
    .filter((i) => steps[i])
    .sort((a, b) => steps[b] - steps[a] || a - b)
    .slice(0, 6)
    .map((i) => `${quoted(names[i])} (${i}) ${percent(weightOf(steps[i]))}`)
    .join(", ");
  const one = (t, s) => `${called(kind.queries, t)} to ${called(kind.keys, s)}: ${percent(weightOf(weights[t * S + s]))}`;
  const called = (side, place) => `${quoted(data.names[side][place])} (${place})`;

  // Kept apart from the sentence's direction.
  const quoted = (name) => `“\u2068${name}\u2069”`;

  const painted = document.createElement("canvas"), pixels = document.createElement("canvas");
  function large() {
    cell = Math.max(2, Math.min(26, Math.floor(640 / Math.max(T, S))));
    const named = cell >= 11, context = painted.getContext("2d");
    const size = Math.min(cell - 1, 14);
    const font = `${size}px system-ui, "PingFang SC", "Microsoft YaHei", "Noto Sans CJK SC", sans-serif`;
    context.font = font;
    const [queries, keys] = [data.names[kind.queries], data.names[kind.keys]];
    const room = (names) => (named ? Math.min(110, 8 + Math.max(...names.map((n) => context.measureText(n).width))) : 0);
    [left, top] = [room(queries), room(keys)].map(Math.ceil);
    ratio = window.devicePixelRatio || 1;
    const [width, height] = [left + S * cell, top + T * cell];
    for (const canvas of [map, painted]) {
      canvas.width = width * ratio;
      canvas.height = height * ratio;
    }
    map.style.width = `${width}px`;
    context.scale(ratio, ratio);
    context.imageSmoothingEnabled = false;
    context.drawImage(picture(pixels, weights, T, S), left, top, S * cell, T * cell);
    context.strokeStyle = css("--line");
    context.strokeRect(left + 0.5, top + 0.5, S * cell - 1, T * cell - 1);
    if (named) {
      context.font = font;
      context.fillStyle = css("--ink");
      context.textBaseline = "middle";
      context.textAlign = "right";
      queries.forEach((name, t) => context.fillText(name, left - 4, top + (t + 0.5) * cell, left - 4));
      context.textAlign = "left";
      keys.forEach((name, s) => {
        context.save();
        context.translate(left + (s + 0.5) * cell, top - 4);
        context.rotate(-Math.PI / 2);
        context.fillText(name, 0, 0, top - 4);
        context.restore();
      });
    }
  }

  function mark() {
    const context = map.getContext("2d");
    context.setTransform(1, 0, 0, 1, 0, 0);
    context.clearRect(0, 0, map.width, map.height);
    context.drawImage(painted, 0, 0);
    context.scale(ratio, ratio);
    context.strokeStyle = css("--accent");
    context.lineWidth = 2;
    context.strokeRect(left, top + at * cell, S * cell, cell);
  }

  map.onmousemove = (event) => {
    const box = map.getBoundingClientRect();
    const scale = (left + S * cell) / box.width;
    const t = Math.floor(((event.clientY - box.top) * scale - top) / cell);
    const s = Math.floor(((event.clientX - box.left) * scale - left) / cell);
    if (t < 0 || t >= T || s < 0 || s >= S) return;
    if (held === null && t !== at) look(t);
    readout.textContent = `${one(t, s)}; ${sentence}`;
  };
  map.onmouseleave = () => { readout.textContent = sentence; };
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && held !== null) { held = null; look(at); }
  });

  function paint() {
    mix();
    heads.forEach((button) => {
      const k = data.kinds[button.dataset.kind];
      const [rows, columns] = [data.names[k.queries].length, data.names[k.keys].length];
      const part = of(k, Number(button.dataset.layer), Number(button.dataset.head));
      thumbnail(button.firstElementChild, part, rows, columns);
    });
  }

  await Promise.all(data.kinds.map(async (k) => { k.bytes = await unpacked(k.weights); delete k.weights; }));
  paint();
  data.kinds.forEach((k, i) => {
    const mine = heads.filter((button) => button.dataset.kind === String(i));
    roam(mine[0].closest("table"), mine, k.heads);
  });
  heads.forEach((button) => {
    button.onclick = () => {
      open(button);
      byId("viewer").scrollIntoView({ block: "nearest" });
    };
  });
  const [k, l, h] = data.opened.map(String);
  const first = heads.find(({ dataset: d }) => d.kind === k && d.layer === l && d.head === h);
  open(first);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { paint(); large(); mark(); });

  const lens = data.lens;
  if (lens) {
    const cells = [...document.querySelectorAll("#lens-grid tbody td")];
    const told = data.names.told, places = data.names.tokens;
    cells.forEach((td) => {
      const [d, place] = [Number(td.dataset.layer), Number(td.dataset.place)];
      td.textContent = lens.pieces[lens.top[d][place][0]];
      shade(td, lens.parts[d][place][0] / 10000);
      td.classList.toggle("right", Boolean(lens.right[d][place]) && lens.came[d][place] >= 0);
      td.onmouseenter = td.onfocus = () => detail(td);
      td.onclick = () => td.focus();
    });
    [...document.querySelectorAll("#told td")].forEach((td, place) => {
      td.textContent = lens.came[0][place] < 0 ? "" : told[place];
    });
    roam(byId("lens-grid"), cells, places.length);

    let shown = cells[0];
    function detail(td) {
      const place = Number(td.dataset.place), chosen = Number(td.dataset.layer);
      shown.classList.remove("here");
      td.classList.add("here");
      shown = td;
      const scored = lens.came[0][place] >= 0;
      byId("lens-caption").textContent =
        `at ${quoted(places[place])} (${place})` + (scored ? `; what is to be told is ${quoted(told[place])}` : "");
      const rows = lens.depths.map((depth, d) => {
        const row = document.createElement("tr");
        if (d === chosen) row.className = "sum";
        const name = document.createElement("th");
        name.scope = "row";
        name.textContent = depth;
        const guesses = lens.top[d][place].map((piece, i) => [lens.pieces[piece], lens.parts[d][place][i]]);
        const texts = guesses.map(([piece, part]) => `${piece} ${likely(part)}`);
        texts.push(scored ? likely(lens.came[d][place]) : "");
        row.append(name, ...texts.map((text) => Object.assign(document.createElement("td"), { textContent: text })));
        return row;
      });
      byId("lens-detail").replaceChildren(...rows.reverse());
    }
    const last = lens.came[0].findLastIndex((part) => part >= 0);
    detail(cells[last < 0 ? places.length - 1 : last]);
  }
  document.documentElement.dataset.ready = "yes";
})();
