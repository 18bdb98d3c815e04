// The training tab: a run's curves and samples, from its files, while it trains or afterwards.

import { make, number } from "./dom.js";
import { chart } from "./chart.js";

const EVERY = 3000;
const CHARTS = [
  ["loss", "Loss", { show: (value) => number(value, 3), smooth: true, marksName: "validation" }],
  ["lr", "Learning rate", { show: (value) => value.toExponential(2) }],
  ["tokens_per_second", "Tokens per second", { show: (value) => number(value), zero: true }],
  ["grad_norm", "Gradient norm", { show: (value) => number(value, 2), smooth: true }],
];

// Fills the tab and keeps it up to date while it is shown.
export function training(place) {
  const head = make("p", { class: "note", role: "status", id: "run" }, "…");
  const bar = make("div", { class: "meter" }, make("span"));
  const charts = make("div", { class: "charts", id: "charts" });
  const samples = make("div", { class: "samples", id: "samples" });
  const drawn = new Map(); // name of a curve -> its chart
  place.replaceChildren(head, bar, charts, samples);
  let before = "";

  async function look() {
    if (document.hidden || place.hidden) return;
    let run;
    try {
      const answer = await fetch("page/run");
      if (!answer.ok) return;
      run = await answer.json();
    } catch { return; }
    const now = JSON.stringify([run.last, run.samples?.length, run.live]);
    if (now === before) return;
    before = now;
    draw(run);
  }

  function draw(run) {
    if (!run.run) {
      head.textContent = "This model does not belong to a run. Serve a run directory to follow its training here.";
      bar.hidden = true;
      return;
    }
    head.textContent = summary(run);
    bar.firstChild.style.width = run.total && run.last.step ? `${(100 * run.last.step) / run.total}%` : "0";
    bar.hidden = !run.total;
    for (const [name, title, options] of CHARTS) {
      const points = run.curves[name];
      if (!(points?.length > 1)) continue;
      if (!drawn.has(name)) {
        drawn.set(name, chart(title, options));
        charts.append(drawn.get(name).figure);
      }
      drawn.get(name).update(points, options.marksName ? run.curves[options.marksName] : []);
    }
    if (!drawn.size) head.textContent += " · no steps are logged yet";
    samples.replaceChildren(...byPrompt(run.samples));
  }

  look();
  setInterval(look, EVERY);
  new MutationObserver(look).observe(place, { attributeFilter: ["hidden"] });
}

function summary(run) {
  const { step, tokens, loss, tokens_per_second: rate, validation } = run.last;
  const parts = [`${run.run}: ${run.live ? "training" : "not training now"}`];
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
