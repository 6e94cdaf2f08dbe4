// The server panel: models, replicas, jobs, and requests in the last minute.

import { call } from "./api.js";

const EVERY_MS = 3000;
const TIMEOUT_MS = 10_000;
const element = (id) => document.getElementById(id);

export class ServerPanel {
  // Calls `onBack()` after each answer of the server.
  constructor({ onBack = () => {} } = {}) {
    this.onBack = onBack;
    document.addEventListener("visibilitychange", () => document.hidden || this.refresh());
    this.isRefreshing = false;
    setInterval(() => document.hidden || this.refresh(), EVERY_MS);
  }

  // Sends one request at a time, so that requests do not pile up on a server that hangs.
  async refresh() {
    if (this.isRefreshing) return;
    this.isRefreshing = true;
    try {
      this.draw(await (await call("v1/status", { signal: AbortSignal.timeout(TIMEOUT_MS) })).json());
      this.onBack();
    } catch (error) {
      setText("server-line", error.status === 401 ? "needs a key" : error.message);
      setText("server-facts", error.message);
      element("server-models").replaceChildren();
    } finally {
      this.isRefreshing = false;
    }
  }

  draw(status) {
    const seconds = (value) => (value === null || value === undefined ? "" : `${value.toFixed(1)} s`);
    const number = (value) => (value === null || value === undefined ? "" : String(Math.round(value * 10) / 10));
    const names = Object.keys(status.models);
    setText("server-line", `${status.status}, ${names.length} model${names.length === 1 ? "" : "s"}`);
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
    setText("server-facts", `Jobs: ${counted.join(", ")}. Version ${status.version}. ${status.reasons.join("; ")}`);
  }
}

// Writes only changes, because screen readers announce every write.
function setText(id, message) {
  if (element(id).textContent !== message) element(id).textContent = message;
}

function line(tag, cells) {
  const row = document.createElement("tr");
  row.append(...cells.map((cell) => Object.assign(document.createElement(tag), { textContent: cell, ...(tag === "th" && { scope: "col" }) })));
  return row;
}
