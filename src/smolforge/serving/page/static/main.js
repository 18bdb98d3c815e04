// Puts the page's parts together: tabs, the state of the server, and the buttons of the Write tab.

import { api } from "./api.js";
import { Chat } from "./chat.js";
import { make, number, post } from "./dom.js";
import { keep, kept } from "./page_state.js";
import { Paper } from "./paper.js";
import * as settings from "./settings.js";
import { Tabs } from "./tabs.js";
import { timelapse } from "./timelapse.js";
import { training } from "./training.js";

const byId = (id) => document.getElementById(id);
const paper = new Paper(byId("paper"));
const tabs = new Tabs("write");
const chat = new Chat();
const watchers = new Set(); // functions that are told the server's state
const STATE_EVERY = 3000;
let state = {};
let used = "write"; // the tab whose request the API tab shows

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
  tabs.offer("chat", Boolean(now.chat), "write");
  settings.sampling.learn(now.write);
  if (!byId("examples").childElementCount) byId("examples").append(...(now.examples ?? []).map(example));
}

const example = (text) => make("button", { type: "button", class: "example", onclick: () => {
  settings.set({ prompt: text });
  byId("prompt").focus();
} }, text);

function write() {
  const { keep, seed } = settings.current();
  settings.set({ seed: keep && seed !== null ? seed : settings.drawSeed() });
  paper.submit(settings.current());
}

// The runs of the served directory: choosing one serves its newest model.
function showRuns(now) {
  const choice = byId("served"), runs = now.runs ?? [];
  byId("runs").hidden = !runs.length;
  if (document.activeElement === choice) return; // an open list stays as it is
  if (runs.join("\n") !== [...choice.options].map((option) => option.value).join("\n")) {
    choice.replaceChildren(...runs.map((name) => make("option", { value: name }, name)));
  }
  choice.value = now.run;
}

async function serve() {
  const choice = byId("served"), problem = byId("served-problem");
  choice.disabled = true;
  problem.textContent = "";
  try {
    await post("page/serve", { run: choice.value });
  } catch (error) {
    problem.textContent = error.message;
  }
  choice.disabled = false;
  choice.blur();
  await refresh();
}

settings.mount();
tabs.chosen = settings.linked();
const { tab, linked } = kept();
if (tab && linked === window.location.hash) {
  tabs.chosen = tab !== "chat"; // which opens by itself where there is one
  if (tabs.chosen) tabs.open(tab);
}
byId("served").addEventListener("change", serve);
byId("theme").addEventListener("click", window.toggleTheme);
byId("controls").addEventListener("submit", (submit) => { submit.preventDefault(); write(); });
byId("controls").addEventListener("input", () => { tabs.chosen = true; });
byId("stop").addEventListener("click", () => paper.stop());
byId("clear").addEventListener("click", () => { paper.clear(); settings.set({ prompt: "" }); byId("prompt").focus(); });
document.addEventListener("keydown", (key) => {
  if (tabs.shown === "chat") chat.shortcut(key);
  if (tabs.shown !== "write") return;
  if (key.key === "Escape") paper.stop();
  if (key.key === "Enter" && (key.ctrlKey || key.metaKey)) { key.preventDefault(); write(); }
});
const showSnippet = api(byId("api"), () => state, () => (used === "chat" ? chat : settings).forApi());
tabs.addEventListener("open", () => {
  keep({ tab: tabs.shown, linked: window.location.hash });
  if (["chat", "write"].includes(tabs.shown)) used = tabs.shown;
  if (tabs.shown === "chat") chat.draw(); // what came while it was hidden could not be scrolled to
  showSnippet();
});
watchers.add(showState);
watchers.add(showRuns);
watchers.add((now) => paper.know(now));
watchers.add((now) => chat.know(now));
watchers.add(timelapse(byId("timelapse"), () => state));
watchers.add(showSnippet);
settings.onChange(showSnippet);
training(byId("training"), () => state);
refresh();
setInterval(refresh, STATE_EVERY);
