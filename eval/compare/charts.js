// Draws where training ends and the curves on the way there, with what is told where one points.
const MARKS = {
  task: "M-4.5,-4.5h9v9h-9z", LenVM: "M-5,0a5,5 0 1,0 10,0a5,5 0 1,0 -10,0z", penalty: "M0,-5.5L5.2,4H-5.2z",
  oracle: "M0,-6L6,0L0,6L-6,0z", control: "M-4,-4L4,4M-4,4L4,-4", critic: "M-5.5,0H5.5M0,-5.5V5.5",
  base: "M0,-7L1.9,-2.2 7,-2.2 2.9,1 4.3,6 0,3.1 -4.3,6 -2.9,1 -7,-2.2 -1.9,-2.2z" };
const HOLLOW = ["M-4.5,-4.5h9v9h-9z", "M-5,0a5,5 0 1,0 10,0a5,5 0 1,0 -10,0z", "M0,5.5L5.2,-4H-5.2z"];
const LEFT = 50, RIGHT = 16, TOP = 24, BOTTOM = 40, INK = "var(--ink)";
const FRONTIER = "stroke:var(--oracle-0);stroke-width:3;stroke-opacity:.55";
const tip = document.getElementById("tip");

function mark(parent, path, colour, hollow) {
  return shape(parent, "path", { class: "mark", d: path, style: `stroke:${colour};fill:${hollow ? "none" : colour}` });
}

function swatch(draw) {
  const made = document.createElementNS(SVG, "svg");
  for (const [key, value] of Object.entries({ class: "swatch", viewBox: "-13 -7 26 14", "aria-hidden": "true" })) {
    made.setAttribute(key, value);
  }
  draw(made);
  return made;
}

function armSwatch(name) {
  const { kind, colour, dash } = arms.get(name);
  return swatch((svg) => {
    shape(svg, "path", { class: "line", d: "M-13,0H13", style: `stroke:${colour};stroke-dasharray:${dash}` });
    mark(svg, MARKS[kind], colour);
  });
}

function showTip(title, lines, x, y) {
  tip.replaceChildren(element("b", "", title), ...lines.map((line) => element("div", "", line)));
  tip.hidden = false;
  const box = tip.getBoundingClientRect(), room = document.documentElement;
  tip.style.left = `${Math.max(4, Math.min(x + 14, room.clientWidth - box.width - 4))}px`;
  tip.style.top = `${y + 14 + box.height > room.clientHeight ? Math.max(4, y - box.height - 12) : y + 14}px`;
}

function hideTip() { tip.hidden = true; }

// All but one arm step back while that one is pointed at.
function highlight(name) {
  for (const drawn of document.querySelectorAll(".plot [data-arm]")) {
    drawn.classList.toggle("dim", name !== null && arms.get(name).on && drawn.dataset.arm !== name);
  }
}

// Axes of a plot, and where a number lies on them; `area` cuts off what lies outside.
function axes(svg, [x0, x1], [y0, y1], height, xName, yName) {
  const width = Math.max(260, svg.clientWidth), right = width - RIGHT, bottom = height - BOTTOM;
  const x = (value) => LEFT + ((right - LEFT) * (value - x0)) / (x1 - x0);
  const y = (value) => bottom - ((bottom - TOP) * (value - y0)) / (y1 - y0);
  const decimals = (steps) => Math.max(...steps.map((value) => (String(value).split(".")[1] || "").length));
  svg.replaceChildren();
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  svg.style.height = `${height}px`;
  const up = ticks(y0, y1, Math.floor(height / 60)), along = ticks(x0, x1, Math.max(2, Math.floor(width / 75)));
  for (const value of up) {
    shape(svg, "line", { class: "grid", x1: LEFT, x2: right, y1: y(value), y2: y(value) });
    shape(svg, "text", { x: LEFT - 7, y: y(value) + 4, "text-anchor": "end" }, plain(value, decimals(up)));
  }
  for (const value of along) {
    shape(svg, "line", { class: "axis", x1: x(value), x2: x(value), y1: bottom, y2: bottom + 4 });
    shape(svg, "text", { x: x(value), y: bottom + 17, "text-anchor": "middle" }, plain(value, decimals(along)));
  }
  shape(svg, "line", { class: "axis", x1: LEFT, x2: right, y1: bottom, y2: bottom });
  shape(svg, "text", { class: "name", x: 2, y: 13 }, yName);
  shape(svg, "text", { class: "name", x: right, y: height - 5, "text-anchor": "end" }, xName);
  const size = { x: LEFT, y: TOP, width: right - LEFT, height: bottom - TOP };
  return { x, y, right, bottom, area: shape(svg, "svg", { ...size, viewBox: Object.values(size).join(" ") }) };
}

function extent(values, least) {
  const low = Math.min(...values), high = Math.max(...values), pad = Math.max(0.06 * (high - low), least);
  return [low - pad, high + pad];
}

function finalPoints() {
  const kinds = [...new Set(decoding.map((one) => one.kind))].filter((kind) => kind !== "base");
  const star = { group: "base policy", path: MARKS.base, colour: INK, lines: [] };
  const points = decoding.map(({ name, kind, tokens, accuracy }) => (
    kind === "base" ? { ...star, title: name, tokens, accuracy } : { title: name, group: kind, colour: INK, lines: [],
      path: HOLLOW[kinds.indexOf(kind) % HOLLOW.length], hollow: true, tokens, accuracy }));
  if (world.base_tokens && !points.some((point) => point.path === MARKS.base)) {
    points.push({ ...star, title: "base policy", tokens: world.base_tokens, accuracy: world.base_accuracy });
  }
  for (const cell of shownCells()) for (const arm of cell.arms.filter((one) => arms.get(one.name).on)) {
    points.push({ title: arm.name, arm: arm.name, path: MARKS[arms.get(arm.name).kind],
      colour: arms.get(arm.name).colour, tokens: arm.end_tokens, accuracy: arm.end_accuracy, lines: [
        `${cell.name}, ${cell.algorithm}; learning rate ${rate(arm)}, strength ${strength(arm)}`,
        `rollouts until 90 % of the waste is gone: ${told(arm.until_most, 0)}`] });
  }
  return points.filter((point) => known(point.tokens.estimate) && known(point.accuracy.estimate))
    .sort((a, b) => a.tokens.estimate - b.tokens.estimate);
}

function drawFinals() {
  const svg = document.getElementById("frontier"), points = finalPoints();
  const ends = (name) => points.flatMap((point) => Object.values(point[name]).filter(known));
  if (!points.length) return svg.replaceChildren();
  const [across, up] = [extent(ends("tokens"), 0.5), extent(ends("accuracy"), 0.005)];
  const plot = axes(svg, across, up, 400, "tokens per answer", "accuracy");
  const line = (places, style) => shape(plot.area, "polyline", { class: "line", style,
    points: places.map(([tokens, accuracy]) => `${plot.x(tokens)},${plot.y(accuracy)}`).join(" ") });
  if (DATA.frontier) line(DATA.frontier.tokens.map((tokens, k) => [tokens, DATA.frontier.accuracy[k]]), FRONTIER);
  for (const group of new Set(points.filter((point) => point.hollow).map((point) => point.group))) {
    const own = points.filter((point) => point.group === group);
    const places = own.map((point) => [point.tokens.estimate, point.accuracy.estimate]);
    line(places, `stroke:${INK};stroke-width:1;stroke-opacity:.45`);
  }
  const groups = points.map((point, k) => drawPoint(svg, plot, point, k === 0));
  svg.onkeydown = (event) => {
    const k = groups.indexOf(event.target), last = groups.length - 1;
    const to = { ArrowRight: k + 1, ArrowUp: k + 1, ArrowLeft: k - 1, ArrowDown: k - 1, Home: 0, End: last }[event.key];
    if (event.key === "Escape") hideTip();
    if (!groups[to]) return;
    event.preventDefault();
    groups[k].setAttribute("tabindex", -1);
    groups[to].setAttribute("tabindex", 0);
    groups[to].focus();
  };
  drawKey(points);
}

function drawPoint(svg, plot, point, first) {
  const x = plot.x(point.tokens.estimate), y = plot.y(point.accuracy.estimate);
  const lines = [`accuracy ${told(point.accuracy, 3)}`, `tokens ${told(point.tokens, 1)}`, ...point.lines];
  const group = shape(svg, "g", { class: "point", role: "img", tabindex: first ? 0 : -1,
    "aria-label": [point.title, ...lines].join("; ") });
  if (point.arm) group.dataset.arm = point.arm;
  const ends = (entry, places) => {
    if (known(entry.low) && known(entry.high)) {
      shape(group, "line", { class: "ends", style: `stroke:${point.colour}`, ...places(entry) });
    }
  };
  ends(point.tokens, ({ low, high }) => ({ x1: plot.x(low), x2: plot.x(high), y1: y, y2: y }));
  ends(point.accuracy, ({ low, high }) => ({ x1: x, x2: x, y1: plot.y(low), y2: plot.y(high) }));
  mark(group, point.path, point.colour, point.hollow).setAttribute("transform", `translate(${x},${y})`);
  const hit = shape(group, "circle", { class: "hit", cx: x, cy: y, r: 10 });
  const tell = () => {
    const box = hit.getBoundingClientRect();
    showTip(point.title, lines, box.x + box.width / 2, box.y + box.height / 2);
  };
  for (const event of ["mouseenter", "focus"]) group.addEventListener(event, tell);
  for (const event of ["mouseleave", "blur"]) group.addEventListener(event, hideTip);
  return group;
}

// What stands in the plot beside the arms, which the legend names.
function drawKey(points) {
  const entries = new Map(points.filter((point) => !point.arm)
    .map(({ group, path, colour, hollow }) => [group, (svg) => mark(svg, path, colour, hollow)]));
  if (DATA.frontier) {
    entries.set("best mixtures of the base policy's styles, without waste",
      (svg) => shape(svg, "path", { class: "line", d: "M-13,0H13", style: FRONTIER }));
  }
  document.getElementById("key").replaceChildren(...[...entries].map(([name, draw]) => {
    const made = element("span");
    made.append(swatch(draw), name);
    return made;
  }));
}

function drawCurves() {
  const place = document.getElementById("curves"), share = (entry, part) => (entry ? [part * entry.estimate] : []);
  const panels = [
    ["excess", "waste, tokens per answer", share(world.base_excess, 0.1)],
    ["accuracy", "accuracy", [...share(world.base_accuracy, 1), ...share(world.base_accuracy, 0.9)]]];
  place.replaceChildren();
  for (const cell of shownCells()) {
    const pair = element("div", "pair"), drawn = cell.arms.filter((arm) => arms.get(arm.name).on);
    place.append(element("h3", "", cellTitle(cell)), pair);
    // All stand in their places before one is drawn: it asks how wide it is.
    const plots = (drawn.length ? panels : []).map(([name, label, limits]) => [shape(pair, "svg", {
      class: "plot", role: "img", "aria-label": `${label} against rollouts, ${cell.name}; the table has the numbers`,
    }), drawn, name, label, limits]);
    for (const plot of plots) drawCurve(...plot);
  }
}

function drawCurve(svg, drawn, name, label, limits) {
  const values = drawn.flatMap((arm) => [...arm[name].low, ...arm[name].high]).filter(known);
  const most = Math.max(1, ...drawn.flatMap((arm) => arm.rollouts));
  const [low, high] = extent([...values, ...limits], 0.005);
  const plot = axes(svg, [0, most], [name === "excess" ? 0 : low, high], 270, "rollouts", label);
  for (const y of limits.map(plot.y)) {
    shape(plot.area, "line", { class: "limit", x1: LEFT, x2: plot.right, y1: y, y2: y });
  }
  const along = (arm, side) => arm.rollouts.map((x, k) => [x, arm[name][side][k]]).filter(([, value]) => known(value))
    .map(([x, value]) => `${plot.x(x).toFixed(1)},${plot.y(value).toFixed(1)}`);
  for (const arm of drawn) {
    shape(plot.area, "polygon", { class: "band", "data-arm": arm.name,
      style: `fill:${arms.get(arm.name).colour};fill-opacity:${Math.min(0.12, 0.8 / drawn.length)}`,
      points: [...along(arm, "low"), ...along(arm, "high").reverse()].join(" ") });
  }
  for (const arm of drawn) {
    const { colour, dash } = arms.get(arm.name);
    shape(plot.area, "polyline", { class: "line", "data-arm": arm.name, points: along(arm, "mean").join(" "),
      style: `stroke:${colour};stroke-dasharray:${dash}` });
  }
  const cross = shape(svg, "line", { class: "hover", y1: TOP, y2: plot.bottom, visibility: "hidden" });
  svg.addEventListener("mousemove", (event) => {
    const box = svg.getBoundingClientRect(), [px, py] = [event.clientX - box.x, event.clientY - box.y];
    const nearest = (list, distance) => list.reduce((a, b) => (distance(b) < distance(a) ? b : a));
    const step = (arm) => nearest([...arm.rollouts.keys()], (k) => Math.abs(plot.x(arm.rollouts[k]) - px));
    const steps = drawn.map((arm) => [arm, step(arm)]);
    const [arm, k] = nearest(steps, ([one, at]) => Math.abs(plot.y(one[name].mean[at] ?? Infinity) - py));
    for (const end of ["x1", "x2"]) cross.setAttribute(end, plot.x(arm.rollouts[k]));
    cross.setAttribute("visibility", "visible");
    highlight(arm.name);
    const entry = { estimate: arm[name].mean[k], low: arm[name].low[k], high: arm[name].high[k] };
    const said = `after ${plain(arm.rollouts[k])} rollouts: ${told(entry, name === "excess" ? 1 : 3)}`;
    showTip(arm.name, [said], event.clientX, event.clientY);
  });
  svg.addEventListener("mouseleave", () => {
    cross.setAttribute("visibility", "hidden");
    highlight(null);
    hideTip();
  });
}

