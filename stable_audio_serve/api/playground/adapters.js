// The sliders of the adapters (LoRA) of the selected model. An adapter whose slider is at 0 is off.

const element = (id) => document.getElementById(id);
const SIGNED = ["lora", "lora-xs"]; // types whose strength may be negative

// Returns the adapters of an order as text, such as "vinyl 0.8, tape 1".
export const describe = ({ loras = [] }) => loras.map(({ name, strength }) => `${name} ${strength}`).join(", ");

export class Adapters {
  constructor() {
    this.byModel = new Map(); // names of models, and their adapters by name
    this.sliders = new Map(); // sliders of the selected model by the adapter's name
  }

  // Reads the adapters from the entries of the server's list of models.
  load(entries) {
    this.byModel.clear();
    for (const { id, parent, ...facts } of entries) {
      if (!parent) continue;
      if (!this.byModel.has(parent)) this.byModel.set(parent, new Map());
      this.byModel.get(parent).set(id.slice(parent.length + 1), facts);
    }
  }

  // Shows the sliders of a model. Adapters of the same name keep their strength.
  show(model) {
    const { chosen } = this;
    const rows = [...(this.byModel.get(model) ?? [])].map(([name, { type }], index) => makeRow(name, { type, id: `lora-${index}` }));
    this.sliders = new Map(rows.map(({ name, slider }) => [name, slider]));
    element("loras").replaceChildren(...rows.map(({ row }) => row));
    this.choose(chosen);
  }

  get isEmpty() {
    return !this.sliders.size;
  }

  // The adapters that are on, as the API takes them; undefined if there are none.
  get chosen() {
    const all = [...this.sliders].map(([name, slider]) => ({ name, strength: slider.valueAsNumber }));
    const on = all.filter(({ strength }) => strength);
    return on.length ? on : undefined;
  }

  // Sets the sliders to the adapters of an order, and all others to off.
  choose(loras = []) {
    for (const [name, slider] of this.sliders) {
      slider.value = loras.find((each) => each.name === name)?.strength ?? 0;
      showStrength(slider);
    }
  }

  // Throws Error if the model lacks one of these adapters.
  require(model, loras = []) {
    const missing = loras.find(({ name }) => !this.byModel.get(model)?.has(name));
    if (missing) throw new Error(`The server no longer has the adapter ${missing.name}.`);
  }
}

function makeRow(name, { type, id }) {
  const row = document.createElement("div");
  const label = Object.assign(document.createElement("label"), { htmlFor: id, textContent: `${name} ` });
  label.append(document.createElement("output"));
  const slider = Object.assign(document.createElement("input"), { id, type: "range", autocomplete: "off", min: SIGNED.includes(type) ? -2 : 0, max: 2, step: 0.05 });
  slider.addEventListener("input", () => showStrength(slider));
  row.append(label, slider);
  return { name, slider, row };
}

function showStrength(slider) {
  const text = slider.valueAsNumber ? slider.value : "off";
  slider.setAttribute("aria-valuetext", text);
  slider.labels[0].querySelector("output").value = text;
}
