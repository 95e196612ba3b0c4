// The live figures: each figure with data-chart="NAME" is drawn from the numbers under NAME in the element "charts".
// Two kinds, bars and plot. All text goes in as text, never as markup. Colours are variables of the page's style.
const SVG = "http://www.w3.org/2000/svg";

function stored(id) {
  const holder = document.getElementById(id);
  return holder ? JSON.parse(holder.textContent) : null;
}

function element(tag, attributes = {}, text = null) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  if (text !== null) made.textContent = text;
  return made;
}

function shape(parent, tag, attributes = {}, text = null) {
  const made = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  if (text !== null) made.textContent = text;
  parent.append(made);
  return made;
}

const paint = (index) => `var(--c${index % 7})`;
// Where the colours begin again, bars are paler, and points and their swatches hollow.
const again = (index) => Math.floor(index / 7) % 2 === 1;
const opacity = (index) => (again(index) ? 0.5 : 1);

// -- axes ------------------------------------------------------------------------------------------------------------

function roundTicks(low, high, count) {
  const rough = (high - low || 1) / count, power = 10 ** Math.floor(Math.log10(rough));
  const step = power * ([1, 2, 5, 10].find((factor) => factor * power >= rough) ?? 10);
  const ticks = [];
  for (let value = Math.ceil(low / step - 1e-9) * step; value <= high + step * 1e-9; value += step) ticks.push(value);
  return ticks;
}

function shortNumber(value, axis) {
  return axis.percent ? `${Math.round(100 * value)} %` : String(Number(value.toPrecision(3)));
}

function rangeOf(axis, values) {
  let low = axis.min ?? Math.min(...values), high = axis.max ?? Math.max(...values);
  if (axis.min === undefined && axis.max === undefined && low === high) [low, high] = [low - 0.5, high + 0.5];
  return high > low ? [low, high] : [low, low + 1];
}

function frame(svg, box, axis, [low, high]) {
  const y = (value) => box.bottom - ((value - low) / (high - low)) * (box.bottom - box.top);
  for (const tick of roundTicks(low, high, 4)) {
    shape(svg, "line", { x1: box.left, x2: box.right, y1: y(tick), y2: y(tick), class: "gridline" });
    shape(svg, "text", { x: box.left - 6, y: y(tick) + 3.5, "text-anchor": "end" }, shortNumber(tick, axis));
  }
  shape(svg, "text", { x: 2, y: 11, class: "axis" }, axis.title);
  return y;
}

function whisker(svg, x1, y1, x2, y2) {
  shape(svg, "line", { x1, x2, y1, y2, class: "whisker" });
}

// A place that shows `tip` when it is pointed at, touched, or reached with the arrow keys.
function mark(svg, tag, attributes, tip) {
  const made = shape(svg, tag, { ...attributes, class: `mark ${attributes.class ?? ""}`, "data-tip": tip });
  shape(made, "title", {}, tip);
  return made;
}

// -- bars ------------------------------------------------------------------------------------------------------------

function hatch(svg, name, colour) {
  const pattern = shape(shape(svg, "defs"), "pattern", {
    id: name, width: 5, height: 5, patternUnits: "userSpaceOnUse", patternTransform: "rotate(45)",
  });
  shape(pattern, "line", { x1: 1, x2: 1, y1: 0, y2: 5, stroke: colour, "stroke-width": 1.6 });
  return `url(#${name})`;
}

function bars(svg, spec, width, hidden, name) {
  const shown = spec.series.map((_, index) => index).filter((index) => !hidden.has(index));
  const slot = (width - 48) / spec.groups.length;
  const longest = Math.max(...spec.groups.map((group) => group.length));
  const slanted = !spec.sparse && slot < 5.4 * Math.max(...spec.groups.flatMap((g) => g.split(" ")).map((w) => w.length)) + 4;
  const foot = spec.sparse ? 34 : slanted ? 14 + 4.4 * longest : 36;
  const box = { left: 42, right: width - 6, top: 22, bottom: 22 + (spec.height ?? 210) };
  svg.setAttribute("viewBox", `0 0 ${width} ${box.bottom + foot}`);
  const y = frame(svg, box, spec.y, [0, spec.y.max]);
  const each = (slot * (spec.sparse ? 0.94 : 0.84)) / Math.max(1, shown.length);
  spec.groups.forEach((group, index) => {
    const middle = box.left + slot * (index + 0.5);
    if (spec.sparse && index % Math.max(1, Math.ceil(26 / slot))) return;
    if (slanted) {
      shape(svg, "text", { transform: `translate(${middle + 3},${box.bottom + 13}) rotate(-42)`, "text-anchor": "end" }, group);
    } else {
      group.split(" ").forEach((word, row) =>
        shape(svg, "text", { x: middle, y: box.bottom + 15 + 13 * row, "text-anchor": "middle" }, word));
    }
  });
  if (spec.x) shape(svg, "text", { x: (box.left + box.right) / 2, y: box.bottom + 31, "text-anchor": "middle", class: "axis" }, spec.x.title);
  for (const bar of spec.bars) {
    const place = shown.indexOf(bar.series);
    if (place < 0) continue;
    const x = box.left + slot * (bar.group + 0.5) + (place - shown.length / 2) * each;
    let base = 0;
    for (const part of bar.parts) {
      const colour = part.colour === undefined ? paint(bar.series) : paint(part.colour);
      const fill = part.hatched ? hatch(svg, `${name}-${bar.group}-${bar.series}`, colour) : colour;
      const attributes = { x: x + each * 0.06, width: each * 0.88, y: y(base + part.value), height: y(base) - y(base + part.value), fill };
      if (part.hatched) attributes.stroke = colour;
      shape(svg, "rect", { ...attributes, opacity: opacity(bar.series), class: "column" });
      base += part.value;
    }
    if (bar.low !== undefined) whisker(svg, x + each / 2, y(bar.low), x + each / 2, y(bar.high));
    mark(svg, "rect", { x, width: each, y: box.top, height: box.bottom - box.top, fill: "transparent" }, bar.tip);
  }
}

// -- lines and points ------------------------------------------------------------------------------------------------

function plot(svg, spec, width, hidden) {
  const box = { left: 42, right: width - 14, top: 22, bottom: 22 + (spec.height ?? 230) };
  svg.setAttribute("viewBox", `0 0 ${width} ${box.bottom + 38}`);
  const all = spec.series.flatMap((series) => series.points);
  const y = frame(svg, box, spec.y, rangeOf(spec.y, all.map((point) => point.y)));
  const bend = spec.x.log ? Math.log : Number;
  const [low, high] = rangeOf(spec.x, all.map((point) => point.x)).map(bend);
  const x = (value) => box.left + 4 + ((bend(value) - low) / (high - low || 1)) * (box.right - box.left - 8);
  const ticks = spec.x.ticks ?? roundTicks(low, high, Math.max(2, Math.floor(width / 90))).map((value) => [value, shortNumber(value, spec.x)]);
  for (const [value, text] of ticks) shape(svg, "text", { x: x(value), y: box.bottom + 15, "text-anchor": "middle" }, text);
  shape(svg, "text", { x: (box.left + box.right) / 2, y: box.bottom + 32, "text-anchor": "middle", class: "axis" }, spec.x.title);
  spec.series.forEach((series, index) => {
    if (hidden.has(index)) return;
    const number = series.colour ?? index, colour = paint(number), points = series.points;
    if (spec.lines) {
      if (points.length && points[0].low !== undefined) {
        const outline = [...points.map((p) => [x(p.x), y(p.high)]), ...points.map((p) => [x(p.x), y(p.low)]).reverse()];
        shape(svg, "polygon", { points: outline.map((pair) => pair.join(",")).join(" "), fill: colour, opacity: 0.14 });
      }
      const path = points.map((p) => `${x(p.x)},${y(p.y)}`).join(" ");
      shape(svg, "polyline", { points: path, fill: "none", stroke: colour, "stroke-width": 1.8, class: `line stroke${Math.floor(number / 7) % 3}` });
    }
    for (const point of points) {
      if (!spec.lines && point.low !== undefined) whisker(svg, x(point.x), y(point.low), x(point.x), y(point.high));
      if (point.left !== undefined) whisker(svg, x(point.left), y(point.y), x(point.right), y(point.y));
    }
    for (const point of points) {
      const place = { cx: x(point.x), cy: y(point.y), fill: colour };
      const look = again(number) ? { class: "dot-mark hollow", style: `stroke: ${colour}` } : { class: "dot-mark" };
      shape(svg, "circle", { ...place, r: spec.radius ?? 4, ...look });
      mark(svg, "circle", { ...place, fill: "transparent", r: Math.max(6, spec.radius ?? 0) }, point.tip);
      if (point.label) {
        const beyond = x(point.x) > width - 8 * point.label.length;
        shape(svg, "text", { x: x(point.x) + (beyond ? -9 : 9), y: y(point.y) - 7, "text-anchor": beyond ? "end" : "start" }, point.label);
      }
    }
  });
}

// -- a figure, its legend, and the box that says what is pointed at --------------------------------------------------

const tip = element("div", { id: "tip", role: "status", "aria-live": "polite", hidden: "" });

function showTip(target) {
  document.querySelectorAll(".mark.on").forEach((other) => other.classList.remove("on"));
  tip.hidden = !target;
  if (!target) return;
  target.classList.add("on");
  tip.textContent = target.dataset.tip;
  const place = target.getBoundingClientRect(), size = tip.getBoundingClientRect();
  const left = Math.min(Math.max(8, place.left + place.width / 2 - size.width / 2), innerWidth - size.width - 8);
  const above = place.top - size.height - 8;
  tip.style.left = `${left}px`;
  tip.style.top = `${above > 8 ? above : Math.min(place.bottom + 8, innerHeight - size.height - 8)}px`;
}

function walk(event, svg) {
  const marks = [...svg.querySelectorAll(".mark")], at = marks.indexOf(svg.querySelector(".mark.on"));
  const steps = { ArrowRight: at + 1, ArrowLeft: at < 0 ? -1 : at - 1, Home: 0, End: -1 };
  if (event.key === "Escape") showTip(null);
  if (!(event.key in steps) || !marks.length) return;
  event.preventDefault();
  showTip(marks.at(steps[event.key] % marks.length));
}

function legend(spec, hidden, redraw) {
  const row = element("div", { class: "legend" });
  (spec.series.length > 1 ? spec.series : []).forEach((series, index) => {
    const button = element("button", { type: "button", "aria-pressed": String(!hidden.has(index)) }, series.name);
    const number = series.colour ?? index, colour = paint(number);
    const hollow = spec.kind === "plot" && again(number);
    const swatch = element("span", hollow
      ? { class: "swatch hollow", style: `border-color: ${colour}` }
      : { class: "swatch", style: `background: ${colour}; opacity: ${opacity(number)}` });
    button.prepend(swatch);
    button.addEventListener("click", () => {
      if (!hidden.delete(index)) hidden.add(index);
      redraw();
      row.parentElement?.querySelectorAll(".legend button")[index]?.focus();
    });
    row.append(button);
  });
  for (const note of spec.notes ?? []) {
    const item = element("span", { class: "note" }, note.text);
    item.prepend(element("span", { class: `swatch ${note.look ?? ""}`, style: note.colour === undefined ? "" : `background: ${paint(note.colour)}` }));
    row.append(item);
  }
  return row;
}

function panel(holder, spec, name) {
  const hidden = new Set();
  const redraw = () => {
    const width = Math.max(240, holder.clientWidth);
    const svg = document.createElementNS(SVG, "svg");
    svg.setAttribute("role", "img");
    svg.setAttribute("tabindex", "0");
    svg.setAttribute("aria-label", `${spec.label}. Left and right arrow keys go through the values.`);
    (spec.kind === "bars" ? bars : plot)(svg, spec, width, hidden, name);
    svg.addEventListener("pointerover", (event) => showTip(event.target.closest(".mark")));
    svg.addEventListener("pointerleave", () => showTip(null));
    svg.addEventListener("blur", () => showTip(null));
    svg.addEventListener("keydown", (event) => walk(event, svg));
    const parts = [spec.title ? element("h4", {}, spec.title) : null, legend(spec, hidden, redraw), svg];
    holder.replaceChildren(...parts.filter(Boolean));
    holder.dataset.width = holder.clientWidth;
  };
  redraw();
  new ResizeObserver(() => { if (Number(holder.dataset.width) !== holder.clientWidth) redraw(); }).observe(holder);
}

function figures() {
  const charts = stored("charts") ?? {};
  document.body.append(tip);
  addEventListener("scroll", () => showTip(null), { passive: true });
  for (const figure of document.querySelectorAll("figure[data-chart]")) {
    const chart = charts[figure.dataset.chart];
    if (!chart) continue;
    const holder = element("div", { class: `panels ${chart.panels.length > 1 && !chart.choose && !chart.stacked ? "many" : ""} ${chart.panels.length % 2 ? "" : "even"}` });
    const put = (specs) => {
      holder.replaceChildren();
      specs.forEach((spec, index) => {
        const place = element("div", { class: "panel" });
        holder.append(place);
        panel(place, spec, `${figure.dataset.chart}-${index}`);
      });
    };
    figure.querySelector(".static")?.replaceWith(holder);
    if (!holder.isConnected) figure.prepend(holder);
    if (chart.choose) {
      const select = element("select", { "aria-label": "state" });
      chart.panels.forEach((spec, index) => select.append(element("option", { value: index }, spec.name)));
      select.addEventListener("change", () => put([chart.panels[select.value]]));
      holder.before(select);
    }
    put(chart.choose ? chart.panels.slice(0, 1) : chart.panels);
  }
}
