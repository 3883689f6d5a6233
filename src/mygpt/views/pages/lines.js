// A small line chart of one figure against the steps: the learning rate, the speed.

import { niceTicks, setSize, shortNumber } from "../static/axes.js";
import { makeSvg, setAttribute, stateOf } from "../static/dom.js";

const MARGIN = { left: 52, right: 10, top: 10, bottom: 22 };

// Draw the line into `element`, or update it.
// data: { points: [[step, value], ...], words: a description for screen readers }
export function renderLine(element, data) {
  const picture = stateOf("line", element, buildLine);
  const width = element.clientWidth || 320;
  const height = 150;
  const last = data.points.reduce((most, [step]) => Math.max(most, step), 0) || 1;
  const largest = data.points.reduce((most, [, value]) => Math.max(most, value), 0) || 1;
  const x = (step) => MARGIN.left + ((width - MARGIN.left - MARGIN.right) * step) / last;
  const bottom = height - MARGIN.bottom;
  const y = (value) => bottom - ((bottom - MARGIN.top) * value) / (1.05 * largest);
  setSize(picture, width, height);
  setAttribute(picture, "aria-label", data.words);
  const marks = [];
  for (const value of niceTicks(0, 1.05 * largest, 3)) {
    const grid = { x1: MARGIN.left, x2: width - MARGIN.right, y1: y(value), y2: y(value) };
    const place = { class: "curve-tick is-loss", x: MARGIN.left - 8, y: y(value) + 4 };
    marks.push(makeSvg("line", { class: "curve-grid", ...grid }));
    marks.push(makeSvg("text", place, shortNumber(value)));
  }
  for (const step of niceTicks(0, last, 3)) {
    const place = { class: "curve-tick is-x", x: x(step), y: bottom + 16 };
    marks.push(makeSvg("text", place, shortNumber(step)));
  }
  const places = data.points.map(([step, value]) => `${x(step).toFixed(1)} ${y(value).toFixed(1)}`);
  const d = places.length ? `M${places.join("L")}` : "";
  picture.replaceChildren(...marks, makeSvg("path", { class: "curve line-curve", d }));
}

function buildLine(box) {
  const picture = makeSvg("svg", { class: "curves", role: "img" });
  box.append(picture);
  return picture;
}
