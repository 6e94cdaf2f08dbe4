// What this browser has under way: jobs submitted, followed to their end, cancelled, and found again after a reload; and
// loops, for which there are no jobs, while they are made.

import { call, callPatiently, jobEvents, newId } from "./api.js";
import { make, readFacts, submit } from "./orders.js";
import * as store from "./store.js";

const element = (id) => document.getElementById(id);

export class Jobs {
  // `onTake({id, order, blob, status, facts, seconds})` for each that succeeds, `onFailure(error)` for the others.
  constructor({ onTake, onFailure }) {
    this.onTake = onTake;
    this.onFailure = onFailure;
    this.followed = new Set();
  }

  // Goes on with what was unfinished when the page was left.
  async resume() {
    for (const job of await store.all("jobs")) this.follow(job);
  }

  // Has an order made. Raises ApiError if a loop is refused.
  async start(order) {
    if (order.kind === "loop") return this.makeLoop(order);
    return this.follow({ id: newId(), order, at: Date.now() }, performance.now());
  }

  async makeLoop(order) {
    const began = performance.now();
    const gone = new AbortController();
    const row = new Row(order, async () => gone.abort());
    row.say("making a loop");
    try {
      const reply = await make(order, { signal: gone.signal });
      const status = { model: reply.headers.get("X-Model"), sample_rate: Number(reply.headers.get("X-Sample-Rate")) };
      const take = { id: newId(), order, blob: await reply.blob(), status, facts: readFacts(reply.headers) };
      await this.onTake({ ...take, seconds: (performance.now() - began) / 1000 });
    } catch (error) {
      if (error.name !== "AbortError") throw error;
    } finally {
      row.remove();
    }
  }

  // From its submission to its take.
  async follow(job, began = null) {
    if (this.followed.has(job.id)) return;
    this.followed.add(job.id);
    let row = null;
    try {
      if (!job.acceptedAs) await this.submit(job);
      row = new Row(job.order, () => call(`jobs/${job.acceptedAs}`, { method: "DELETE" }).catch(this.onFailure));
      for await (const { kind, data } of jobEvents(job.acceptedAs)) {
        if (kind === "progress") row.show(data);
        if (kind === "away") row.say(`${data.message} Trying again.`);
        if (kind === "end") await this.finish(job, { status: data, began });
      }
      await store.remove("jobs", job.id);
    } catch (error) {
      this.onFailure(error.status === 404 ? new Error("The server does not know this job any more.") : error);
      if (isGone(error)) await store.remove("jobs", job.id);
    } finally {
      this.followed.delete(job.id);
      row?.remove();
    }
  }

  // It is kept before the server has it, with the key that makes a second submission the same job: a page that is loaded
  // again before the answer is there submits once more.
  async submit(job) {
    store.put("jobs", job);
    try {
      job.acceptedAs = await submit(job.order, job.id);
    } catch (error) {
      if (error.status === 0) throw new Error("The server does not answer. It is asked again when the page is loaded again.");
      if (error.status !== 401) await store.remove("jobs", job.id);
      throw error;
    }
    await store.put("jobs", job);
  }

  async finish(job, { status, began }) {
    if (status.status === "failed") this.onFailure(new Error(status.error ?? "The job failed."));
    if (status.status !== "succeeded") return;
    const reply = await callPatiently(`jobs/${job.acceptedAs}/audio`);
    const facts = { ...readFacts(reply.headers), ...clipFacts(status) };
    const seconds = began && (performance.now() - began) / 1000;
    const blob = await reply.blob().catch(() => {
      throw new Error("The connection was lost. The take is fetched when the page is loaded again.");
    });
    await this.onTake({ id: job.id, order: job.order, blob, status, facts, seconds });
  }
}

// Whether asking for a job again brings nothing: not so without a key, nor where the server or the connection broke.
const isGone = ({ status }) => status >= 400 && status < 500 && ![401, 403, 429].includes(status);

// A line of the list, with a button that stops it.
class Row {
  constructor(order, onCancel) {
    const { prompt } = order.fields;
    this.node = document.createElement("li");
    const what = Object.assign(document.createElement("span"), { className: "what", textContent: prompt });
    this.bar = Object.assign(document.createElement("progress"), { max: 1 });
    this.bar.setAttribute("aria-label", `Progress of ${prompt}`);
    const cancel = Object.assign(document.createElement("button"), { type: "button", textContent: "Cancel" });
    cancel.setAttribute("aria-label", `Cancel ${prompt}`);
    cancel.addEventListener("click", async () => {
      cancel.disabled = true;
      await onCancel();
      cancel.disabled = false; // it is still there if that failed
    });
    this.line = Object.assign(document.createElement("small"), { textContent: "sent" });
    this.node.append(what, this.bar, cancel, this.line);
    element("jobs").append(this.node);
    element("no-jobs").hidden = true;
  }

  show({ stage, fraction, queue_position: position, eta_seconds: left }) {
    this.bar.value = fraction;
    const before = position === null || position === undefined ? "" : `, ${position} before it`;
    this.say(`${stage}${before}${left ? `, about ${Math.ceil(left)} s left` : ""}`);
  }

  say(message) {
    this.line.textContent = message;
  }

  remove() {
    this.node.remove();
    element("no-jobs").hidden = element("jobs").childElementCount > 0;
  }
}

function clipFacts(status) {
  const clip = status.clips?.[0];
  const made = { device: status.device ?? null, dtype: status.dtype ?? null, recipe: status.recipes?.[0] ?? null };
  return clip ? { seed: clip.seed, loudness: clip.loudness, ...known(made) } : {};
}

const known = (fields) => Object.fromEntries(Object.entries(fields).filter(([, value]) => value !== null));
