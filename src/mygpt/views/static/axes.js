// Axes of charts: positions of ticks, their labels, and columns for labels that would overlap; and
// the size of a picture.

import { setAttribute } from "./dom.js";

// Set the size of an SVG picture in pixels, which are its units.
export function setSize(picture, width, height) {
  setAttribute(picture, "viewBox", `0 0 ${width} ${height}`);
  setAttribute(picture, "width", width);
  setAttribute(picture, "height", height);
}

// At most about `most` round numbers from `low` to `high`.
export function niceTicks(low, high, most) {
  const span = high - low;
  if (!(span > 0)) return [low];
  const rough = span / most;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 5, 10].find((factor) => factor * power >= rough);
  const first = Math.ceil(low / step - 1e-9);
  const last = Math.floor(high / step + 1e-9);
  return Array.from({ length: last - first + 1 }, (_, n) => (first + n) * step);
}

// A number with few digits: 1.5k, 2M, 0.25.
export function shortNumber(value) {
  const [divisor, sign] = value >= 1e6 ? [1e6, "M"] : value >= 1e4 ? [1e3, "k"] : [1, ""];
  return `${Number((value / divisor).toPrecision(4))}${sign}`;
}

// The column (0, 1, ...) of each label at its height, so that labels of one column are at least
// `space` apart.
export function labelColumns(heights, space) {
  const columns = [];
  return heights.map((height) => {
    const apart = (one) => Math.abs(one - height) >= space;
    const free = columns.findIndex((taken) => taken.every(apart));
    const at = free < 0 ? columns.push([]) - 1 : free;
    columns[at].push(height);
    return at;
  });
}
