// The page from top to bottom: what was asked, totals, plots; each bar filters the rows below.

const data = JSON.parse(document.getElementById("data").textContent);
const gallery = new Gallery(data);

function drawHead() {
  const { campaign } = data;
  const told = [
    data.output,
    campaign && `begun ${moment(campaign.created)}`,
    `report of ${moment(data.written)}`,
  ];
  document.getElementById("head").append(
    words(data.title, "h1"),
    words(told.filter(Boolean).join(" · "), "p"),
    ...data.notes.map((note) => words(note, "p", "notice")),
  );
}

function drawTiles() {
  const { totals, latency } = data;
  const tiles = [
    [count(totals.rows), "rows"],
    [count(totals.answered), `answered, ${percent(totals.answered, totals.rows)}`],
    [count(totals.failed), `failed, ${percent(totals.failed, totals.rows)}`, totals.failed ? "bad" : ""],
    totals.open ? [count(totals.open), "no answer yet"] : null,
    data.seconds ? [duration(data.seconds), "in all"] : null,
    data.seconds ? [rateOf((totals.answered + totals.failed) / data.seconds), "on average"] : null,
    totals.prompt_tokens ? [short(totals.prompt_tokens), "tokens in prompts"] : null,
    totals.completion_tokens ? [short(totals.completion_tokens), "tokens in answers"] : null,
    latency ? [duration(latency.p50), "median time of a job"] : null,
  ];
  const tile = ([value, name, kind = ""]) => el("div", { class: `tile ${kind}` }, el("b", {}, value), el("span", {}, name));
  document.getElementById("tiles").append(...tiles.filter(Boolean).map(tile));
}

function rateOf(perSecond) {
  if (perSecond >= 1) return `${figure(perSecond)}/s`;
  return perSecond * 60 >= 1 ? `${figure(perSecond * 60)}/min` : `${figure(perSecond * 3600)}/h`;
}

/** A card; `fill(box)` draws into it once it is in the page. */
function plot(id, title, note, size, fill) {
  const box = el("div");
  document.getElementById("plots").append(el("section", { class: `card ${size}`, id }, el("header", {}, el("h2", {}, title), note), box));
  fill(box);
}

function drawAsked() {
  if (data.asked.length) plot("asked", "What was asked", null, data.rate ? "third" : "wide", (box) => box.append(facts(data.asked)));
}

function drawRate() {
  const { rate } = data;
  if (!rate) return;
  const series = [
    { name: "answered", kind: "good", values: rate.answered },
    { name: "failed", kind: "bad", values: rate.failed },
  ];
  const legend = el("span", { class: "legend" }, series.map(({ name, kind }) => el("span", {}, el("i", { class: kind }), name)));
  plot("rate", "Rate over time", legend, data.asked.length ? "two-thirds" : "wide", (box) => overTime(box, { start: rate.start, width_s: rate.width_s, series }));
}

function drawLatency() {
  const { latency } = data;
  if (!latency) return;
  const bins = roomy(latency.bins.map(([from, to, held]) => ({ from, to, count: held })));
  const [low, high] = [Math.log(bins[0].from), Math.log(bins.at(-1).to)];
  const ticks = [];
  for (let power = -6; power < 8; power += 1) ticks.push(...[1, 2, 5].map((step) => step * 10 ** power));
  const marks = [["p50", latency.p50], ["p90", latency.p90], ["p99", latency.p99]].map(([label, at]) => ({ at, label }));
  const told = marks.map(({ at, label }) => `${label} ${duration(at)}`).join(" · ");
  plot("latency", "Time of a job", el("span", {}, told), data.scores ? "" : "wide", (box) =>
    histogram(box, {
      bins,
      place: (value) => (Math.log(value) - low) / (high - low),
      ticks: ticks.filter((value) => Math.log(value) >= low - 1e-9 && Math.log(value) <= high + 1e-9),
      format: duration,
      title: "from submission to answer, logarithmic",
      marks,
    }),
  );
}

/** Logarithmic bins with empty ones at both ends, so that few bars have an axis to stand on. */
function roomy(bins) {
  const step = bins[0].to / bins[0].from;
  while (bins.length < 12) {
    bins.unshift({ from: bins[0].from / step, to: bins[0].from, count: 0 });
    bins.push({ from: bins.at(-1).to, to: bins.at(-1).to * step, count: 0 });
  }
  return bins;
}

function drawScores() {
  const { scores: told } = data;
  if (!told) return;
  const width = 1 / told.bins.length;
  const bins = told.bins.map((held, index) => ({ from: round(index * width), to: round((index + 1) * width), count: held }));
  plot("scores", "Confidence", el("span", {}, "a bar filters the rows below"), "", (box) =>
    histogram(box, {
      bins,
      place: (value) => value,
      ticks: [0, 0.2, 0.4, 0.6, 0.8, 1],
      format: (value) => String(round(value)),
      title: "score",
      onpick: ({ from, to }) => gallery.pick({ low: from, high: to }),
    }),
  );
}

function round(value) {
  return Math.round(value * 1000) / 1000;
}

function drawCounts() {
  const { codes, hosts, totals, labels, stages } = data;
  const whole = (stages ?? []).reduce((sum, stage) => sum + stage.seconds, 0);
  const cards = [
    [
      "codes", "Failures by code", null,
      codes.map((code) => ({ ...code, kind: "bad", note: percent(code.count, totals.rows) })),
      ({ name }) => gallery.pick({ outcome: `code:${name}` }),
    ],
    [
      "hosts", "Failures by host", null,
      hosts.map((host) => ({ name: host.name, count: host.failed, of: host.rows, kind: "bad", note: percent(host.failed, host.rows) })),
      ({ name }) => gallery.pick({ host: name, outcome: FAILED }),
    ],
    [
      "labels", "Answers by label", null,
      labels.map((label) => ({ ...label, note: percent(label.count, totals.answered) })),
      ({ name }) => gallery.pick({ label: name }),
    ],
    [
      "stages", "Where a job's time goes", el("span", {}, "mean of the rows below"),
      (stages ?? []).map(({ name, seconds }) => ({ name, count: seconds, shown: duration(seconds), note: percent(seconds, whole) })),
      null,
    ],
  ].filter(([, , , rows]) => rows.length);
  const size = ["", "wide", "", "third", "quarter"][cards.length];
  for (const [id, title, note, rows, onpick] of cards) plot(id, title, note, size, (box) => bars(box, rows, { onpick }));
}

drawHead();
drawTiles();
drawAsked();
drawRate();
drawLatency();
drawScores();
drawCounts();
document.documentElement.dataset.drawn = "true";
