// The pictures of an item: one large, the others as buttons below it. They are kept as blobs, so that the next item's are
// here before it is shown; a request has the token in a header, which an image's address cannot have.

const KEPT = 24;
const kept = new Map();

/** The promise of a picture's address in this page. */
function pictureOf(item, index) {
  const key = JSON.stringify([item.id, index]);
  if (!kept.has(key)) {
    kept.set(key, load(item.id, index));
    kept.get(key).catch(() => kept.delete(key));
    if (kept.size > KEPT) drop(kept.keys().next().value);
  }
  return kept.get(key);
}

async function load(id, index) {
  const reply = await ask(`/picture?${new URLSearchParams({ id, index })}`);
  return URL.createObjectURL(await reply.blob());
}

function drop(key) {
  kept.get(key).then(URL.revokeObjectURL, () => null);
  kept.delete(key);
}

/** Load what will be shown first of an item. */
function preload(item) {
  if (item?.pictures) pictureOf(item, 0).catch(() => null);
}

/** Show an item's pictures in a box; `chosen` is the large one. */
function showPictures(box, item, chosen) {
  const large = el("figure", { class: "large" });
  box.replaceChildren(large);
  if (!item.pictures) {
    large.append(el("p", { class: "missing" }, "This job has no picture that is kept."));
    return;
  }
  const name = item.pictures > 1 ? `Picture ${chosen + 1} of ${item.pictures}` : "The picture";
  fill(large, item, chosen, name);
  if (item.pictures < 2) return;
  const strip = el("div", { class: "strip", role: "group", "aria-label": "All pictures" });
  for (let index = 0; index < item.pictures; index += 1) {
    const current = index === chosen && "true";
    const label = `Show picture ${index + 1}`;
    const button = el("button", { type: "button", "aria-label": label, "aria-current": current, onclick: () => choosePicture(index) });
    fill(button, item, index, "");
    strip.append(button);
  }
  box.append(strip);
}

async function fill(frame, item, index, alt) {
  try {
    const image = el("img", { src: await pictureOf(item, index), alt });
    image.addEventListener("error", () => image.replaceWith(el("p", { class: "missing" }, "The picture cannot be shown.")));
    frame.replaceChildren(image);
  } catch (failure) {
    frame.replaceChildren(el("p", { class: "missing" }, failure.message));
  }
}
