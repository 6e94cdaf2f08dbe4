// The server's own API from a page: calls with the key of this tab, errors with their fields, event streams by fetch.

const KEY = "stable-audio-serve.key";
const base = new URL(".", document.baseURI);

export const url = (path) => new URL(path, base).href;

let ownKey = ""; // where the browser denies its storage

export function key() {
  try {
    return sessionStorage.getItem(KEY) ?? "";
  } catch {
    return ownKey;
  }
}

export function setKey(value) {
  ownKey = value;
  try {
    if (value) sessionStorage.setItem(KEY, value);
    else sessionStorage.removeItem(KEY);
  } catch {} // it lasts as long as the page
}

export class ApiError extends Error {
  // `faults` are [{field, message}]; `field` is null for what concerns the whole request.
  constructor(status, faults, retryAfterS = null) {
    super(faults.map((fault) => fault.message).join("; "));
    this.status = status;
    this.faults = faults;
    this.retryAfterS = retryAfterS;
  }
}

export async function call(path, { method = "GET", json, form, headers = {}, signal, cache = "no-store" } = {}) {
  const all = { ...(key() && { Authorization: `Bearer ${key()}` }), ...headers };
  if (json) all["Content-Type"] = "application/json";
  let reply;
  try {
    reply = await fetch(url(path), { method, headers: all, body: json ? JSON.stringify(json) : form, signal, cache });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(0, [{ field: null, message: "The server does not answer." }]);
  }
  if (!reply.ok) throw await readError(reply);
  return reply;
}

async function readError(reply) {
  const retry = Number(reply.headers.get("Retry-After")) || null;
  let detail;
  try {
    const body = await reply.json();
    detail = body.detail ?? body.error?.message ?? body.error; // as the route's dialect words it
  } catch {
    detail = null;
  }
  if (Array.isArray(detail)) {
    return new ApiError(reply.status, detail.map((fault) => ({ field: String(fault.loc.at(-1)), message: fault.msg })), retry);
  }
  if (detail?.message) return new ApiError(reply.status, [{ field: detail.param ?? null, message: detail.message }], retry);
  const message = detail || `The server answered ${reply.status}.`;
  const named = /^[a-z_]+/.exec(message); // of a field, if the form has one of that name
  return new ApiError(reply.status, [{ field: named && named[0], message }], retry);
}

const ENDED = ["succeeded", "failed", "cancelled"];
const LONGEST_PAUSE_MS = 10_000;
const POLL_MS = 1000;
const MOST_STREAMS = 2; // a browser has six connections to a server, for all of its tabs: the rest of the page needs some
const LEAST_BETWEEN_POLLS_MS = 250; // of all jobs together, however many there are
let numStreams = 0;
let nextPollMs = 0;

// What happens to a job, as {kind, data}: "progress", "away" while the server does not answer, and last "end". A lost
// stream goes on where it broke off; every fourth attempt asks for the status, for networks that let no stream through,
// and so does each job beyond the first ones.
export async function* jobEvents(id) {
  let last = null;
  for (let failures = 0; ; failures += 1) {
    const isAsked = failures % 4 === 3 || numStreams >= MOST_STREAMS;
    if (!isAsked) numStreams += 1;
    try {
      if (isAsked) {
        await turnToPoll();
        const data = await (await call(`jobs/${id}`)).json();
        if (ENDED.includes(data.status)) {
          yield { kind: "end", data };
          return;
        }
        yield { kind: "progress", data: data.progress };
        failures = 0;
      } else {
        const headers = { Accept: "text/event-stream", ...(last !== null && { "Last-Event-ID": last }) };
        const reply = await call(`jobs/${id}/events`, { headers });
        for await (const event of reply.body ? readEvents(reply.body) : []) {
          failures = 0;
          if (event.id) last = event.id;
          if (event.data) yield { kind: event.event, data: JSON.parse(event.data) };
          if (event.event === "end") return;
        }
      }
    } catch (error) {
      if (isRefusal(error)) throw error;
      yield { kind: "away", data: { message: error instanceof ApiError ? error.message : "The connection was lost." } };
    } finally {
      if (!isAsked) numStreams -= 1;
    }
    await pause(Math.min(LONGEST_PAUSE_MS, Math.max(isAsked ? POLL_MS : 0, 250 * 2 ** failures)));
  }
}

async function turnToPoll() {
  const now = performance.now();
  const at = Math.max(now, nextPollMs);
  nextPollMs = at + LEAST_BETWEEN_POLLS_MS;
  await pause(at - now);
}

const isRefusal = (error) => error.status >= 400 && error.status < 500 && error.status !== 429;

// Calls again while the server is away, a minute at most.
export async function callPatiently(path, options) {
  for (let failures = 0; ; failures += 1) {
    try {
      return await call(path, options);
    } catch (error) {
      if (isRefusal(error) || failures >= 8) throw error;
    }
    await pause(Math.min(LONGEST_PAUSE_MS, 250 * 2 ** failures));
  }
}

async function* readEvents(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  try {
    for (let text = ""; ; ) {
      const { done, value } = await reader.read();
      if (done) return;
      const blocks = (text + value).split("\n\n");
      text = blocks.pop();
      for (const block of blocks) {
        const fields = {};
        for (const line of block.split("\n")) fields[line.split(":", 1)[0]] = line.slice(line.indexOf(":") + 1).trim();
        yield fields;
      }
    }
  } finally {
    reader.cancel().catch(() => {}); // the connection is gone already
  }
}

const pause = (milliseconds) => new Promise((resume) => setTimeout(resume, milliseconds));

// 32 hexadecimal digits. `crypto.randomUUID` is there on HTTPS and on this machine only.
export const newId = () => [...crypto.getRandomValues(new Uint8Array(16))].map((byte) => byte.toString(16).padStart(2, "0")).join("");
