// One token's attention weights as arcs to earlier tokens, above the text on one line.

import { makeSvg, setAttribute, setText } from "./dom.js";
import { percent, tokenName } from "./text.js";

const CHAR_WIDTH = 8.5;
const ARC_PADDING = 8;
const BASELINE = 104;
const MOST_HEIGHT = 80;
const LEAST_DRAWN = 0.004;

// Draw the attention weights `row` (T,) of `tokens[from]` into `svg`.
// options: { from, to: index of the highlighted token or null, width: in pixels }
export function drawArcs(svg, tokens, row, { from, to, width }) {
  const names = tokens.map((token) => arcName(token));
  const first = firstShown(names, from, width);
  const centers = [];
  let x = ARC_PADDING;
  for (let place = first; place <= from; place += 1) {
    const cell = cellWidth(names[place]);
    centers[place] = x + cell / 2;
    x += cell;
  }
  setAttribute(svg, "viewBox", `0 0 ${width} ${BASELINE + 24}`);
  setAttribute(svg, "width", width);
  setAttribute(svg, "height", BASELINE + 24);
  svg.replaceChildren(
    ...arcPaths(row, { first, from, to, centers }),
    ...arcTexts(names, { first, from, to, centers }),
    hiddenWords(row, first),
  );
}

// The first token that fits on the line if `from` is its last one.
function firstShown(names, from, width) {
  let first = from;
  let used = 2 * ARC_PADDING + cellWidth(names[from] ?? "");
  while (first > 0 && used + cellWidth(names[first - 1]) <= width) {
    first -= 1;
    used += cellWidth(names[first]);
  }
  return first;
}

function arcPaths(row, { first, from, to, centers }) {
  const paths = [];
  const farthest = centers[from] - centers[first];
  for (let place = first; place <= from; place += 1) {
    const weight = row[place] ?? 0;
    if (weight < LEAST_DRAWN) continue;
    const stressed = to === null || to === place;
    const far = centers[from] - centers[place];
    const height = MOST_HEIGHT * Math.sqrt(far / Math.max(farthest, MOST_HEIGHT));
    paths.push(
      makeSvg("path", {
        class: stressed ? "arc" : "arc is-quiet",
        d: far ? arcOf(centers[from], centers[place], height) : loopOf(centers[from]),
        "stroke-width": (0.6 + 6 * weight).toFixed(2),
        "stroke-opacity": (0.25 + 0.75 * Math.sqrt(weight)).toFixed(3),
      }),
    );
  }
  return paths;
}

// A cubic curve whose middle is `height` above its ends.
function arcOf(start, end, height) {
  const y = BASELINE - 4;
  const top = (y - height / 0.75).toFixed(1);
  return `M${start} ${y}C${start} ${top} ${end} ${top} ${end} ${y}`;
}

function loopOf(x) {
  const y = BASELINE - 4;
  return `M${x} ${y}c-9 -16 9 -16 0 0`;
}

function arcTexts(names, { first, from, to, centers }) {
  const texts = [];
  for (let place = first; place <= from; place += 1) {
    const stressed = place === from || place === to;
    const text = makeSvg("text", { x: centers[place], y: BASELINE + 12 });
    setAttribute(text, "class", stressed ? "arc-token is-stressed" : "arc-token");
    setText(text, names[place]);
    texts.push(text);
  }
  return texts;
}

// The total weight of the tokens that do not fit on the line.
function hiddenWords(row, first) {
  const hidden = row.slice(0, first).reduce((sum, weight) => sum + weight, 0);
  const words = first > 0 ? `← ${percent(hidden)} to the ${first} before` : "";
  return makeSvg("text", { class: "arc-note", x: ARC_PADDING, y: 14 }, words);
}

function arcName(token) {
  const name = tokenName(token.text, token.id);
  return name.length > 12 ? `${name.slice(0, 11)}…` : name;
}

function cellWidth(name) {
  return Math.max(1, Array.from(name).length) * CHAR_WIDTH + 5;
}
