// The form: shows the fields of the selected model with the server's ranges, reads their values, and shows errors at
// the fields that the server names.

import { Adapters } from "./adapters.js";
import { callWithRetries } from "./api.js";
import { readFields } from "./description.js";
import { isExtended } from "./orders.js";
import { Sections } from "./sections.js";

const NOTES = ["C", "C♯", "D", "E♭", "E", "F", "F♯", "G", "A♭", "A", "B♭", "B"];
const KEYS = NOTES.flatMap((note) => [`${note} major`, `${note} minor`]);
const WITHIN = { true_peak_dbtp: "loudness" }; // fields that are part of another
// Fields that the page has for itself: each variation is an order, and the key of a loop is added to its prompt.
const OWN = new Set(["prompt", "batch_size", "key", "audio"]);
// The kinds of clips that a field is for, of those that are not for all.
const ONLY_FOR = {
  duration: ["clip"],
  audio: ["clip"],
  init_noise_level: ["clip"],
  batch_size: ["clip", "loop"],
  bpm: ["loop"],
  bars: ["loop"],
  key: ["loop"],
  sections: ["piece"],
};
const element = (id) => document.getElementById(id);

// Rounds a bound down, so that the shown value is valid input.
const shown = (most) => Math.floor(most * 100) / 100;

// Says which numbers a field takes.
function requirement({ min, max, step }) {
  const range = max ? `from ${min} to ${shown(max)}` : `of at least ${min}`;
  return `Enter a ${step === "1" ? "whole number" : "number"} ${range}.`;
}

export const randomSeed = () => crypto.getRandomValues(new Uint32Array(1))[0];

const namesTempo = (prompt) => /\d\s*bpm\b/i.test(prompt);
const inKey = (key) => (key ? ` in ${key}` : "");

// Returns a loop's prompt without the tempo and key that `order` has added, and the key. A prompt that named its tempo
// stays as it was sent, because the user may have written all of it.
function asWritten({ prompt, bpm }) {
  for (const key of ["", ...KEYS]) {
    const added = ` ${bpm}bpm${inKey(key)}`;
    const written = prompt.slice(0, -added.length);
    if (prompt.endsWith(added) && !namesTempo(written)) return { prompt: written, key };
  }
  return { prompt, key: "" };
}

export class Form {
  constructor({ onSubmit, onSourceFile }) {
    this.node = element("form");
    this.models = new Map();
    this.adapters = new Adapters();
    this.sections = new Sections();
    this.source = null; // a file
    this.parent = null; // the clip that the source is from
    this.locked = false;
    this.node.addEventListener("submit", (event) => {
      event.preventDefault();
      onSubmit();
    });
    this.node.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey)) return;
      event.preventDefault(); // or in a field of one line the form is submitted twice
      this.node.requestSubmit();
    });
    this.node.addEventListener("input", ({ target }) => this.clearFaults(target.closest("[data-field]")));
    element("model").addEventListener("change", () => this.showModel());
    for (const kind of this.node.elements.kind) kind.addEventListener("change", () => this.showKind());
    element("init_noise_level").addEventListener("input", () => this.showStrength());
    element("seed-lock").addEventListener("click", () => this.lockSeed(!this.locked));
    element("source-clear").addEventListener("click", () => this.setSource(null));
    element("source-file").addEventListener("change", (event) => {
      const [file] = event.target.files;
      event.target.value = "";
      if (file) onSourceFile(file);
    });
    this.acceptDrops(onSourceFile);
    element("key").replaceChildren(new Option("any", ""), ...KEYS.map((key) => new Option(key, key)));
  }

  // Loads models and limits. Throws ApiError.
  async load() {
    const read = async (path, cache) => (await callWithRetries(path, { cache })).json();
    const [models, limits, description] = await Promise.all([read("v1/models"), read("health"), read("openapi.json", "no-cache")]);
    this.accepted = readFields(description);
    const served = models.data.filter((entry) => !entry.parent); // the others are adapters
    this.models = new Map(served.map((model) => [model.id, model]));
    this.adapters.load(models.data);
    this.limits = limits;
    this.showLoaded();
    const chosen = element("model").value;
    const options = served.map((model) => new Option(model.is_demo ? `${model.id} (demo)` : model.id, model.id));
    element("model").replaceChildren(...options);
    element("model").value = this.models.has(chosen) ? chosen : served.find((model) => model.is_default).id;
    this.showModel();
  }

  get isLoaded() {
    return this.models.size > 0;
  }

  // Enables the Generate button once the form has its data. Without a key that the server needs, the button asks for it.
  showLoaded({ needsKey = false } = {}) {
    this.needsKey = needsKey && !this.isLoaded;
    const button = element("generate");
    button.disabled = !this.isLoaded && !this.needsKey;
    button.textContent = this.needsKey ? "Enter the API key" : this.isLoaded ? "Generate" : "Connecting";
  }

  get model() {
    return this.models.get(element("model").value);
  }

  get kind() {
    return this.node.elements.kind.value;
  }

  // Returns the longest clip of a model in seconds, 0 if it is not served.
  longestOf(name) {
    return this.models.get(name)?.max_duration_s ?? 0;
  }

  showModel() {
    const { model } = this;
    if (Number(element("duration").value) > model.max_duration_s) element("duration").value = shown(model.max_duration_s);
    element("steps").placeholder = model.default_steps;
    const samplers = [new Option("the model's default", ""), ...model.samplers.map((name) => new Option(name, name))];
    const chosen = element("sampler").value;
    element("sampler").replaceChildren(...samplers);
    element("sampler").value = model.samplers.includes(chosen) ? chosen : "";
    this.adapters.show(model.id);
    this.sections.bound(model.max_duration_s);
    this.showKind();
  }

  // Shows the fields that the route of this kind accepts, with their ranges.
  showKind() {
    if (!this.model) return; // not loaded yet
    const { kind } = this;
    element("cfg_scale").placeholder = this.model.default_cfg_scale;
    for (const choice of this.node.querySelectorAll("[data-needs]")) choice.hidden = !(choice.dataset.needs in this.accepted.piece);
    const accepted = this.accepted[kind === "piece" ? "piece" : kind === "clip" && this.source ? "vary" : "generate"];
    for (const box of this.node.querySelectorAll("[data-field]")) {
      const name = box.dataset.field;
      const isAccepted = OWN.has(name) || (WITHIN[name] ?? name) in accepted;
      const isUseless = (name === "init_noise_level" && !this.source) || (name === "loras" && this.adapters.isEmpty);
      box.hidden = !isAccepted || isUseless || !(ONLY_FOR[name] ?? [kind]).includes(kind);
      this.bound(box, accepted[name] ?? {});
    }
  }

  bound(box, { min, max, text }) {
    const input = box.querySelector("input[type=number], input[type=range]");
    const most = { duration: this.model.max_duration_s, steps: this.model.max_steps, batch_size: this.limits.max_batch_size };
    if (input) {
      if (min !== undefined) input.min = min;
      const upper = Math.min(max ?? Infinity, most[box.dataset.field] ?? Infinity);
      if (upper < Infinity) input.max = upper;
      const range = box.querySelector("span.range");
      if (range && input.max) range.textContent = `${input.min || 0} to ${shown(input.max)}`;
    }
    if (text) box.title = text;
  }

  showStrength() {
    this.node.querySelector("output[for=init_noise_level]").value = element("init_noise_level").value;
  }

  lockSeed(locked) {
    this.locked = locked;
    element("seed-lock").setAttribute("aria-pressed", String(locked));
    if (!locked) element("seed").value = "";
  }

  // Sets the source file or null, and shows its name. Only clips have a source. `parent` is the clip that it is from.
  setSource(file, { note = "", parent = null } = {}) {
    if (file && file !== this.source) this.node.elements.kind.value = "clip";
    this.source = file;
    this.parent = parent;
    element("source-name").textContent = file ? `Source: ${file.name}${note}` : "No source. Drop an audio file here, or use a clip.";
    element("source-clear").hidden = !file;
    this.showKind();
  }

  acceptDrops(onSourceFile) {
    const box = element("source-box");
    const isFile = (event) => [...(event.dataTransfer?.types ?? [])].includes("Files");
    document.addEventListener("dragover", (event) => {
      if (!isFile(event)) return;
      event.preventDefault();
      box.classList.add("over");
    });
    document.addEventListener("dragleave", (event) => event.relatedTarget || box.classList.remove("over"));
    document.addEventListener("drop", (event) => {
      if (!isFile(event)) return;
      event.preventDefault();
      box.classList.remove("over");
      const [file] = event.dataTransfer.files;
      if (file) onSourceFile(file);
    });
  }

  // Returns errors that need no server: a missing prompt, and numbers that a field does not take.
  faults() {
    const found = element("prompt").value.trim() ? [] : [{ field: "prompt", message: "Enter a prompt." }];
    for (const box of this.node.querySelectorAll("[data-field]:not([hidden])")) {
      const input = box.querySelector("input[type=number]:invalid");
      if (input) found.push({ field: box.dataset.field, message: requirement(input), input });
    }
    return found;
  }

  // Returns the orders, one per variation, each with its seed. An empty field means the model's default.
  orders() {
    const number = (id) => (element(id).value.trim() === "" ? undefined : element(id).valueAsNumber);
    const first = number("seed") ?? randomSeed();
    if (!this.locked) element("seed").value = "";
    const count = this.kind === "piece" ? 1 : (number("batch_size") ?? 1);
    return Array.from({ length: count }, (_, index) => this.order(first + index, number));
  }

  order(seed, number) {
    const sampler = element("sampler").value;
    const target = number("target_lufs");
    const shared = {
      prompt: element("prompt").value,
      model: this.model.id,
      steps: number("steps"),
      cfg_scale: number("cfg_scale"),
      seed,
      negative_prompt: element("negative_prompt").value || undefined,
      sampler_kwargs: sampler ? { sampler_type: sampler } : undefined,
      loras: this.adapters.chosen,
      loudness: target === undefined ? undefined : defined({ target_lufs: target, true_peak_dbtp: number("true_peak_dbtp") }),
      fade_in_s: number("fade_in_s"),
      fade_out_s: number("fade_out_s"),
    };
    if (this.kind === "piece") return { kind: "generate", fields: defined({ ...shared, sections: this.sections.value }) };
    if (this.kind === "loop") {
      const tempo = namesTempo(shared.prompt) ? "" : ` ${number("bpm")}bpm`;
      const prompt = `${shared.prompt}${tempo}${inKey(element("key").value)}`;
      return { kind: "generate", fields: defined({ ...shared, prompt, loop: true, bpm: number("bpm"), bars: Number(element("bars").value) }) };
    }
    const fields = defined({ ...shared, duration: number("duration") });
    if (!this.source) return { kind: "generate", fields };
    return { kind: "vary", fields: defined({ ...fields, init_noise_level: number("init_noise_level") }), ...this.origin };
  }

  get origin() {
    return defined({ source: this.source ?? undefined, parent: this.parent ?? undefined });
  }

  // Loads a clip's settings. Throws Error if its model or an adapter is not served.
  fill(order) {
    const { fields } = order;
    if (!this.models.has(fields.model)) throw new Error(`The server no longer has the model ${fields.model}.`);
    this.adapters.require(fields.model, fields.loras);
    const set = (id, value) => {
      element(id).value = value ?? "";
    };
    const { prompt, key } = fields.loop ? asWritten(fields) : fields;
    this.node.elements.kind.value = fields.loop ? "loop" : fields.sections ? "piece" : "clip";
    set("model", fields.model);
    this.showModel();
    set("prompt", prompt);
    for (const id of ["steps", "cfg_scale", "negative_prompt", "seed", "fade_in_s", "fade_out_s"]) set(id, fields[id]);
    for (const id of ["target_lufs", "true_peak_dbtp"]) set(id, fields.loudness?.[id]);
    set("sampler", fields.sampler_kwargs?.sampler_type);
    set("batch_size", 1);
    this.adapters.choose(fields.loras);
    if (fields.loop) for (const id of ["bpm", "bars"]) set(id, fields[id]);
    if (fields.loop) set("key", key);
    if (fields.sections) this.sections.fill(fields.sections);
    if (this.kind === "clip" && !isExtended(order)) set("duration", fields.duration);
    if (order.kind === "vary") set("init_noise_level", fields.init_noise_level);
    this.lockSeed(true);
    this.showStrength();
    const { source = null, parent = null } = order.kind === "inpaint" ? {} : order;
    this.setSource(source, { parent });
  }

  field(name) {
    return document.querySelector(`[data-field="${name}"]`);
  }

  // Whether the form shows this field.
  has(name) {
    const box = /^\w+$/.test(name ?? "") ? this.field(name) : null;
    return Boolean(box && !box.hidden);
  }

  // Removes the errors of all fields or of one.
  clearFaults(box = this.node) {
    if (!box) return;
    for (const note of box.querySelectorAll("[data-field] > .error")) note.remove();
    for (const input of box.querySelectorAll("[aria-invalid]")) {
      input.removeAttribute("aria-invalid");
      input.removeAttribute("aria-describedby");
    }
    element("form-error").hidden = true;
  }

  // Shows each error at its field and focuses the first; errors without a field appear below the form.
  showFaults(faults) {
    this.clearFaults();
    const elsewhere = [];
    for (const { field, message, input: wrong } of faults) {
      if (!this.has(field)) {
        elsewhere.push(message);
        continue;
      }
      const box = this.field(field);
      const note = Object.assign(document.createElement("p"), { className: "error", id: `error-${field}`, textContent: message });
      box.append(note);
      const folded = box.closest("details");
      if (folded) folded.open = true;
      const input = wrong ?? box.querySelector("input, select, textarea");
      input?.setAttribute("aria-invalid", "true");
      input?.setAttribute("aria-describedby", note.id);
    }
    element("form-error").textContent = elsewhere.join(" ");
    element("form-error").hidden = !elsewhere.length;
    if (elsewhere.length) element("form-error").scrollIntoView({ block: "nearest" });
    document.querySelector("[aria-invalid]")?.focus();
  }
}

export const defined = (fields) => Object.fromEntries(Object.entries(fields).filter(([, value]) => value !== undefined && !Number.isNaN(value)));
