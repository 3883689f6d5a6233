// Loss curves against tokens, steps or seconds, with baselines as horizontal lines.

import { make, makeSvg, moved, setAttribute, setText, stateOf } from "./dom.js";
import { labelColumns, niceTicks, setSize, shortNumber } from "./axes.js";
import { grouped } from "./text.js";

const MARGIN = { left: 44, right: 12, top: 14, bottom: 34 };
const BASELINE_SPACE = 14; // pixels between the labels of two baselines
const NAME_WIDTH = 100;
// What the horizontal axis can be, and its name.
const AXES = { tokens: "tokens", step: "steps", seconds: "seconds" };

// Draw the curves into `element`, or update them.
// data: { series: [{ name, role: "training", "validation" or "run-1" to "run-8",
//                    points: [{ tokens, step, seconds, loss }, ...] }],
//         best: { step, seconds, loss } or null, baselines: [{ name, loss }], unit,
//         growing: whether points are still added }
// options: { axis: "tokens", "step" or "seconds" (the first that any point has) }
export function renderCurves(element, data, options = {}) {
  const state = stateOf("curves", element, (box) => buildCurves(box, data));
  state.data = data;
  state.height = 300;
  state.width = element.clientWidth || 640;
  if (options.axis) state.axis = options.axis;
  drawCurves(state);
}

function buildCurves(box, data) {
  const picture = makeSvg("svg", { class: "curves", tabindex: 0, role: "img" });
  const readout = make("p", { class: "readout" });
  const best = make("span", { class: "key key-best" });
  const known = (axis) => data.series.some((one) => one.points.some((p) => Number.isFinite(p[axis])));
  const axes = Object.keys(AXES).filter(known);
  const key = make("div", { class: "curves-key" });
  const state = { picture, readout, key, best, data, axis: axes[0] ?? "step", at: null, point: null };
  const buttons = axes.map((axis) => axisButton(state, axis));
  const head = make("div", { class: "curves-head" }, key);
  if (axes.length > 1) head.append(make("div", { class: "switch" }, ...buttons));
  state.buttons = buttons;
  box.append(head, picture, readout);
  picture.addEventListener("pointermove", (event) => pointAtCurve(state, event));
  picture.addEventListener("pointerleave", () => showPoint(state, null));
  picture.addEventListener("keydown", (event) => moveOnCurve(state, event));
  return state;
}

function axisButton(state, axis) {
  const button = make("button", { type: "button", "data-axis": axis }, AXES[axis]);
  button.addEventListener("click", () => {
    state.axis = axis;
    drawCurves(state);
  });
  return button;
}

function drawCurves(state) {
  const { picture, data } = state;
  for (const button of state.buttons) {
    setAttribute(button, "aria-pressed", String(button.dataset.axis === state.axis));
  }
  const keys = data.series.map(({ role, name }) => make("span", { class: `key key-${role}` }, name));
  state.key.replaceChildren(...keys, ...(data.best ? [state.best] : []));
  // In the key, since a label beside the point would hide the curves that end there.
  setText(state.best, data.best ? `best ${data.best.loss.toFixed(4)}` : "");
  state.scale = curveScale(state);
  setSize(picture, state.width, state.height);
  setAttribute(picture, "aria-label", curveWords(data));
  state.mark = makeSvg("g", { class: "curve-mark", visibility: "hidden" });
  state.mark.append(
    makeSvg("line", { class: "curve-line", y1: MARGIN.top, y2: state.height - MARGIN.bottom }),
    makeSvg("circle", { r: 4 }),
  );
  picture.replaceChildren(
    ...axisMarks(state),
    ...baselineMarks(state),
    ...data.series.map((one) => curvePath(state, one)),
    ...bestMark(state),
    state.mark,
  );
  showAgain(state);
}

// Show the point that was shown before the curves were drawn again, if it is still one of them.
function showAgain(state) {
  const { point, at } = state;
  const points = point ? readablePoints(state) : [];
  const place = points.findIndex((p) => p.name === point.name && p.step === point.step);
  showPoint(state, points[place] ?? null);
  if (place >= 0 && at !== null) state.at = place;
}

// Functions from steps and losses to pixels.
function curveScale({ data, axis, width, height }) {
  const points = data.series.flatMap((one) => one.points);
  const losses = [...points, ...(data.baselines ?? [])].map((p) => p.loss).filter(Number.isFinite);
  const last = points.reduce((most, p) => Math.max(most, p[axis] ?? 0), 0) || 1;
  const largest = losses.reduce((most, loss) => Math.max(most, loss), 0) || 1;
  const least = losses.reduce((low, loss) => Math.min(low, loss), largest);
  const low = least > 0.5 * largest ? least - 0.15 * (largest - least || largest) : 0;
  const high = largest + 0.04 * (largest - low);
  const right = width - MARGIN.right;
  const bottom = height - MARGIN.bottom;
  const x = (value) => MARGIN.left + ((right - MARGIN.left) * value) / last;
  const y = (loss) => bottom - ((bottom - MARGIN.top) * (loss - low)) / (high - low);
  return { x, y, last, low, high, right, bottom };
}

function axisMarks({ scale, axis, data }) {
  const marks = [];
  for (const loss of niceTicks(scale.low, scale.high, 5)) {
    const y = scale.y(loss);
    const place = { class: "curve-tick is-loss", x: MARGIN.left - 8, y: y + 4 };
    marks.push(levelLine("curve-grid", scale, loss), makeSvg("text", place, shortNumber(loss)));
  }
  for (const value of niceTicks(0, scale.last, scale.right > 500 ? 6 : 4)) {
    const place = { class: "curve-tick is-x", x: scale.x(value), y: scale.bottom + 16 };
    marks.push(makeSvg("text", place, shortNumber(value)));
  }
  const unit = data.unit ?? "nats per token";
  const where = { class: "curve-axis", x: scale.right, y: scale.bottom + 30 };
  marks.push(makeSvg("text", where, `loss in ${unit}, against ${AXES[axis]}`));
  return marks;
}

// A horizontal line at one loss.
function levelLine(name, scale, loss) {
  const y = scale.y(loss);
  return makeSvg("line", { class: name, x1: MARGIN.left, x2: scale.right, y1: y, y2: y });
}

function baselineMarks({ scale, data }) {
  const baselines = (data.baselines ?? []).filter((one) => Number.isFinite(one.loss));
  const heights = baselines.map((one) => scale.y(one.loss) - 4);
  const columns = labelColumns(heights, BASELINE_SPACE);
  const lines = baselines.map((one) => levelLine("curve-baseline", scale, one.loss));
  const names = baselines.map((one, n) => {
    const x = scale.right - 4 - NAME_WIDTH * columns[n];
    const words = `${one.name}  ${one.loss.toFixed(3)}`;
    return makeSvg("text", { class: "curve-name", x, y: heights[n] }, words);
  });
  return [...lines, ...names];
}

function curvePath({ scale, axis }, one) {
  const points = one.points.filter((p) => Number.isFinite(p[axis]) && Number.isFinite(p.loss));
  const places = points.map((p) => `${scale.x(p[axis]).toFixed(1)} ${scale.y(p.loss).toFixed(1)}`);
  const d = places.length ? `M${places.join("L")}` : "";
  return makeSvg("path", { class: `curve curve-${one.role}`, d });
}

function bestMark({ scale, axis, data }) {
  const best = data.best;
  if (!best || !Number.isFinite(best[axis])) return [];
  const place = { cx: scale.x(best[axis]), cy: scale.y(best.loss), r: 4.5 };
  return [makeSvg("circle", { class: "curve-best", ...place })];
}

// All points with a readout, in the order of the axis.
function readablePoints(state) {
  const all = state.data.series.flatMap((one) => one.points.map((p) => ({ ...p, name: one.name })));
  return all
    .filter((p) => Number.isFinite(p[state.axis]) && Number.isFinite(p.loss))
    .sort((a, b) => a[state.axis] - b[state.axis]);
}

function showPoint(state, point) {
  state.point = point;
  // Not at each update of curves that grow: it would be read aloud every second.
  setAttribute(state.readout, "aria-live", point || !state.data.growing ? "polite" : "off");
  setAttribute(state.mark, "visibility", point ? "visible" : "hidden");
  if (!point) {
    state.at = null;
    setText(state.readout, curveWords(state.data));
    return;
  }
  const [line, dot] = state.mark.children;
  const x = state.scale.x(point[state.axis]);
  setAttribute(line, "x1", x);
  setAttribute(line, "x2", x);
  setAttribute(dot, "cx", x);
  setAttribute(dot, "cy", state.scale.y(point.loss));
  const time = Number.isFinite(point.seconds) ? `, ${shortNumber(point.seconds)} s` : "";
  const read = Number.isFinite(point.tokens) ? `, ${grouped(point.tokens)} tokens` : "";
  const where = `at step ${grouped(point.step)}${read}${time}`;
  setText(state.readout, `${point.name} ${point.loss.toFixed(4)} ${where}`);
}

function curveWords(data) {
  const last = data.series.map((one) => [one.name, one.points[one.points.length - 1]]);
  const words = last.filter(([, p]) => p).map(([name, p]) => `${name} ${p.loss.toFixed(4)}`);
  const when = data.growing ? "So far" : "At the end";
  return words.length ? `${when}: ${words.join(", ")}.` : "No losses yet.";
}

function pointAtCurve(state, event) {
  const box = state.picture.getBoundingClientRect();
  const [x, y] = [
    ((event.clientX - box.left) * state.width) / box.width,
    ((event.clientY - box.top) * state.height) / box.height,
  ];
  let nearest = null;
  let least = Infinity;
  for (const point of readablePoints(state)) {
    const away = Math.hypot(
      state.scale.x(point[state.axis]) - x,
      (state.scale.y(point.loss) - y) / 4,
    );
    if (away < least) [nearest, least] = [point, away];
  }
  showPoint(state, nearest);
}

function moveOnCurve(state, event) {
  const points = readablePoints(state);
  const to = moved(event.key, state.at ?? points.length, points.length);
  if (to === null || !points.length) return;
  event.preventDefault();
  showPoint(state, points[to]);
  state.at = to;
}
