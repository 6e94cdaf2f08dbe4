// The work in progress of this browser: submits jobs, follows them to their end, cancels them, and resumes them after a
// reload. Also runs loops, for which the API has no jobs.

import { call, callWithRetries, jobEvents, newId } from "./api.js";
import { make, readFacts, submit } from "./orders.js";
import * as store from "./store.js";

const element = (id) => document.getElementById(id);

export class Jobs {
  // Calls `onClip({id, order, blob, status, facts, seconds})` for each success, `onFailure(error)` for each failure.
  constructor({ onClip, onFailure }) {
    this.onClip = onClip;
    this.onFailure = onFailure;
    this.followed = new Set();
  }

  // Resumes the jobs that were unfinished when the page was closed.
  async resume() {
    for (const job of await store.all("jobs")) this.follow(job);
  }

  // Runs an order. Throws ApiError if a loop is refused.
  async start(order) {
    if (order.kind === "loop") return this.makeLoop(order);
    return this.follow({ id: newId(), order, at: Date.now() }, performance.now());
  }

  async makeLoop(order) {
    const began = performance.now();
    const cancelled = new AbortController();
    const row = new Row(order, async () => cancelled.abort());
    row.say("generating a loop");
    try {
      const reply = await make(order, { signal: cancelled.signal });
      const status = { model: reply.headers.get("X-Model"), sample_rate: Number(reply.headers.get("X-Sample-Rate")) };
      const clip = { id: newId(), order, blob: await reply.blob(), status, facts: readFacts(reply.headers) };
      await this.onClip({ ...clip, seconds: (performance.now() - began) / 1000 });
    } catch (error) {
      if (error.name !== "AbortError") throw error;
    } finally {
      row.remove();
    }
  }

  // Follows a job from its submission to its clip.
  async follow(job, began = null) {
    if (this.followed.has(job.id)) return;
    this.followed.add(job.id);
    let row = null;
    try {
      if (!job.acceptedAs) await this.submit(job);
      row = new Row(job.order, () => call(`jobs/${job.acceptedAs}`, { method: "DELETE" }).catch(this.onFailure));
      for await (const { kind, data } of jobEvents(job.acceptedAs)) {
        if (kind === "progress") row.show(data);
        if (kind === "away") row.say(`${data.message} Retrying.`);
        if (kind === "end") await this.finish(job, { status: data, began });
      }
      await store.remove("jobs", job.id);
    } catch (error) {
      this.onFailure(error.status === 404 ? new Error("The server no longer has this job.") : error);
      if (isFinal(error)) await store.remove("jobs", job.id);
    } finally {
      this.followed.delete(job.id);
      row?.remove();
    }
  }

  // Stores the job before submitting it, with its idempotency key. After a reload the page submits it again, and the
  // server returns the same job.
  async submit(job) {
    store.put("jobs", job);
    try {
      job.acceptedAs = await submit(job.order, job.id);
    } catch (error) {
      if (error.status === 0) throw new Error("Server unreachable. Reload the page to submit the job again.");
      if (error.status !== 401) await store.remove("jobs", job.id);
      throw error;
    }
    await store.put("jobs", job);
  }

  async finish(job, { status, began }) {
    if (status.status === "failed") this.onFailure(new Error(status.error ?? "The job failed."));
    if (status.status !== "succeeded") return;
    const reply = await callWithRetries(`jobs/${job.acceptedAs}/audio`);
    const facts = { ...readFacts(reply.headers), ...clipFacts(status) };
    const seconds = began && (performance.now() - began) / 1000;
    const blob = await reply.blob().catch(() => {
      throw new Error("The connection was lost. Reload the page to fetch the clip.");
    });
    await this.onClip({ id: job.id, order: job.order, blob, status, facts, seconds });
  }
}

// Whether a retry is useless. It is not after a missing key, a server error or a lost connection.
const isFinal = ({ status }) => status >= 400 && status < 500 && ![401, 403, 429].includes(status);

// A row of the job list, with a cancel button.
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
      cancel.disabled = false; // the row remains if cancelling failed
    });
    this.line = Object.assign(document.createElement("small"), { textContent: "submitting" });
    this.node.append(what, this.bar, cancel, this.line);
    element("jobs").append(this.node);
    element("no-jobs").hidden = true;
  }

  show({ stage, fraction, queue_position: position, eta_seconds: left }) {
    this.bar.value = fraction;
    const before = position === null || position === undefined ? "" : position ? `, ${position} before it` : ", next";
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
