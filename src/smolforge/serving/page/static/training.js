// The training tab: a run's curves and samples, from its files, while it trains or afterwards. Of a directory of runs those
// that are checked are drawn into the same charts.

import { make, number } from "./dom.js";
import { chart } from "./chart.js";

const EVERY = 3000;
const MOST = 8; // runs in one chart
const CHARTS = [
  ["loss", "Loss", { show: (value) => number(value, 3), smooth: true, marksName: "validation" }],
  ["lr", "Learning rate", { show: (value) => value.toExponential(2) }],
  ["tokens_per_second", "Tokens per second", { show: (value) => number(value), zero: true }],
  ["grad_norm", "Gradient norm", { show: (value) => number(value, 2), smooth: true }],
];

// Fills the tab and keeps it up to date while it is shown.
export function training(place, state) {
  const head = make("p", { class: "note", role: "status", id: "run" }, "…");
  const choice = make("fieldset", { class: "compared", id: "compared", hidden: true });
  const bar = make("div", { class: "meter" }, make("span"));
  const charts = make("div", { class: "charts", id: "charts" });
  const samples = make("div", { class: "samples", id: "samples" });
  const drawn = new Map(); // name of a curve -> its chart
  const unchecked = new Set(); // runs that the visitor does not want
  const told = new Map(); // of several runs: name -> how far it is
  let listed = [];
  place.replaceChildren(head, choice, bar, charts, samples);
  let before = "";

  async function look() {
    if (document.hidden || place.hidden) return;
    const several = state().runs?.length > 1;
    if (several) offer(state().runs);
    let runs;
    try {
      const asked = new URLSearchParams(listed.filter((name) => !unchecked.has(name)).slice(0, MOST).map((name) => ["name", name]));
      if (several && !asked.size) return draw([], several);
      const answer = await fetch(several ? `page/runs?${asked}` : "page/run");
      if (!answer.ok) throw new Error();
      const found = await answer.json();
      runs = several ? found.runs : [found];
    } catch {
      head.textContent = "The files of the run cannot be read at the moment.";
      head.hidden = false;
      return;
    }
    const now = JSON.stringify(runs.map((run) => [run.run, run.last, run.samples?.length, run.live]));
    if (now !== before) draw(runs, several);
    before = now;
  }

  // A box for each run, in the colour of its curves.
  function offer(names) {
    choice.hidden = false;
    if (names.join("\n") === listed.join("\n")) return;
    for (const name of names.slice(MOST)) if (!listed.includes(name)) unchecked.add(name);
    listed = names;
    choice.replaceChildren(make("legend", { class: "unseen" }, "Runs"), ...names.map((name, i) => {
      const box = make("input", { type: "checkbox", value: name, checked: !unchecked.has(name) });
      box.addEventListener("change", () => {
        if (box.checked) unchecked.delete(name); else unchecked.add(name);
        told.get(name).textContent = "";
        look();
      });
      told.set(name, make("span", { class: "figures" }));
      return make("label", { class: "check", style: { "--run": `var(--run-${i % MOST})` } }, box, make("i"), name, told.get(name));
    }));
  }

  function draw(runs, several) {
    if (!several && !runs[0].run) {
      head.textContent = "This model does not belong to a run. Serve a run directory to follow its training here.";
      bar.hidden = true;
      return;
    }
    head.hidden = several;
    for (const run of runs) (told.get(run.run) ?? head).textContent = summary(run);
    const [run] = runs;
    bar.hidden = several || !run.total;
    if (!bar.hidden) bar.firstChild.style.width = run.last.step ? `${(100 * run.last.step) / run.total}%` : "0";
    for (const [name, title, options] of CHARTS) {
      const lines = runs.filter(({ curves }) => curves[name]?.length > 1).map(({ run: of, curves }) => ({
        name: of, points: curves[name], marks: (options.marksName && curves[options.marksName]) || [],
        colour: several ? `--run-${listed.indexOf(of) % MOST}` : null,
      }));
      if (!lines.length && !drawn.has(name)) continue;
      if (!drawn.has(name)) {
        drawn.set(name, chart(title, options));
        charts.append(drawn.get(name).figure);
      }
      drawn.get(name).update(lines);
    }
    if (!several && !drawn.size) head.append(" · no steps are logged yet");
    samples.replaceChildren(...(several ? [] : byPrompt(run.samples)));
  }

  look();
  setInterval(look, EVERY);
  new MutationObserver(look).observe(place, { attributeFilter: ["hidden"] });
}

function summary(run) {
  const { step, tokens, loss, tokens_per_second: rate, validation } = run.last;
  const parts = [step >= run.total ? "finished" : run.live ? "training" : "not training now"];
  if (step !== undefined) parts.push(`step ${number(step)}${run.total ? ` of ${number(run.total)}` : ""}`);
  if (tokens) parts.push(`${number(tokens)} tokens`);
  if (loss !== undefined) parts.push(`loss ${number(loss, 3)}`);
  if (validation !== undefined) parts.push(`validation ${number(validation, 3)}`);
  if (rate) parts.push(`${number(rate)} tokens/s`);
  if (run.live && rate && step && run.total > step) parts.push(`about ${span(((run.total - step) * (tokens / step)) / rate)} left`);
  return parts.join(" · ");
}

// The samples of each prompt, newest first.
function byPrompt(samples) {
  const groups = new Map();
  for (const sample of samples) groups.set(sample.prompt, [sample, ...(groups.get(sample.prompt) ?? [])]);
  return [...groups].map(([prompt, list]) => make("section", {},
    make("h3", {}, `“${prompt}” through training`),
    make("div", {}, ...list.map((sample) => make("article", { class: "card" },
      make("h4", {}, `step ${number(sample.step)}`),
      make("p", { class: "timelapse-text" }, make("span", { class: "said" }, prompt), sample.text))))));
}

const span = (seconds) => (seconds < 90 ? `${Math.round(seconds)} s` : seconds < 5400 ? `${Math.round(seconds / 60)} min` : `${(seconds / 3600).toFixed(1)} h`);
