// The actions of the page.

import { describe } from "./adapters.js";
import { ApiError, key, setKey } from "./api.js";
import { audioContext, decode, equalGains, padded, Player, sha256, wavBlob } from "./audio.js";
import { defined, Form, randomSeed } from "./form.js";
import { Jobs } from "./jobs.js";
import { asCurl, asJson, asPython, FORMATS, make, repeat } from "./orders.js";
import { ServerPanel } from "./server_panel.js";
import * as store from "./store.js";
import { Clips } from "./clips.js";
import { Waveform } from "./waveform.js";

const element = (id) => document.getElementById(id);
const MOST_DECODED_BYTES = 50e6; // larger sources are sent without decoding them first
const say = (message) => (element("said").textContent = message);

let chosen = null; // the clip to be shown
let shown = null; // the shown clip
let other = null; // the previously shown clip, for A / B
let buffer = null; // audio of the shown clip

const player = new Player({
  onTick: (seconds) => {
    waveform.moveTo(seconds);
    element("clock").value = `${seconds.toFixed(2)} / ${player.duration.toFixed(2)} s`;
  },
  onEnd: () => showPlaying(),
});
const waveform = new Waveform(element("wave"), { onSeek: (seconds) => player.seek(seconds), onRegion: showRegion });
const form = new Form({ onSubmit: () => attempt(generate), onSourceFile: useFile });
const clips = new Clips({ onShow: (clip) => show(clip).catch(fail), onDelete: removeOther });
const jobs = new Jobs({ onClip: addClip, onFailure: fail });
const panel = new ServerPanel();

function fail(error) {
  if (error instanceof ApiError) {
    if (error.status === 401) return askKey(error.message);
    const wait = error.retryAfterS ? ` Try again in ${error.retryAfterS} s.` : "";
    return form.showFaults(error.faults.map((fault, index) => (index ? fault : { ...fault, message: fault.message + wait })));
  }
  form.showFaults([{ field: null, message: error.message }]);
}

// ---- generating ----

async function generate() {
  if (!form.model) return connect(); // models are not loaded yet, or the server needs a key
  form.clearFaults();
  const faults = form.faults();
  if (faults.length) return form.showFaults(faults);
  readySound();
  return Promise.all(form.orders().map((order) => jobs.start(order)));
}

// Opens the audio device during the generation, because that takes a moment.
function readySound() {
  if (element("autoplay").checked) audioContext().resume().catch(() => {});
}

async function addClip({ id, order, blob, status, facts, seconds }) {
  if (clips.byId.has(id)) return; // another tab has added it
  const clip = { id, at: Date.now(), order, blob, rateHz: status.sample_rate, model: status.model, facts, seconds };
  const isKept = clips.add(clip);
  await show(clip, { plays: Boolean(seconds) && element("autoplay").checked });
  const warnings = (status.warnings ?? []).map((warning) => ` ${warning}.`);
  say((seconds ? `Generated in ${seconds.toFixed(2)} s.` : "Generated.") + warnings.join(""));
  if (!(await isKept)) say("Generated. The browser cannot store the clip: it lasts until this page closes.");
}

async function useFile(file) {
  form.setSource(file, `, ${(file.size / 1e6).toFixed(1)} MB`);
  if (file.size > MOST_DECODED_BYTES) return;
  const sound = await decode(file, 44100).catch(() => null);
  if (form.source !== file) return; // the user chose another file
  if (sound) form.setSource(file, `, ${sound.duration.toFixed(2)} s`);
  else form.showFaults([{ field: "audio", message: "This browser cannot decode the file. The server may be able to." }]);
}

const CROSSFADE_S = 0.03; // of the server, inside a region; not applied before the start of a clip

// Regenerates the region: inside the clip, past its end, or before its start, which shifts the clip.
async function regenerate() {
  form.clearFaults();
  const { region } = waveform;
  const { fields } = shown.order;
  const before = Math.max(0, -region.start);
  const after = Math.max(0, region.end - buffer.duration);
  const source = wavFile(shown, before ? wavBlob(padded(buffer, before, 0)) : shown.blob);
  const duration = round(before + buffer.duration + after);
  const settings = defined({
    prompt: element("prompt").value || fields.prompt,
    model: shown.model,
    steps: fields.steps,
    cfg_scale: fields.cfg_scale,
    sampler_kwargs: fields.sampler_kwargs,
    loras: fields.loras,
    negative_prompt: fields.negative_prompt,
    duration,
    seed: form.locked ? fields.seed : randomSeed(),
  });
  const end = before ? Math.max(region.end, CROSSFADE_S) : region.end;
  const times = [round(Math.max(0, region.start + before)), Math.min(duration, round(end + before))];
  readySound();
  await jobs.start({ kind: "inpaint", fields: settings, source, regions: [times] });
}

const round = (seconds) => Math.round(seconds * 1000) / 1000;
const wavFile = (clip, blob) => new File([blob], `${name(clip)}.wav`, { type: "audio/wav" });
const name = (clip) => `${clip.order.fields.prompt.toLowerCase().match(/[\p{L}\p{N}]+/gu)?.join("-").slice(0, 60) ?? "clip"}-${clip.facts.seed}`;

// ---- showing ----

async function show(clip, { plays = false } = {}) {
  chosen = clip;
  const sound = await decode(clip.blob, clip.rateHz);
  if (chosen !== clip) return; // the user chose another clip
  if (shown && shown.id !== clip.id) other = shown;
  shown = clip;
  buffer = sound;
  player.load([buffer], [1]);
  if (plays) player.play().then(showPlaying, fail);
  element("ab").setAttribute("aria-pressed", "false");
  const { facts } = clip;
  const loudness = facts.loudness === null || facts.loudness === undefined ? "" : `, ${facts.loudness.toFixed(1)} LUFS`;
  const adapters = describe(clip.order.fields);
  element("clip-name").textContent = clip.order.fields.prompt;
  element("clip-facts").textContent = `${clip.model}${adapters && `, ${adapters}`}, seed ${facts.seed}, ${buffer.duration.toFixed(2)} s${loudness}${facts.device ? `, ${facts.device} ${facts.dtype ?? ""}` : ""}`;
  for (const id of ["play", "loop", "format", "download"]) element(id).disabled = false;
  element("format").replaceChildren(...FORMATS[clip.order.kind].map((format) => new Option(format)));
  element("ab").disabled = !other;
  element("clip-tools").hidden = false;
  document.documentElement.dataset.shown = clip.id;
  clips.mark(clip);
  player.onTick(0);
  showPlaying();
  await waveform.show(buffer, form.mostS || Infinity);
}

function removeOther(clip) {
  if (other?.id === clip.id) other = null;
  element("ab").disabled = !other;
}

function showPlaying() {
  element("play").textContent = player.isPlaying ? "Pause" : "Play";
}

function showRegion(region) {
  element("region-tools").hidden = !region || !shown;
  if (!region || !shown) return;
  const where = region.end > buffer.duration + 0.01 ? "past the end of the clip" : region.start < -0.01 ? "before the start of the clip" : "of the clip";
  element("region-line").textContent = `${(region.end - region.start).toFixed(2)} s ${where}`;
  element("region-start").value = region.start.toFixed(2);
  element("region-end").value = region.end.toFixed(2);
}

// ---- buttons ----

async function playOrPause() {
  if (player.isPlaying) player.stop();
  else await player.play();
  showPlaying();
}

async function toggleLoop() {
  const loops = !player.loops;
  element("loop").setAttribute("aria-pressed", String(loops));
  await player.setLoop(loops);
}

// Plays the shown clip and the previous one in sync at equal loudness, and switches the audible one.
async function toggleAB() {
  const button = element("ab");
  if (player.voices.length < 2) {
    const [clip, before] = [shown, other];
    const sound = await decode(before.blob, before.rateHz);
    if (shown !== clip) return; // another clip is shown by now
    const at = player.now;
    const wasPlaying = player.isPlaying;
    player.load([buffer, sound], equalGains([clip.facts.loudness, before.facts.loudness]));
    await player.seek(at);
    if (wasPlaying) await player.play();
  }
  const audible = 1 - player.audible;
  player.select(audible);
  button.setAttribute("aria-pressed", String(audible === 1));
  say(audible ? `Playing the previous clip: ${other.order.fields.prompt}, seed ${other.facts.seed}` : "Playing the shown clip");
  showPlaying();
}

async function download() {
  const clip = shown;
  const format = element("format").value;
  if (format !== "wav") say(`Generating the clip again as ${format}.`);
  const blob = format === "wav" ? clip.blob : await (await make(clip.order, { format })).blob();
  const link = Object.assign(document.createElement("a"), { href: URL.createObjectURL(blob), download: `${name(clip)}.${format}` });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
}

async function repeatAndCompare() {
  const clip = shown;
  say("Generating the clip again.");
  const { reply, verdict } = await repeat(clip);
  const [first, second] = await Promise.all([clip.blob, await reply.blob()].map((blob) => blob.arrayBuffer()));
  const bytes = new Uint8Array(second);
  const isSame = first.byteLength === second.byteLength && new Uint8Array(first).every((byte, index) => byte === bytes[index]);
  const hash = crypto.subtle ? `: SHA-256 ${await sha256(second)}` : ""; // needs HTTPS or localhost
  const why = verdict === "close" ? "the device or version differs, or the server runs in fast mode" : "the server has changed";
  say(isSame ? `Identical bytes${hash}` : `Different bytes: ${why}.`);
}

async function copy(kind) {
  const text = { curl: asCurl, python: asPython, json: asJson }[kind](shown);
  if (navigator.clipboard) await navigator.clipboard.writeText(text);
  else copyBySelection(text);
  say("Copied.");
}

// The fallback without HTTPS: only selected text can be copied.
function copyBySelection(text) {
  const field = Object.assign(document.createElement("textarea"), { value: text, className: "unseen" });
  document.body.append(field);
  field.select();
  document.execCommand("copy");
  field.remove();
}

function askKey(message = "") {
  element("key-error").textContent = message;
  element("key-error").hidden = !message;
  element("api-key").value = key();
  if (!element("key-dialog").open) element("key-dialog").showModal();
}

async function connect() {
  try {
    await form.load();
    form.clearFaults();
    await jobs.resume();
  } catch (error) {
    fail(error);
  }
  panel.refresh();
}

const on = (id, event, act) => element(id).addEventListener(event, () => attempt(act));
const attempt = async (act) => {
  try {
    await act();
  } catch (error) {
    fail(error);
  }
};
on("play", "click", playOrPause);
on("loop", "click", toggleLoop);
on("ab", "click", toggleAB);
on("download", "click", download);
on("repeat", "click", repeatAndCompare);
on("regenerate", "click", regenerate);
on("region-clear", "click", () => waveform.clear());
on("mark-region", "click", () => waveform.mark(buffer.duration * 0.25, buffer.duration * 0.75));
on("use-source", "click", () => form.setSource(wavFile(shown, shown.blob)));
on("load-settings", "click", () => form.fill(shown.order));
on("open-key", "click", () => askKey());
for (const id of ["region-start", "region-end"]) {
  on(id, "change", () => waveform.mark(element("region-start").valueAsNumber, element("region-end").valueAsNumber));
}
for (const button of document.querySelectorAll("[data-copy]")) button.addEventListener("click", () => attempt(() => copy(button.dataset.copy)));
on("key-dialog", "close", () => {
  if (element("key-dialog").returnValue !== "save") return undefined;
  setKey(element("api-key").value.trim());
  return connect();
});
// Removes the focus from a clicked button, so that Space plays after a click on Generate.
document.addEventListener("click", (event) => event.detail && event.target.closest("button")?.blur());
document.addEventListener("keydown", (event) => {
  const isTyping = event.target.closest("input, textarea, select, dialog, .scroll");
  const isPressing = event.key === " " && event.target.closest("button, a");
  if (isTyping || isPressing || event.ctrlKey || event.metaKey || event.altKey || !shown) return;
  const acts = {
    " ": playOrPause,
    l: toggleLoop,
    b: () => other && toggleAB(),
    ArrowLeft: () => player.seek(player.now - 1),
    ArrowRight: () => player.seek(player.now + 1),
  };
  if (!acts[event.key]) return;
  event.preventDefault();
  attempt(acts[event.key]);
});

element("autoplay").checked = store.readAutoplay();
on("autoplay", "change", () => store.setAutoplay(element("autoplay").checked));
await store.open();
await Promise.all([clips.load(), connect()]);
document.documentElement.dataset.ready = "true";
