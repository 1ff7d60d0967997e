// Read-outs for the charts: the pointer, a finger or the arrow keys choose a step.
"use strict";

const formats = {
  fixed: (value) => value.toFixed(3),
  scientific: (value) => (value === 0 ? "0" : value.toExponential(2).replace("e+", "e")),
  percent: (value) => (100 * value).toFixed(1) + " %",
  compact: (value) =>
    new Intl.NumberFormat("en", { notation: "compact", maximumSignificantDigits: 3 }).format(value),
};

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

for (const figure of document.querySelectorAll("figure.chart")) {
  const source = figure.querySelector("script");
  if (!source) continue;
  const chart = JSON.parse(source.textContent);
  const plot = figure.querySelector(".plot");
  const cursor = figure.querySelector(".cursor");
  const readout = figure.querySelector(".readout");
  // The curve with the most points decides which steps can be chosen.
  const steps = chart.series.reduce((a, b) => (b.x.length > a.x.length ? b : a)).x;
  let chosen = steps.length - 1;

  const show = (index) => {
    chosen = Math.max(0, Math.min(steps.length - 1, index));
    const step = steps[chosen];
    const share = (step - chart.low) / (chart.high - chart.low);
    readout.replaceChildren(element("b", "", "step " + step.toLocaleString("en")));
    for (const series of chart.series) {
      const at = nearest(series.x, step);
      // Curves are dense; measurements are few, and theirs may be far from the chosen step.
      const far = series.dots && series.x[at] !== step ? " (step " + series.x[at].toLocaleString("en") + ")" : "";
      const line = element("div", series.colour, "");
      line.append(element("i", series.dots ? "dots" : "line", ""));
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
  const point = (event) => {
    const box = plot.getBoundingClientRect();
    const share = (event.clientX - box.left) / box.width;
    show(nearest(steps, chart.low + share * (chart.high - chart.low)));
  };
  plot.addEventListener("pointermove", point);
  plot.addEventListener("pointerdown", point);
  plot.addEventListener("pointerleave", hide);
  plot.addEventListener("blur", hide);
  plot.addEventListener("keydown", (event) => {
    const stride = { ArrowLeft: -1, ArrowRight: 1, PageUp: -20, PageDown: 20 }[event.key];
    if (stride) {
      event.preventDefault();
      show(chosen + stride);
    } else if (event.key === "Escape") hide();
  });
}
