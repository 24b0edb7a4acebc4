// An evaluation from top to bottom: its numbers, confusion and calibration, and the rows to look at.

const data = JSON.parse(document.getElementById("data").textContent);
// Of a matrix that can be read; the classes with the most rows.
const MOST_CLASSES = 40;
const NO_ANSWER = "(no answer)";

function drawHead() {
  document.getElementById("head").append(
    words(data.title, "h1"),
    ...data.notes.map((note) => words(note, "p")),
    ...(data.verdict ? [words(data.verdict, "p", "verdict")] : []),
  );
}

function drawTiles() {
  const tile = ({ name, value, note }) => el("div", { class: "tile" }, el("b", {}, value), el("span", {}, name), el("small", {}, note));
  document.getElementById("tiles").append(...data.tiles.map(tile));
}

/** A card; `fill(box)` draws into it once it is in the page. */
function card(id, title, note, size, fill) {
  const box = el("div", { class: "scroll" });
  const header = el("header", {}, el("h2", {}, title), note && el("span", {}, note));
  document.getElementById("plots").append(el("section", { class: `card ${size}`, id }, header, box));
  fill(box);
}

function table(columns, rows, name = "") {
  const head = el("thead", {}, el("tr", {}, columns.map((column, at) => words(column, "th", at ? "value" : ""))));
  const line = ([first, ...rest]) => el("tr", {}, words(first, "th"), rest.map((cell) => (cell instanceof Node ? cell : el("td", {}, cell))));
  return el("table", { class: name }, head, el("tbody", {}, rows.map(line)));
}

function drawDifferences() {
  if (!data.differences) return;
  card("differences", "Both outputs", "p: McNemar's exact test", "wide", (box) => box.append(table(data.columns, data.differences)));
}

function drawConfusion() {
  const { classes, confusion } = data;
  if (!classes) return;
  const shown = [...classes].sort((a, b) => b.support - a.support).slice(0, MOST_CLASSES).map(({ label }) => label).sort();
  const held = new Map(confusion.map(({ truth, answer, rows }) => [JSON.stringify([truth, answer]), rows]));
  const others = [...new Set(confusion.map(({ answer }) => answer))].filter((answer) => answer !== null && !shown.includes(answer));
  const answers = [...shown, ...others.sort().slice(0, Math.max(MOST_CLASSES - shown.length, 0))];
  if (confusion.some(({ answer }) => answer === null)) answers.push(null);
  const support = new Map(classes.map(({ label, support: rows }) => [label, rows]));
  const cell = (truth, answer) => {
    const rows = held.get(JSON.stringify([truth, answer])) ?? 0;
    const told = `${visible(truth)}, answered ${visible(answer ?? NO_ANSWER)}: ${count(rows)}`;
    const box = el("td", { class: rows ? "" : "none", title: told }, count(rows));
    const share = Math.round((100 * rows) / support.get(truth));
    if (rows) box.style.background = `color-mix(in srgb, var(${truth === answer ? "--good" : "--bad"}) ${10 + 0.6 * share}%, transparent)`;
    return box;
  };
  const size = data.calibration.length && answers.length <= 8 ? "" : "wide";
  const all = shown.length < classes.length ? `the ${shown.length} largest of ${count(classes.length)} classes; ` : "";
  card("confusion", "Confusion matrix", `${all}rows by truth (down) and answer (across)`, size, (box) =>
    box.append(table(["truth", ...answers.map((answer) => answer ?? NO_ANSWER)], shown.map((truth) => [truth, ...answers.map((answer) => cell(truth, answer))]), "matrix")),
  );
}

function drawClasses() {
  if (!data.classes) return;
  const share = (value) => (value === null ? "–" : percent(value, 1));
  const rows = data.classes.map((one) => [one.label, share(one.precision), share(one.recall), share(one.f1), count(one.support)]);
  card("classes", "By class", null, "wide", (box) => box.append(table(["class", "precision", "recall", "F1", "rows"], rows)));
}

function drawCalibration() {
  const bins = data.calibration;
  if (!bins?.length) return;
  card("calibration", "Calibration", "on the line: as often right as the probability says", "", (box) =>
    drawn(box, (width) => {
      const height = 300;
      const root = plotFrame(width, height, "Share of right answers by probability");
      const x = (value) => MARGIN.left + value * (width - MARGIN.left - MARGIN.right);
      const y = verticalAxis(root, width, height, 1, "share right", (value) => String(Math.round(value * 100) / 100));
      root.append(svg("line", { class: "ideal", x1: x(0), y1: y(0), x2: x(1), y2: y(1) }));
      root.append(svg("polyline", { class: "curve", points: bins.map((bin) => `${x(bin.score)},${y(bin.accuracy)}`).join(" ") }));
      const most = Math.max(...bins.map((bin) => bin.rows));
      for (const bin of bins) {
        const told = `${bin.low.toFixed(1)} to ${bin.high.toFixed(1)}: ${count(bin.rows)} rows, ${percent(bin.accuracy, 1)} right`;
        const point = { class: "good", cx: x(bin.score), cy: y(bin.accuracy), r: 3 + 5 * Math.sqrt(bin.rows / most) };
        root.append(svg("circle", point, svg("title", {}, told)));
      }
      horizontalAxis(root, width, height, [0, 0.2, 0.4, 0.6, 0.8, 1].map((value) => [x(value), String(value)]), "mean probability of ten equal bins");
      return root;
    }),
  );
}

function drawRows() {
  const { items } = data;
  const box = document.getElementById("rows");
  if (!items.length) return;
  const told = items.length < data.of ? ` (${count(items.length)} of ${count(data.of)})` : ` (${count(items.length)})`;
  box.append(el("h2", {}, data.heading + told), el("ul", { class: "items" }, items.map(item)));
}

const hasPictures = data.items.some(({ thumb }) => thumb);

function item(row) {
  const answers = row.answers.map(({ name, text, is_right: isRight, score }) => [
    name,
    words(`${isRight ? "✓" : "✗"} ${text ?? NO_ANSWER}` + (score === null ? "" : ` (${score.toFixed(3)})`), "dd", isRight ? "right" : "wrong"),
  ]);
  const pairs = [["Row", words(row.id, "dd")], ["Truth", words(row.truth, "dd")], ...answers];
  return el(
    "li",
    { class: "item" },
    hasPictures ? shot(row) : null,
    el("dl", {}, pairs.flatMap(([name, value]) => [el("dt", {}, name), value])),
  );
}

/** The picture: only what the page's writer made itself, a small JPEG, PNG or WebP as data. */
function shot({ thumb }) {
  const box = el("div", { class: "shot muted small" });
  const isOurs = /^data:image\/(?:jpeg|png|webp);base64,[A-Za-z0-9+/=]+$/.test(thumb ?? "");
  box.append(isOurs ? el("img", { src: thumb, alt: "", decoding: "async" }) : "no picture");
  return box;
}

drawHead();
drawTiles();
drawDifferences();
drawConfusion();
drawCalibration();
drawClasses();
drawRows();
document.documentElement.dataset.drawn = "true";
