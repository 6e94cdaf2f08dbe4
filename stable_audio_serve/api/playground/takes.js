// The history: the takes that this browser keeps, as a list, the same in all tabs. A take is {id, at, order, blob, rateHz,
// model, facts, seconds}.

import * as store from "./store.js";

const element = (id) => document.getElementById(id);

export class Takes {
  // `onShow(take)` when one is chosen, `onForget(take)` when one is gone.
  constructor({ onShow, onForget }) {
    this.onShow = onShow;
    this.onForget = onForget;
    this.byId = new Map();
    this.shown = null;
    store.onChange((name) => name === "takes" && this.load());
    element("forget").addEventListener("click", () => this.clear());
  }

  async load() {
    const all = await store.all("takes");
    this.byId = new Map(all.map((take) => [take.id, take]));
    this.draw();
  }

  // Returns whether the browser keeps it beyond this page.
  async add(take) {
    this.byId.set(take.id, take);
    element("takes").prepend(this.row(take));
    element("forget").hidden = false;
    return store.put("takes", take);
  }

  async forget(take) {
    this.byId.delete(take.id);
    this.onForget(take);
    this.draw();
    await store.remove("takes", take.id);
  }

  async clear() {
    const gone = [...this.byId.values()];
    this.byId.clear();
    gone.forEach(this.onForget);
    this.draw();
    await store.clear("takes");
  }

  mark(take) {
    this.shown = take.id;
    for (const row of element("takes").children) row.classList.toggle("shown", row.dataset.take === take.id);
  }

  draw() {
    const rows = [...this.byId.values()].reverse().map((take) => this.row(take));
    element("takes").replaceChildren(...rows);
    element("forget").hidden = !rows.length;
  }

  row(take) {
    const row = document.createElement("li");
    row.dataset.take = take.id;
    const { prompt } = take.order.fields;
    const what = Object.assign(document.createElement("button"), { type: "button", className: "what", textContent: `${prompt} · ${take.facts.seed}` });
    what.addEventListener("click", () => this.onShow(take));
    const away = Object.assign(document.createElement("button"), { type: "button", textContent: "Forget" });
    away.setAttribute("aria-label", `Forget ${prompt}, seed ${take.facts.seed}`);
    away.addEventListener("click", () => this.forget(take));
    row.append(what, away);
    row.classList.toggle("shown", take.id === this.shown);
    return row;
  }
}
