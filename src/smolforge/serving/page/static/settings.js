// The settings of the Write tab: prompt, seed and sampling; and their forms in a link, for the page's own routes, and
// for the API.

import { keep, kept } from "./page_state.js";
import { isSampling, numberOf, SamplingControls } from "./sampling.js";

const SEED_HINT = "Equal seeds give equal texts. Empty: a new one each time.";
const EMPTY = { prompt: "", seed: null, keep: false };
const form = { ...EMPTY };
const changed = new EventTarget();
const byId = (id) => document.getElementById(id);

export const sampling = new SamplingControls();
export const onChange = (tell) => changed.addEventListener("change", tell);
export const drawSeed = () => crypto.getRandomValues(new Uint32Array(1))[0];
export const seedOf = (text) => (/^\d+$/.test(text) ? Math.min(Number(text), Number.MAX_SAFE_INTEGER) : null);

// The form and the sampling settings that the user changed: what the page's own routes take, and `keep`.
export const current = () => ({ ...form, ...sampling.changed });
export const forPage = ({ keep, ...settings }) => settings;

// Fills the form with controls and follows them.
export function mount() {
  byId("settings").append(...sampling.sliders("max_tokens", "temperature", "top_p"));
  byId("more-settings").append(...sampling.sliders("top_k", "min_p", "repetition_penalty"));
  sampling.addEventListener("change", () => changed.dispatchEvent(new Event("change")));
  byId("prompt").addEventListener("input", () => set({ prompt: byId("prompt").value }));
  byId("seed").addEventListener("input", typeSeed);
  byId("keep").addEventListener("change", () => set({ keep: byId("keep").checked }));
  followLink();
  const before = kept();
  if (before.hash === window.location.hash && before.form) { // the link was followed before the reload
    sampling.replace(before.sampling);
    set(before.form);
  }
  window.addEventListener("hashchange", followLink);
  onChange(() => keep({ hash: window.location.hash, form: { ...form }, sampling: { ...sampling.changed } }));
}

// A seed that is typed is meant; an empty field asks for a new one each time.
function typeSeed() {
  const text = byId("seed").value.trim(), seed = seedOf(text);
  set({ seed, keep: seed !== null }, "seed");
  tellOfSeed(text !== "" && seed === null ? text : null);
}

function tellOfSeed(wrong) {
  byId("seed").setAttribute("aria-invalid", String(wrong !== null));
  byId("seed-hint").textContent = wrong === null ? SEED_HINT : `“${wrong}” is not a seed: it must be a whole number.`;
  byId("seed-hint").classList.toggle("bad", wrong !== null);
}

// Changes the form and shows it; `typing` names a control that is left alone.
export function set(values, typing = null) {
  Object.assign(form, values);
  const prompt = byId("prompt");
  if (prompt.value !== form.prompt) prompt.value = form.prompt;
  if (typing !== "seed" && "seed" in values) {
    byId("seed").value = form.seed ?? "";
    tellOfSeed(null);
  }
  byId("keep").checked = form.keep;
  changed.dispatchEvent(new Event("change"));
}

// A link to a text that was written with these settings: opening it and writing gives the same text. They stay behind the
// #, which browsers never send: prompts do not end up in a server's log.
export function toLink(knobs = current()) {
  const parameters = new URLSearchParams();
  for (const [name, value] of Object.entries({ ...knobs, keep: knobs.seed !== null })) {
    if (value !== EMPTY[name] && value !== null) parameters.set(name, String(value));
  }
  const hash = parameters.toString();
  return window.location.origin + window.location.pathname + (hash ? `#${hash}` : "");
}

export const linked = () => new URLSearchParams(window.location.hash.slice(1)).has("prompt");

function followLink() {
  const found = { ...EMPTY }, numbers = {};
  for (const [name, text] of new URLSearchParams(window.location.hash.slice(1))) {
    if (name === "prompt") found.prompt = text;
    else if (name === "seed") found.seed = seedOf(text);
    else if (isSampling(name)) numbers[name] = numberOf(name, text);
  }
  sampling.replace(numbers);
  set({ ...found, keep: found.seed !== null }); // a link reproduces
}

// For the API, whose own defaults are others: what the tab shows is always named, other settings where they were changed.
export function forApi() {
  const { max_tokens, temperature, top_p } = sampling.values;
  const main = { prompt: form.prompt, max_tokens, temperature, top_p, ...(form.seed === null ? {} : { seed: form.seed }) };
  const more = Object.fromEntries(Object.entries(sampling.changed).filter(([name]) => !(name in main)));
  return { route: "completions", main, more };
}
