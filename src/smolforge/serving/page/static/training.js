// The training tab: a run's curves and samples, from its files, while it trains or afterwards.

import { make, number } from "./dom.js";
import { chart } from "./chart.js";

const EVERY = 3000;
const CHARTS = [
  ["loss", "Loss", (value) => number(value, 3), { smooth: true, with: "validation" }],
  ["lr", "Learning rate", (value) => value.toExponential(2), {}],
  ["tokens_per_second", "Tokens per second", (value) => number(value), { zero: true }],
  ["grad_norm", "Gradient norm", (value) => number(value, 2), { smooth: true }],
];

export function training(place) {
  const head = make("p", { class: "sf-note", role: "status", id: "sf-run" }, "…");
  const bar = make("div", { class: "sf-meter" }, make("span"));
  const charts = make("div", { class: "sf-charts", id: "sf-charts" });
  const samples = make("div", { class: "sf-samples", id: "sf-samples" });
  place.replaceChildren(make("section", { class: "sf-panel" }, head, bar, charts, samples));
  let before = "";

  async function look() {
    if (!place.isConnected || document.hidden || !place.offsetParent) return;
    let run;
    try {
      const answer = await fetch("/page/run");
      if (!answer.ok) return;
      run = await answer.json();
    } catch { return; }
    const now = JSON.stringify([run.last, run.samples.length, place.clientWidth, run.live]);
    if (now === before) return;
    before = now;
    draw(run);
  }

  function draw(run) {
    if (!run.run) {
      head.textContent = "This model belongs to no run. Serve a run directory to follow its training here.";
      return;
    }
    const { step, tokens, loss, tokens_per_second: rate, validation } = run.last;
    const facts = [`${run.run}: ${run.live ? "training" : "not training now"}`];
    if (step !== undefined) facts.push(`step ${number(step)}${run.total ? ` of ${number(run.total)}` : ""}`);
    if (tokens) facts.push(`${number(tokens)} tokens`);
    if (loss !== undefined) facts.push(`loss ${number(loss, 3)}`);
    if (validation !== undefined) facts.push(`validation ${number(validation, 3)}`);
    if (rate) facts.push(`${number(rate)} tokens/s`);
    if (run.live && rate && step && run.total > step) facts.push(`about ${span(((run.total - step) * (tokens / step)) / rate)} left`);
    head.textContent = facts.join(" · ");
    bar.firstChild.style.width = run.total && step ? `${(100 * step) / run.total}%` : "0";
    bar.hidden = !run.total;
    charts.replaceChildren(...CHARTS.filter(([name]) => run.curves[name]?.length > 1).map(([name, title, show, options]) =>
      chart(title, run.curves[name], { show, ...options, other: options.with && run.curves[options.with] })));
    if (!charts.childElementCount) charts.append(make("p", { class: "sf-note" }, "The first rows of the log are still to come."));
    const byPrompt = new Map();
    for (const sample of run.samples) byPrompt.set(sample.prompt, [...(byPrompt.get(sample.prompt) ?? []), sample]);
    samples.replaceChildren(...[...byPrompt].map(([prompt, list]) => make("section", {},
      make("h3", {}, `“${prompt}” through time`),
      make("div", {}, ...list.reverse().map((sample) => make("article", { class: "sf-card" }, make("h4", {}, `step ${number(sample.step)}`),
        make("p", { class: "sf-timelapse-text" }, make("span", { class: "sf-said" }, prompt), sample.text)))))));
  }

  look();
  setInterval(look, EVERY);
  new IntersectionObserver(look).observe(place);
  new ResizeObserver(look).observe(place);
}

const span = (seconds) => (seconds < 90 ? `${Math.round(seconds)} s` : seconds < 5400 ? `${Math.round(seconds / 60)} min` : `${(seconds / 3600).toFixed(1)} h`);
