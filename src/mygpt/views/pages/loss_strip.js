// The losses of a whole text as one picture: each column is the mean loss of its characters, by its
// height and by its shade. A click moves to that place. Letters: K characters.

import { make, setAttribute, stateOf } from "../static/dom.js";

const HEIGHT = 92; // pixels, of which the marks take
const TOP = 10;
const BOTTOM = 8;
const NEAR = 5; // pixels: half of a triangle
const COLORS = ["--accent", "--ink", "--wash"];

// Draw the picture into `element`, or update it.
// data: { count: K, meanOf(start, end): the mean loss of some characters, NaN if none is known,
//         mean: that of the text, marks: [start, ...], spans: [[start, end], ...],
//         start, end: the characters that are shown below, words: a description }
// options: { onMove(position, near): near is how many characters a click may be off; 0 in a drag }
export function renderLossStrip(element, data, options) {
  const state = stateOf("loss-strip", element, buildStrip);
  state.data = data;
  state.onMove = options.onMove;
  drawStrip(state);
}

// The mean loss of each of `columns` equal parts of the text.
export function columnMeans({ count, meanOf }, columns) {
  return Array.from({ length: columns }, (_, column) => {
    const first = Math.min(count - 1, Math.floor((column * count) / columns));
    return meanOf(first, Math.max(first + 1, Math.floor(((column + 1) * count) / columns)));
  });
}

function buildStrip(box) {
  const canvas = make("canvas", { class: "loss-strip", role: "img" });
  box.append(canvas);
  const state = { box, canvas, data: null };
  const move = (event, pixels) => {
    const { left, width } = canvas.getBoundingClientRect();
    const share = Math.min(1, Math.max(0, (event.clientX - left) / width));
    state.onMove(Math.round(share * state.data.count), (pixels / width) * state.data.count);
  };
  canvas.addEventListener("pointerdown", (event) => move(event, NEAR));
  canvas.addEventListener("pointermove", (event) => event.buttons === 1 && move(event, 0));
  const scheme = window.matchMedia("(prefers-color-scheme: dark)");
  scheme.addEventListener("change", () => drawStrip(state));
  return state;
}

function drawStrip({ box, canvas, data }) {
  const width = box.clientWidth || 640;
  const ratio = window.devicePixelRatio || 1;
  canvas.width = Math.round(width * ratio);
  canvas.height = Math.round(HEIGHT * ratio);
  setAttribute(canvas, "aria-label", data.words);
  const style = window.getComputedStyle(canvas);
  const [accent, ink, wash] = COLORS.map((name) => style.getPropertyValue(name).trim());
  const context = canvas.getContext("2d");
  context.scale(ratio, ratio);
  const x = (position) => (width * position) / data.count;
  context.fillStyle = wash;
  context.fillRect(0, TOP, width, HEIGHT - TOP - BOTTOM);
  drawColumns(context, data, { width, accent, ink });
  context.fillStyle = ink;
  for (const mark of data.marks) drawTriangle(context, x(mark));
  for (const [start, end] of data.spans) {
    context.fillRect(x(start), HEIGHT - BOTTOM + 3, Math.max(2, x(end) - x(start)), 4);
  }
  drawFrame(context, x(data.start), x(data.end), ink);
}

function drawColumns(context, data, { width, accent, ink }) {
  const means = columnMeans(data, Math.round(width));
  const known = means.filter((mean) => !Number.isNaN(mean));
  const most = known.reduce((high, mean) => Math.max(high, mean), 0) || 1;
  const least = known.reduce((low, mean) => Math.min(low, mean), most);
  const bottom = HEIGHT - BOTTOM;
  const height = (mean) => ((bottom - TOP) * mean) / most;
  context.fillStyle = accent;
  means.forEach((mean, column) => {
    if (Number.isNaN(mean)) return;
    context.globalAlpha = 0.25 + (0.75 * (mean - least)) / (most - least || 1);
    context.fillRect(column, bottom - height(mean), 1, height(mean));
  });
  context.globalAlpha = 1;
  context.strokeStyle = ink;
  context.setLineDash([2, 4]);
  context.beginPath();
  context.moveTo(0, bottom - height(data.mean));
  context.lineTo(width, bottom - height(data.mean));
  context.stroke();
  context.setLineDash([]);
}

function drawTriangle(context, x) {
  context.beginPath();
  context.moveTo(x - 4, 1);
  context.lineTo(x + 4, 1);
  context.lineTo(x, TOP - 1);
  context.fill();
}

function drawFrame(context, left, right, ink) {
  context.strokeStyle = ink;
  context.lineWidth = 2;
  context.strokeRect(left + 1, TOP, Math.max(3, right - left - 2), HEIGHT - TOP - BOTTOM);
}
