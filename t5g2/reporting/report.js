// Read-outs and zoom for the charts: the pointer, a finger or the arrow keys choose a step; a drag
// with the mouse, the buttons or + - 0 choose a range, the same one in all charts of a page.
"use strict";

const formats = {
  fixed: (value) => value.toFixed(3),
  scientific: (value) => (value === 0 ? "0" : value.toExponential(2).replace("e+", "e")),
  percent: (value) => (100 * value).toFixed(1) + " %",
  compact: (value) =>
    new Intl.NumberFormat("en", { notation: "compact", maximumSignificantDigits: 3 }).format(value),
};
const SIDE = 1000; // of the square that the SVG's coordinates span

function nearest(sorted, value) {
  let low = 0;
  let high = sorted.length - 1;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (sorted[middle] < value) low = middle + 1;
    else high = middle;
  }
  return low > 0 && value - sorted[low - 1] <= sorted[low] - value ? low - 1 : low;
}

function element(tag, className, text) {
  const made = document.createElement(tag);
  made.className = className;
  made.textContent = text;
  return made;
}

// Round values in a range, about five of them.
function ticks(low, high) {
  const unit = 10 ** Math.floor(Math.log10((high - low) / 5));
  const spacing = [1, 2, 5, 10].map((f) => f * unit).find((s) => (high - low) / s <= 6);
  const found = [];
  for (let i = Math.ceil(low / spacing); i * spacing <= high; i++) found.push(+(i * spacing).toPrecision(12));
  return found;
}

function label(value, form) {
  if (form === "percent") return +(100 * value).toPrecision(4) + " %";
  if (value !== 0 && Math.abs(value) < 1e-3) return value.toExponential().replace("e+", "e");
  if (Math.abs(value) < 1e4) return value.toLocaleString("en", { maximumSignificantDigits: 5 });
  return new Intl.NumberFormat("en", { notation: "compact", maximumSignificantDigits: 5 })
    .format(value).replace("K", "k");
}

// What a range of steps looks like, its own highest and lowest values at the edges.
function drawRange(chart, low, high) {
  const across = (x) => (SIDE * (x - low)) / (high - low);
  let bottom = Infinity;
  let top = -Infinity;
  const parts = chart.series.map((series) => {
    // One point beyond each edge, so that lines leave the picture.
    const first = Math.max(0, series.x.findIndex((x) => x >= low) - 1);
    const after = series.x.findIndex((x) => x > high);
    const last = after < 0 ? series.x.length : after + 1;
    const before = series.x[series.x.length - 1] < low;
    for (let i = first; i < last && !before; i++) {
      if (series.x[i] < low || series.x[i] > high) continue;
      bottom = Math.min(bottom, series.y[i]);
      top = Math.max(top, series.y[i]);
    }
    return before ? [] : Array.from({ length: last - first }, (_, i) => [series.x[first + i], series.y[first + i]]);
  });
  if (!(bottom <= top)) return null;
  const scale = chart.logarithmic && bottom > 0 ? Math.log : (y) => y;
  const room = 0.06 * (scale(top) - scale(bottom)) || 0.05 * Math.abs(scale(top)) || 1;
  const [floor, ceiling] = [scale(bottom) - room, scale(top) + room];
  const down = (y) => SIDE - (SIDE * (scale(y) - floor)) / (ceiling - floor);
  const exact = (value) => (scale === Math.log ? Math.exp(value) : value);
  const levels = ticks(exact(floor), exact(ceiling)).filter((y) => down(y) <= SIDE && down(y) >= 0);
  const paths = levels.map((y) => ["grid", `M0 ${down(y).toFixed(1)}H${SIDE}`]);
  for (const step of chart.resumes)
    if (step >= low && step <= high) paths.push(["resume", `M${across(step).toFixed(1)} 0V${SIDE}`]);
  chart.series.forEach((series, i) => {
    const places = parts[i].map(([x, y]) => across(x).toFixed(1) + " " + down(y).toFixed(1));
    const dashed = series.dashed ? " dashed" : "";
    const look = series.look === "dots" ? "line" : series.look;
    if (places.length > 1) paths.push([`${series.colour} ${look}${dashed}`, "M" + places.join("L")]);
    if (series.look === "dots" || places.length === 1)
      paths.push([`${series.colour} dot`, places.map((place) => `M${place}h0`).join("")]);
  });
  const steps = ticks(low, high);
  return {
    paths,
    labels: [
      ...levels.map((y) => ["y", "top", down(y) / 10, label(y, chart.form)]),
      ...steps.map((x) => ["x", "left", across(x) / 10, label(x, "")]),
    ],
  };
}

const charts = [];

function zoomAll(axis, low, high) {
  for (const chart of charts) if (chart.axis === axis) chart.zoom(low, high);
}

for (const figure of document.querySelectorAll("figure.chart")) {
  const source = figure.querySelector("script");
  if (!source) continue;
  const chart = JSON.parse(source.textContent);
  const plot = figure.querySelector(".plot");
  const svg = plot.querySelector("svg");
  const cursor = figure.querySelector(".cursor");
  const readout = figure.querySelector(".readout");
  const whole = [svg.firstElementChild, ...plot.querySelectorAll(".x, .y, .level")];
  const all = { low: chart.low, high: chart.high };
  // The curve with the most points decides which steps can be chosen.
  const steps = chart.series.reduce((a, b) => (b.x.length > a.x.length ? b : a)).x;
  let view = all;
  let zoomed = [];
  let chosen = steps.length - 1;
  let dragged = null; // where a drag began, and its picture

  const show = (index) => {
    const [first, last] = [nearest(steps, view.low), nearest(steps, view.high)];
    chosen = Math.max(first, Math.min(last, index));
    const step = steps[chosen];
    const share = (step - view.low) / (view.high - view.low);
    readout.replaceChildren(element("b", "", chart.axis + " " + step.toLocaleString("en")));
    for (const series of chart.series) {
      const at = nearest(series.x, step);
      const dots = series.look === "dots";
      // Curves are dense; measurements are few, and theirs may be far from the chosen step.
      const far = dots && series.x[at] !== step ? " (" + series.x[at].toLocaleString("en") + ")" : "";
      const line = element("div", series.colour, "");
      line.append(element("i", dots ? "dots" : "line", ""));
      line.append(series.name + " ");
      line.append(element("b", "", formats[chart.form](series.y[at])), far);
      readout.append(line);
    }
    cursor.style.left = 100 * share + "%";
    cursor.hidden = readout.hidden = false;
    const room = plot.clientWidth - readout.offsetWidth;
    const left = share * plot.clientWidth + (share < 0.5 ? 12 : -12 - readout.offsetWidth);
    readout.style.left = Math.max(0, Math.min(room, left)) + "px";
  };
  const hide = () => {
    cursor.hidden = readout.hidden = true;
  };
  const zoom = (low, high) => {
    hide();
    const isAll = low <= all.low && high >= all.high;
    const drawn = isAll ? null : drawRange(chart, low, high);
    zoomed.forEach((made) => made.remove());
    zoomed = [];
    whole.forEach((part) => part.toggleAttribute("hidden", Boolean(drawn)));
    view = drawn ? { low, high } : all;
    if (!drawn) return;
    const group = document.createElementNS(svg.namespaceURI, "g");
    for (const [className, d] of drawn.paths) {
      const path = document.createElementNS(svg.namespaceURI, "path");
      path.setAttribute("class", className);
      path.setAttribute("d", d);
      group.append(path);
    }
    svg.append(group);
    zoomed = [group, ...drawn.labels.map(([className, side, place, text]) => {
      const made = element("span", className, text);
      made.style[side] = place + "%";
      plot.append(made);
      return made;
    })];
  };
  charts.push({ axis: chart.axis, zoom });
  const zoomBy = (factor) => {
    if (!factor) return zoomAll(chart.axis, -Infinity, Infinity);
    const width = (view.high - view.low) * factor;
    if (width < 4) return;
    // Around the chosen step; without one, towards the end.
    const centre = steps[chosen] < view.low ? view.low : Math.min(steps[chosen], view.high);
    const low = Math.max(all.low, Math.min(centre - width / 2, all.high - width));
    zoomAll(chart.axis, low, low + width);
  };
  const buttons = figure.querySelector(".zoom");
  buttons.hidden = false;
  buttons.addEventListener("click", (event) => {
    if (event.target.dataset.by) zoomBy(Number(event.target.dataset.by));
  });

  const stepAt = (event) => {
    const box = plot.getBoundingClientRect();
    const share = Math.max(0, Math.min(1, (event.clientX - box.left) / box.width));
    return view.low + share * (view.high - view.low);
  };
  const point = (event) => {
    show(nearest(steps, stepAt(event)));
    if (!dragged) return;
    const [a, b] = [dragged.from, stepAt(event)].sort((x, y) => x - y);
    const percent = (x) => (100 * (x - view.low)) / (view.high - view.low);
    dragged.box.style.left = percent(a) + "%";
    dragged.box.style.width = percent(b) - percent(a) + "%";
  };
  const drop = (event) => {
    if (!dragged) return;
    const [a, b] = [dragged.from, stepAt(event)].sort((x, y) => x - y);
    dragged.box.remove();
    dragged = null;
    // Less than that is a click.
    if (b - a > 0.02 * (view.high - view.low)) zoomAll(chart.axis, a, b);
  };
  plot.addEventListener("pointerdown", (event) => {
    point(event);
    if (event.pointerType !== "mouse" || event.button !== 0) return;
    event.preventDefault();
    plot.focus({ preventScroll: true });
    plot.setPointerCapture(event.pointerId);
    dragged = { from: stepAt(event), box: element("span", "chosen", "") };
    plot.append(dragged.box);
  });
  plot.addEventListener("pointermove", point);
  plot.addEventListener("pointerup", drop);
  plot.addEventListener("pointercancel", drop);
  plot.addEventListener("dblclick", () => zoomBy(0));
  plot.addEventListener("pointerleave", hide);
  plot.addEventListener("blur", hide);
  plot.addEventListener("keydown", (event) => {
    const stride = { ArrowLeft: -1, ArrowRight: 1, PageUp: -20, PageDown: 20 }[event.key];
    const factor = { "+": 0.5, "=": 0.5, "-": 2, 0: 0 }[event.key];
    if (stride) {
      event.preventDefault();
      show(chosen + stride);
    } else if (factor !== undefined && !event.ctrlKey && !event.metaKey) zoomBy(factor);
    else if (event.key === "Escape") hide();
  });
}
