// The sections of a long piece: a list of prompts and lengths that the user extends.

import { formatTime } from "./words.js";

const element = (id) => document.getElementById(id);
const USUAL_S = 20;

export class Sections {
  constructor() {
    this.usualS = USUAL_S;
    element("add-section").addEventListener("click", () => this.add().prompt.focus());
    element("sections").addEventListener("input", () => this.number());
  }

  // Sets the longest section of the model in seconds, and makes new sections shorter than that.
  bound(longestS) {
    this.usualS = Math.min(USUAL_S, Math.max(1, Math.floor(longestS / 2)));
    if (!this.rows.length) this.fill([{}, {}]);
  }

  // Shows these sections.
  fill(sections) {
    element("sections").replaceChildren();
    for (const section of sections) this.add(section);
  }

  // Adds a section as long as the last one. Returns its inputs.
  add({ prompt = "", duration = this.rows.at(-1)?.duration.value ?? this.usualS } = {}) {
    const row = document.createElement("li");
    // Without autocomplete "off", a browser that returns to the page writes the values into other fields.
    const input = (name, facts) => Object.assign(document.createElement("input"), { className: name, autocomplete: "off", ...facts });
    const inputs = {
      prompt: input("prompt", { type: "text", dir: "auto", value: prompt, placeholder: "as the prompt above", maxLength: 100_000 }),
      duration: input("duration", { type: "number", value: duration, min: 1, step: "any", required: true }),
    };
    const remove = Object.assign(document.createElement("button"), { type: "button", className: "delete", title: "Remove" });
    remove.addEventListener("click", () => {
      row.remove();
      this.number();
      element("add-section").focus();
    });
    row.append(inputs.prompt, inputs.duration, remove);
    element("sections").append(row);
    this.number();
    return inputs;
  }

  get rows() {
    const rows = [...element("sections").children];
    return rows.map((row) => ({ prompt: row.querySelector(".prompt"), duration: row.querySelector(".duration"), remove: row.querySelector("button") }));
  }

  // Names the inputs by their section, and shows the total length.
  number() {
    const { rows } = this;
    rows.forEach(({ prompt, duration, remove }, index) => {
      prompt.setAttribute("aria-label", `Prompt of section ${index + 1}`);
      duration.setAttribute("aria-label", `Length of section ${index + 1}, seconds`);
      remove.setAttribute("aria-label", `Remove section ${index + 1}`);
      remove.disabled = rows.length === 1;
    });
    element("sections-total").textContent = `${formatTime(lengthOf(this.value), 0.1)} in all`;
  }

  // The sections as the API takes them. A section without a prompt has the prompt of the piece.
  get value() {
    return this.rows.map(({ prompt, duration }) => ({ ...(prompt.value.trim() && { prompt: prompt.value }), duration: duration.valueAsNumber || 0 }));
  }
}

// Returns the length of a piece in seconds.
export const lengthOf = (sections) => sections.reduce((sum, { duration }) => sum + duration, 0);
