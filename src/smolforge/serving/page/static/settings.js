// The sampling settings: their controls, and their forms in a link, for the page's own routes, and for the API.

import { make } from "./dom.js";

// name, label, lowest, highest, step, default, hint
const SLIDERS = [
  ["max_tokens", "Maximum tokens", 1, 1024, 1, 100, ""],
  ["temperature", "Temperature", 0.1, 2, 0.05, 0.8, "Low is careful, high is daring."],
  ["top_p", "Top-p", 0.1, 1, 0.05, 0.9, "Choose only among the likeliest tokens that add up to this probability."],
];
const MORE_SLIDERS = [
  ["top_k", "Top-k", 0, 200, 1, 0, "Choose only among this many of the likeliest tokens; 0 is off."],
  ["min_p", "Min-p", 0, 0.5, 0.01, 0, "Leave out tokens below this share of the likeliest one; 0 is off."],
  ["repetition_penalty", "Repetition penalty", 1, 2, 0.05, 1, "Make tokens that appeared before less likely; 1 is off."],
];
const ALL_SLIDERS = [...SLIDERS, ...MORE_SLIDERS];
const DEFAULTS = { prompt: "", ...Object.fromEntries(ALL_SLIDERS.map(([name, , , , , value]) => [name, value])), seed: null, keep: false };

export const current = { ...DEFAULTS };
const changed = new EventTarget();
const boxes = {}; // name -> { number, range }
const byId = (id) => document.getElementById(id);

export const onChange = (tell) => changed.addEventListener("change", tell);
export const drawSeed = () => crypto.getRandomValues(new Uint32Array(1))[0];

// The number that a text means for a setting, within its limits; its default where it means none.
function numberOf(name, text) {
  const [, , low, high, step, value] = ALL_SLIDERS.find(([known]) => known === name);
  const wanted = Number(text);
  if (text === "" || !Number.isFinite(wanted)) return value;
  return Math.min(high, Math.max(low, step === 1 ? Math.round(wanted) : wanted));
}

const seedOf = (text) => (/^\d+$/.test(text) ? Math.min(Number(text), Number.MAX_SAFE_INTEGER) : null);

// Fills the form with controls and follows them.
export function mount() {
  for (const [place, sliders] of [["settings", SLIDERS], ["more-settings", MORE_SLIDERS]]) byId(place).append(...sliders.map(slider));
  byId("prompt").addEventListener("input", () => set({ prompt: byId("prompt").value }));
  byId("seed").addEventListener("input", () => set({ seed: seedOf(byId("seed").value) }, "seed"));
  byId("keep").addEventListener("change", () => set({ keep: byId("keep").checked }));
  set(fromLink(window.location.hash));
  window.addEventListener("hashchange", () => set({ ...DEFAULTS, ...fromLink(window.location.hash) }));
}

function slider([name, label, min, max, step, , hint]) {
  const id = name.replace("_", "-");
  const limits = { min, max, step };
  const number = make("input", { type: "number", id: `${id}-number`, ...limits, "aria-describedby": hint ? `${id}-hint` : null });
  const range = make("input", { type: "range", ...limits, tabindex: "-1", "aria-hidden": "true" });
  boxes[name] = { number, range };
  number.addEventListener("change", () => set({ [name]: numberOf(name, number.value) }));
  range.addEventListener("input", () => set({ [name]: numberOf(name, range.value) }));
  return make("div", { class: "field", id }, make("label", { for: number.id }, label), number, range,
    hint ? make("p", { class: "hint", id: `${id}-hint` }, hint) : null);
}

// Changes settings and shows them; `typing` names a control that is left alone.
export function set(values, typing = null) {
  Object.assign(current, values);
  for (const [name, { number, range }] of Object.entries(boxes)) {
    number.value = range.value = current[name];
    range.style.setProperty("--share", (range.value - range.min) / (range.max - range.min));
  }
  const prompt = byId("prompt");
  if (prompt.value !== current.prompt) prompt.value = current.prompt;
  if (typing !== "seed") byId("seed").value = current.seed ?? "";
  byId("keep").checked = current.keep;
  changed.dispatchEvent(new Event("change"));
}

// Stays behind the #, which browsers never send: prompts do not end up in a server's log.
export function toLink() {
  const parameters = new URLSearchParams();
  for (const [name, value] of Object.entries(current)) {
    if (value !== DEFAULTS[name] && value !== null) parameters.set(name, String(value));
  }
  const hash = parameters.toString();
  return window.location.origin + window.location.pathname + (hash ? `#${hash}` : "");
}

function fromLink(hash) {
  const found = {};
  for (const [name, text] of new URLSearchParams(hash.replace(/^#/, ""))) {
    if (name === "prompt") found.prompt = text;
    else if (name === "keep") found.keep = text === "true";
    else if (name === "seed") found.seed = seedOf(text);
    else if (name in DEFAULTS) found[name] = numberOf(name, text);
  }
  return found;
}

// For the API: only what differs from its own defaults.
export function forApi() {
  const { prompt, max_tokens, temperature, top_p, seed } = current;
  const more = {};
  for (const [name, , , , , value] of MORE_SLIDERS) if (current[name] !== value) more[name] = current[name];
  return { main: { prompt, max_tokens, temperature, top_p, ...(seed === null ? {} : { seed }) }, more };
}

export const forPage = ({ keep, ...settings }) => settings;
