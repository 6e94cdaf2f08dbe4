// The list of clips stored in this browser, in sync over all tabs. A clip is {id, at, order, blob, rateHz, model, facts,
// seconds, durationS, isFavourite}.

import * as store from "./store.js";
import { fileName, formatTime, kindOf, titleOf } from "./words.js";
import { zipBlob } from "./zip.js";

const element = (id) => document.getElementById(id);

export class Clips {
  // Calls `onShow(clip)` when a clip is selected, `onDelete(clip)` when it is deleted, `onFile(blob, name)` with a file to
  // save, `onError(error)` if that fails.
  constructor({ onShow, onDelete, onFile, onError }) {
    Object.assign(this, { onShow, onDelete, onFile, onError });
    this.byId = new Map();
    this.chosen = new Set(); // ids
    this.shown = null;
    store.onChange((name) => name === "takes" && this.load());
    element("only-favourites").addEventListener("click", () => this.filter());
    element("zip").addEventListener("click", () => this.saveZip().catch(onError));
    element("forget-all").addEventListener("click", () => this.askToForget());
    element("forget-dialog").addEventListener("close", () => element("forget-dialog").returnValue === "forget" && this.clear());
  }

  async load() {
    const all = await store.all("takes");
    this.byId = new Map(all.map((clip) => [clip.id, clip]));
    this.draw();
  }

  // Returns whether the browser stores the clip beyond this page.
  async add(clip) {
    this.byId.set(clip.id, clip);
    element("clips").prepend(this.row(clip));
    this.showTools();
    const isStored = await store.put("takes", clip);
    if (!this.byId.has(clip.id)) await this.load(); // because another tab's change was read before the clip was stored
    return isStored;
  }

  async delete(clip) {
    this.byId.delete(clip.id);
    this.onDelete(clip);
    this.draw();
    await store.remove("takes", clip.id);
  }

  async clear() {
    const deleted = [...this.byId.values()];
    this.byId.clear();
    deleted.forEach(this.onDelete);
    this.draw();
    await store.clear("takes");
  }

  askToForget() {
    const count = this.byId.size;
    const favourites = [...this.byId.values()].filter((clip) => clip.isFavourite).length;
    const which = favourites ? ` ${favourites} of them ${favourites === 1 ? "is a favourite" : "are favourites"}.` : "";
    element("forget-text").textContent = `This deletes ${count} clip${count === 1 ? "" : "s"} from this browser.${which}`;
    element("forget-dialog").returnValue = "";
    element("forget-dialog").showModal();
  }

  filter() {
    const button = element("only-favourites");
    button.setAttribute("aria-pressed", String(button.ariaPressed !== "true"));
    this.draw();
  }

  async setFavourite(clip, isFavourite) {
    clip.isFavourite = isFavourite;
    if (element("only-favourites").ariaPressed === "true") this.draw();
    else this.showTools();
    await store.put("takes", clip);
  }

  async saveZip() {
    const clips = [...this.byId.values()].filter((clip) => this.chosen.has(clip.id));
    const archive = await zipBlob(clips.map((clip) => ({ name: `${fileName(clip)}.wav`, blob: clip.blob })));
    this.onFile(archive, "clips.zip");
  }

  mark(clip) {
    this.shown = clip.id;
    for (const row of element("clips").children) row.classList.toggle("shown", row.dataset.clip === clip.id);
  }

  draw() {
    for (const id of this.chosen) if (!this.byId.has(id)) this.chosen.delete(id);
    this.showTools();
    const isFiltered = element("only-favourites").ariaPressed === "true";
    const listed = [...this.byId.values()].filter((clip) => clip.isFavourite || !isFiltered);
    replaceRows(element("clips"), listed.reverse().map((clip) => this.row(clip)));
  }

  // Shows the buttons above the list that are of use.
  showTools() {
    const clips = [...this.byId.values()];
    element("no-clips").hidden = element("forget-all").hidden = false;
    element(clips.length ? "no-clips" : "forget-all").hidden = true;
    const favourites = element("only-favourites");
    favourites.hidden = !clips.some((clip) => clip.isFavourite);
    if (favourites.hidden) favourites.setAttribute("aria-pressed", "false");
    element("zip").hidden = !this.chosen.size;
    element("zip").textContent = `Download ZIP (${this.chosen.size})`;
  }

  row(clip) {
    const row = document.createElement("li");
    row.dataset.clip = clip.id;
    row.classList.toggle("shown", clip.id === this.shown);
    const choose = Object.assign(document.createElement("input"), { type: "checkbox", checked: this.chosen.has(clip.id) });
    choose.setAttribute("aria-label", `Choose ${titleOf(clip)}`);
    choose.addEventListener("change", () => {
      if (choose.checked) this.chosen.add(clip.id);
      else this.chosen.delete(clip.id);
      this.showTools();
    });
    const star = button("star", { label: `Favourite ${titleOf(clip)}`, isPressed: Boolean(clip.isFavourite) });
    star.addEventListener("click", () => {
      star.setAttribute("aria-pressed", String(!clip.isFavourite));
      this.setFavourite(clip, !clip.isFavourite);
    });
    const what = button("what", {});
    what.append(text("span", clip.order.fields.prompt), text("small", describe(clip)));
    what.addEventListener("click", () => this.onShow(clip));
    const remove = button("delete", { label: `Delete ${titleOf(clip)}` });
    remove.addEventListener("click", () => this.delete(clip));
    row.append(choose, star, what, remove);
    row.draggable = true;
    row.addEventListener("dragstart", ({ dataTransfer }) => giveFile(dataTransfer, clip));
    return row;
  }
}

// Replaces all rows. A keyboard's focus stays on its clip, or goes to the next one if the clip is gone.
function replaceRows(list, rows) {
  const focused = list.querySelector(":focus-visible");
  const before = focused?.parentElement;
  const at = [...list.children].indexOf(before);
  list.replaceChildren(...rows);
  if (!focused || !rows.length) return;
  const row = rows.find(({ dataset }) => dataset.clip === before.dataset.clip) ?? rows[Math.min(at, rows.length - 1)];
  row.children[[...before.children].indexOf(focused)].focus();
}

// Describes a clip in a line, such as "loop · 0:04.0 · seed 7 · from rain, seed 3".
function describe({ order, facts, durationS }) {
  const parts = [kindOf(order), durationS && formatTime(durationS, 0.1), `seed ${facts.seed}`, order.parent && `from ${order.parent.title}`];
  return parts.filter(Boolean).join(" · ");
}

// Makes a drag out of the browser's window write the clip's file. The URL lasts long enough for the copy.
function giveFile(dataTransfer, clip) {
  const address = URL.createObjectURL(clip.blob);
  dataTransfer.setData("DownloadURL", `audio/wav:${fileName(clip)}.wav:${address}`);
  dataTransfer.effectAllowed = "copy";
  setTimeout(() => URL.revokeObjectURL(address), 600_000);
}

function button(className, { label, isPressed }) {
  const made = Object.assign(document.createElement("button"), { type: "button", className });
  if (label) made.setAttribute("aria-label", label);
  if (label) made.title = label.split(" ")[0];
  if (isPressed !== undefined) made.setAttribute("aria-pressed", String(isPressed));
  return made;
}

const text = (tag, textContent) => Object.assign(document.createElement(tag), { textContent, dir: "auto" });
