// The sampling controls of a tab. They start at the model's own values, which the server tells, and keep apart what the
// user changed: only that is sent, so that the model's generation_config counts for the rest.

import { make } from "./dom.js";

// name -> label, lowest, highest, step, hint
const SLIDERS = {
  max_tokens: ["Maximum tokens", 1, 1024, 1, ""],
  temperature: ["Temperature", 0, 2, 0.05, "Low is careful, high is daring; 0 always takes the likeliest token."],
  top_p: ["Top-p", 0.05, 1, 0.05, "Choose only among the likeliest tokens that add up to this probability."],
  top_k: ["Top-k", 0, 200, 1, "Choose only among this many of the likeliest tokens; 0 is off."],
  min_p: ["Min-p", 0, 0.5, 0.01, "Leave out tokens below this share of the likeliest one; 0 is off."],
  repetition_penalty: ["Repetition penalty", 1, 2, 0.05, "Make tokens that appeared before less likely; 1 is off."],
};

// The number that a text means for a setting, within its limits; null where it means none.
export function numberOf(name, text, high = SLIDERS[name][2]) {
  const [, low, , step] = SLIDERS[name];
  const wanted = Number(text);
  if (String(text).trim() === "" || !Number.isFinite(wanted)) return null;
  return Math.min(high, Math.max(low, step === 1 ? Math.round(wanted) : wanted));
}

export const isSampling = (name) => name in SLIDERS;

export class SamplingControls extends EventTarget {
  // `prefix`: of the ids in the document, where two tabs have the same control.
  constructor(prefix = "") {
    super();
    this.prefix = prefix;
    this.own = {};
    this.changed = {};
    this.controls = {}; // name -> { number, range, reset }, without a range for a number alone
  }

  get values() { return { ...this.own, ...this.changed }; }

  // Takes the model's own values. What is being typed stays unless they are news.
  learn(values = {}) {
    if (JSON.stringify(values) === JSON.stringify(this.own)) return;
    this.own = values;
    this.show();
  }

  // Changes settings; null gives one back to the model.
  change(values) {
    for (const [name, value] of Object.entries(values)) {
      if (value === null || value === this.own[name]) delete this.changed[name];
      else this.changed[name] = value;
    }
    this.show();
    this.dispatchEvent(new Event("change"));
  }

  // Forgets all changes but these.
  replace(changed) {
    this.changed = {};
    this.change(changed);
  }

  sliders(...names) { return names.map((name) => this.slider(name)); }

  slider(name) {
    const [label, min, max, step, hint] = SLIDERS[name];
    const id = this.prefix + name.replace("_", "-");
    const number = make("input", { type: "number", id: `${id}-number`, min, max, step: "any", "aria-describedby": hint ? `${id}-hint` : null });
    const range = make("input", { type: "range", min, max, step, tabindex: "-1", "aria-hidden": "true" });
    const reset = make("button", { type: "button", class: "reset", title: "Back to the model's own value", hidden: true,
      "aria-label": `${label}: back to the model's own value`, onclick: () => { this.change({ [name]: null }); number.focus(); } }, "↺");
    number.addEventListener("change", () => this.change({ [name]: numberOf(name, number.value) }));
    range.addEventListener("input", () => this.change({ [name]: numberOf(name, range.value) }));
    this.controls[name] = { number, range, reset };
    return make("div", { class: "field", id }, make("label", { for: number.id }, label), reset, number, range,
      hint ? make("p", { class: "hint", id: `${id}-hint` }, hint) : null);
  }

  // A number without a slider, of any size.
  number(name) {
    const [label, min] = SLIDERS[name];
    const number = make("input", { type: "number", id: `${this.prefix}${name.replace("_", "-")}`, min });
    number.addEventListener("change", () => this.change({ [name]: numberOf(name, number.value, Infinity) }));
    this.controls[name] = { number };
    return make("div", { class: "field" }, make("label", { for: number.id }, label), number);
  }

  show() {
    for (const [name, { number, range, reset }] of Object.entries(this.controls)) {
      number.value = this.values[name] ?? "";
      if (!range) continue;
      range.value = number.value;
      range.style.setProperty("--share", (range.value - range.min) / (range.max - range.min));
      reset.hidden = !(name in this.changed);
    }
  }
}
