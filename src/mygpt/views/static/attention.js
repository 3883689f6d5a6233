// Attention weights of a chosen layer and head: arcs from one token to earlier ones, and a grid
// of all tokens. Letters: T time; weights are [layer][head][T][T], row attends to column.

import { make, makeSvg, setAttribute, setText, stateOf } from "./dom.js";
import { drawArcs } from "./arcs.js";
import { percent, tokenName } from "./text.js";

const GRID_LEVELS = 16;
const MOST_LABELLED = 40;
const LABEL_WIDTH = 5; // cells

// Draw the attention into `element`, or update it.
// data: { tokens: [{ id, text }] (T), weights: [layer][head][T][T] }
// options: { layer, head: the first ones to show (0, 0); from: the attending token (the last) }
export function renderAttention(element, data, options = {}) {
  const state = stateOf("attention", element, buildAttention);
  const fresh = state.data === null;
  const grown = !fresh && state.data.tokens.length !== data.tokens.length;
  state.data = data;
  if (fresh || options.layer !== undefined) state.layer = options.layer ?? 0;
  if (fresh || options.head !== undefined) state.head = options.head ?? 0;
  const last = data.tokens.length - 1;
  if (fresh || grown || options.from !== undefined) state.from = options.from ?? last;
  state.layer = Math.min(state.layer, data.weights.length - 1);
  state.head = Math.min(state.head, (data.weights[state.layer] ?? []).length - 1);
  state.from = Math.min(state.from, last);
  state.to = null;
  fillChoice(state.layers, data.weights.length, state.layer);
  fillChoice(state.heads, (data.weights[state.layer] ?? []).length, state.head);
  showAttention(state);
}

function buildAttention(box) {
  const layers = make("select", { class: "choice" });
  const heads = make("select", { class: "choice" });
  const readout = make("p", { class: "readout", "aria-live": "polite" });
  const arcs = makeSvg("svg", { class: "arcs" });
  const grid = makeSvg("svg", { class: "grid", tabindex: 0, role: "group" });
  setAttribute(grid, "aria-label", "Attention as a grid; arrow keys move over it");
  const head = make(
    "div",
    { class: "choices" },
    make("label", {}, "Layer ", layers),
    make("label", {}, "Head ", heads),
  );
  const scroll = make("div", { class: "arcs-box" }, arcs);
  box.append(head, scroll, readout, grid);
  const state = { layers, heads, readout, arcs, grid, data: null, layer: 0, head: 0, from: 0 };
  Object.assign(state, { to: null, box: scroll });
  layers.addEventListener("change", () => chooseHead(state, Number(layers.value), state.head));
  heads.addEventListener("change", () => chooseHead(state, state.layer, Number(heads.value)));
  grid.addEventListener("pointermove", (event) => pointAtCell(state, event));
  grid.addEventListener("pointerleave", () => selectCell(state, state.from, null));
  grid.addEventListener("keydown", (event) => moveOnGrid(state, event));
  return state;
}

function fillChoice(select, count, chosen) {
  if (select.options.length !== count) {
    const numbers = Array.from({ length: count }, (_, n) => n);
    select.replaceChildren(...numbers.map((n) => make("option", { value: n }, String(n + 1))));
  }
  select.value = String(chosen);
}

function chooseHead(state, layer, head) {
  state.layer = layer;
  state.head = Math.min(head, state.data.weights[layer].length - 1);
  fillChoice(state.heads, state.data.weights[layer].length, state.head);
  showAttention(state);
}

function weightsOf(state) {
  return (state.data.weights[state.layer] ?? [])[state.head] ?? [];
}

function showAttention(state) {
  drawGrid(state);
  markCell(state);
}

// The squares of weights (T, T) as paths, one for each shade: 128 by 128 are 16 elements.
export function cellPaths(weights) {
  const shades = Array.from({ length: GRID_LEVELS + 1 }, () => []);
  weights.forEach((row, y) => {
    for (let x = 0; x <= y; x += 1) {
      shades[Math.round(GRID_LEVELS * Math.sqrt(Math.min(1, row[x])))].push(`M${x} ${y}h1v1h-1z`);
    }
  });
  return shades.map((cells, level) =>
    makeSvg("path", {
      class: level ? "grid-cells" : "grid-empty",
      d: cells.join(""),
      "fill-opacity": level ? (level / GRID_LEVELS).toFixed(3) : null,
    }),
  );
}

function drawGrid(state) {
  const weights = weightsOf(state);
  const count = weights.length;
  const labelWidth = count <= MOST_LABELLED ? LABEL_WIDTH : 0;
  setAttribute(state.grid, "viewBox", `${-labelWidth} 0 ${count + labelWidth} ${Math.max(1, count)}`);
  const paths = cellPaths(weights);
  state.rowMark = makeSvg("rect", { class: "grid-row", x: 0, height: 1 });
  state.cellMark = makeSvg("rect", { class: "grid-cell", width: 1, height: 1 });
  const labels = labelWidth ? state.data.tokens.map((token, y) => gridLabel(token, y)) : [];
  state.grid.replaceChildren(...paths, ...labels, state.rowMark, state.cellMark);
}

function gridLabel(token, y) {
  const name = Array.from(tokenName(token.text, token.id)).slice(0, 7).join("");
  return makeSvg("text", { class: "grid-label", x: -0.4, y: y + 0.75 }, name);
}

// Mark the attending and the attended token, and show the weight.
function markCell(state) {
  const row = weightsOf(state)[state.from] ?? [];
  setAttribute(state.rowMark, "y", state.from);
  setAttribute(state.rowMark, "width", state.from + 1);
  setAttribute(state.cellMark, "visibility", state.to === null ? "hidden" : "visible");
  setAttribute(state.cellMark, "x", state.to ?? 0);
  setAttribute(state.cellMark, "y", state.from);
  drawArcs(state.arcs, state.data.tokens, row, {
    from: state.from,
    to: state.to,
    width: state.box.clientWidth || 640,
  });
  const to = state.to ?? row.indexOf(Math.max(...row));
  if (!row.length) setText(state.readout, "");
  else setText(state.readout, attentionWords(state, row, to));
}

function attentionWords(state, row, to) {
  const { tokens } = state.data;
  const name = (place) => `‘${tokenName(tokens[place].text, tokens[place].id)}’`;
  const back = state.from - to;
  const where = back === 0 ? "itself" : `${name(to)}, ${back} back`;
  const most = state.to === null ? " most" : "";
  return `${name(state.from)} attends${most} to ${where}: ${percent(row[to])}`;
}

function selectCell(state, from, to) {
  if (from === state.from && to === state.to) return;
  state.from = from;
  state.to = to;
  markCell(state);
}

function pointAtCell(state, event) {
  const matrix = state.grid.getScreenCTM();
  if (!matrix) return;
  const point = new DOMPoint(event.clientX, event.clientY).matrixTransform(matrix.inverse());
  const [x, y] = [Math.floor(point.x), Math.floor(point.y)];
  if (y < 0 || y >= state.data.tokens.length) return;
  selectCell(state, y, x >= 0 && x <= y ? x : null);
}

function moveOnGrid(state, event) {
  const steps = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
  const step = steps[event.key];
  if (!step) return;
  event.preventDefault();
  const last = state.data.tokens.length - 1;
  const from = Math.min(last, Math.max(0, state.from + step[0]));
  const to = Math.min(from, Math.max(0, (state.to ?? from) + step[1]));
  selectCell(state, from, to);
}
