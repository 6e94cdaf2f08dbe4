// The actions of the page.

import { ApiError, key, setKey } from "./api.js";
import { audioContext, decode, sha256 } from "./audio.js";
import { Clips } from "./clips.js";
import { defined, Form, randomSeed } from "./form.js";
import { Jobs } from "./jobs.js";
import { asCurl, asJson, asPython, FORMATS, make, repeat } from "./orders.js";
import { lengthOf } from "./sections.js";
import { ServerPanel } from "./server_panel.js";
import { Stage } from "./stage.js";
import * as store from "./store.js";
import { fileName, titleOf } from "./words.js";

const element = (id) => document.getElementById(id);
const MOST_DECODED_BYTES = 50e6; // larger sources are sent without decoding them first

const stage = new Stage({ longestOf: (model) => form.longestOf(model), onError: fail });
const form = new Form({ onSubmit: () => attempt(generate), onSourceFile: useFile });
const clips = new Clips({ onShow: (clip) => attempt(() => select(clip)), onDelete: (clip) => stage.forget(clip), onFile: save, onError: fail });
const jobs = new Jobs({ onClip: addClip, onGrowing: (job, how) => attempt(() => listen(job, how)), onRefusal: refuse });
const panel = new ServerPanel({ onBack: () => form.isLoaded || connect() });
const say = (message) => stage.say(message);

async function attempt(act) {
  try {
    await act();
  } catch (error) {
    fail(error);
  }
}

function fail(error) {
  say(""); // such as that a clip is being generated
  if (error instanceof ApiError) {
    if (error.status === 401) return askKey(error.message);
    return form.showFaults(error.faults);
  }
  form.showFaults([{ field: null, message: error.message }]);
}

// Shows a refusal that is about the key or a field of the form. Returns whether it is.
function refuse(error) {
  const isAboutForm = error.status === 401 || Boolean(error.faults?.some(({ field }) => form.has(field)));
  if (isAboutForm) fail(error);
  return isAboutForm;
}

// ---- generating ----

async function generate() {
  if (!form.isLoaded) return form.needsKey && askKey();
  form.clearFaults();
  const faults = form.faults();
  if (faults.length) return form.showFaults(faults);
  return run(form.orders());
}

async function run(orders) {
  // Opens the audio device during the generation, because that takes a moment.
  if (element("autoplay").checked) audioContext().resume().catch(() => {});
  const ends = orders.map((order) => jobs.start(order));
  stage.reveal();
  await Promise.all(ends);
}

async function addClip({ id, order, blob, status, facts, seconds }) {
  const rateHz = status.sample_rate;
  const { sections } = order.fields;
  const durationS = sections ? lengthOf(sections) : status.duration ?? (await decode(blob, rateHz)).duration;
  const added = clips.byId.get(id); // by another tab
  const clip = added ?? { id, at: Date.now(), order, blob, rateHz, model: status.model, facts, seconds, durationS };
  const isKept = added ? true : clips.add(clip);
  await select(clip, { plays: Boolean(seconds) && element("autoplay").checked });
  const warnings = (status.warnings ?? []).map((warning) => ` ${warning}.`);
  say((seconds ? `Generated in ${seconds.toFixed(2)} s.` : "Generated.") + warnings.join(""));
  if (!(await isKept)) say("Generated. The browser cannot store the clip: it lasts until this page closes.");
}

// Shows a long piece while it is made. Unless the user asks for it, it does not interrupt what plays.
async function listen(job, { isAsked, isNew }) {
  if (!isAsked && stage.player?.isPlaying) return;
  clips.mark(job);
  await stage.showGrowing(job, { plays: isAsked || (isNew && element("autoplay").checked) });
}

async function select(clip, options) {
  clips.mark(clip);
  await stage.show(clip, options);
}

async function useFile(file) {
  form.setSource(file, { note: `, ${(file.size / 1e6).toFixed(1)} MB` });
  if (file.size > MOST_DECODED_BYTES) return;
  const sound = await decode(file, 44100).catch(() => null);
  if (form.source !== file) return; // the user chose another file
  if (sound) form.setSource(file, { note: `, ${sound.duration.toFixed(2)} s` });
  else form.showFaults([{ field: "audio", message: "This browser cannot decode the file. The server may be able to." }]);
}

// Regenerates the region inside the clip, and extends the clip by what is before its start or past its end.
async function regenerate() {
  form.clearFaults();
  const { shown, duration } = stage;
  const { region } = stage.view;
  const { fields } = shown.order;
  const before = round(Math.max(0, -region.start));
  const after = round(Math.max(0, region.end - duration));
  const inside = [round(Math.max(0, region.start)), round(Math.min(duration, region.end))];
  const isLonger = before > 0 || after > 0;
  const settings = defined({
    prompt: element("prompt").value || fields.prompt,
    model: shown.model,
    steps: fields.steps,
    cfg_scale: fields.cfg_scale,
    sampler_kwargs: fields.sampler_kwargs,
    loras: fields.loras,
    negative_prompt: fields.negative_prompt,
    duration: isLonger ? undefined : duration,
    extend_before_s: before || undefined,
    extend_after_s: after || undefined,
    init_noise_level: stage.strength ?? undefined,
    seed: form.locked ? fields.seed : randomSeed(),
  });
  const regions = inside[0] < inside[1] ? { regions: [inside] } : {};
  await run([{ kind: "inpaint", fields: settings, source: wavFile(shown), ...regions, parent: asParent(shown) }]);
}

const round = (seconds) => Math.round(seconds * 1000) / 1000;
const wavFile = (clip) => new File([clip.blob], `${fileName(clip)}.wav`, { type: "audio/wav" });
const asParent = (clip) => ({ id: clip.id, title: titleOf(clip) });

// ---- files ----

function save(blob, name) {
  const link = Object.assign(document.createElement("a"), { href: URL.createObjectURL(blob), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
}

async function download() {
  const clip = stage.shown;
  const { name, extension, fields } = FORMATS[Number(element("format").value)];
  if (fields) say(`Generating the clip again as ${name}.`);
  const blob = fields ? await (await make(clip.order, fields)).blob() : clip.blob;
  save(blob, `${fileName(clip)}.${extension}`);
  say("");
}

async function repeatAndCompare() {
  const clip = stage.shown;
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
  const text = { curl: asCurl, python: asPython, json: asJson }[kind](stage.shown);
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

// ---- the server ----

function askKey(message = "") {
  form.showLoaded({ needsKey: true });
  element("key-error").textContent = message;
  element("key-error").hidden = !message;
  if (element("key-dialog").open) return; // the user may be typing
  element("api-key").value = key();
  element("key-dialog").returnValue = ""; // Escape leaves it as it is, so an earlier "save" would be repeated
  element("key-dialog").showModal();
}

let connecting = null;

// Loads the form's data and resumes unfinished jobs. Calls during an attempt wait for it.
function connect() {
  connecting ??= load().finally(() => (connecting = null));
  return connecting;
}

async function load() {
  try {
    await form.load();
    form.clearFaults();
    await jobs.resume();
  } catch (error) {
    fail(error);
  }
  panel.refresh();
}

// ---- events ----

const on = (id, event, act) => element(id).addEventListener(event, () => attempt(act));
on("download", "click", download);
on("repeat", "click", repeatAndCompare);
on("regenerate", "click", regenerate);
on("use-source", "click", () => form.setSource(wavFile(stage.shown), { parent: asParent(stage.shown) }));
on("load-settings", "click", () => form.fill(stage.shown.order));
on("open-key", "click", () => askKey());
for (const button of document.querySelectorAll("[data-copy]")) button.addEventListener("click", () => attempt(() => copy(button.dataset.copy)));
for (const button of document.querySelectorAll("[data-example]")) {
  button.addEventListener("click", () => {
    element("prompt").value = button.dataset.example;
    element("prompt").focus();
  });
}
on("key-dialog", "close", () => {
  if (element("key-dialog").returnValue !== "save") return undefined;
  setKey(element("api-key").value.trim());
  return connect();
});
on("autoplay", "change", () => store.setPreference("autoplay", element("autoplay").checked ? "on" : "off"));
on("more", "toggle", () => store.setPreference("more", element("more").open ? "open" : "closed"));

const SHORTCUTS = [
  { keys: [" "], label: "Space", effect: "play, pause", act: () => stage.playOrPause() },
  { keys: ["l"], label: "L", effect: "loop", act: () => stage.toggleLoop() },
  { keys: ["b"], label: "B", effect: "compare with the clip shown before", act: () => element("ab").disabled || stage.toggleAB() },
  { keys: ["ArrowLeft"], label: "←", effect: "one second back", act: () => stage.seek(stage.player.now - 1) },
  { keys: ["ArrowRight"], label: "→", effect: "one second forward", act: () => stage.seek(stage.player.now + 1) },
  { keys: ["Home"], label: "Home", effect: "to the start", act: () => stage.seek(0) },
  { keys: ["+", "="], label: "+", effect: "zoom in", act: () => element("zoom-in").click() },
  { keys: ["-"], label: "−", effect: "zoom out", act: () => element("zoom-out").click() },
  { keys: ["0"], label: "0", effect: "show the whole clip", act: () => element("zoom-fit").click() },
  { keys: ["r"], label: "R", effect: "mark a region", act: () => element("mark-region").click() },
  { keys: ["Escape"], label: "Esc", effect: "clear the region", act: () => stage.view.clear() },
];
for (const { label, effect } of [{ label: "Ctrl + Enter", effect: "generate" }, ...SHORTCUTS]) {
  const line = document.createElement("div");
  const key = document.createElement("dt");
  key.append(Object.assign(document.createElement("kbd"), { textContent: label }));
  line.append(key, Object.assign(document.createElement("dd"), { textContent: effect }));
  element("shortcuts").querySelector("dl").append(line);
}

// Removes the focus from a clicked button, so that Space plays after a click on Generate.
document.addEventListener("click", (event) => event.detail && event.target.closest("button")?.blur());
document.addEventListener("keydown", (event) => {
  const isTyping = event.target.closest("input, textarea, select, dialog, .scroll");
  const isPressing = event.key === " " && event.target.closest("button, a, summary");
  if (isTyping || isPressing || event.ctrlKey || event.metaKey || event.altKey || !stage.shown) return;
  const shortcut = SHORTCUTS.find(({ keys }) => keys.includes(event.key));
  if (!shortcut) return;
  event.preventDefault();
  attempt(shortcut.act);
});

element("autoplay").checked = store.preference("autoplay", "on") !== "off";
element("more").open = store.preference("more", "closed") === "open";
await store.open();
await Promise.all([clips.load(), connect()]);
document.documentElement.dataset.ready = "true";
