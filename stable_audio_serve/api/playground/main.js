// The page: what each button does.

import { ApiError, key, setKey } from "./api.js";
import { audioContext, decode, equalGains, padded, Player, sha256, wavBlob } from "./audio.js";
import { defined, Form, randomSeed } from "./form.js";
import { Jobs } from "./jobs.js";
import { asCurl, asJson, asPython, FORMATS, make, repeat } from "./orders.js";
import { ServerPanel } from "./server_panel.js";
import * as store from "./store.js";
import { Takes } from "./takes.js";
import { Waveform } from "./waveform.js";

const element = (id) => document.getElementById(id);
const MOST_DECODED_BYTES = 50e6; // a larger source is not looked into, only sent
const say = (message) => (element("said").textContent = message);

let chosen = null; // the take that is to be shown
let shown = null; // the take that is shown
let other = null; // the one shown before it: A / B
let buffer = null; // its sound

const player = new Player({
  onTick: (seconds) => {
    waveform.moveTo(seconds);
    element("clock").value = `${seconds.toFixed(2)} / ${player.duration.toFixed(2)} s`;
  },
  onEnd: () => showPlaying(),
});
const waveform = new Waveform(element("wave"), { onSeek: (seconds) => player.seek(seconds), onRegion: showRegion });
const form = new Form({ onSubmit: () => attempt(generate), onSourceFile: useFile });
const takes = new Takes({ onShow: (take) => show(take).catch(fail), onForget: forget });
const jobs = new Jobs({ onTake: addTake, onFailure: fail });
const panel = new ServerPanel();

function fail(error) {
  if (error instanceof ApiError) {
    if (error.status === 401) return askKey(error.message);
    const wait = error.retryAfterS ? ` Try again in ${error.retryAfterS} s.` : "";
    return form.showFaults(error.faults.map((fault, index) => (index ? fault : { ...fault, message: fault.message + wait })));
  }
  form.showFaults([{ field: null, message: error.message }]);
}

// ---- making ----

async function generate() {
  if (!form.model) return connect(); // the server has not said yet what it makes, or asks for a key
  form.clearFaults();
  const faults = form.faults();
  if (faults.length) return form.showFaults(faults);
  readySound();
  return Promise.all(form.orders().map((order) => jobs.start(order)));
}

// Opening a sound device takes a moment: it is done while the take is made.
function readySound() {
  if (element("autoplay").checked) audioContext().resume().catch(() => {});
}

async function addTake({ id, order, blob, status, facts, seconds }) {
  if (takes.byId.has(id)) return; // another tab has fetched it
  const take = { id, at: Date.now(), order, blob, rateHz: status.sample_rate, model: status.model, facts, seconds };
  const isKept = takes.add(take);
  await show(take, { plays: Boolean(seconds) && element("autoplay").checked });
  const warnings = (status.warnings ?? []).map((warning) => ` ${warning}.`);
  say((seconds ? `Made in ${seconds.toFixed(2)} s.` : "Made.") + warnings.join(""));
  if (!(await isKept)) say("Made. This browser has no room for it: it lasts as long as this page.");
}

async function useFile(file) {
  form.setSource(file, `, ${(file.size / 1e6).toFixed(1)} MB`);
  if (file.size > MOST_DECODED_BYTES) return;
  const sound = await decode(file, 44100).catch(() => null);
  if (form.source !== file) return; // it was replaced meanwhile
  if (sound) form.setSource(file, `, ${sound.duration.toFixed(2)} s`);
  else form.showFaults([{ field: "audio", message: "This browser cannot read the file; the server may." }]);
}

const CROSSFADE_S = 0.03; // the server's, inside a region; what is before a clip's start has none of it

// The region is made anew: within the take, behind its end, or before its start, for which the clip is moved.
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
const wavFile = (take, blob) => new File([blob], `${name(take)}.wav`, { type: "audio/wav" });
const name = (take) => `${take.order.fields.prompt.toLowerCase().match(/[\p{L}\p{N}]+/gu)?.join("-").slice(0, 60) ?? "take"}-${take.facts.seed}`;

// ---- showing ----

async function show(take, { plays = false } = {}) {
  chosen = take;
  const sound = await decode(take.blob, take.rateHz);
  if (chosen !== take) return; // another one was chosen meanwhile
  if (shown && shown.id !== take.id) other = shown;
  shown = take;
  buffer = sound;
  player.load([buffer], [1]);
  if (plays) player.play().then(showPlaying, fail);
  element("ab").setAttribute("aria-pressed", "false");
  const { facts } = take;
  const loudness = facts.loudness === null || facts.loudness === undefined ? "" : `, ${facts.loudness.toFixed(1)} LUFS`;
  element("take-name").textContent = take.order.fields.prompt;
  element("take-facts").textContent = `${take.model}, seed ${facts.seed}, ${buffer.duration.toFixed(2)} s${loudness}${facts.device ? `, ${facts.device} ${facts.dtype ?? ""}` : ""}`;
  for (const id of ["play", "loop", "format", "download"]) element(id).disabled = false;
  element("format").replaceChildren(...FORMATS[take.order.kind].map((format) => new Option(format)));
  element("ab").disabled = !other;
  element("take-tools").hidden = false;
  document.documentElement.dataset.shown = take.id;
  takes.mark(take);
  player.onTick(0);
  showPlaying();
  await waveform.show(buffer, form.mostS || Infinity);
}

function forget(take) {
  if (other?.id === take.id) other = null;
  element("ab").disabled = !other;
}

function showPlaying() {
  element("play").textContent = player.isPlaying ? "Pause" : "Play";
}

function showRegion(region) {
  element("region-tools").hidden = !region || !shown;
  if (!region || !shown) return;
  const where = region.end > buffer.duration + 0.01 ? "continues the take" : region.start < -0.01 ? "extends it to the left" : "of the take";
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

// The shown take and the one before it play in step, as loud as each other; this changes which of them is heard.
async function toggleAB() {
  const button = element("ab");
  if (player.voices.length < 2) {
    const [take, before] = [shown, other];
    const sound = await decode(before.blob, before.rateHz);
    if (shown !== take) return; // another one is shown by now
    const at = player.now;
    const wasPlaying = player.isPlaying;
    player.load([buffer, sound], equalGains([take.facts.loudness, before.facts.loudness]));
    await player.seek(at);
    if (wasPlaying) await player.play();
  }
  const heard = 1 - player.heard;
  player.hear(heard);
  button.setAttribute("aria-pressed", String(heard === 1));
  say(heard ? `Hearing the one before: ${other.order.fields.prompt}, seed ${other.facts.seed}` : "Hearing the shown take");
  showPlaying();
}

async function download() {
  const take = shown;
  const format = element("format").value;
  if (format !== "wav") say(`Making it once more, as ${format}.`);
  const blob = format === "wav" ? take.blob : await (await make(take.order, { format })).blob();
  const link = Object.assign(document.createElement("a"), { href: URL.createObjectURL(blob), download: `${name(take)}.${format}` });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
}

async function prove() {
  const take = shown;
  say("Making it once more.");
  const { reply, verdict } = await repeat(take);
  const [first, second] = await Promise.all([take.blob, await reply.blob()].map((blob) => blob.arrayBuffer()));
  const bytes = new Uint8Array(second);
  const isSame = first.byteLength === second.byteLength && new Uint8Array(first).every((byte, index) => byte === bytes[index]);
  const hash = crypto.subtle ? `: SHA-256 ${await sha256(second)}` : ""; // only on HTTPS and on this machine
  const why = verdict === "close" ? "it was made on something else, or in fast mode" : "the server is another one by now";
  say(isSame ? `The same to the byte${hash}` : `Not the same bytes: ${why}.`);
}

async function copy(kind) {
  const text = { curl: asCurl, python: asPython, json: asJson }[kind](shown);
  if (navigator.clipboard) await navigator.clipboard.writeText(text);
  else copyAsBefore(text);
  say("Copied.");
}

// Without HTTPS, on another machine, the clipboard is open to what the user has selected only.
function copyAsBefore(text) {
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
on("repeat", "click", prove);
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
// A button that was pressed by hand gives the keys back: after Generate, Space plays.
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

element("autoplay").checked = store.playsAtOnce();
on("autoplay", "change", () => store.setPlaysAtOnce(element("autoplay").checked));
await store.open();
await Promise.all([takes.load(), connect()]);
document.documentElement.dataset.ready = "true";
