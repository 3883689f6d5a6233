// Samples of a model, with passages that were copied from the corpus underlined.

import { make, resizeChildren, setText, stateOf } from "./dom.js";
import { grouped, percent, visibleText } from "./text.js";

// Draw the samples into `element`, or update them.
// data: [{ title (or step), text, prompt: its beginning, copied: [[start, end], ...] }]
//   Offsets count characters (code points) of `text`, as Python does.
// options: { copiedChars: the minimum length of a copied passage }
export function renderSamples(element, data, options = {}) {
  const state = stateOf("samples", element, buildSamples);
  const any = data.some((sample) => (sample.copied ?? []).length > 0);
  const length = options.copiedChars ? `, ${options.copiedChars} characters or more` : "";
  setText(state.legend, any ? `Underlined: copied word for word from the corpus${length}.` : "");
  resizeChildren(state.list, data.length, () => buildSample(state));
  data.forEach((sample, place) => fillSample(state.parts.get(state.list.children[place]), sample));
}

// The intervals [[start, end], ...] merged, in order, and clipped to `length`.
export function mergedSpans(spans, length) {
  const merged = [];
  const sorted = [...spans].sort((a, b) => a[0] - b[0]);
  for (const [start, end] of sorted) {
    const first = Math.max(0, start);
    const last = Math.min(length, end);
    const before = merged[merged.length - 1];
    if (first >= last) continue;
    if (before && first <= before[1]) before[1] = Math.max(before[1], last);
    else merged.push([first, last]);
  }
  return merged;
}

function buildSamples(box) {
  const list = make("div", { class: "samples-list" });
  const legend = make("p", { class: "legend samples-legend" });
  box.append(list, legend);
  return { list, legend, parts: new WeakMap() };
}

function buildSample(state) {
  const title = make("h3", { class: "sample-title" });
  const share = make("span", { class: "sample-share" });
  const text = make("p", { class: "sample-text" });
  const head = make("div", { class: "sample-head" }, title, share);
  const sample = make("article", { class: "sample" }, head, text);
  state.parts.set(sample, { title, share, text });
  return sample;
}

function fillSample(parts, sample) {
  const chars = Array.from(sample.text);
  const spans = mergedSpans(sample.copied ?? [], chars.length);
  const copied = spans.reduce((sum, [start, end]) => sum + end - start, 0);
  const title = sample.title ?? (sample.step === undefined ? "" : `step ${grouped(sample.step)}`);
  setText(parts.title, title);
  setText(parts.share, copied ? `${percent(copied / chars.length)} copied` : "");
  const pieces = [];
  let at = 0;
  const plain = (end) => pieces.push(shownSample(chars.slice(at, end)));
  for (const [start, end] of spans) {
    plain(start);
    pieces.push(make("mark", { class: "copied" }, shownSample(chars.slice(start, end))));
    at = end;
  }
  plain(chars.length);
  if (sample.prompt) {
    const prompt = shownSample(Array.from(sample.prompt));
    pieces.unshift(make("span", { class: "sample-prompt" }, prompt));
  }
  parts.text.replaceChildren(...pieces);
}

// Line ends are kept, since samples are shown as running text.
function shownSample(chars) {
  return chars.map((char) => (char === "\n" ? char : visibleText(char, true))).join("");
}
