"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  if (!data) return;
  const NS = "http://www.w3.org/2000/svg", WIDTH = 158, HEIGHT = 36, LETTERS = 24;
  const byId = (id) => document.getElementById(id);
  const svg = byId("canvas"), world = byId("world"), map = byId("map"), about = byId("about");
  const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
  const make = (name, attributes, parent) => {
    const element = document.createElementNS(NS, name);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    if (parent) parent.append(element);
    return element;
  };
  const short = (text, end) => text.length <= LETTERS ? text
    : end ? "…" + text.slice(1 - LETTERS) : text.slice(0, LETTERS - 1) + "…";

  // Every node knows where it is before and after; what falls into a new layer ends where that layer stands.
  const count = data.boxes.length;
  const groupAt = (k) => data.after[count + k];
  const mean = (points) => [0, 1].map((i) => points.reduce((sum, p) => sum + p[i], 0) / points.length);
  const members = data.groups.map((_, k) => data.boxes.filter((b) => b.into === k));
  const nodes = data.boxes.map((box, i) => {
    const end = box.into !== null ? groupAt(box.into) : data.after[i];
    const kind = box.into !== null ? "falls" : box.kind === "input" || box.kind === "output" ? "end" : "stays";
    return { id: i, box, kind, title: box.does, name: box.label, from: box.at, to: end || box.at, leaves: !end || box.into !== null };
  });
  const fresh = data.groups.map((group, k) => ({
    id: count + k, group, kind: "new", title: group.does, name: group.name, members: members[k],
    from: members[k].length ? mean(members[k].map((b) => b.at)) : [0, 0], to: groupAt(k) || [0, 0],
  })).filter((node) => node.members.length && groupAt(node.id - count));
  const all = [...nodes, ...fresh];
  const where = new Map(all.map((node) => [node.id, node]));

  const layer = (name) => make("g", { class: name }, world);
  const hulls = layer("hulls"), lines = layer("lines"), boxes = layer("boxes");
  const paths = Object.fromEntries(["plain", "falling", "done", "lit"].map((kind) => [kind, make("path", { class: `edges ${kind}` }, lines)]));
  for (const node of fresh) node.hull = make("rect", { class: "hull", rx: 12 }, hulls);
  for (const node of all) {
    const g = node.g = make("g", { class: `box ${node.kind}`, "data-id": node.id }, boxes);
    make("rect", { x: -WIDTH / 2, y: -HEIGHT / 2, width: WIDTH, height: HEIGHT, rx: 7 }, g);
    const same = node.title === node.name;
    make("text", { y: same ? 4 : -3 }, g).textContent = short(node.title, false);
    if (!same) make("text", { class: "name", y: 11 }, g).textContent = short(node.name, true);
    make("title", {}, g).textContent = `${node.name}\n${node.title}`;
  }

  let time = 0, view = { x: 0, y: 0, scale: 1 }, chosen = null;
  const mix = (a, b, t) => a + (b - a) * t;
  const ease = (t) => t * t * (3 - 2 * t);
  const at = (node) => { const t = ease(time); return [mix(node.from[0], node.to[0], t), mix(node.from[1], node.to[1], t)]; };

  function curve(points) {
    let d = `M${points[0][0].toFixed(1)} ${points[0][1].toFixed(1)}`;
    for (let i = 1; i < points.length; i++) {
      const [x0, y0] = points[i - 1], [x1, y1] = points[i], middle = (y0 + y1) / 2;
      d += `C${x0.toFixed(1)} ${middle.toFixed(1)} ${x1.toFixed(1)} ${middle.toFixed(1)} ${x1.toFixed(1)} ${y1.toFixed(1)}`;
    }
    return d;
  }
  function route([source, target, bends], after) {
    const a = where.get(source), b = where.get(target);
    if (!a || !b) return "";
    const t = ease(time), inside = !after && a.box.into !== null && a.box.into === b.box.into;
    const half = HEIGHT / 2 * (inside ? 1 - t : 1);
    const start = at(a), end = at(b);
    start[1] += half;
    end[1] -= half;
    // On the way, bends go to where the edge will run straight between the places that its ends fall to.
    const between = after ? bends : bends.map((p, i) => {
      const s = (i + 1) / (bends.length + 1);
      return [0, 1].map((k) => mix(p[k], mix(a.to[k], b.to[k], s), t));
    });
    return curve([start, ...between, end]);
  }

  function draw() {
    const t = ease(time);
    for (const node of all) {
      const [x, y] = at(node);
      node.g.setAttribute("transform", `translate(${x.toFixed(1)} ${y.toFixed(1)})`);
      const seen = node.kind === "new" ? t : node.leaves ? 1 - t : 1;
      node.g.setAttribute("opacity", seen.toFixed(3));
      node.g.style.display = seen < 0.01 ? "none" : "";
    }
    for (const node of fresh) {
      const points = node.members.map((m) => at(nodes[data.boxes.indexOf(m)]));
      const xs = points.map((p) => p[0]), ys = points.map((p) => p[1]);
      const pad = 10, left = Math.min(...xs) - WIDTH / 2 - pad, top = Math.min(...ys) - HEIGHT / 2 - pad;
      const box = { x: left, y: top, width: Math.max(...xs) + WIDTH / 2 + pad - left, height: Math.max(...ys) + HEIGHT / 2 + pad - top };
      for (const [key, value] of Object.entries(box)) node.hull.setAttribute(key, value.toFixed(1));
      node.hull.style.opacity = (0.09 * (1 - t)).toFixed(3);
    }
    const plain = [], falling = [];
    if (time < 1) for (const edge of data.before_edges) {
      const a = data.boxes[edge[0]], b = data.boxes[edge[1]];
      (a.into !== null && a.into === b.into ? falling : plain).push(route(edge, false));
    }
    paths.plain.setAttribute("d", plain.join(""));
    paths.falling.setAttribute("d", falling.join(""));
    paths.done.setAttribute("d", time < 1 ? "" : data.after_edges.map((edge) => route(edge, true)).join(""));
    light();
    byId("time").value = 1000 * time;
    byId("show-before").setAttribute("aria-pressed", time < 0.5);
    byId("show-after").setAttribute("aria-pressed", time >= 0.5);
    miniature();
  }
  function light() {
    const edges = time < 1 ? data.before_edges : data.after_edges;
    const mine = chosen === null ? [] : edges.filter((edge) => edge[0] === chosen || edge[1] === chosen);
    paths.lit.setAttribute("d", mine.map((edge) => route(edge, time >= 1)).join(""));
  }
  function look() {
    world.setAttribute("transform", `translate(${view.x.toFixed(1)} ${view.y.toFixed(1)}) scale(${view.scale.toFixed(4)})`);
    svg.classList.toggle("far", view.scale < 0.34);
    miniature();
  }

  const shown = () => all.filter((node) => node.kind === "new" ? time > 0.5 : !(node.leaves && time > 0.5));
  function bounds() {
    const points = shown().map(at), xs = points.map((p) => p[0]), ys = points.map((p) => p[1]);
    return { left: Math.min(...xs) - WIDTH, right: Math.max(...xs) + WIDTH, top: Math.min(...ys) - HEIGHT, bottom: Math.max(...ys) + HEIGHT };
  }
  const size = () => svg.getBoundingClientRect();
  function fit(whole) {
    const b = bounds(), s = size();
    const wide = s.width / (b.right - b.left), high = s.height / (b.bottom - b.top);
    view.scale = whole ? Math.max(Math.min(wide, high, 1.2), 0.12) : Math.min(Math.max(Math.min(wide, high), 0.55), 1);
    view.x = s.width / 2 - view.scale * (whole ? (b.left + b.right) / 2 : at(all[0])[0]);
    const over = view.scale * (b.bottom - b.top) > s.height + 1;
    view.y = over ? 14 - view.scale * b.top : s.height / 2 - view.scale * (b.top + b.bottom) / 2;
    look();
  }
  function zoom(factor, x, y) {
    const scale = Math.min(Math.max(view.scale * factor, 0.01), 4), k = scale / view.scale;
    view = { x: x - k * (x - view.x), y: y - k * (y - view.y), scale };
    look();
  }
  function centre(node) {
    const s = size(), [x, y] = at(node);
    view.scale = Math.max(view.scale, 0.8);
    view.x = s.width / 2 - view.scale * x;
    view.y = s.height / 2 - view.scale * y;
    look();
  }

  // From before to after, with what is in the middle of the view held there.
  let run = 0;
  function go(goal) {
    const token = ++run, from = time, began = performance.now(), s = size();
    const middle = [(s.width / 2 - view.x) / view.scale, (s.height / 2 - view.y) / view.scale];
    const near = shown().reduce((best, node) => {
      const [x, y] = at(node), distance = Math.hypot(x - middle[0], y - middle[1]);
      return distance < best[0] ? [distance, node] : best;
    }, [Infinity, null])[1];
    const held = near && at(near), step = (value) => {
      time = value;
      if (near) {
        const now = at(near);
        view.x -= view.scale * (now[0] - held[0]);
        view.y -= view.scale * (now[1] - held[1]);
        held[0] = now[0]; held[1] = now[1];
      }
      draw(); look();
    };
    if (still) return step(goal);
    const frame = (now) => {
      if (token !== run) return;
      const t = Math.min((now - began) / 900, 1);
      step(mix(from, goal, t));
      if (t < 1) requestAnimationFrame(frame);
    };
    requestAnimationFrame(frame);
  }

  function miniature() {
    const box = map.getBoundingClientRect(), ratio = devicePixelRatio || 1, pen = map.getContext("2d");
    map.width = box.width * ratio; map.height = box.height * ratio;
    pen.scale(ratio, ratio);
    const b = bounds(), sx = box.width / (b.right - b.left), sy = box.height / (b.bottom - b.top);
    const style = getComputedStyle(document.documentElement), colour = (name) => style.getPropertyValue(name);
    const colours = { falls: colour("--falls"), new: colour("--new"), stays: colour("--edge"), end: colour("--edge") };
    for (const node of shown()) {
      const [x, y] = at(node);
      pen.fillStyle = colours[node.kind];
      pen.fillRect((x - WIDTH / 2 - b.left) * sx, (y - HEIGHT / 2 - b.top) * sy, Math.max(WIDTH * sx, 2), Math.max(HEIGHT * sy * 0.8, 1));
    }
    const s = size();
    pen.strokeStyle = colour("--ink");
    pen.lineWidth = 1.5;
    const clip = (value, most) => Math.min(Math.max(value, 1), most - 1);
    const left = clip((-view.x / view.scale - b.left) * sx, box.width), top = clip((-view.y / view.scale - b.top) * sy, box.height);
    const right = clip(((s.width - view.x) / view.scale - b.left) * sx, box.width), bottom = clip(((s.height - view.y) / view.scale - b.top) * sy, box.height);
    pen.strokeRect(left, top, right - left, Math.max(bottom - top, 2));
    map.jump = (event) => {
      const x = (event.clientX - box.left) / sx + b.left, y = (event.clientY - box.top) / sy + b.top;
      view.x = s.width / 2 - view.scale * x;
      view.y = s.height / 2 - view.scale * y;
      look();
    };
  }

  function tell(node) {
    chosen = node ? node.id : null;
    about.hidden = !node;
    for (const each of all) each.g.classList.toggle("hit", each === node);
    light();
    if (!node) return;
    const line = (tag, text) => { const e = document.createElement(tag); e.textContent = text; return e; };
    about.replaceChildren(line("b", node.title), line("code", node.name));
    const falls = node.box && node.box.into !== null ? data.groups[node.box.into] : null;
    if (falls) about.append(line("div", `falls into ${falls.name}, ${falls.does}`));
    if (node.group) {
      const list = document.createElement("ul");
      list.append(...node.group.replaced.map((name) => line("li", name)));
      about.append(line("div", `replaces ${node.group.replaced.length}:`), list);
    }
    if (node.box && !falls && node.leaves) about.append(line("div", "is no longer needed"));
  }

  // Moving about
  const fingers = new Map();
  let moved = 0;
  svg.addEventListener("pointerdown", (event) => { fingers.set(event.pointerId, [event.clientX, event.clientY]); moved = 0; svg.setPointerCapture(event.pointerId); });
  svg.addEventListener("pointermove", (event) => {
    const last = fingers.get(event.pointerId);
    if (!last) return;
    const now = [event.clientX, event.clientY], others = [...fingers.entries()].filter(([id]) => id !== event.pointerId);
    moved += Math.hypot(now[0] - last[0], now[1] - last[1]);
    if (others.length) {
      const other = others[0][1], s = size();
      const before = Math.hypot(last[0] - other[0], last[1] - other[1]), after = Math.hypot(now[0] - other[0], now[1] - other[1]);
      if (before > 0) zoom(after / before, (now[0] + other[0]) / 2 - s.left, (now[1] + other[1]) / 2 - s.top);
    } else {
      view.x += now[0] - last[0];
      view.y += now[1] - last[1];
      look();
    }
    fingers.set(event.pointerId, now);
  });
  const up = (event) => fingers.delete(event.pointerId);
  svg.addEventListener("pointerup", (event) => {
    up(event);
    if (moved > 5) return;
    const under = document.elementsFromPoint(event.clientX, event.clientY).map((e) => e.closest && e.closest(".box")).find(Boolean);
    tell(under ? where.get(Number(under.dataset.id)) : null);
  });
  svg.addEventListener("pointercancel", up);
  svg.addEventListener("wheel", (event) => {
    event.preventDefault();
    const s = size(), unit = event.deltaMode ? 30 : 1;
    if (event.ctrlKey || event.metaKey) return zoom(Math.exp(-event.deltaY * unit / 300), event.clientX - s.left, event.clientY - s.top);
    view.x -= event.deltaX * unit;
    view.y -= event.deltaY * unit;
    look();
  }, { passive: false });
  svg.addEventListener("keydown", (event) => {
    const step = { ArrowUp: [0, 60], ArrowDown: [0, -60], ArrowLeft: [60, 0], ArrowRight: [-60, 0] }[event.key];
    if (!step) return;
    event.preventDefault();
    view.x += step[0];
    view.y += step[1];
    look();
  });
  let dragging = false;
  map.addEventListener("pointerdown", (event) => { dragging = true; map.setPointerCapture(event.pointerId); map.jump(event); });
  map.addEventListener("pointermove", (event) => { if (dragging) map.jump(event); });
  map.addEventListener("pointerup", () => { dragging = false; });

  const middle = (factor) => () => { const s = size(); zoom(factor, s.width / 2, s.height / 2); };
  byId("in").addEventListener("click", middle(1.3));
  byId("out").addEventListener("click", middle(1 / 1.3));
  byId("fit").addEventListener("click", () => fit(true));
  byId("show-before").addEventListener("click", () => go(0));
  byId("show-after").addEventListener("click", () => go(1));
  byId("time").addEventListener("input", (event) => { run++; time = event.target.value / 1000; draw(); });

  // Search
  let hits = [], hit = -1;
  function find(text) {
    const words = text.trim().toLowerCase();
    const fits = (node) => `${node.name} ${node.title}`.toLowerCase().includes(words);
    hits = words ? shown().filter(fits) : [];
    hit = -1;
    for (const node of all) node.g.classList.toggle("dim", Boolean(words) && !fits(node));
    byId("found").textContent = words ? `${hits.length} found` : "";
    if (hits.length) next(1);
  }
  function next(step) {
    if (!hits.length) return;
    hit = (hit + step + hits.length) % hits.length;
    byId("found").textContent = `${hit + 1} of ${hits.length}`;
    centre(hits[hit]);
    tell(hits[hit]);
  }
  byId("find").addEventListener("input", (event) => find(event.target.value));
  byId("find").addEventListener("keydown", (event) => { if (event.key === "Enter") next(event.shiftKey ? -1 : 1); });

  // A row of a table leads to its layer.
  const named = (name) => fresh.find((n) => n.name === name) || nodes.find((n) => n.name === name);
  for (const row of document.querySelectorAll(".wide tbody tr")) row.addEventListener("click", () => {
    const node = named(row.cells[0].textContent);
    if (!node) return;
    time = node.kind === "new" ? 1 : node.leaves ? 0 : time;
    draw();
    byId("graph").scrollIntoView({ behavior: still ? "auto" : "smooth" });
    centre(node);
    tell(node);
  });

  if (location.hash === "#after") time = 1;
  draw();
  fit(false);
  addEventListener("resize", look);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", miniature);
  document.documentElement.dataset.ready = String(all.length);
})();
