// The settings of a conversation, in a dialog: what the model is told first, sampling, the seed, and the keys of the tab.

import { SamplingControls } from "./sampling.js";
import { seedOf } from "./settings.js";

const byId = (id) => document.getElementById(id);

export class ChatSettings {
  // `changed` is called after each change.
  constructor(changed) {
    this.changed = changed;
    this.settings = null; // of the conversation that is shown
    this.sampling = new SamplingControls("chat-");
    byId("chat-sampling").append(...this.sampling.sliders("temperature", "top_p"), this.sampling.number("max_tokens"));
    byId("chat-more-sampling").append(...this.sampling.sliders("top_k", "min_p", "repetition_penalty"));
    this.sampling.addEventListener("change", () => this.change({ sampling: { ...this.sampling.changed } }));
    byId("system").addEventListener("input", () => this.change({ system: byId("system").value }));
    byId("chat-seed").addEventListener("input", () => this.change({ seed: seedOf(byId("chat-seed").value) }));
    byId("open-settings").addEventListener("click", () => byId("chat-settings").showModal());
    byId("chat-settings").addEventListener("click", (click) => { // outside of the form
      if (click.target === byId("chat-settings")) byId("chat-settings").close();
    });
  }

  change(values) {
    if (!this.settings) return;
    Object.assign(this.settings, values);
    this.changed();
  }

  show(settings) {
    this.settings = null; // the controls tell of changes that are none
    this.sampling.replace(settings.sampling);
    byId("system").value = settings.system;
    byId("chat-seed").value = settings.seed ?? "";
    this.settings = settings;
  }
}
