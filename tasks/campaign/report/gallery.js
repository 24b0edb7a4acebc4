// The rows: search, filters, order, pages of cards, and one row in a dialog.

const PAGE = 60;
const FAILED = "failed";
const ANSWERED = "answered";
const OPEN = "open";

const ORDERS = {
  row: ["Row number", (a, b) => a.row - b.row],
  low: ["Lowest score", (a, b) => last(a.score, Infinity) - last(b.score, Infinity)],
  high: ["Highest score", (a, b) => last(b.score, -Infinity) - last(a.score, -Infinity)],
  slow: ["Slowest", (a, b) => last(b.seconds, -1) - last(a.seconds, -1)],
  fast: ["Fastest", (a, b) => last(a.seconds, Infinity) - last(b.seconds, Infinity)],
  long: ["Longest answer", (a, b) => (b.answer ?? "").length - (a.answer ?? "").length],
  answer: ["Answer, A to Z", (a, b) => LETTERS.compare(a.answer ?? a.label ?? "\uffff", b.answer ?? b.label ?? "\uffff")],
};
const LETTERS = new Intl.Collator(undefined, { numeric: true });

/** Rows without a value come last. */
function last(value, otherwise) {
  return value ?? otherwise;
}

function folded(text) {
  return text.normalize("NFKC").toLowerCase();
}

class Gallery {
  constructor(data) {
    this.data = data;
    this.items = data.items;
    for (const item of this.items) item.hay = haystack(item);
    const prompts = new Set(this.items.map((item) => item.prompt ?? ""));
    this.look = { hasPictures: data.thumbnails.shown > 0, hasPrompts: prompts.size > 1 };
    this.none = { query: "", outcome: "", label: "", host: "", low: null, high: null };
    this.filter = { ...this.none };
    this.order = "row";
    this.page = 0;
    this.list = document.getElementById("items");
    this.dialog = document.getElementById("detail");
    this.controls = this.toolbar();
    this.dialog.addEventListener("keydown", (event) => this.step(event));
    this.dialog.addEventListener("click", (event) => event.target === this.dialog && this.dialog.close());
    this.dialog.addEventListener("close", () => this.card(this.at)?.focus());
    this.apply();
  }

  /** Apply a filter beside those in force, as a click on a plot does, and show its rows. */
  pick(filter) {
    Object.assign(this.filter, filter);
    this.apply();
    document.getElementById("gallery").scrollIntoView({ block: "start" });
  }

  toolbar() {
    const { data } = this;
    const change = (name, read) => (event) => {
      this.filter[name] = read(event.target.value);
      this.apply();
    };
    const bound = (value) => (value === "" ? null : Number(value));
    const controls = {
      query: el("input", { type: "search", placeholder: "Words in answers, prompts, ids, addresses …", oninput: change("query", String) }),
      outcome: choice(outcomes(data), change("outcome", String)),
      label: choice(named(data.labels, "All labels"), change("label", String)),
      low: number("Lowest score", change("low", bound)),
      high: number("Highest score", change("high", bound)),
      order: choice(orders(this.items), (event) => {
        this.order = event.target.value;
        this.apply();
      }),
    };
    const form = document.getElementById("toolbar");
    form.addEventListener("submit", (event) => event.preventDefault());
    form.append(
      el("label", { class: "search" }, "Search", controls.query),
      el("label", {}, "Outcome", controls.outcome),
      data.labels.length ? el("label", {}, "Label", controls.label) : "",
      data.scores ? el("label", {}, "Score", el("span", { class: "range" }, controls.low, "to", controls.high)) : "",
      el("label", {}, "Order", controls.order),
      el("button", { type: "button", id: "clear", onclick: () => this.pick({ ...this.none }) }, "Clear"),
    );
    return controls;
  }

  apply() {
    const { filter } = this;
    for (const name of ["query", "outcome", "label", "low", "high"]) {
      const value = filter[name] ?? "";
      if (this.controls[name].value !== String(value)) this.controls[name].value = value;
    }
    const queried = folded(filter.query).split(/\s+/).filter(Boolean);
    this.found = this.items.filter((item) => passes(item, filter, queried)).sort(ORDERS[this.order][1]);
    this.page = 0;
    this.draw();
  }

  draw() {
    const first = this.page * PAGE;
    const shown = this.found.slice(first, first + PAGE);
    const cards = shown.map((item, index) => card(item, this.look, () => this.open(first + index)));
    this.list.replaceChildren(...cards);
    if (!shown.length) this.list.append(el("li", { class: "empty" }, "No row has all of this. Clear a filter to see more."));
    this.drawFound(first, shown.length);
    this.drawPages();
  }

  drawFound(first, shown) {
    const { found, data } = this;
    const rows = found.length === this.items.length ? `${count(found.length)} rows` : `${count(found.length)} of ${count(this.items.length)} rows`;
    const range = found.length > PAGE ? `, ${count(first + 1)} to ${count(first + shown)} here` : "";
    const sampled = data.sample.rows < data.sample.of ? ` (a sample of ${count(data.sample.of)})` : "";
    const told = document.getElementById("found");
    told.replaceChildren(el("span", {}, rows + sampled + range));
    if (this.filter.host) told.append(chip(`Host: ${this.filter.host} ✕`, "", () => this.pick({ host: "" }), "Drop this filter"));
  }

  drawPages() {
    const pages = Math.max(Math.ceil(this.found.length / PAGE), 1);
    const turn = (label, page, name) =>
      el("button", { type: "button", "aria-label": name, disabled: page < 0 || page >= pages || page === this.page, onclick: () => this.turn(page) }, label);
    const nav = document.getElementById("pages");
    nav.hidden = pages === 1;
    nav.replaceChildren(
      turn("«", 0, "First page"),
      turn("‹ Back", this.page - 1, "Previous page"),
      el("span", { class: "muted" }, `Page ${count(this.page + 1)} of ${count(pages)}`),
      turn("Next ›", this.page + 1, "Next page"),
      turn("»", pages - 1, "Last page"),
    );
  }

  turn(page) {
    this.page = page;
    this.draw();
    document.getElementById("gallery").scrollIntoView({ block: "start" });
    this.list.querySelector("button")?.focus({ preventScroll: true });
  }

  /** The card's button of a row in view. */
  card(at) {
    return this.list.querySelectorAll(".item > button")[at - this.page * PAGE];
  }

  open(at) {
    this.at = at;
    const page = Math.floor(at / PAGE);
    if (page !== this.page) {
      this.page = page;
      this.draw();
    }
    this.dialog.replaceChildren(this.detail(this.found[at]));
    if (!this.dialog.open) this.dialog.showModal();
    this.dialog.scrollTop = 0;
  }

  step(event) {
    const to = this.at + ({ ArrowLeft: -1, ArrowRight: 1 }[event.key] ?? 0);
    if (to === this.at || to < 0 || to >= this.found.length) return;
    event.preventDefault();
    this.open(to);
  }

  detail(item) {
    const button = (label, to, name) =>
      el("button", { type: "button", "aria-label": name, disabled: to < 0 || to >= this.found.length, onclick: () => this.open(to) }, label);
    return el(
      "div",
      { class: "detail" },
      el(
        "div",
        { class: "bar-top" },
        el("h2", {}, `Row ${count(item.row)}`),
        button("‹", this.at - 1, "Previous row"),
        button("›", this.at + 1, "Next row"),
        el("button", { type: "button", onclick: () => this.dialog.close() }, "Close"),
      ),
      item.thumb ? shot(item) : null,
      facts(details(item, this.data)),
    );
  }
}

function haystack(item) {
  const told = [item.row, item.id, item.image, item.prompt, item.answer, item.label, item.code, item.error, ...(item.others ?? [])];
  return folded(told.filter((one) => one !== null && one !== undefined).join("\n"));
}

function passes(item, filter, queried) {
  if (filter.outcome && filter.outcome !== item.state && filter.outcome !== `code:${item.code}`) return false;
  if (filter.label && filter.label !== item.label) return false;
  if (filter.host && filter.host !== item.host) return false;
  if (filter.low !== null && !(item.score >= filter.low)) return false;
  if (filter.high !== null && !(item.score <= filter.high)) return false;
  return queried.every((word) => item.hay.includes(word));
}

function outcomes({ totals, codes }) {
  const states = [[ANSWERED, "Answered", totals.answered], [FAILED, "Failed", totals.failed], [OPEN, "No answer yet", totals.open]];
  return [
    ["", "All outcomes"],
    ...states.filter(([, , rows]) => rows).map(([value, name, rows]) => [value, `${name} (${count(rows)})`]),
    ...codes.map(({ name, count: rows }) => [`code:${name}`, `${name} (${count(rows)})`]),
  ];
}

function named(rows, all) {
  return [["", all], ...rows.map(({ name, count: held }) => [name, `${cut(name, 40)} (${count(held)})`])];
}

function cut(text, most) {
  return text.length > most ? `${text.slice(0, most - 1)}…` : text;
}

/** The orders that these rows have values for. */
function orders(items) {
  const needs = { low: "score", high: "score", slow: "seconds", fast: "seconds", long: "answer" };
  return Object.entries(ORDERS)
    .filter(([name]) => !needs[name] || items.some((item) => item[needs[name]] !== undefined))
    .map(([name, [label]]) => [name, label]);
}

function choice(options, onchange) {
  return el("select", { onchange }, options.map(([value, label]) => el("option", { value }, label)));
}

function number(label, oninput) {
  return el("input", { type: "number", min: 0, max: 1, step: 0.05, "aria-label": label, oninput });
}

function chip(label, kind, onclick = null, title = null) {
  return el(onclick ? "button" : "span", { class: `chip ${kind}`, type: onclick && "button", title, onclick }, el("span", { class: "name", dir: "auto" }, label));
}

/** A row in the list. A prompt that all rows share is left to the row's dialog. */
function card(item, { hasPictures, hasPrompts }, onclick) {
  const isPlain = item.answer === undefined || item.answer === item.label;
  return el(
    "li",
    { class: "item" },
    el(
      "button",
      { type: "button", onclick },
      hasPictures ? shot(item) : null,
      el(
        "div",
        { class: "said" },
        item.code ? chip(item.code, "bad") : null,
        item.state === OPEN ? chip("no answer yet", "idle") : null,
        item.error ? words(item.error, "div", "error clamp") : null,
        item.label ? words(item.label, "div", "answer clamp two") : null,
        isPlain ? null : words(item.answer, "div", "answer clamp"),
        item.score === undefined ? null : meter(item.score),
        item.prompt && hasPrompts ? words(item.prompt, "div", "prompt clamp two") : null,
      ),
      el("div", { class: "foot" }, el("span", { dir: "auto" }, called(item)), el("span", {}, item.seconds === undefined ? "" : duration(item.seconds))),
    ),
  );
}

/** What a row is called: its id, its picture's file, or its number. */
function called(item) {
  return item.id ?? (item.image && !item.host && !item.image.startsWith("data:") ? item.image : `row ${count(item.row)}`);
}

/** The picture: only what the page's writer made itself, a small JPEG, PNG or WebP as data. */
function shot(item) {
  const box = el("div", { class: "shot" });
  if (/^data:image\/(?:jpeg|png|webp);base64,[A-Za-z0-9+/=]+$/.test(item.thumb ?? "")) {
    box.append(el("img", { src: item.thumb, alt: "", decoding: "async" }));
    if (item.more > 0) box.append(el("span", { class: "more" }, `+${count(item.more)}`));
  } else {
    box.append(words(item.host ?? "no picture"));
  }
  return box;
}

function meter(score) {
  const fill = el("b");
  fill.style.width = `${Math.min(Math.max(score, 0), 1) * 100}%`;
  return el("div", { class: "meter" }, el("i", {}, fill), score.toFixed(2));
}

function facts(pairs) {
  const told = pairs.filter(([, value]) => value !== undefined && value !== null && value !== "");
  return el("dl", { class: "facts" }, told.flatMap(([name, value]) => [el("dt", {}, name), el("dd", {}, value instanceof Node ? value : words(value))]));
}

function details(item, data) {
  return [
    ["Id", item.id],
    ["Picture", item.image && link(item.image, item.image)],
    ["More pictures", item.more > 0 ? count(item.more) : null],
    ["Prompt", item.prompt],
    ["Label", item.label],
    ["Score", item.score?.toFixed(4)],
    ["Answer", item.answer],
    ["Scores", item.scores && scores(item.scores)],
    ["Error", item.code && chip(item.code, "bad")],
    ["Message", item.error],
    ["Ended because", item.finish],
    ["Time", item.seconds === undefined ? null : duration(item.seconds)],
    ["Ended", item.ended && moment(item.ended)],
    ["Tokens", item.tokens && `${count(item.tokens[0])} in, ${count(item.tokens[1])} out`],
    ["Job", item.job],
    ...data.columns.map((name, index) => [name, item.others?.[index]]),
  ];
}

function scores(pairs) {
  return bars(el("div"), pairs.map(([name, score]) => ({ name, count: score, shown: score.toFixed(3) })), { most: 1 });
}
