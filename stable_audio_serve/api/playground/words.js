// Texts about times and clips that several parts of the page show.

import { isExtended } from "./orders.js";

// Returns a time as 0:04.25. `step` is the distance of neighbouring labels in seconds: 0:04 for whole seconds.
export function formatTime(seconds, step = 0.01) {
  const digits = Math.max(0, Math.min(2, Math.ceil(-Math.log10(step))));
  const rounded = Number(Math.abs(seconds).toFixed(digits));
  const rest = (rounded % 60).toFixed(digits).padStart(digits ? digits + 3 : 2, "0");
  return `${seconds < 0 && rounded ? "−" : ""}${Math.floor(rounded / 60)}:${rest}`;
}

const KINDS = { generate: "clip", vary: "variation", inpaint: "region" };

// Returns the kind of an order's clip in one or two words.
export function kindOf(order) {
  const { kind, fields } = order;
  if (fields.sections) return "long piece";
  if (fields.loop) return "loop";
  if (isExtended(order)) return "extended";
  return KINDS[kind];
}

// Returns the tempo of an order's clip in beats per minute: of a loop, or as its prompt names it; null if unknown.
export function tempoOf({ fields }) {
  const named = /(\d+(?:\.\d+)?) ?bpm\b/i.exec(fields.prompt);
  const tempo = fields.bpm ?? (named && Number(named[1]));
  return tempo >= 20 && tempo <= 400 ? tempo : null;
}

// Returns a short title of a clip: its prompt and seed.
export const titleOf = ({ order, facts }) => `${order.fields.prompt}, seed ${facts.seed}`;

// Returns the name of a clip's file without its extension.
export function fileName({ order, facts }) {
  const words = order.fields.prompt.toLowerCase().match(/[\p{L}\p{N}]+/gu)?.join("-").slice(0, 60) ?? "clip";
  return `${words}-${facts.seed}`;
}
