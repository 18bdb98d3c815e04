// One small line chart as SVG: axes with round numbers, a smoothed line over the raw one, the value under the pointer.

import { make, number } from "./dom.js";

const HEIGHT = 180;
const EDGE = { left: 58, right: 12, top: 10, bottom: 24 };
const WIDTH = 460;

function ticks(low, high, count) {
  const rough = (high - low) / count || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= rough) ?? power;
  const found = [];
  for (let value = Math.ceil(low / step) * step; value <= high + step * 1e-9; value += step) found.push(value);
  return found;
}

const short = (value) => {
  const size = Math.abs(value);
  if (size >= 1e6) return `${+(value / 1e6).toPrecision(3)}M`;
  if (size >= 1e4) return `${+(value / 1e3).toPrecision(3)}k`;
  return size !== 0 && size < 1e-2 ? value.toExponential(0) : `${+value.toPrecision(3)}`;
};

// A mean over a window around each point that shrinks towards both ends, so that it neither lags nor begins late.
function smoothed(points) {
  const most = Math.max(1, Math.round(points.length / 30));
  const sums = [0];
  for (const [, y] of points) sums.push(sums.at(-1) + y);
  return points.map(([x], i) => {
    const half = Math.min(most, i, points.length - 1 - i);
    return [x, (sums[i + half + 1] - sums[i - half]) / (2 * half + 1)];
  });
}

export function chart(title, points, { show, smooth = false, zero = false, other = null }) {
  const all = [...points, ...(other ?? [])];
  const xs = [points[0][0], points.at(-1)[0]];
  // A few wild values at the start must not flatten the rest: the highest of all but one in fifty sets the top.
  const sorted = all.map((p) => p[1]).sort((a, b) => a - b);
  let low = zero ? 0 : sorted[0];
  let high = sorted[Math.floor(0.99 * (sorted.length - 1))];
  if (points.length < 200) high = sorted.at(-1);
  if (high - low < 1e-12) { high += Math.abs(high) * 0.1 || 1; low -= zero ? 0 : Math.abs(low) * 0.1; }
  const x = (v) => EDGE.left + ((v - xs[0]) / (xs[1] - xs[0] || 1)) * (WIDTH - EDGE.left - EDGE.right);
  const y = (v) => EDGE.top + (1 - Math.min(1.04, Math.max(-0.04, (v - low) / (high - low)))) * (HEIGHT - EDGE.top - EDGE.bottom);
  const path = (list) => `M${list.map(([a, b]) => `${x(a).toFixed(1)} ${y(b).toFixed(1)}`).join("L")}`;
  const svg = make("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": `${title}, now ${show(points.at(-1)[1])}` });
  for (const value of ticks(low, high, 4)) {
    svg.append(make("line", { class: "sf-grid", x1: EDGE.left, x2: WIDTH - EDGE.right, y1: y(value), y2: y(value) }),
      make("text", { class: "sf-axis", x: EDGE.left - 6, y: y(value) + 3.5, "text-anchor": "end" }, short(value)));
  }
  for (const value of ticks(xs[0], xs[1], 5)) {
    svg.append(make("text", { class: "sf-axis", x: x(value), y: HEIGHT - 6, "text-anchor": "middle" }, short(value)));
  }
  const calm = smooth && points.length > 20;
  svg.append(make("path", { class: calm ? "sf-raw" : "sf-curve", d: path(points) }));
  if (calm) svg.append(make("path", { class: "sf-curve", d: path(smoothed(points)) }));
  for (const [a, b] of other ?? []) svg.append(make("circle", { class: "sf-dot", cx: x(a), cy: y(b), r: 3.5 }));
  const cursor = make("line", { class: "sf-cursor", y1: EDGE.top, y2: HEIGHT - EDGE.bottom, visibility: "hidden" });
  svg.append(cursor);
  const now = make("span", { class: "sf-value" }, show(points.at(-1)[1]));
  svg.addEventListener("pointermove", (move) => {
    const box = svg.getBoundingClientRect();
    const wanted = xs[0] + (((move.clientX - box.left) / box.width) * WIDTH - EDGE.left) / (WIDTH - EDGE.left - EDGE.right) * (xs[1] - xs[0]);
    const nearest = points.reduce((best, p) => (Math.abs(p[0] - wanted) < Math.abs(best[0] - wanted) ? p : best));
    cursor.setAttribute("x1", x(nearest[0]));
    cursor.setAttribute("x2", x(nearest[0]));
    cursor.setAttribute("visibility", "visible");
    now.textContent = `step ${number(nearest[0])}: ${show(nearest[1])}`;
  });
  svg.addEventListener("pointerleave", () => {
    cursor.setAttribute("visibility", "hidden");
    now.textContent = show(points.at(-1)[1]);
  });
  const legend = other?.length ? make("span", { class: "sf-key" }, "● validation") : null;
  return make("figure", { class: "sf-chart" }, make("figcaption", {}, make("b", {}, title), legend, now), svg);
}
