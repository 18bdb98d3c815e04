// A line chart of a training curve, drawn by uPlot: of one run the raw line, a smoothed line over it and marks; of several a
// line and marks of each in its colour; and the values under the pointer.

import { make, number } from "./dom.js";

const HEIGHT = 190;
const FONT = "11px system-ui, sans-serif";
const WHOLE = Array.from({ length: 27 }, (_, i) => [1, 2, 5][i % 3] * 10 ** Math.floor(i / 3)); // between two ticks of a step
const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

const short = (value) => {
  const size = Math.abs(value);
  if (size >= 1e6) return `${+(value / 1e6).toPrecision(3)}M`;
  if (size >= 1e3) return `${+(value / 1e3).toPrecision(3)}k`;
  return size !== 0 && size < 1e-3 ? (+value.toPrecision(2)).toExponential() : `${+value.toPrecision(3)}`;
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
  if (!sorted.length) return [0, 1];
  const low = zero ? 0 : sorted[0];
  const high = sorted.length < 200 ? sorted.at(-1) : sorted[Math.floor(0.99 * (sorted.length - 1))];
  const edge = high - low < 1e-12 ? Math.abs(high) * 0.1 || 1 : (high - low) * 0.04;
  return [zero ? 0 : low - edge, high + edge];
}

const columns = (pairs) => [pairs.map(([step]) => step), pairs.map(([, y]) => y)];
const line = (name, width, show = true) => ({ stroke: () => colour(name), width, points: { show: false }, spanGaps: true, show });
const dots = (name) => ({ stroke: () => colour(name), paths: () => null, points: { show: true, size: 7, fill: () => colour(name) } });

// Draws `title` into a figure. `update(lines)` takes { name, points, marks, colour } of each run, where points and marks are
// [step, value] pairs; a line without a colour is alone.
export function chart(title, { show, smooth = false, zero = false, marksName = null }) {
  const value = make("span", { class: "value" });
  const key = make("span", { class: "key", hidden: true }, `● ${marksName}`);
  const place = make("div", { class: "plot", role: "img" });
  const figure = make("figure", { class: "chart" }, make("figcaption", {}, make("b", {}, title), key, value), place);
  let range = [0, 1], latest = "", shown = "", lines = [];

  const axis = { stroke: () => colour("--soft"), font: FONT, grid: { stroke: () => colour("--grid"), width: 1 }, ticks: { show: false } };
  // Of one run: raw, smoothed, marks; of several: smoothed, marks.
  const series = ({ colour: of }) => (of ? [line(of, 1.8), dots(of)]
    : [line(smooth ? "--faint" : "--ember", smooth ? 1 : 1.8), line("--ember", 1.8, smooth), dots("--mark")]);

  function valueAt(self, first, at) {
    const values = self.data[first];
    while (at > 0 && (values[at] ?? null) === null) at -= 1;
    return values[at] ?? null;
  }

  function tell(self) {
    const at = self.cursor.idx;
    if (at === null || at === undefined || !lines.length) {
      value.textContent = latest;
      return;
    }
    const width = series(lines[0]).length;
    const found = lines.map(({ name, colour: of }, i) => [of ? `${name} ` : "", valueAt(self, 1 + i * width, at)]);
    const told = found.filter(([, y]) => y !== null).map(([name, y]) => name + show(y)).join(" · ");
    value.textContent = `step ${number(self.data[0][at])}: ${told}`;
  }

  function build() {
    figure.plot?.destroy();
    figure.plot = new uPlot({
      width: place.clientWidth || 460, height: HEIGHT, legend: { show: false }, cursor: { y: false, drag: { x: false, y: false } },
      scales: { x: { time: false }, y: { range: () => range } },
      axes: [
        { ...axis, grid: { show: false }, size: 26, incrs: WHOLE, values: (_, steps) => steps.map(short) },
        { ...axis, size: 54, values: (_, numbers) => numbers.map(short) },
      ],
      series: [{}, ...lines.flatMap(series)],
      hooks: { setCursor: [tell] },
    }, [[], ...lines.flatMap(series).map(() => [])], place);
  }

  function update(given) {
    lines = given;
    const now = JSON.stringify(lines.map(({ name, colour: of }) => [name, of]));
    if (now !== shown) build();
    shown = now;
    const every = lines.flatMap(({ points, marks }) => [...points, ...marks]);
    range = limits(every.map(([, y]) => y), zero);
    latest = lines.length === 1 ? show(lines[0].points.at(-1)[1]) : "";
    place.setAttribute("aria-label", `${title}: ${lines.map(({ name, points }) => `${name}, ${points.length} points, now ${show(points.at(-1)[1])}`).join("; ")}`);
    key.hidden = !lines.some(({ marks }) => marks.length);
    key.style.color = lines[0]?.colour ? "var(--soft)" : "";
    value.textContent = latest;
    const tables = lines.flatMap(({ points, marks, colour: of }) => {
      const [steps, values] = columns(points), even = smooth ? smoothed(values) : values;
      return [[steps, ...(of ? [] : [values]), even], columns(marks)];
    });
    figure.plot.setData(tables.length ? uPlot.join(tables) : [[]]);
  }

  new ResizeObserver(() => { if (place.clientWidth) figure.plot?.setSize({ width: place.clientWidth, height: HEIGHT }); }).observe(place);
  window.addEventListener("themechange", () => figure.plot?.redraw());
  return { figure, update };
}
