// The work in progress of this browser, shown on the stage: submits jobs, follows them to their end, cancels them, and
// resumes them after a reload.

import { call, callWithRetries, jobEvents, newId } from "./api.js";
import { readFacts, submit } from "./orders.js";
import * as store from "./store.js";
import { kindOf } from "./words.js";

const element = (id) => document.getElementById(id);

export class Jobs {
  // Calls `onClip({id, order, blob, status, facts, seconds})` for each success, `onGrowing(job, {isAsked, isNew})` when the
  // first section of a long piece is finished and when the user asks to listen to it, and `onRefusal(error)` if the
  // server does not accept an order. `isNew` is false after a reload of the page. The job's row shows later failures, and
  // refusals for which `onRefusal` returns false.
  constructor({ onClip, onGrowing, onRefusal }) {
    Object.assign(this, { onClip, onGrowing, onRefusal });
    this.followed = new Map(); // {job, waiting} by id; `waiting` ends the wait for the server
    store.onChange((name) => name === "jobs" && this.dropCancelled());
  }

  // Resumes the jobs that were unfinished when the page was closed.
  async resume() {
    for (const job of await store.all("jobs")) this.follow(job);
  }

  // Drops the orders that wait for the server and that another tab has cancelled. If that tab has made a clip of one,
  // the order is sent all the same, so that this tab shows the clip too.
  async dropCancelled() {
    // Listed before the stored jobs are read: an order that is given meanwhile is in none of them.
    const unsent = [...this.followed.values()].filter(({ job }) => !job.acceptedAs);
    if (!unsent.length) return;
    const [jobs, clips] = await Promise.all([store.all("jobs"), store.all("takes")]);
    const kept = new Set([...jobs, ...clips].map(({ id }) => id));
    for (const { job, waiting } of unsent) if (!job.acceptedAs && !kept.has(job.id)) waiting.abort();
  }

  // Runs an order to its end.
  async start(order) {
    return this.follow({ id: newId(), order, at: Date.now() }, performance.now());
  }

  // Follows a job from its submission to its clip.
  async follow(job, began = null) {
    if (this.followed.has(job.id)) return;
    const waiting = new AbortController();
    this.followed.set(job.id, { job, waiting });
    const row = new Row(job.order, () => this.cancel(job, waiting));
    try {
      const onAway = ({ status, message }) => row.say(status ? message : "Server unreachable. Sent when it is back.");
      if (!job.acceptedAs) await this.submit(job, { signal: waiting.signal, onAway });
      for await (const { kind, data } of jobEvents(job.acceptedAs)) {
        if (kind === "progress") this.showProgress(job, { row, progress: data, isNew: began !== null });
        if (kind === "away") row.say("Connection lost. Retrying.");
        if (kind === "end") await this.finish(job, { status: data, began });
      }
      await store.remove("jobs", job.id);
      row.remove();
    } catch (error) {
      await this.fail(job, { error, row });
    } finally {
      this.followed.delete(job.id);
    }
  }

  showProgress(job, { row, progress, isNew }) {
    row.show(progress);
    if (!progress.sections_done || job.isHeard) return;
    job.isHeard = true;
    row.buttons([["Listen to", async () => void this.onGrowing(job, { isAsked: true, isNew })], ["Cancel", () => this.cancel(job, null)]]);
    this.onGrowing(job, { isAsked: false, isNew });
  }

  // Stores the job before submitting it, with its idempotency key. After a reload the page submits it again, and the
  // server returns the same job.
  async submit(job, waiting) {
    store.put("jobs", job);
    job.acceptedAs = await submit(job.order, job.id, waiting);
    await store.put("jobs", job);
    if (waiting.signal.aborted) await this.cancel(job, null); // cancelled while the request was on its way
  }

  async cancel(job, waiting) {
    if (!job.acceptedAs) return waiting.abort();
    return call(`jobs/${job.acceptedAs}`, { method: "DELETE" });
  }

  // Ends the row of a job that is refused for its fields or key. Others keep it, with the reason and a button to try again.
  async fail(job, { error, row }) {
    const isOver = error.name === "AbortError" || error.isFinal || isFinal(error);
    if (isOver) await store.remove("jobs", job.id);
    if (error.name === "AbortError") return row.remove();
    if ((error.status === 401 || !job.acceptedAs) && this.onRefusal(error)) return row.remove();
    const retry = () => (isOver ? this.start(job.order) : this.follow(job));
    return row.fail(error.status === 404 && job.acceptedAs ? "The server no longer has this job." : error.message, { retry, onDismiss: () => store.remove("jobs", job.id) });
  }

  async finish(job, { status, began }) {
    if (status.status === "failed") throw Object.assign(new Error(status.error ?? "The job failed."), { isFinal: true });
    const done = status.progress?.sections_done;
    const isCut = status.status === "cancelled" && done > 0;
    if (status.status !== "succeeded" && !isCut) return;
    const order = isCut ? firstSections(job.order, done) : job.order; // a cancelled piece keeps its finished sections
    const reply = await callWithRetries(`jobs/${job.acceptedAs}/audio${isCut ? "?follow=1" : ""}`);
    const facts = { seed: order.fields.seed, ...known(readFacts(reply.headers)), ...clipFacts(status) };
    const seconds = began && (performance.now() - began) / 1000;
    const blob = await reply.blob().catch(() => {
      throw new Error("The connection was lost.");
    });
    await this.onClip({ id: job.id, order, blob, status, facts, seconds });
  }
}

// Whether a retry is useless. It is not after a missing key, a server error or a lost connection.
const isFinal = ({ status }) => status >= 400 && status < 500 && ![401, 403, 429].includes(status);

// A row of the job list: what is made, its progress, and a button to cancel it; after a failure the reason.
class Row {
  constructor(order, onCancel) {
    const { prompt } = order.fields;
    this.node = document.createElement("li");
    this.prompt = prompt;
    const what = Object.assign(document.createElement("span"), { className: "what", textContent: prompt, dir: "auto" });
    this.bar = Object.assign(document.createElement("progress"), { max: 1 });
    this.bar.setAttribute("aria-label", `Progress of ${prompt}`);
    this.line = Object.assign(document.createElement("small"), { textContent: `${kindOf(order)}, sending` });
    this.node.append(what, this.line, this.bar);
    this.buttons([["Cancel", onCancel]]);
    if (order.fields.sections) this.bar.classList.add("parts");
    this.bar.style.setProperty("--parts", order.fields.sections?.length ?? 1);
    element("jobs").append(this.node);
  }

  // Shows buttons in place of the present ones. A button is disabled while its act runs.
  buttons(all) {
    for (const button of this.node.querySelectorAll("button")) button.remove();
    for (const [text, act] of all) {
      const button = Object.assign(document.createElement("button"), { type: "button", textContent: text.split(" to")[0] });
      button.setAttribute("aria-label", `${text} ${this.prompt}`);
      button.addEventListener("click", async () => {
        button.disabled = true;
        try {
          await act();
        } catch (error) {
          this.say(error.message);
        }
        button.disabled = false; // the row remains if the act failed
      });
      this.line.before(button);
    }
  }

  show({ stage, fraction, sections_done: done, sections, queue_position: position, eta_seconds: left }) {
    this.bar.value = fraction;
    const section = sections && done < sections ? `section ${done + 1} of ${sections}, ` : "";
    const before = position === null || position === undefined ? "" : position ? `, ${position} before it` : ", next";
    this.say(`${section}${stage}${before}${left ? `, about ${Math.ceil(left)} s left` : ""}`);
  }

  fail(message, { retry, onDismiss }) {
    this.node.classList.add("failed");
    this.bar.remove();
    this.line.setAttribute("role", "alert");
    this.say(message);
    const dismiss = async () => {
      this.remove();
      await onDismiss();
    };
    const again = async () => {
      this.remove();
      await retry();
    };
    this.buttons([["Try again", again], ["Dismiss", dismiss]]);
  }

  say(message) {
    this.line.textContent = message;
  }

  remove() {
    this.node.remove();
  }
}

const firstSections = (order, count) => ({ ...order, fields: { ...order.fields, sections: order.fields.sections.slice(0, count) } });

function clipFacts(status) {
  const clip = status.clips?.[0];
  const made = { device: status.device ?? null, dtype: status.dtype ?? null, recipe: status.recipes?.[0] ?? null };
  return clip ? { seed: clip.seed, loudness: clip.loudness, ...known(made) } : {};
}

const known = (fields) => Object.fromEntries(Object.entries(fields).filter(([, value]) => value !== null));
