// Building elements and writing numbers. Every text from the data becomes a text node: nothing here reads HTML.

// Characters that reorder what stands beside them or are invisible, as tasks/printable.py has them, but for line ends.
const HIDDEN =
  /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u00ad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\ud800-\udfff\u{e0000}-\u{e007f}]/gu;

/** The text with hidden characters as escapes, such as \u202e. */
function visible(value) {
  return String(value).replace(HIDDEN, (char) => "\\u" + char.codePointAt(0).toString(16).padStart(4, "0"));
}

/** An element. Attributes that begin with "on" are listeners; children are elements or texts. */
function el(name, attributes = {}, ...children) {
  return filled(document.createElement(name), attributes, children);
}

function svg(name, attributes = {}, ...children) {
  return filled(document.createElementNS("http://www.w3.org/2000/svg", name), attributes, children);
}

function filled(element, attributes, children) {
  for (const [key, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
    else element.setAttribute(key, value === true ? "" : value);
  }
  for (const child of children.flat()) {
    if (child === null || child === undefined) continue;
    element.append(child instanceof Node ? child : document.createTextNode(visible(child)));
  }
  return element;
}

/** A stranger's text in its own box, in its own direction. */
function words(value, name = "div", extra = "") {
  return el(name, { class: `text ${extra}`, dir: "auto" }, value);
}

/** A link that tells its host nothing of this page; a text where the address is no web address. */
function link(address, label) {
  let url = null;
  try {
    url = new URL(address);
  } catch {
    return words(label, "span");
  }
  if (url.protocol !== "http:" && url.protocol !== "https:") return words(label, "span");
  const attributes = { href: url.href, target: "_blank", rel: "noopener noreferrer nofollow", class: "text", dir: "auto" };
  return el("a", attributes, label);
}

const WHOLE = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });

function count(value) {
  return WHOLE.format(value);
}

/** A number with three digits that matter: 1,234; 12.3; 0.0123. */
function figure(value) {
  if (value >= 100) return WHOLE.format(value);
  return String(Number(value.toPrecision(value >= 1 ? 3 : 2)));
}

function short(value) {
  return new Intl.NumberFormat("en", { notation: "compact", maximumFractionDigits: 1 }).format(value);
}

function percent(part, whole) {
  if (!whole) return "–";
  const share = (100 * part) / whole;
  // Neither "0%" of what happened nor "100%" of what did not quite.
  if (share > 0 && share < 0.1) return "<0.1%";
  if (share < 100 && share > 99.9) return ">99.9%";
  return `${share === 100 ? 100 : share.toFixed(1)}%`;
}

/** Seconds for people: 45 ms, 3.2 s, 12 min 5 s, 3 h 12 min. */
function duration(seconds) {
  if (seconds < 0.9995) return `${figure(seconds * 1000)} ms`;
  if (seconds < 59.95) return `${figure(seconds)} s`;
  const whole = Math.round(seconds);
  const [days, hours, minutes] = [Math.floor(whole / 86400), Math.floor(whole / 3600) % 24, Math.floor(whole / 60) % 60];
  if (days) return `${days} d ${hours} h`;
  if (hours) return `${hours} h ${minutes} min`;
  return `${minutes} min ${whole % 60} s`;
}

function moment(seconds) {
  return new Date(seconds * 1000).toLocaleString("en-GB", { dateStyle: "medium", timeStyle: "short" });
}
