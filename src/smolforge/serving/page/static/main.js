// Puts the page's parts together: tabs, the state of the server, and the buttons of the form.

import { api } from "./api.js";
import { make, number } from "./dom.js";
import { Paper } from "./paper.js";
import * as settings from "./settings.js";
import { timelapse } from "./timelapse.js";
import { training } from "./training.js";

const byId = (id) => document.getElementById(id);
const paper = new Paper(byId("paper"));
const watchers = new Set(); // functions that are told the server's state
const STATE_EVERY = 3000;
let state = {};

async function refresh() {
  try {
    const answer = await fetch("page/state");
    if (answer.status === 401) window.location = "login";
    state = await answer.json();
  } catch {
    state = { ...state, ready: false, problem: "the server does not answer" };
  }
  watchers.forEach((tell) => tell(state));
}

function showState(now) {
  const name = now.model ?? "smolforge";
  document.title = `${name} · smolforge`;
  byId("model").textContent = name;
  const step = now.step === null || now.step === undefined ? "" : ` · step ${number(now.step)}`;
  byId("status").textContent = now.ready ? `ready${step} · context ${number(now.context)}` : (now.problem ?? "…");
  byId("status").classList.toggle("bad", !now.ready);
  byId("status").classList.toggle("ready", now.ready);
  if (!byId("examples").childElementCount) byId("examples").append(...(now.examples ?? []).map(example));
}

const example = (text) => make("button", { type: "button", class: "example", onclick: () => {
  settings.set({ prompt: text });
  byId("prompt").focus();
} }, text);

function write() {
  const seed = settings.current.keep && settings.current.seed !== null ? settings.current.seed : settings.drawSeed();
  settings.set({ seed });
  paper.submit({ ...settings.current });
}

function tabs() {
  const all = [...document.querySelectorAll("[role=tab]")];
  function open(chosen) {
    for (const tab of all) {
      tab.setAttribute("aria-selected", String(tab === chosen));
      tab.tabIndex = tab === chosen ? 0 : -1;
      byId(tab.getAttribute("aria-controls")).hidden = tab !== chosen;
    }
  }
  all.forEach((tab, i) => {
    tab.addEventListener("click", () => open(tab));
    tab.addEventListener("keydown", (key) => {
      const go = { ArrowRight: 1, ArrowLeft: -1 }[key.key];
      if (!go) return;
      const next = all[(i + go + all.length) % all.length];
      next.focus();
      open(next);
    });
  });
  open(all[0]);
}

tabs();
settings.mount();
byId("theme").addEventListener("click", window.toggleTheme);
byId("controls").addEventListener("submit", (submit) => { submit.preventDefault(); write(); });
byId("stop").addEventListener("click", () => paper.stop());
byId("clear").addEventListener("click", () => { paper.clear(); settings.set({ prompt: "" }); byId("prompt").focus(); });
document.addEventListener("keydown", (key) => {
  if (key.key === "Escape") paper.stop();
  if (key.key === "Enter" && (key.ctrlKey || key.metaKey)) { key.preventDefault(); write(); }
});
const showSnippet = api(byId("api"), () => state);
watchers.add(showState);
watchers.add((now) => paper.know(now));
watchers.add(timelapse(byId("timelapse"), () => state));
watchers.add(showSnippet);
settings.onChange(showSnippet);
training(byId("training"));
refresh();
setInterval(refresh, STATE_EVERY);
