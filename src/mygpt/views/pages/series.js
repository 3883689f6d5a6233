// A chart of several figures at the snapshots of a training, and where the slider is.

import { niceTicks, setSize, shortNumber } from "../static/axes.js";
import { make, makeSvg, setAttribute, stateOf } from "../static/dom.js";

const MARGIN = { left: 44, right: 24, top: 10, bottom: 24 };

// Draw the figures into `element`, or update them. Snapshots are equally far apart.
// data: { steps: [of each snapshot], series: [{ name, values: [of each snapshot] }, ...] (at most 8),
//         at: the index of the snapshot to mark, low, high: the range, digits: of the key,
//         level: { value, name } or null: a horizontal line, words: for screen readers }
export function renderSeries(element, data) {
  const { picture, key } = stateOf("series", element, buildSeries);
  const width = element.clientWidth || 320;
  const height = 180;
  const bottom = height - MARGIN.bottom;
  const most = Math.max(1, data.steps.length - 1);
  const x = (place) => MARGIN.left + ((width - MARGIN.left - MARGIN.right) * place) / most;
  const y = (value) => bottom - ((bottom - MARGIN.top) * (value - data.low)) / (data.high - data.low);
  const across = { x1: MARGIN.left, x2: width - MARGIN.right };
  const marks = [];
  for (const value of niceTicks(data.low, data.high, 4)) {
    const place = { class: "curve-tick is-loss", x: MARGIN.left - 8, y: y(value) + 4 };
    marks.push(makeSvg("line", { class: "curve-grid", ...across, y1: y(value), y2: y(value) }));
    marks.push(makeSvg("text", place, shortNumber(value)));
  }
  for (const index of niceTicks(0, most, width > 500 ? 6 : 3).map(Math.round)) {
    const label = shortNumber(data.steps[index] ?? data.steps[0]);
    marks.push(makeSvg("text", { class: "curve-tick is-x", x: x(index), y: bottom + 16 }, label));
  }
  if (data.level) {
    const at = y(data.level.value);
    marks.push(makeSvg("line", { class: "series-level", ...across, y1: at, y2: at }));
  }
  const now = { class: "series-now", x1: x(data.at), x2: x(data.at), y1: MARGIN.top, y2: bottom };
  marks.push(makeSvg("line", now));
  data.series.forEach(({ values }, number) => {
    const places = values.map((value, index) => `${x(index).toFixed(1)} ${y(value).toFixed(1)}`);
    const kind = `run-${number + 1}`;
    marks.push(makeSvg("path", { class: `curve curve-${kind}`, d: `M${places.join("L")}` }));
    const point = { class: `series-point series-${kind}`, cx: x(data.at), cy: y(values[data.at]), r: 4 };
    marks.push(makeSvg("circle", point));
  });
  setSize(picture, width, height);
  setAttribute(picture, "aria-label", data.words);
  picture.replaceChildren(...marks);
  const names = data.series.map(({ name, values }, number) => {
    const text = `${name} ${values[data.at].toFixed(data.digits)}`;
    return make("span", { class: `key key-run-${number + 1}` }, text);
  });
  if (data.level) names.push(make("span", { class: "key key-level" }, data.level.name));
  key.replaceChildren(...names);
}

function buildSeries(box) {
  const picture = makeSvg("svg", { class: "curves", role: "img" });
  const key = make("div", { class: "curves-key" });
  box.append(key, picture);
  return { picture, key };
}
