// What the server does: its models and replicas, what waits, and how much it made in the last minute.

import { call } from "./api.js";

const EVERY_MS = 3000;
const PATIENCE_MS = 10_000;
const element = (id) => document.getElementById(id);

export class ServerPanel {
  constructor() {
    document.addEventListener("visibilitychange", () => document.hidden || this.refresh());
    this.isAsking = false;
    setInterval(() => document.hidden || this.refresh(), EVERY_MS);
  }

  // One request at a time: a server that hangs gets no more of them.
  async refresh() {
    if (this.isAsking) return;
    this.isAsking = true;
    try {
      this.draw(await (await call("v1/status", { signal: AbortSignal.timeout(PATIENCE_MS) })).json());
    } catch (error) {
      say("server-line", error.status === 401 ? "needs a key" : error.message);
      say("server-facts", error.message);
      element("server-models").replaceChildren();
    } finally {
      this.isAsking = false;
    }
  }

  draw(status) {
    const seconds = (value) => (value === null || value === undefined ? "" : `${value.toFixed(1)} s`);
    const number = (value) => (value === null || value === undefined ? "" : String(Math.round(value * 10) / 10));
    const names = Object.keys(status.models);
    say("server-line", `${status.status}, ${names.length} model${names.length === 1 ? "" : "s"}`);
    const rows = names.map((name) => {
      const model = status.models[name];
      const devices = [...new Set(model.replicas.map((replica) => replica.device).filter(Boolean))].join(", ");
      const replicas = `${model.replicas.length} of ${model.max_replicas}`;
      return [name, model.stage, replicas, devices, number(model.rows_per_step), seconds(model.backlog_s), number(model.requests_per_minute)];
    });
    const head = ["Model", "Stage", "Replicas", "Device", "Rows per step", "Backlog", "Requests in the last minute"];
    const { jobs } = status;
    const counted = ["queued", "running", "dead_letters"].map((name) => `${jobs[name] ?? "?"} ${name.replace("_", " ")}`);
    element("server-models").replaceChildren(line("th", head), ...rows.map((cells) => line("td", cells)));
    say("server-facts", `Jobs: ${counted.join(", ")}. Version ${status.version}. ${status.reasons.join("; ")}`);
  }
}

// Only what has changed is written: a screen reader says it again.
function say(id, message) {
  if (element(id).textContent !== message) element(id).textContent = message;
}

function line(tag, cells) {
  const row = document.createElement("tr");
  row.append(...cells.map((cell) => Object.assign(document.createElement(tag), { textContent: cell, ...(tag === "th" && { scope: "col" }) })));
  return row;
}
