// Draws the completions of the page: coloured tokens and a curve, each pointing at the other.
// Two hues that the common kinds of colour blindness tell apart, light enough for dark text.
const ORANGE = [240, 138, 36], BLUE = [84, 156, 222], WHITE = [255, 255, 255];
const MARGIN = { left: 50, right: 12, top: 12, bottom: 50 }, HEIGHT = 230, STRIP = 12;

function colour(shift, limit) {
  const share = Math.min(1, Math.abs(shift) / limit), end = shift > 0 ? ORANGE : BLUE;
  return `rgb(${WHITE.map((from, k) => Math.round(from + share * (end[k] - from))).join(",")})`;
}

function signed(value, digits) {
  return (value >= 0 || Number(value.toFixed(digits)) === 0 ? "+" : "") + number(value, digits);
}

const unit = document.getElementById("unit"), same = document.getElementById("same");

function shifts(entry) {
  return unit.value === "value" ? entry.shift : entry.shift_in_tokens;
}

// Nearly all shifts are told apart; the few beyond get the full colour.
function colourLimit() {
  const all = DATA.completions.flatMap((entry) => shifts(entry).map(Math.abs)).sort((a, b) => a - b);
  return all[Math.floor(0.99 * (all.length - 1))] || all[all.length - 1] || 1;
}

class Panel {
  constructor(place) {
    this.root = element("section", "panel");
    this.root.tabIndex = 0;
    this.root.setAttribute("aria-label", `completion ${place + 1}`);
    const head = element("div", "head");
    this.select = element("select");
    this.select.setAttribute("aria-label", "which completion");
    for (const [index, entry] of DATA.completions.entries()) {
      this.select.append(new Option(`row ${entry.row}: ${entry.length} tokens${entry.finished ? "" : ", cut"}`, index));
    }
    this.facts = element("span", "facts");
    head.append(this.select, this.facts);
    const details = element("details");
    this.prompt = element("pre", "prompt");
    details.append(element("summary", "", "prompt"), this.prompt);
    this.svg = document.createElementNS(SVG, "svg");
    this.svg.setAttribute("role", "img");
    this.readout = element("div", "readout");
    this.readout.setAttribute("aria-live", "polite");
    this.text = element("div", "text");
    this.root.append(head, details, this.svg, this.readout, this.text);
    document.getElementById("panels").append(this.root);
    this.select.value = place;
    this.listen();
  }

  listen() {
    this.select.addEventListener("change", () => { this.show(); drawCurves(); });
    this.text.addEventListener("mouseover", (event) => {
      const token = event.target.closest(".t");
      if (token) this.mark(Number(token.dataset.i));
    });
    this.text.addEventListener("click", (event) => {
      const token = event.target.closest(".t");
      if (token) this.pin(Number(token.dataset.i));
    });
    this.svg.addEventListener("mousemove", (event) => this.mark(this.tokenAt(event)));
    this.svg.addEventListener("click", (event) => this.pin(this.tokenAt(event)));
    for (const part of [this.text, this.svg]) part.addEventListener("mouseleave", () => this.mark(this.pinned));
    this.root.addEventListener("keydown", (event) => this.key(event));
  }

  get entry() { return DATA.completions[Number(this.select.value)]; }

  show() {
    const entry = this.entry;
    this.pinned = null;
    this.marked = null;
    const known = Object.entries(entry.columns).map(([name, value]) => `${name}: ${value}`);
    this.facts.textContent = [
      `prompt ${entry.group}`, entry.finished ? "finished" : "cut: its true length is not known",
      `${number(entry.remaining[0], 1)} predicted before the first token`, ...known].join(" · ");
    this.prompt.textContent = entry.prompt;
    this.text.replaceChildren(...entry.tokens.map((token, i) => this.token(token, i)));
    this.text.scrollTop = 0;
    this.paint();
    this.tell();
  }

  token([text, part, parts, special], i) {
    const made = element("span", special ? "t special" : part < parts ? "t part" : /^ +$/.test(text) ? "t blank" : "t");
    made.dataset.i = i;
    for (const piece of text.split(/(\r\n|\n|\r|\t)/)) {
      if (!piece) continue;
      made.append(/[\r\n\t]/.test(piece) ? element("i", piece === "\t" ? "tab" : "end", piece) : piece);
    }
    return made;
  }

  paint() {
    const own = shifts(this.entry), limit = colourLimit();
    for (const [i, token] of [...this.text.children].entries()) token.style.backgroundColor = colour(own[i], limit);
  }

  // The token whose choice leads from one state to the next: between two points of the curve.
  tokenAt(event) {
    const x = event.clientX - this.svg.getBoundingClientRect().left;
    const state = Math.floor((x - MARGIN.left) / this.scaleX);
    return Math.max(0, Math.min(this.entry.tokens.length - 1, state));
  }

  pin(i) {
    for (const token of this.text.querySelectorAll(".pinned")) token.classList.remove("pinned");
    this.pinned = i;
    if (i !== null) this.text.children[i].classList.add("pinned");
    this.mark(i);
    if (i !== null) this.reveal(this.text.children[i]);
  }

  mark(i) {
    if (this.marked !== null) this.text.children[this.marked].classList.remove("on");
    this.marked = i;
    if (i !== null) this.text.children[i].classList.add("on");
    this.drawMark();
    this.tell();
  }

  // Scrolls the text alone, never the page.
  reveal(token) {
    const box = this.text.getBoundingClientRect(), own = token.getBoundingClientRect();
    if (own.top < box.top + 20) this.text.scrollTop -= box.top + 60 - own.top;
    if (own.bottom > box.bottom - 20) this.text.scrollTop += own.bottom - box.bottom + 60;
  }

  key(event) {
    if (event.target === this.select) return;
    const last = this.entry.tokens.length - 1, far = event.shiftKey ? 10 : 1;
    const from = this.pinned === null ? this.marked : this.pinned;
    const targets = {
      ArrowRight: from === null ? 0 : Math.min(last, from + far),
      ArrowLeft: from === null ? last : Math.max(0, from - far),
      Home: 0, End: last, Escape: null };
    if (!(event.key in targets) || event.altKey || event.ctrlKey || event.metaKey) return;
    event.preventDefault();
    this.pin(targets[event.key]);
  }

  tell() {
    this.readout.replaceChildren();
    const i = this.marked, entry = this.entry;
    if (i === null) {
      this.readout.append(element("span", "idle", "Point at a token or at the curve."));
      return;
    }
    const [text, part, parts, special] = entry.tokens[i];
    const shown = part < parts ? this.whole(i) : text.replace(/\r\n|\n|\r/g, "↵").replace(/\t/g, "⇥").replace(/ /g, "␣");
    const code = element("code", "", shown || "(nothing)");
    code.style.backgroundColor = colour(shifts(entry)[i], colourLimit());
    const change = entry.shift_in_tokens[i];
    const kind = special ? " (special)" : parts > 1 ? ` (part ${part} of ${parts} of a character)` : "";
    this.readout.append(element("b", "", `token ${i + 1}`), ` of ${entry.tokens.length} `, code, kind,
      " makes it ", element("b", "", `${number(Math.abs(change), 2)} tokens ${change < 0 ? "shorter" : "longer"}`),
      ` than expected (${signed(entry.shift[i], 4)} in value). Still to come: predicted `,
      element("b", "", `${number(entry.remaining[i], 1)} → ${number(entry.remaining[i + 1], 1)}`),
      entry.finished ? `, true ${entry.tokens.length - i} → ${entry.tokens.length - i - 1}.`
        : `, at least ${entry.tokens.length - i} → ${entry.tokens.length - i - 1}.`);
  }

  // The character that a token has only a part of stands at the last of its tokens.
  whole(i) {
    const [, part, parts] = this.entry.tokens[i];
    return this.entry.tokens[i + parts - part][0];
  }

  drawCurve(mostX, mostY) {
    const entry = this.entry, width = Math.max(260, this.svg.clientWidth || this.root.clientWidth - 30);
    const inner = { width: width - MARGIN.left - MARGIN.right, height: HEIGHT - MARGIN.top - MARGIN.bottom };
    this.scaleX = inner.width / mostX;
    this.x = (t) => MARGIN.left + t * this.scaleX;
    this.y = (n) => MARGIN.top + inner.height * (1 - Math.min(n, mostY) / mostY);
    this.svg.replaceChildren();
    this.svg.setAttribute("viewBox", `0 0 ${width} ${HEIGHT}`);
    this.svg.setAttribute("aria-label", `predicted against true tokens still to come, row ${entry.row}`);
    const bottom = MARGIN.top + inner.height;
    for (const n of ticks(0, mostY, 4)) {
      shape(this.svg, "line", { class: "grid", x1: MARGIN.left, x2: width - MARGIN.right, y1: this.y(n), y2: this.y(n) });
      shape(this.svg, "text", { x: MARGIN.left - 6, y: this.y(n) + 4, "text-anchor": "end" }, String(n));
    }
    const under = bottom + STRIP + 5;
    for (const t of ticks(0, mostX, Math.max(2, Math.floor(inner.width / 90)))) {
      shape(this.svg, "line", { class: "axis", x1: this.x(t), x2: this.x(t), y1: under - 2, y2: under + 2 });
      shape(this.svg, "text", { x: this.x(t), y: under + 14, "text-anchor": "middle" }, String(t));
    }
    shape(this.svg, "text", { x: MARGIN.left + inner.width / 2, y: HEIGHT - 3, "text-anchor": "middle" },
      "tokens written");
    const own = shifts(entry), limit = colourLimit();
    // Where tokens stand closer than pixels, the strongest of a few is shown.
    const few = Math.max(1, Math.ceil(1.5 / this.scaleX));
    for (let i = 0; i < own.length; i += few) {
      const part = own.slice(i, i + few), strongest = part.reduce((a, b) => (Math.abs(b) > Math.abs(a) ? b : a));
      shape(this.svg, "rect", { class: "shift", "data-i": i, x: this.x(i), y: bottom + 3, height: STRIP,
        width: part.length * this.scaleX, fill: colour(strongest, limit) });
    }
    const last = entry.tokens.length;
    shape(this.svg, "line", { class: "true", x1: this.x(0), y1: this.y(last), x2: this.x(last), y2: this.y(0) });
    const points = entry.remaining.map((n, t) => `${this.x(t).toFixed(1)},${this.y(n).toFixed(1)}`);
    shape(this.svg, "polyline", { class: "predicted", points: points.join(" ") });
    this.drawKey(width, entry.finished);
    this.marks = shape(this.svg, "g", { class: "marks" });
    this.drawMark();
  }

  drawKey(width, finished) {
    const place = { x: width - MARGIN.right - 4, "text-anchor": "end" };
    const lines = [["predicted", "predicted, still to come"], ["true", finished ? "true" : "at least (cut)"]];
    lines.forEach(([name, label], k) => {
      const y = MARGIN.top + 6 + 17 * k;
      shape(this.svg, "line", { class: name, x1: place.x - 26, x2: place.x, y1: y, y2: y });
      shape(this.svg, "text", { ...place, x: place.x - 32, y: y + 4 }, label);
    });
  }

  drawMark() {
    if (!this.marks) return;
    this.marks.replaceChildren();
    const i = this.marked, entry = this.entry;
    if (i === null || i >= entry.tokens.length) return;
    shape(this.marks, "rect", { class: "band", "data-i": i, x: this.x(i), y: MARGIN.top,
      width: Math.max(1, this.scaleX), height: HEIGHT - MARGIN.top - MARGIN.bottom + STRIP + 3 });
    for (const t of [i, i + 1]) {
      shape(this.marks, "circle", { class: "dot", r: 3.5, cx: this.x(t), cy: this.y(entry.remaining[t]) });
    }
  }
}

const panels = DATA.completions.slice(0, 2).map((_, place) => new Panel(place));

function drawCurves() {
  const extents = panels.map(({ entry }) => [entry.tokens.length, Math.max(entry.tokens.length, ...entry.remaining)]);
  panels.forEach((panel, place) => {
    const chosen = same.checked ? extents : [extents[place]];
    panel.drawCurve(Math.max(...chosen.map(([x]) => x)), Math.max(...chosen.map(([, y]) => y)));
  });
}

function drawLegend() {
  const limit = colourLimit(), tokens = unit.value === "tokens";
  const ends = [-limit, limit].map((end) => signed(end, tokens ? (limit < 10 ? 1 : 0) : 3));
  document.getElementById("low").textContent = `shorter ${ends[0]}`;
  document.getElementById("high").textContent = `${ends[1]} longer`;
  const stops = [-1, 0, 1].map((share) => colour(share * limit, limit));
  document.getElementById("bar").style.background = `linear-gradient(to right, ${stops.join(", ")})`;
  document.getElementById("legend").setAttribute("aria-label", `blue: shorter, orange: longer; ${ends.join(" to ")}`);
}

function drawAll() {
  drawLegend();
  for (const panel of panels) panel.paint();
  drawCurves();
}

document.title = DATA.title;
document.getElementById("title").textContent = DATA.title;
document.getElementById("about").textContent = DATA.about;
unit.addEventListener("change", () => { drawAll(); for (const panel of panels) panel.tell(); });
same.addEventListener("change", drawCurves);
window.addEventListener("resize", drawCurves);
for (const panel of panels) panel.show();
drawAll();
