// Plots: SVG with axes, drawn anew when their box changes its width.

const MARGIN = { top: 22, right: 12, bottom: 42, left: 52 };
const STEPS_S = [1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 10800, 21600, 43200, 86400, 172800, 604800, 2592000];

/** Call `draw(width)` now and whenever the box's width changes. */
function drawn(box, draw) {
  let last = 0;
  new ResizeObserver(([entry]) => {
    const width = Math.round(entry.contentRect.width);
    if (width === last || width === 0) return;
    last = width;
    box.replaceChildren(draw(width));
  }).observe(box);
  return box;
}

/** The step 1, 2 or 5 times a power of ten that divides `top` into about `parts`. */
function niceStep(top, parts) {
  const rough = top / parts || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  return power * [1, 2, 5, 10].find((step) => step * power >= rough * 0.999);
}

function plotFrame(width, height, summary) {
  return svg("svg", { viewBox: `0 0 ${width} ${height}`, width, height, role: "group", "aria-label": summary });
}

/** The vertical axis: lines and labels. Returns the function from a value to its y. */
function verticalAxis(root, width, height, most, title, format) {
  const step = niceStep(most || 1, 4);
  const top = Math.ceil((most || 1) / step - 1e-9) * step;
  const y = (value) => height - MARGIN.bottom - (value / top) * (height - MARGIN.top - MARGIN.bottom);
  for (let value = 0; value <= top + step / 2; value += step) {
    root.append(svg("line", { class: value ? "grid" : "base", x1: MARGIN.left, x2: width - MARGIN.right, y1: y(value), y2: y(value) }));
    root.append(svg("text", { x: MARGIN.left - 8, y: y(value) + 4, "text-anchor": "end" }, format(value)));
  }
  root.append(svg("text", { x: 0, y: 11 }, title));
  return y;
}

/** The horizontal axis: `ticks` are pairs of x and label; those without room are left out. */
function horizontalAxis(root, width, height, ticks, title) {
  let free = -Infinity;
  for (const [x, label] of ticks) {
    const half = label.length * 3.6;
    const middle = Math.min(Math.max(x, half), width - half);
    root.append(svg("line", { class: "base", x1: x, x2: x, y1: height - MARGIN.bottom, y2: height - MARGIN.bottom + 4 }));
    if (middle - half < free) continue;
    root.append(svg("text", { x: middle, y: height - MARGIN.bottom + 18, "text-anchor": "middle" }, label));
    free = middle + half + 8;
  }
  root.append(svg("text", { x: width - MARGIN.right, y: height - 4, "text-anchor": "end" }, title));
}

/** Makes a shape a button, for the mouse and the keyboard. */
function pickable(shape, label, onpick) {
  if (!onpick) return shape;
  const key = (event) => {
    if (event.key !== "Enter" && event.key !== " ") return;
    event.preventDefault();
    onpick();
  };
  return filled(shape, { role: "button", tabindex: 0, "aria-label": label, onclick: onpick, onkeydown: key }, []);
}

/**
 * A histogram. `bins`: {from, to, count, bad}; `place(value)`: 0 to 1 along the axis; `ticks`: values; `marks`: {at, label};
 * `onpick(bin)` makes the bars buttons.
 */
function histogram(box, { bins, place, ticks, format, title, unit = "rows", marks = [], onpick = null, kind = "good" }) {
  return drawn(box, (width) => {
    const height = 230;
    const root = plotFrame(width, height, `${title}: histogram of ${count(bins.reduce((sum, bin) => sum + bin.count, 0))} ${unit}`);
    const x = (value) => MARGIN.left + place(value) * (width - MARGIN.left - MARGIN.right);
    const y = verticalAxis(root, width, height, Math.max(...bins.map((bin) => bin.count)), unit, short);
    for (const bin of bins) {
      if (!bin.count) continue;
      const label = `${format(bin.from)} to ${format(bin.to)}: ${count(bin.count)} ${unit}`;
      // At least a line for the smallest count.
      const top = Math.min(y(bin.count), y(0) - 1.5);
      const [left, right] = [x(bin.from), x(bin.to)];
      const size = { x: left + 0.5, width: Math.max(right - left - 1, 1), y: top, height: y(0) - top };
      const bar = svg("rect", { class: kind, rx: 1.5, ...size }, svg("title", {}, label));
      root.append(pickable(bar, label, onpick && (() => onpick(bin))));
    }
    horizontalAxis(root, width, height, ticks.map((value) => [x(value), format(value)]), title);
    drawMarks(root, marks, x, y, width);
    return root;
  });
}

function drawMarks(root, marks, x, y, width) {
  // From the right: a label stands left of its line where it would run into the next one, or nowhere.
  let free = Infinity;
  for (const { at, label } of [...marks].reverse()) {
    const place = x(at);
    const room = label.length * 6.6;
    const isLeft = place + 4 + room > Math.min(free, width);
    root.append(svg("line", { class: "mark", x1: place, x2: place, y1: MARGIN.top - 8, y2: y(0) }));
    if (isLeft && place - 4 > free) continue;
    const side = isLeft ? { x: place - 4, "text-anchor": "end" } : { x: place + 4 };
    root.append(svg("text", { class: "mark-label", y: MARGIN.top - 2, ...side }, label));
    free = isLeft ? place - 4 - room : place;
  }
}

/** Counts over time as stacked columns. `series`: {name, kind, values}, one value for each `width_s` seconds. */
function overTime(box, { start, width_s, series }) {
  const totals = series[0].values.map((_, bucket) => series.reduce((sum, one) => sum + one.values[bucket], 0));
  const [unit, factor] = rateUnit(Math.max(...totals) / width_s);
  return drawn(box, (width) => {
    const height = 230;
    const root = plotFrame(width, height, `Rows that ended ${unit}, over time`);
    const end = start + width_s * totals.length;
    const x = (time) => MARGIN.left + ((time - start) / (end - start)) * (width - MARGIN.left - MARGIN.right);
    const rate = (rows) => (rows / width_s) * factor;
    const y = verticalAxis(root, width, height, rate(Math.max(...totals)), unit, short);
    totals.forEach((total, bucket) => {
      const from = start + bucket * width_s;
      const column = svg("g", {}, svg("title", {}, `${moment(from)}: ${series.map((one) => `${count(one.values[bucket])} ${one.name}`).join(", ")}`));
      let below = 0;
      for (const one of series) {
        const rows = one.values[bucket];
        if (!rows) continue;
        const [low, high] = [y(rate(below)), y(rate(below + rows))];
        const side = { x: x(from), width: Math.max(x(from + width_s) - x(from) - (totals.length > 150 ? 0 : 0.8), 0.6) };
        column.append(svg("rect", { class: one.kind, ...side, y: high, height: Math.max(low - high, 1) }));
        below += rows;
      }
      root.append(column);
    });
    horizontalAxis(root, width, height, timeTicks(start, end, x), "time of day of this browser");
    return root;
  });
}

function rateUnit(perSecond) {
  if (perSecond >= 1) return ["rows per second", 1];
  return perSecond * 60 >= 1 ? ["rows per minute", 60] : ["rows per hour", 3600];
}

function timeTicks(start, end, x) {
  const step = STEPS_S.find((one) => (end - start) / one <= 8) ?? STEPS_S.at(-1);
  const shift = new Date(start * 1000).getTimezoneOffset() * 60;
  const first = Math.ceil((start - shift) / step) * step + shift;
  const ticks = [];
  let day = null;
  for (let time = first; time <= end; time += step) {
    const date = new Date(time * 1000);
    const today = date.toLocaleDateString("en-GB", { day: "numeric", month: "short" });
    const clock = date.toLocaleTimeString("en-GB", step < 60 ? {} : { hour: "2-digit", minute: "2-digit" });
    ticks.push([x(time), step >= 86400 ? today : today === day ? clock : `${today}, ${clock}`]);
    day = today;
  }
  return ticks;
}

/** Names with bars. `rows`: {name, count, shown, of, kind, note}; `shown` replaces the count, `of` is the count it is a part of. */
function bars(box, rows, { onpick = null, most = Math.max(...rows.map((row) => row.count), 1) } = {}) {
  box.classList.add("bars");
  for (const row of rows) {
    const fill = el("i", { class: row.kind ?? "good" });
    fill.style.width = `${(100 * row.count) / most}%`;
    const told = row.shown ?? (row.of ? `${count(row.count)} of ${count(row.of)}` : count(row.count));
    box.append(
      el(
        onpick ? "button" : "div",
        { class: "bar", type: onpick && "button", title: visible(row.name), onclick: onpick && (() => onpick(row)) },
        el("span", { class: "name", dir: "auto" }, row.name),
        el("span", { class: "count" }, row.note ? `${told} · ${row.note}` : told),
        el("span", { class: "track" }, fill),
      ),
    );
  }
  return box;
}
