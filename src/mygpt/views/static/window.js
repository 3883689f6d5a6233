// The context window on the text: the tokens that the model reads, and those outside.

import { make, makeSvg, setAttribute, setText, stateOf } from "./dom.js";
import { counted, grouped } from "./text.js";

// Draw the window into `element`, or update it.
// data: { length: tokens of the text, start: the number of tokens before the window,
//         window: its length in tokens, trained: the longest window in training, or null,
//         outside: what is before the window in words, if more is than the first `start` tokens }
export function renderWindow(element, data) {
  const state = stateOf("window", element, buildWindow);
  const seen = data.length - data.start;
  const total = Math.max(data.length, data.start + data.window, 1);
  const place = (count) => (1000 * count) / total;
  setSpan(state.forgotten, 0, place(data.start));
  setSpan(state.seen, place(data.start), place(seen));
  setSpan(state.frame, place(data.start), place(data.window));
  const trained = isShorter(data) ? data.trained : data.window;
  setSpan(state.untrained, place(data.start + trained), place(data.window - trained));
  for (const x of ["x1", "x2"]) {
    setAttribute(state.trained, x, place(data.start + trained).toFixed(2));
  }
  setAttribute(state.trained, "visibility", isShorter(data) ? "visible" : "hidden");
  setText(state.words, windowWords(data, seen));
}

// The window as text, for screen readers.
export function windowWords(data, seen) {
  const filled = `The model reads ${seen === 1 ? "1 token" : `the last ${grouped(seen)} tokens`}`;
  const places = `its context window has ${counted(data.window, "token")}`;
  const read = data.length === 1 ? "1 token" : `all ${grouped(data.length)} tokens`;
  const all = `The model reads ${read}; ${places}.`;
  const outside = data.outside ?? (data.start ? `the first ${grouped(data.start)}` : "");
  const some = `${filled}; ${places}. Outside: ${outside}.`;
  return (outside ? some : all) + trainedWords(data, seen);
}

// What the trained length means for this text; empty if it is the window, or not known.
function trainedWords(data, seen) {
  if (!isShorter(data)) return "";
  const words = ` In training it read at most ${grouped(data.trained)} (the line in the strip)`;
  if (seen <= data.trained) return `${words}.`;
  return `${words}: the last ${counted(seen - data.trained, "position")} are untrained, and the ` +
    "predictions unreliable.";
}

function isShorter({ trained, window }) {
  return Boolean(trained) && trained < window;
}

function buildWindow(box) {
  const bar = { y: 8, height: 8 };
  const forgotten = makeSvg("rect", { class: "window-forgotten", ...bar });
  const seen = makeSvg("rect", { class: "window-seen", ...bar });
  const untrained = makeSvg("rect", { class: "window-untrained", ...bar });
  const frame = makeSvg("rect", { class: "window-frame", y: 2, height: 20 });
  const trained = makeSvg("line", { class: "window-trained", y1: 0, y2: 24 });
  const picture = makeSvg(
    "svg",
    { class: "window-picture", viewBox: "0 0 1000 24", preserveAspectRatio: "none" },
    forgotten,
    seen,
    untrained,
    frame,
    trained,
  );
  setAttribute(picture, "aria-hidden", "true");
  const words = make("p", { class: "window-words" });
  box.append(picture, words);
  return { forgotten, seen, untrained, frame, trained, words };
}

function setSpan(rect, x, width) {
  setAttribute(rect, "x", x.toFixed(2));
  setAttribute(rect, "width", Math.max(0, width).toFixed(2));
}
