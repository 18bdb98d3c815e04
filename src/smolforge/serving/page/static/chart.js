// One line chart of a training curve, drawn by uPlot: the raw line, a smoothed line over it, and the value under the pointer.

import { make, number } from "./dom.js";

const HEIGHT = 190;
const FONT = "11px system-ui, sans-serif";
const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

const short = (value) => {
  const size = Math.abs(value);
  if (size >= 1e6) return `${+(value / 1e6).toPrecision(3)}M`;
  if (size >= 1e4) return `${+(value / 1e3).toPrecision(3)}k`;
  return size !== 0 && size < 1e-2 ? value.toExponential(0) : `${+value.toPrecision(3)}`;
};

// A mean over a window around each point that shrinks towards both ends, so that it neither lags nor begins late.
function smoothed(values) {
  const most = Math.max(1, Math.round(values.length / 30));
  const sums = [0];
  for (const value of values) sums.push(sums.at(-1) + value);
  return values.map((_, i) => {
    const half = Math.min(most, i, values.length - 1 - i);
    return (sums[i + half + 1] - sums[i - half]) / (2 * half + 1);
  });
}

// A few extreme values at the start must not flatten the rest: of many points the highest hundredth is cut off.
function limits(values, zero) {
  const sorted = [...values].sort((a, b) => a - b);
  const low = zero ? 0 : sorted[0];
  const high = sorted.length < 200 ? sorted.at(-1) : sorted[Math.floor(0.99 * (sorted.length - 1))];
  const edge = high - low < 1e-12 ? Math.abs(high) * 0.1 || 1 : (high - low) * 0.04;
  return [zero ? 0 : low - edge, high + edge];
}

// Draws `title` into a figure. `update(points, marks)` takes [step, value] pairs for the line and for the marks.
export function chart(title, { show, smooth = false, zero = false, marksName = null }) {
  const value = make("span", { class: "value" });
  const key = make("span", { class: "key", hidden: true }, `● ${marksName}`);
  const place = make("div", { class: "plot", role: "img" });
  const figure = make("figure", { class: "chart" }, make("figcaption", {}, make("b", {}, title), key, value), place);
  let range = [0, 1];
  let latest = "";

  const axis = { stroke: () => colour("--soft"), font: FONT, grid: { stroke: () => colour("--grid"), width: 1 }, ticks: { show: false } };
  const plot = new uPlot({
    width: 460, height: HEIGHT, legend: { show: false }, cursor: { y: false, drag: { x: false, y: false } },
    scales: { x: { time: false }, y: { range: () => range } },
    axes: [
      { ...axis, grid: { show: false }, size: 26, values: (_, steps) => steps.map(short) },
      { ...axis, size: 54, values: (_, numbers) => numbers.map(short) },
    ],
    series: [
      {},
      { stroke: () => colour(smooth ? "--faint" : "--ember"), width: smooth ? 1 : 1.8, points: { show: false }, spanGaps: true },
      { stroke: () => colour("--ember"), width: 1.8, points: { show: false }, spanGaps: true, show: smooth },
      { stroke: () => colour("--mark"), paths: () => null, points: { show: true, size: 7, fill: () => colour("--mark") } },
    ],
    hooks: { setCursor: [(self) => {
      const [steps, values] = self.data;
      let at = self.cursor.idx;
      while (at > 0 && (values[at] ?? null) === null) at -= 1;
      value.textContent = at === null || at === undefined ? latest : `step ${number(steps[at])}: ${show(values[at])}`;
    }] },
  }, [[], [], [], []], place);
  figure.plot = plot;

  function update(points, marks = []) {
    const columns = (pairs) => [pairs.map(([step]) => step), pairs.map(([, y]) => y)];
    const [steps, values] = columns(points);
    range = limits([...values, ...marks.map(([, y]) => y)], zero);
    latest = show(values.at(-1));
    place.setAttribute("aria-label", `${title}: ${values.length} points, now ${latest}`);
    key.hidden = !marks.length;
    value.textContent = latest;
    plot.setData(uPlot.join([[steps, values, smooth ? smoothed(values) : values], columns(marks)]));
  }

  new ResizeObserver(() => { if (place.clientWidth) plot.setSize({ width: place.clientWidth, height: HEIGHT }); }).observe(place);
  window.addEventListener("themechange", () => plot.redraw());
  return { figure, update };
}
