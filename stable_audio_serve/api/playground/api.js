// Client of the server's API: calls with this tab's key, errors with their fields, event streams by fetch.

const KEY = "stable-audio-serve.key";
const base = new URL(".", document.baseURI);

export const url = (path) => new URL(path, base).href;

let ownKey = ""; // used when the browser blocks session storage

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
  } catch {} // then the key lasts as long as the page
}

export class ApiError extends Error {
  // `faults` are [{field, message}]; `field` is null for errors of the whole request.
  constructor(status, faults, retryAfterS = null) {
    const [first] = faults;
    if (retryAfterS && !first.message.includes("try again")) {
      first.message = `${first.message.replace(/\.$/, "")}. Try again in ${retryAfterS} s.`;
    }
    super(faults.map((fault) => fault.message).join("; "));
    this.status = status;
    this.faults = faults;
    this.retryAfterS = retryAfterS;
  }
}

export async function call(path, { method = "GET", json, form, headers = {}, signal, cache = "no-store" } = {}) {
  const all = { ...(key() && { Authorization: `Bearer ${key()}` }), ...headers };
  if (json) all["Content-Type"] = "application/json";
  if (form && !(await isReadable(form))) {
    throw new ApiError(400, [{ field: "audio", message: "The file cannot be read, or it has changed. Choose it again." }]);
  }
  let reply;
  try {
    reply = await fetch(url(path), { method, headers: all, body: json ? JSON.stringify(json) : form, signal, cache });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(0, [{ field: null, message: "Server unreachable." }]);
  }
  const isPage = reply.headers.get("Content-Type")?.startsWith("text/html"); // a proxy's, such as one to sign in
  if (!reply.ok || isPage) throw await readError(reply);
  return reply;
}

// Whether the files in a form can be read. A folder cannot, nor can a file that was changed or deleted since it was chosen.
// Sent nevertheless, Chromium reports the same error as for a server that is away, Safari sends an empty file, and Firefox
// never ends the request.
async function isReadable(form) {
  const files = [...form.values()].filter((value) => value instanceof Blob);
  return Promise.all(files.map((file) => file.slice(0, 1).arrayBuffer())).then(() => true, () => false);
}

async function readError(reply) {
  const retry = Number(reply.headers.get("Retry-After")) || null;
  let detail;
  try {
    const body = await reply.json();
    detail = body.detail ?? body.error?.message ?? body.error; // each dialect has its own error format
  } catch {
    detail = null;
  }
  const faults = Array.isArray(detail) ? detail.filter((fault) => fault?.loc && fault.msg) : [];
  if (faults.length) {
    const field = ({ loc }) => String(loc[1] ?? loc[0]); // the first item names the part of the request, such as "body"
    return new ApiError(reply.status, faults.map((fault) => ({ field: field(fault), message: fault.msg })), retry);
  }
  if (detail?.message) return new ApiError(reply.status, [{ field: detail.param ?? null, message: String(detail.message) }], retry);
  // A proxy may have answered in any other format.
  const message = typeof detail === "string" && detail ? detail : `The server responded with ${reply.ok ? "a web page" : `status ${reply.status}`}.`;
  const named = /^[a-z_]+/.exec(message); // the message may start with a field name
  return new ApiError(reply.status, [{ field: named && named[0], message }], retry);
}

const ENDED = ["succeeded", "failed", "cancelled"];
const LONGEST_PAUSE_MS = 10_000;
const LONGEST_WAIT_MS = 3000; // between attempts to send an order
const POLL_MS = 1000;
const LONGEST_SILENCE_MS = 30_000; // of an event stream
const MOST_STREAMS = 2; // browsers allow six connections per server over all tabs, and the page needs some of them
const LEAST_BETWEEN_POLLS_MS = 250; // over all jobs
let numStreams = 0;
let nextPollMs = 0;

// Yields a job's events as {kind, data}: "progress", "away" after a lost connection, and finally "end". A lost
// stream resumes after its last event. Every fourth attempt polls the status instead, for networks that block streams.
// Jobs beyond the first MOST_STREAMS are always polled.
export async function* jobEvents(id) {
  let last = null;
  for (let failures = 0; ; failures += 1) {
    const isPolled = failures % 4 === 3 || numStreams >= MOST_STREAMS;
    if (!isPolled) numStreams += 1;
    try {
      if (isPolled) {
        await waitToPoll();
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
      yield { kind: "away" };
    } finally {
      if (!isPolled) numStreams -= 1;
    }
    await pause(Math.min(LONGEST_PAUSE_MS, Math.max(isPolled ? POLL_MS : 0, 250 * 2 ** failures)));
  }
}

async function waitToPoll() {
  const now = performance.now();
  const at = Math.max(now, nextPollMs);
  nextPollMs = at + LEAST_BETWEEN_POLLS_MS;
  await pause(at - now);
}

// Whether the server is unreachable, or a proxy answers in its place.
const isAway = (error) => error.status === 0 || (error.status >= 502 && error.status <= 504);

// Repeats a call while the server is away. Calls `onAway(error)` after each attempt. Rejects with AbortError once `signal`
// is aborted.
export async function callUntilBack(path, options, { onAway, signal }) {
  for (let failures = 0; ; failures += 1) {
    try {
      return await call(path, options);
    } catch (error) {
      if (!isAway(error)) throw error;
      onAway(error);
      const leastS = error.retryAfterS ?? 0;
      await Promise.race([pause(Math.max(1000 * leastS, Math.min(LONGEST_WAIT_MS, 250 * 2 ** failures))), aborted(signal)]);
    }
    signal.throwIfAborted();
  }
}

const aborted = (signal) => new Promise((resume) => signal.addEventListener("abort", resume, { once: true }));

const isRefusal = (error) => error.status >= 400 && error.status < 500 && error.status !== 429;

// Retries for up to a minute while the server is unreachable.
export async function callWithRetries(path, options) {
  for (let failures = 0; ; failures += 1) {
    try {
      return await call(path, options);
    } catch (error) {
      if (isRefusal(error) || failures >= 8) throw error;
    }
    await pause(Math.min(LONGEST_PAUSE_MS, 250 * 2 ** failures));
  }
}

// Rejects if a read takes too long. The server sends a comment every ten seconds, so the connection is lost then, although
// the browser does not know it, as after a sleep of the computer.
function inTime(read) {
  let timer;
  const late = new Promise((_, reject) => (timer = setTimeout(() => reject(new Error("The connection is silent.")), LONGEST_SILENCE_MS)));
  return Promise.race([read, late]).finally(() => clearTimeout(timer));
}

async function* readEvents(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  try {
    for (let text = ""; ; ) {
      const { done, value } = await inTime(reader.read());
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
    reader.cancel().catch(() => {}); // the connection is already closed
  }
}

export const pause = (milliseconds) => new Promise((resume) => setTimeout(resume, milliseconds));

// Returns 32 random hexadecimal digits. `crypto.randomUUID` needs HTTPS or localhost.
export const newId = () => [...crypto.getRandomValues(new Uint8Array(16))].map((byte) => byte.toString(16).padStart(2, "0")).join("");
