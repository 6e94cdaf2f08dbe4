// Builds requests from orders, also as text to copy. An order holds the settings of a clip: {kind, fields, source?,
// regions?, parent?}, with `fields` by the API's names, `source` a file, `regions` [[start, end]] in seconds, and `parent`
// the clip that the source is from: {id, title}.

import { call, callUntilBack, url } from "./api.js";

const ROUTES = { generate: "generations", vary: "variations", inpaint: "inpaint" };
const JOB_ROUTES = { generate: "jobs", vary: "jobs/variations", inpaint: "jobs/inpaint" };

// The formats that a clip can be downloaded in: their names, extensions and fields. The first is that of stored clips.
export const FORMATS = [
  { name: "WAV", extension: "wav" },
  { name: "WAV 24-bit", extension: "wav", fields: { response_format: "wav", bit_depth: 24 } },
  { name: "WAV float", extension: "wav", fields: { response_format: "wav", bit_depth: "float" } },
  { name: "FLAC", extension: "flac", fields: { response_format: "flac" } },
  { name: "MP3", extension: "mp3", fields: { response_format: "mp3" } },
  { name: "M4A", extension: "m4a", fields: { response_format: "m4a" } },
  { name: "Ogg", extension: "ogg", fields: { response_format: "ogg" } },
  { name: "Opus", extension: "opus", fields: { response_format: "opus" } },
];

// Whether an order makes a clip longer.
export const isExtended = ({ fields }) => Boolean(fields.extend_before_s || fields.extend_after_s);

const wire = (value) => (typeof value === "object" ? JSON.stringify(value) : String(value));

function body(order, more = {}) {
  const fields = { ...order.fields, ...more };
  if (order.regions) {
    fields.inpaint_start_seconds = order.regions.map(([start]) => start);
    fields.inpaint_end_seconds = order.regions.map(([, end]) => end);
  }
  if (!order.source) return { json: fields };
  const form = new FormData();
  for (const [name, value] of Object.entries(fields)) form.append(name, wire(value));
  form.append("audio", order.source, order.source.name ?? "source.wav");
  return { form };
}

const path = (order) => `v1/audio/${ROUTES[order.kind]}`;

// Generates synchronously, with more fields; the response is the audio.
export const make = (order, fields = {}) => call(path(order), { method: "POST", ...body(order, fields) });

// Submits a job, as soon as the server is reachable, and returns its id. The same order with the same key returns the
// same job, so that a repeated attempt does no harm.
export async function submit(order, idempotencyKey, waiting) {
  const headers = { "Idempotency-Key": idempotencyKey };
  const reply = await callUntilBack(JOB_ROUTES[order.kind], { method: "POST", headers, ...body(order) }, waiting);
  return (await reply.json()).id;
}

// Recreates a clip from its recipe, or without one from its order. Returns {reply, verdict}: "exact", "close" or null.
export async function repeat(clip) {
  const { recipe } = clip.facts;
  if (!recipe) return { reply: await make(clip.order), verdict: null };
  const form = new FormData();
  form.append("recipe", new Blob([JSON.stringify(recipe)]), "recipe.json"); // as a file, because form fields are limited to 512 KiB
  if (clip.order.source) form.append("audio", clip.order.source, clip.order.source.name ?? "source.wav");
  const reply = await call("v1/audio/replay", { method: "POST", form });
  return { reply, verdict: reply.headers.get("X-Replay") };
}

// Returns the properties of a single clip from response headers. A shortened recipe cannot be replayed.
export function readFacts(headers) {
  const value = (name) => JSON.parse(headers.get(name) ?? "null");
  const recipe = value("X-Recipe");
  return {
    seed: value("X-Seed"),
    loudness: value("X-Audio-Loudness"),
    device: headers.get("X-Device"),
    dtype: headers.get("X-Dtype"),
    recipe: recipe?.left_out ? null : recipe,
  };
}

// Returns the recipe for POST /v1/audio/replay; for a clip without one its order.
export function asJson({ order, facts }) {
  if (facts.recipe) return JSON.stringify(facts.recipe, null, 2);
  const source = order.source && { source: order.source.name ?? "source.wav" };
  return JSON.stringify({ kind: order.kind, ...order.fields, ...source }, null, 2);
}

export function asCurl({ order }) {
  const quoted = (text) => `'${String(text).replaceAll("'", `'\\''`)}'`;
  const name = order.source?.name ?? "source.wav";
  const { json } = body({ ...order, source: null });
  const sent = order.source
    ? Object.entries(json).map(([field, value]) => `--form-string ${quoted(`${field}=${wire(value)}`)}`)
    : ["-H 'Content-Type: application/json'", `-d ${quoted(JSON.stringify(json))}`];
  if (order.source) sent.push(`-F ${quoted(`audio=@"${name.replace(/["\\]/g, "\\$&")}"`)}`);
  const key = `-H "Authorization: Bearer $STABLE_AUDIO_API_KEY"`;
  const lines = order.fields.sections
    ? [quoted(url("jobs")), key, ...sent, `| sed -E 's/.*"id":"([0-9a-f]{32})".*/\\1/'`, `| xargs -I{} curl -fsS '${url("jobs/")}{}/audio?follow=1' -o clip.wav`]
    : [quoted(url(path(order))), key, ...sent, "-o clip.wav"];
  return ["curl -fsS", ...lines].join(" \\\n  ");
}

export function asPython({ order }) {
  const { prompt, ...fields } = order.fields;
  const python = (value) => {
    if (typeof value === "boolean") return value ? "True" : "False";
    if (value === null || typeof value !== "object") return value === null ? "None" : JSON.stringify(value);
    if (Array.isArray(value)) return `[${value.map(python).join(", ")}]`;
    return `{${Object.entries(value).map(([name, each]) => `${JSON.stringify(name)}: ${python(each)}`).join(", ")}}`;
  };
  const source = JSON.stringify(order.source?.name ?? "source.wav");
  const first = order.source ? [source, python(prompt)] : [python(prompt)];
  const regions = order.regions ? [`regions=[${order.regions.map((times) => `(${times.join(", ")})`).join(", ")}]`] : [];
  const more = Object.entries(fields).map(([name, value]) => `${name}=${python(value)}`);
  const given = [...first, ...regions, ...more].join(", ");
  const made = order.fields.sections
    ? [`    job = client.jobs.wait(client.jobs.submit(${given}).id)`, '    client.jobs.download(job, "clip.wav")']
    : [`    clip = client.${isExtended(order) ? "extend" : order.kind}(${given})`, '    clip.save("clip.wav")'];
  return [
    "from stable_audio_serve.client import Client",
    "",
    `with Client(${JSON.stringify(url("."))}) as client:`,
    ...made,
    "",
  ].join("\n");
}
