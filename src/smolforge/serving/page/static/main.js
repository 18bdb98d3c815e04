// Puts the page's parts together. Gradio shows a tab's parts when it is first opened, so each is filled as it comes.

import { api } from "./api.js";
import { copy, make, number } from "./dom.js";
import { timelapse } from "./timelapse.js";
import { Paper } from "./paper.js";
import * as settings from "./settings.js";
import { training } from "./training.js";

const paper = new Paper();
const watchers = new Set();
let state = {};

async function refresh() {
  try {
    const answer = await fetch("/page/state");
    if (answer.status === 401) window.location = "/login";
    state = await answer.json();
  } catch {
    state = { ...state, ready: false, problem: "the server does not answer" };
  }
  watchers.forEach((tell) => tell(state));
  paper.know(state);
}

function header(place) {
  const status = make("span", { class: "sf-status", role: "status", "aria-live": "polite" });
  const name = make("span", { class: "sf-name" }, "smolforge");
  const theme = make("button", { class: "sf-icon", type: "button", title: "Light or dark", "aria-label": "Light or dark" }, "◐");
  theme.addEventListener("click", () => {
    const dark = document.body.classList.toggle("dark");
    try { localStorage.setItem("smolforge-theme", dark ? "dark" : "light"); } catch { /* private window */ }
  });
  place.replaceChildren(
    make("header", { class: "sf-head" },
      make("img", { src: "/page/static/icon.svg", alt: "", width: 36, height: 36 }),
      make("div", { class: "sf-title" }, make("h1", {}, name), status), theme));
  watchers.add((now) => {
    name.textContent = now.model ?? "smolforge";
    const step = now.step === null || now.step === undefined ? "" : ` · step ${number(now.step)}`;
    status.textContent = now.ready ? `ready${step} · context ${number(now.context)}` : (now.problem ?? "…");
    status.classList.toggle("sf-bad", !now.ready);
  });
}

const parts = {
  header,
  paper: (place) => paper.mount(place),
  timelapse: (place) => timelapse(place, () => state, watchers),
  training: (place) => training(place),
  api: (place) => watchers.add(api(place, () => state)),
};

function fill([name, element]) {
  const place = element.querySelector(".sf-part") ?? element;
  if (place.dataset.filled) return;
  place.dataset.filled = "yes";
  parts[name](place);
  watchers.forEach((tell) => tell(state));
}

const early = window.smolforgeParts ?? [];
window.smolforgeParts = { push: fill };

try {
  const wanted = localStorage.getItem("smolforge-theme");
  if (wanted) document.body.classList.toggle("dark", wanted === "dark");
} catch { /* private window */ }

// What Gradio's events call.
window.smolforge = {
  submit(values) {
    const now = settings.fromKnobs(values);
    const seed = now.keep && now.seed !== null ? now.seed : settings.drawSeed();
    settings.current.seed = seed;
    paper.submit({ ...now, seed });
    return seed;
  },
  stop: () => paper.stop(),
  clear: () => { paper.clear(); return ""; },
  example: (text) => { setTimeout(() => document.querySelector("#sf-prompt textarea")?.focus(), 50); return text; },
  knobs(values) {
    settings.fromKnobs(values);
    watchers.forEach((tell) => tell(state));
  },
  fromLink: () => settings.fromLink(window.location.hash),
  link: (button) => copy(settings.toLink(settings.current), button),
};

document.addEventListener("keydown", (key) => {
  if (key.key === "Escape") paper.stop();
  if (key.key === "Enter" && (key.ctrlKey || key.metaKey)) document.querySelector("#sf-submit")?.click();
});

early.forEach(fill);
refresh();
setInterval(refresh, 3000);
