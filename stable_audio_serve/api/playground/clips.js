// The list of clips stored in this browser, in sync over all tabs. A clip is {id, at, order, blob, rateHz, model, facts,
// seconds}.

import * as store from "./store.js";

const element = (id) => document.getElementById(id);

export class Clips {
  // Calls `onShow(clip)` when a clip is selected, `onDelete(clip)` when it is deleted.
  constructor({ onShow, onDelete }) {
    this.onShow = onShow;
    this.onDelete = onDelete;
    this.byId = new Map();
    this.shown = null;
    store.onChange((name) => name === "takes" && this.load());
    element("delete-all").addEventListener("click", () => this.clear());
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
    element("delete-all").hidden = false;
    return store.put("takes", clip);
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

  mark(clip) {
    this.shown = clip.id;
    for (const row of element("clips").children) row.classList.toggle("shown", row.dataset.clip === clip.id);
  }

  draw() {
    const rows = [...this.byId.values()].reverse().map((clip) => this.row(clip));
    element("clips").replaceChildren(...rows);
    element("delete-all").hidden = !rows.length;
  }

  row(clip) {
    const row = document.createElement("li");
    row.dataset.clip = clip.id;
    const { prompt } = clip.order.fields;
    const what = Object.assign(document.createElement("button"), { type: "button", className: "what", textContent: `${prompt} · ${clip.facts.seed}` });
    what.addEventListener("click", () => this.onShow(clip));
    const remove = Object.assign(document.createElement("button"), { type: "button", textContent: "Delete" });
    remove.setAttribute("aria-label", `Delete ${prompt}, seed ${clip.facts.seed}`);
    remove.addEventListener("click", () => this.delete(clip));
    row.append(what, remove);
    row.classList.toggle("shown", clip.id === this.shown);
    return row;
  }
}
