// One item after the other: its state here, its decisions at the server, and the keys.

const { token } = JSON.parse(document.getElementById("data").textContent);
const [WANTED, FEW] = [20, 5];
const POLL_MS = 3000;
const EMPTY = "(empty)";
const box = (id) => document.getElementById(id);

/**
 * `queue`: items here, the shown one first. `undoable`: decisions, the last one at the end; `done`: their number, with those
 * that it is too late to undo. `unsaved`: the decision that the server did not take.
 */
const state = { queue: [], left: 0, done: 0, undoable: [], skipped: new Set(), unsaved: null, isBusy: false, changes: 0, picture: 0 };

/** A request, whose failure is a sentence for the reviewer. */
async function ask(path, body = null) {
  const headers = { Authorization: `Bearer ${token}`, ...(body && { "Content-Type": "application/json" }) };
  const sent = { method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body), signal: AbortSignal.timeout(35000) };
  let reply;
  try {
    reply = await fetch(path, sent);
  } catch {
    throw new Error("The command idefics-jobs review does not answer. Is it still running?");
  }
  if (reply.ok) return reply;
  const told = await reply.json().catch(() => ({}));
  throw new Error(told.error ?? `The command idefics-jobs review answers with ${reply.status}.`);
}

async function askJson(path, body) {
  return (await ask(path, body)).json();
}

// What is waiting.

async function refill() {
  const before = state.changes;
  const { items, left } = await askJson(`/items?limit=${state.skipped.size + WANTED}`);
  // Of a decision that was made meanwhile this list knows nothing.
  if (before !== state.changes) return;
  const shown = state.queue[0];
  const others = items.filter((item) => item.id !== shown?.id);
  const byId = new Map(others.map((item) => [item.id, item]));
  const later = [...state.skipped].map((id) => byId.get(id)).filter(Boolean);
  const fresh = others.filter((item) => !state.skipped.has(item.id));
  state.queue = [...(shown ? [shown] : []), ...fresh, ...later];
  state.left = left;
  if (!shown) showItem();
  showProgress();
  preload(state.queue[1]);
}

async function refillIfFew() {
  const fresh = state.queue.filter((item) => !state.skipped.has(item.id)).length;
  if (fresh >= FEW || state.queue.length >= state.left) return;
  await refill().catch(state.queue.length ? () => null : (failure) => showProblem(failure.message));
}

async function poll() {
  if (state.queue.length || state.isBusy || document.hidden) return;
  try {
    await refill();
    if (!state.unsaved) showProblem("");
  } catch (failure) {
    showProblem(failure.message);
  }
}

// Decisions. While one is being saved keys do nothing: they would be meant for a picture that nobody has seen.

async function exclusively(act) {
  if (state.isBusy) return;
  state.isBusy = true;
  document.body.setAttribute("aria-busy", "true");
  try {
    await act();
  } finally {
    state.isBusy = false;
    document.body.removeAttribute("aria-busy");
  }
  refillIfFew();
}

const decide = (answer) => exclusively(() => save(answer));
const undo = () => exclusively(takeBack);

async function save(answer) {
  const item = state.queue[0];
  if (!item) return;
  const isAgain = state.unsaved?.id === item.id;
  markChosen(answer);
  let told;
  try {
    told = await askJson("/decide", { id: item.id, answer });
  } catch (failure) {
    state.unsaved = { id: item.id, answer };
    say("");
    showProblem(`Not saved: ${named(answer)}. ${failure.message}`, () => decide(answer));
    return;
  }
  if (told.saved) {
    state.undoable.push({ item, answer });
    state.done += 1;
  }
  state.left = told.left;
  state.queue.shift();
  state.skipped.delete(item.id);
  changed();
  if (told.saved) say(`Saved: ${named(answer)}.`);
  else if (isAgain) say("This one is decided already: by your first try, or by another reviewer.");
  else say("Another reviewer was first. Your decision was not saved.");
}

async function takeBack() {
  const last = state.undoable.at(-1);
  if (!last) return say("There is nothing to undo.");
  let told;
  try {
    told = await askJson("/undo", { id: last.item.id });
  } catch (failure) {
    return showProblem(`Not undone: ${named(last.answer)}. ${failure.message}`, undo);
  }
  state.undoable.pop();
  if (!told.undone) {
    showProblem("");
    showProgress();
    return say(`Too late to undo: ${named(last.answer)}. The decision has gone out.`);
  }
  state.done -= 1;
  state.left = told.left;
  state.queue.unshift(last.item);
  changed();
  say(`Undone: ${named(last.answer)}.`);
}

function skip() {
  if (state.isBusy || !state.queue.length) return;
  const item = state.queue.shift();
  state.skipped.delete(item.id);
  state.skipped.add(item.id);
  state.queue.push(item);
  const isAlone = state.queue.length === 1;
  changed();
  say(isAlone ? "This is the only one that is left." : "Skipped: it comes again after the others.");
  refillIfFew();
}

function changed() {
  state.changes += 1;
  state.unsaved = null;
  showProblem("");
  showItem();
  showProgress();
}

function named(answer) {
  if (answer === null) return "cannot tell";
  return answer.length > 80 ? `${answer.slice(0, 80)}…` : answer || EMPTY;
}

// What is shown.

function say(text) {
  box("notice").textContent = visible(text);
}

/** Show a problem, with a button that tries again; no text hides it. */
function showProblem(text, again = null) {
  const button = again && el("button", { type: "button", class: "plain", onclick: again }, "Try again");
  const told = text ? [visible(text), button].filter(Boolean) : [];
  if (box("problem").firstChild?.data === told[0] && !again) return;
  box("problem").replaceChildren(...told);
}

function showProgress() {
  const { left, done } = state;
  box("progress").textContent = `${count(left)} left · ${count(done)} decided in this session`;
  box("bar").max = Math.max(left + done, 1);
  box("bar").value = done;
  box("undo").disabled = state.undoable.length === 0;
  document.title = `(${count(state.left)}) Review`;
}

function showItem() {
  const item = state.queue[0];
  box("item").hidden = !item;
  box("empty").hidden = Boolean(item) || state.left > 0;
  document.documentElement.dataset.drawn = "true";
  if (!item) return;
  state.picture = 0;
  showPictures(box("pictures"), item, 0);
  box("asked").textContent = visible(item.asked);
  box("sureness").textContent = sureness(item);
  box("answers").replaceChildren(...item.answers.map(answerButton));
  box("field").value = "";
  box("facts").replaceChildren(...facts(item));
  // A screen reader then reads the question, and the next Tab goes to the answers.
  box("asked").focus({ preventScroll: true });
  window.scrollTo(0, 0);
  preload(state.queue[1]);
}

function choosePicture(index) {
  const item = state.queue[0];
  if (!item || index < 0 || index >= item.pictures) return;
  const hadFocus = box("pictures").contains(document.activeElement);
  state.picture = index;
  showPictures(box("pictures"), item, index);
  if (hadFocus) box("pictures").querySelector("[aria-current]").focus();
}

function sureness(item) {
  return `The model is ${percent(item.confidence, 1)} sure; the job asked for ${percent(item.min_confidence, 1)}.`;
}

function answerButton(answer, place) {
  const key = place < 9 ? String(place + 1) : null;
  const attributes = { type: "button", class: "answer", "aria-keyshortcuts": key, onclick: () => decide(answer.text) };
  const share = answer.confidence;
  const bar = el("i");
  bar.style.width = `${100 * Math.min(Math.max(share ?? 0, 0), 1)}%`;
  return el(
    "li",
    {},
    el(
      "button",
      attributes,
      key ? el("kbd", {}, key) : el("span"),
      words(answer.text || EMPTY, "span"),
      share === null ? el("span") : el("span", { class: "muted" }, percent(share, 1)),
      share === null ? null : el("span", { class: "track", "aria-hidden": "true" }, bar),
    ),
  );
}

function markChosen(answer) {
  const answers = state.queue[0].answers;
  box("answers").querySelectorAll("button").forEach((button, place) => {
    button.setAttribute("aria-pressed", String(answers[place].text === answer));
  });
}

function facts(item) {
  const told = { Job: item.id, Task: item.task, Model: item.model, Created: moment(item.created), Metadata: item.metadata };
  return Object.entries(told)
    .filter(([, value]) => value && JSON.stringify(value) !== "{}")
    .flatMap(([name, value]) => [el("dt", {}, name), el("dd", {}, words(typeof value === "string" ? value : JSON.stringify(value, null, 2)))]);
}

// Keys.

function writeAnother() {
  if (!state.queue.length) return;
  const field = box("field");
  if (!field.value) field.value = state.queue[0].answers[0]?.text ?? "";
  field.focus();
  field.select();
}

function saveField() {
  const text = box("field").value.trim();
  if (text) decide(text);
  else say("The field is empty: write an answer, or press Esc to leave it.");
}

const KEYS = {
  0: () => decide(null),
  "-": () => decide(null),
  e: writeAnother,
  s: skip,
  " ": skip,
  u: undo,
  ArrowLeft: () => choosePicture(state.picture - 1),
  ArrowRight: () => choosePicture(state.picture + 1),
};

function onKey(event) {
  if (event.isComposing || event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.target === box("field")) return onFieldKey(event);
  // These act on their own with a blank.
  if (event.key === " " && event.target.closest("button, summary, a")) return;
  const answer = /^[1-9]$/.test(event.key) ? state.queue[0]?.answers[Number(event.key) - 1] : null;
  const act = answer ? () => decide(answer.text) : KEYS[event.key.length === 1 ? event.key.toLowerCase() : event.key];
  if (!act) return;
  event.preventDefault();
  // A key that is held down is meant for one picture.
  if (!event.repeat) act();
}

function onFieldKey(event) {
  if (event.key === "Escape") box("asked").focus();
  if (event.key !== "Enter" || event.shiftKey) return;
  event.preventDefault();
  if (!event.repeat) saveField();
}

document.addEventListener("keydown", onKey);
box("other").addEventListener("submit", (event) => {
  event.preventDefault();
  saveField();
});
box("unknown").addEventListener("click", () => decide(null));
box("skip").addEventListener("click", skip);
box("undo").addEventListener("click", undo);
window.addEventListener("beforeunload", (event) => {
  if (state.unsaved) event.preventDefault();
});
setInterval(poll, POLL_MS);
poll();
