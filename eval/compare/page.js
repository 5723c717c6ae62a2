// The page of a comparison: which cell and which arms are shown, the table and the samples.
const KINDS = { task: 1, LenVM: 3, penalty: 6, oracle: 1, control: 4, critic: 2 };  // and how many colours each has
const ALL = "all", DASH = "–";
// So many arms are all drawn at first; of more, so many penalties.
const FEW = 8, PENALTIES = 3;
const cellChoice = document.getElementById("cell"), table = document.getElementById("table");
const world = DATA.world, decoding = DATA.decoding || [], arms = new Map();
const sorting = { column: null, down: false };
let touched = false;

for (const { name, kind: given } of DATA.cells.flatMap((cell) => cell.arms)) {
  if (arms.has(name)) continue;
  const kind = Object.hasOwn(KINDS, given) ? given : "control", count = KINDS[kind];
  const place = [...arms.values()].filter((arm) => arm.kind === kind).length, turn = Math.floor(place / count);
  const dash = kind === "control" ? ["2 3", "8 2 2 2"][turn % 2] : ["none", "6 3", "8 3 2 3"][turn % 3];
  arms.set(name, { kind, dash, colour: `var(--${kind}-${place % count})`, on: true });
}

const known = (value) => value !== null && value !== undefined;
const shownCells = () => DATA.cells.filter((cell, k) => cellChoice.value === ALL || Number(cellChoice.value) === k);
const cellTitle = ({ completions, group_size: group, algorithm }) => (
  `${completions} rollouts a step, ${group} of each prompt (${algorithm})`);
const rate = (arm) => arm.learning_rate.toExponential();
const strength = (arm) => (known(arm.strength) ? String(arm.strength) : DASH);
const missing = (until) => (until.missed && until.seeds ? `not reached in ${until.missed} of ${until.seeds}` : "");

function plain(value, digits = 0) {
  return known(value) ? number(value, digits).replace(/\B(?=(\d{3})+(?!\d))/g, "\u202f") : DASH;
}

function range(entry, digits) {
  if (!known(entry.low) || entry.low === entry.high) return "";
  const low = plain(entry.low, digits);
  return known(entry.high) ? `${low}–${plain(entry.high, digits)}` : `from ${low}`;
}

// An estimate or a median with its range in one line.
function told(entry, digits) {
  const ends = range(entry, digits);
  return [plain(middle(entry), digits), ends && `(${ends})`, missing(entry)].filter(Boolean).join(" ");
}

// All arms of a few; of many, what the question is about, and the best penalties of the first shown cell.
function chooseArms() {
  if (touched || arms.size <= FEW) return;
  const until = (arm) => arm.until_most.median ?? Infinity;
  const penalties = shownCells()[0].arms.filter((arm) => arm.kind === "penalty");
  const best = penalties.sort((a, b) => (until(a) < until(b) ? -1 : 1)).slice(0, PENALTIES).map((arm) => arm.name);
  for (const [name, arm] of arms) arm.on = ["task", "LenVM", "oracle"].includes(arm.kind) || best.includes(name);
}

function toggle(names, on) {
  touched = true;
  for (const name of names) arms.get(name).on = on;
  drawPlots();
}

function drawLegend() {
  const present = new Set(shownCells().flatMap((cell) => cell.arms.map((arm) => arm.name)));
  document.getElementById("legend").replaceChildren(...Object.keys(KINDS).flatMap((kind) => {
    const names = [...present].filter((name) => arms.get(name).kind === kind);
    const row = element("div"), every = element("button", "kind", kind), buttons = element("div");
    every.title = `all or none: ${kind}`;
    every.addEventListener("click", () => toggle(names, !names.every((name) => arms.get(name).on)));
    buttons.append(...names.map((name) => {
      const button = element("button");
      button.dataset.arm = name;
      button.append(armSwatch(name), name);
      button.addEventListener("click", () => toggle([name], !arms.get(name).on));
      // Not under a finger, which does not leave.
      button.addEventListener("pointerenter", (event) => event.pointerType === "mouse" && highlight(name));
      button.addEventListener("focus", () => button.matches(":focus-visible") && highlight(name));
      for (const event of ["pointerleave", "blur"]) button.addEventListener(event, () => highlight(null));
      return button;
    }));
    row.append(every, buttons);
    return names.length ? [row] : [];
  }));
}

function drawPlots() {
  for (const button of document.querySelectorAll("#legend button[data-arm]")) {
    button.setAttribute("aria-pressed", arms.get(button.dataset.arm).on);
  }
  hideTip();
  drawFinals();
  drawCurves();
}

// Of each column: its title, what it is sorted by, and what stands in its cells, with a note under it.
const middle = (entry) => entry?.median ?? entry?.estimate;
const over = (name, digits) => ({ by: (arm) => middle(arm[name]), cell: ({ [name]: entry }) => (
  entry ? [plain(middle(entry), digits), range(entry, digits), missing(entry)] : [DASH]) });
const COLUMNS = [
  { title: "arm", by: (arm) => arm.name },
  { title: "learning\nrate", by: (arm) => arm.learning_rate, cell: (arm) => [rate(arm)] },
  { title: "strength", by: (arm) => arm.strength, cell: (arm) => [strength(arm)] },
  { title: "rollouts until\n50 % is gone", ...over("until_half", 0) },
  { title: "rollouts until\n90 % is gone", ...over("until_most", 0) },
  { title: "times\nLenVM's", ...over("times_lenvm", 2) },
  { title: "accuracy\nat the end", ...over("end_accuracy", 3) },
  { title: "tokens\nat the end", ...over("end_tokens", 1) },
  { title: "waste\nat the end", ...over("end_excess", 1) },
  { title: "unsafe", by: (arm) => arm.unsafe, cell: (arm) => [`${plain(100 * arm.unsafe)} %`] },
  { title: "below the\nfrontier", ...over("frontier_gap", 3) },
  { title: "answers to\nbreak even", ...over("break_even", 0) },
];

function drawTable() {
  const columns = [...COLUMNS];
  const budget = { title: "budget", by: (arm) => arm.cell, cell: (arm) => [arm.cell] };
  if (shownCells().length > 1) columns.splice(1, 0, budget);
  const rows = shownCells().flatMap((cell) => cell.arms.map((arm) => ({ ...arm, cell: cell.name })));
  const sorted = columns.find((column) => column.title === sorting.column);
  if (sorted) rows.sort((a, b) => compare(sorted.by(a), sorted.by(b)));
  const head = element("tr"), body = element("tbody");
  for (const column of columns) {
    const cell = element("th", column.title === "arm" ? "text" : ""), button = element("button", "", column.title);
    cell.scope = "col";
    if (column === sorted) cell.setAttribute("aria-sort", sorting.down ? "descending" : "ascending");
    button.addEventListener("click", () => {
      sorting.down = sorting.column === column.title && !sorting.down;
      sorting.column = column.title;
      drawTable();
      table.querySelectorAll("thead button")[columns.indexOf(column)].focus();
    });
    cell.append(button);
    head.append(cell);
  }
  for (const arm of rows) {
    const row = element("tr"), name = element("th", "text");
    name.scope = "row";
    name.append(element("div"));
    name.firstChild.append(armSwatch(arm.name), element("span", "", arm.name));
    row.append(name, ...columns.slice(1).map((column) => {
      const [value, ...notes] = column.cell(arm);
      const cell = element("td", column.title === "unsafe" && arm.unsafe ? "bad" : "", value);
      notes.forEach((note, k) => note && cell.append(element("span", k ? "note missed" : "note", note)));
      return cell;
    }));
    body.append(row);
  }
  table.replaceChildren(element("thead"), body);
  table.tHead.append(head);
}

// What is not known comes last, whichever way.
function compare(a, b) {
  if (!known(a) || !known(b)) return known(b) - known(a);
  return (sorting.down ? -1 : 1) * (typeof a === "string" ? a.localeCompare(b, "en", { numeric: true }) : a - b);
}

function drawSamples(samples) {
  const place = document.getElementById("samples");
  place.hidden = !samples.length;
  samples.forEach(({ prompt, rows }, k) => {
    const whole = element("details"), cards = element("div", "cards");
    whole.open = k < 2;
    whole.append(element("summary", "", prompt), cards);
    for (const row of rows) {
      const card = element("div", "card"), text = element("p"), tokens = row.text.split(/\s+/).filter(Boolean);
      const wasted = tokens.filter((_, i) => row.waste[i]).length, facts = element("div", "soft");
      facts.append(element("span", row.correct ? "" : "bad", row.correct ? "right" : "wrong"),
        `, ${tokens.length} tokens, ${wasted} of them waste`);
      tokens.forEach((token, i) => {
        if (row.waste[i] && i && row.waste[i - 1]) text.lastChild.textContent += ` ${token}`;
        else text.append(i ? " " : "", row.waste[i] ? element("s", "", token) : token);
      });
      card.append(element("b", "", row.name), facts, text);
      cards.append(card);
    }
    place.append(whole);
  });
}

function drawCell() {
  chooseArms();
  drawLegend();
  drawPlots();
  drawTable();
}

DATA.cells.forEach((cell, k) => cellChoice.append(new Option(cellTitle(cell), k)));
if (DATA.cells.length > 1) cellChoice.append(new Option("all of them", ALL));
if (world.base_accuracy) {
  document.getElementById("about").textContent = `The policy that training starts from has an accuracy of ` +
    `${told(world.base_accuracy, 3)} and writes ${told(world.base_tokens, 1)} tokens per answer, of which ` +
    `${told(world.base_excess, 1)} are waste. The budget is how many rollouts a step has, and how many of each prompt.`;
}
cellChoice.addEventListener("change", drawCell);
let drawnWidth = window.innerWidth;
window.addEventListener("resize", () => {
  // A phone changes the height while one scrolls.
  if (window.innerWidth !== drawnWidth) drawPlots();
  drawnWidth = window.innerWidth;
});
window.addEventListener("scroll", () => {
  hideTip();
  // What the keys have come to may have been scrolled into sight, and goes on telling.
  if (document.activeElement.matches(".point")) document.activeElement.dispatchEvent(new Event("focus"));
}, { passive: true });
drawSamples(DATA.samples || []);
drawCell();
