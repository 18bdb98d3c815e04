// The time-lapse: one card for each checkpoint, filled one after the other under the same prompt and seed.

import { events, make, number, swap } from "./dom.js";
import * as settings from "./settings.js";

// Fills the tab; returns a function that is told when the server's state has changed.
export function timelapse(place, state) {
  const button = make("button", { type: "button", id: "timelapse-start", class: "primary" }, "Start");
  const stop = make("button", { type: "button", id: "timelapse-stop", class: "stop", hidden: true }, "Stop");
  const note = make("p", { class: "note", role: "status" });
  const prompt = make("input", {
    type: "text", id: "timelapse-prompt", "aria-label": "Prompt of the time-lapse", placeholder: "Once upon a time",
  });
  const cards = make("div", { class: "cards", id: "cards" });
  let running = null;

  async function start() {
    running?.abort();
    running = new AbortController();
    const chosen = settings.forPage(settings.current());
    const seed = chosen.seed ?? settings.drawSeed();
    const knobs = { ...chosen, prompt: prompt.value || chosen.prompt || "Once upon a time", seed };
    const found = new Map();
    swap(button, stop, true);
    note.classList.remove("bad");
    note.textContent = `Seed ${seed} at each step.`;
    cards.replaceChildren();
    try {
      await events("page/timelapse", { ...knobs, steps: [] }, running.signal, (news) => {
        if (news.steps) {
          for (const step of news.steps) {
            const text = make("p", { class: "timelapse-text" }, make("span", { class: "said" }, knobs.prompt));
            const card = make("article", { class: "card", "data-step": step }, make("h3", {}, `step ${number(step)}`), text);
            found.set(step, { card, text });
            cards.append(card);
          }
          return;
        }
        const entry = found.get(news.step);
        if (!entry) return;
        if (news.text) entry.text.append(news.text);
        if (news.state) entry.card.dataset.state = news.state;
        if (news.message) entry.text.append(make("span", { class: "end bad" }, news.message));
      });
    } catch (error) {
      note.textContent = error.name === "AbortError" ? "Stopped." : error.message;
      note.classList.toggle("bad", error.name !== "AbortError");
    }
    swap(button, stop, false);
  }

  button.addEventListener("click", start);
  stop.addEventListener("click", () => running?.abort());
  prompt.addEventListener("keydown", (key) => { if (key.key === "Enter") start(); });
  place.replaceChildren(
    make("h2", {}, "Watch it learn"),
    make("p", {}, "The same prompt through the steps of the run, from noise to text. Settings are those of the Write tab."),
    make("div", { class: "line" }, prompt, button, stop), note, cards);
  return () => {
    const steps = state().steps ?? [];
    if (!stop.hidden) return;
    button.disabled = !steps.length;
    if (!steps.length) note.textContent = "This model does not belong to a run. Serve a run to see a time-lapse.";
    else if (!cards.childElementCount) note.textContent = `${steps.length} models, of step ${number(steps[0])} to ${number(steps.at(-1))}.`;
  };
}
