// Draws the charts of a page with uPlot from the JSON in #chart-data, which report/charts.py describes.
"use strict";

const FONT = "12px system-ui, sans-serif";
const style = getComputedStyle(document.documentElement);
const colour = (name) => style.getPropertyValue(name).trim();
const digits = (value, most) => `${+value.toPrecision(most)}`;

function scaled(value, units, most = 4) {
  const [size, suffix] = units.find(([size]) => Math.abs(value) >= size) ?? [1, ""];
  return `${digits(value / size, most)}${suffix}`;
}
const count = (value) => scaled(value, [[1e12, "T"], [1e9, "B"], [1e6, "M"], [1e3, "k"]]);
const bytes = (value) => scaled(value, [[2 ** 40, " TiB"], [2 ** 30, " GiB"], [2 ** 20, " MiB"], [2 ** 10, " KiB"]]);
const percent = (value) => `${digits(100 * value, 4)}%`;
const pad = (value) => String(Math.floor(value)).padStart(2, "0");

function duration(seconds) {
  if (seconds < 60) return `${digits(seconds, 3)} s`;
  if (seconds < 3600) return `${Math.floor(seconds / 60)}:${pad(seconds % 60)} min`;
  if (seconds < 86400) return `${Math.floor(seconds / 3600)}:${pad((seconds % 3600) / 60)} h`;
  return `${Math.floor(seconds / 86400)} d ${Math.floor((seconds % 86400) / 3600)} h`;
}

// The decimals of a tick follow from the step between ticks.
function plain(value, step) {
  if (value !== 0 && Math.abs(value) < 1e-3) return value.toExponential(1).replace(".0", "");
  if (Math.abs(value) >= 1e4 || !step) return count(value);
  return value.toFixed((String(step).split(".")[1] ?? "").length);
}

const TIMES = [1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 10800, 21600, 43200, 86400, 172800, 432000, 864000];
// By the key of a unit: its name on the x axis, the text of a value, of a tick (the same unless given), and steps of ticks.
const UNITS = {
  tokens: { name: "tokens", text: (value) => `${count(value)} tokens`, tick: count },
  seconds: { name: "time", text: duration, incrs: TIMES },
  nats: { text: (value) => value.toPrecision(4), tick: plain },
  bits: { text: (value) => value.toPrecision(4), tick: plain },
  rate: { text: (value) => digits(value, 3), tick: plain },
  norm: { text: (value) => value.toPrecision(3), tick: plain },
  speed: { text: (value) => `${count(value)} tokens/s`, tick: count },
  bytes: { text: bytes, incrs: Array.from({ length: 50 }, (_, power) => 2 ** power) },
  value: { name: "value", text: (value) => digits(value, 4), tick: plain },
  share: { text: percent },
  peak: { text: percent },
};

// Ticks of a logarithmic axis: as few per decade as give four, and plain steps where the range is narrow.
function logTicks(low, high) {
  for (const steps of [[1], [1, 3], [1, 2, 5], [1, 1.5, 2, 3, 5, 7], [1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8]]) {
    const ticks = [];
    for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power++) {
      for (const step of steps) ticks.push(+(step * 10 ** power).toPrecision(3));
    }
    const inside = ticks.filter((tick) => tick >= low && tick <= high);
    if (inside.length >= 4) return inside.length > 9 ? inside.filter((_, i) => i % Math.ceil(inside.length / 9) === 0) : inside;
  }
  const power = 10 ** Math.floor(Math.log10((high - low) / 4));
  const step = power * [1, 2, 5, 10].find((one) => one * power >= (high - low) / 5);
  const first = Math.ceil(low / step);
  return Array.from({ length: Math.floor(high / step) - first + 1 }, (_, i) => +((first + i) * step).toPrecision(6));
}

function axis(unit, log, more) {
  const { text, tick = text, incrs } = UNITS[unit];
  return {
    stroke: () => colour("--soft"), font: FONT, ticks: { show: false }, gap: 6,
    grid: { stroke: () => colour("--grid"), width: 1 },
    ...(incrs && !log ? { incrs } : {}),
    ...(log ? { splits: (_, __, low, high) => logTicks(low, high), filter: (_, ticks) => ticks } : {}),
    values: (_, ticks, __, ___, step) => ticks.map((value) => (value === 0 ? "0" : tick(value, log ? 0 : step))),
    ...more,
  };
}

function series({ label, kind, colour: index }) {
  const stroke = () => colour(`--c${index}`);
  const faint = kind === "raw" ? "55" : "99";
  return {
    label, kind, spanGaps: true, width: { raw: 1, points: 1.2 }[kind] ?? 2,
    stroke: kind === "line" ? stroke : () => stroke() + faint,
    points: { show: kind === "points" || undefined, size: 7, fill: stroke, stroke, width: 0 },
  };
}

// What uPlot has no option for: marks and levels under the curves, and the values at the cursor.
function annotations(chart, marks) {
  const tip = document.createElement("div");
  tip.className = "tip";
  tip.hidden = true;
  const line = (u, from, to, stroke, dash) => {
    const { ctx } = u;
    ctx.save();
    ctx.beginPath();
    ctx.rect(u.bbox.left, u.bbox.top, u.bbox.width, u.bbox.height);
    ctx.clip();
    ctx.beginPath();
    ctx.strokeStyle = stroke;
    ctx.lineWidth = 1.3 * devicePixelRatio;
    ctx.setLineDash(dash.map((part) => part * devicePixelRatio));
    ctx.moveTo(...from);
    ctx.lineTo(...to);
    ctx.stroke();
    ctx.restore();
  };
  const drawn = (u) => {
    const { left, top, width, height } = u.bbox;
    for (const mark of marks) {
      const x = u.valToPos(mark[chart.x], "x", true);
      line(u, [x, top], [x, top + height], colour("--mark"), [2, 4]);
    }
    for (const { label, value, side } of chart.levels) {
      const y = u.valToPos(value, "y", true);
      if (!(y >= top && y <= top + height)) continue;
      line(u, [left, y], [left + width, y], colour("--floor"), [6, 4]);
      u.ctx.save();
      u.ctx.fillStyle = colour("--floor");
      u.ctx.font = `${12 * devicePixelRatio}px system-ui, sans-serif`;
      u.ctx.textAlign = side;
      u.ctx.textBaseline = "bottom";
      u.ctx.fillText(label, side === "right" ? left + width : left + 4 * devicePixelRatio, y - 4 * devicePixelRatio);
      u.ctx.restore();
    }
  };
  const moved = (u) => {
    const { left, idx, idxs } = u.cursor;
    tip.hidden = left < 0 || idx == null;
    if (tip.hidden) return;
    const x = u.data[0][idx];
    const step = u.data.at(-1)[idx];
    const lines = [`${UNITS[chart.x].text(x)}${step == null ? "" : ` · step ${step.toLocaleString("en")}`}`];
    u.series.forEach(({ label, show, scale }, i) => {
      const value = i && show && scale === "y" && idxs[i] != null ? u.data[i][idxs[i]] : null;
      if (value != null) lines.push(`${label}: ${UNITS[chart.y].text(value)}`);
    });
    for (const mark of marks) if (Math.abs(u.valToPos(mark[chart.x], "x") - left) < 5) lines.push(mark.label);
    tip.hidden = lines.length === 1;
    tip.textContent = lines.join("\n");
    const right = left > u.over.clientWidth / 2;
    tip.style.left = right ? "" : `${left + 12}px`;
    tip.style.right = right ? `${u.over.clientWidth - left + 12}px` : "";
  };
  return { hooks: { ready: (u) => u.over.append(tip), drawAxes: drawn, setCursor: moved } };
}

// Of a curve with fewer points than the axis has, the value within a few pixels of the cursor.
function nearest(u, index, closest) {
  const values = u.data[index];
  for (let away = 0; away < 60; away++) {
    for (const at of [closest - away, closest + away]) {
      if (values[at] != null && Math.abs(u.valToPos(u.data[0][at], "x") - u.cursor.left) < 8) return at;
    }
  }
  return null;
}

// The columns that a chart needs, aligned by uPlot, with the step of each row as a last column that is not drawn.
function aligned(chart, page, logX) {
  const used = [...new Set(chart.series.map(({ table }) => table))];
  const columns = used.map((index) => [...chart.series.filter(({ table }) => table === index).map(({ column }) => column), null]);
  const tables = used.map((index, i) => {
    const table = page.tables[index];
    const rows = table[chart.x].flatMap((x, row) => (x != null && (!logX || x > 0) ? [row] : []));
    return [chart.x, ...columns[i].map((name) => name ?? "step")].map((name) => rows.map((row) => table[name][row]));
  });
  const [x, ...joined] = uPlot.join(tables);
  const names = columns.flat();
  return [x, ...joined.filter((_, i) => names[i] != null), joined[names.indexOf(null)]];
}

function draw(chart, page, element, asked) {
  const given = aligned(chart, page, false)[0];
  // The values of a sweep's key may be spread by their ratio.
  const logX = asked || (chart.x === "value" && given[0] > 0 && given.at(-1) > 4 * given[0]);
  const data = aligned(chart, page, logX);
  const [x] = data;
  const full = [logX ? x[0] : Math.min(0, x[0]), Math.max(x.at(-1), x[0] + 1e-9)];
  const isAll = (low, high) => low == null || low === high || (low <= x[0] && high >= x.at(-1));
  const marks = (chart.marks ? page.marks : []).filter((mark) => mark[chart.x] != null);
  const drawnValues = data.slice(1, -1).flat().filter((value) => value != null);
  const [lowest, highest] = drawnValues.reduce(([low, high], value) => [Math.min(low, value), Math.max(high, value)], [Infinity, -Infinity]);
  // As a whole a chart has the range that Python chose, in which one spike does not flatten a curve; a part of it has
  // the range of its values.
  const rangeOfY = (_, low, high) => {
    if (low == null || (low <= lowest && high >= highest)) return [chart.low, chart.high];
    return chart.log ? [low / 1.05, high * 1.05] : uPlot.rangeNum(low, high, 0.06, true);
  };
  return new uPlot({
    width: element.clientWidth,
    height: element.clientHeight,
    legend: { show: false },
    padding: [8, 14, 0, 0],
    pxAlign: 0,
    cursor: { sync: { key: chart.x === "value" ? chart.title : chart.x }, y: false, drag: { x: true, y: false }, dataIdx: nearest, points: { size: 6 } },
    scales: {
      x: { time: false, distr: logX ? 3 : 1, range: (_, low, high) => (isAll(low, high) ? full : [low, high]) },
      y: { distr: chart.log ? 3 : 1, range: rangeOfY },
      step: { auto: false, range: [0, 1] },
    },
    axes: [axis(chart.x, logX, { space: 70, size: 24, gap: 4, label: UNITS[chart.x].name, labelSize: 18, labelGap: 0, labelFont: FONT }), axis(chart.y, chart.log, { space: 34, size: 62 })],
    series: [{}, ...chart.series.map(series), { scale: "step", show: false }],
    plugins: [annotations(chart, marks)],
  }, data, element);
}

function keysOf(figure) {
  return [...figure.querySelectorAll("button.key")];
}

function drawAll(page) {
  const figures = [...document.querySelectorAll("figure.chart")];
  const plots = figures.map((figure) => figure.querySelector(".plot"));
  const logX = document.getElementById("log-x");
  let drawn = [];
  const isShown = (key) => key.getAttribute("aria-pressed") === "true";
  const redraw = () => {
    drawn.forEach((u) => u.destroy());
    drawn = page.charts.map((chart, i) => draw(chart, page, plots[i], logX.checked));
    drawn.forEach((u, i) => keysOf(figures[i]).forEach((key, j) => u.setSeries(j + 1, { show: isShown(key) })));
  };
  const fit = () => drawn.forEach((u, i) => u.setSize({ width: plots[i].clientWidth, height: plots[i].clientHeight }));
  redraw();
  logX.addEventListener("change", redraw);
  new ResizeObserver(fit).observe(document.body);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => drawn.forEach((u) => u.redraw()));
  figures.forEach((figure, i) => keysOf(figure).forEach((key, j) => key.addEventListener("click", () => {
    key.setAttribute("aria-pressed", !isShown(key));
    drawn[i].setSeries(j + 1, { show: isShown(key) });
  })));
  // A print is light and has a width of its own.
  for (const [event, printing] of [["beforeprint", true], ["afterprint", false]]) {
    addEventListener(event, () => {
      document.documentElement.classList.toggle("printing", printing);
      fit();
      drawn.forEach((u) => u.redraw());
    });
  }
}

const source = document.getElementById("chart-data");
if (source) drawAll(JSON.parse(source.textContent));
// The newest samples are shown first; the older ones are to their left.
for (const strip of document.querySelectorAll(".strip:not(.from-left)")) strip.scrollLeft = strip.scrollWidth;
