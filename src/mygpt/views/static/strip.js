// Sampling as a picture: all kept tokens side by side from 0 to 1, each as wide as its
// probability, and the next random number as a marker on one of them.

import { make, makeSvg, resizeChildren, setAttribute, setText, stateOf } from "./dom.js";
import { tokenName } from "./text.js";

const STRIP_WIDTH = 1000;
const LEAST_NAMED = 0.035;
const LEAST_SHOWN = 0.0005;
const ORDER = "Here the tokens are in the vocabulary's order, above by probability.";

// Draw the strip into `element`, or update it.
// data: { after: probabilities (V,), texts: by id, id: the token drawn,
//         uniform: the number in [0, 1), or null for greedy }
export function renderStrip(element, data) {
  const state = stateOf("strip", element, buildStrip);
  const parts = stripParts(data.after);
  resizeChildren(state.parts, parts.length, () => make("span", { class: "strip-part" }));
  parts.forEach((part, n) => {
    const span = state.parts.children[n];
    span.style.setProperty("flex-grow", part.share.toFixed(5));
    const named = part.id !== null && part.share >= LEAST_NAMED;
    setText(span, named ? tokenName(data.texts[part.id], part.id) : "");
    span.classList.toggle("is-drawn", part.id === data.id);
    span.classList.toggle("is-crowd", part.id === null);
  });
  const drawn = data.uniform !== null;
  setAttribute(state.needle, "visibility", drawn ? "visible" : "hidden");
  const at = (STRIP_WIDTH * (data.uniform ?? 0)).toFixed(2);
  setAttribute(state.needle, "x1", at);
  setAttribute(state.needle, "x2", at);
  const name = `‘${tokenName(data.texts[data.id], data.id)}’`;
  setText(
    state.words,
    drawn
      ? `The next random number is ${data.uniform.toFixed(4)}; it selects ${name}. ${ORDER}`
      : `Greedy: the most probable token, ${name}, is taken.`,
  );
}

// Segments in the order of ids: one for each token that is wide enough to be visible, and one
// (id null) for each group of tokens between them.
function stripParts(after) {
  const parts = [];
  after.forEach((share, id) => {
    if (share === 0) return;
    const last = parts[parts.length - 1];
    if (share >= LEAST_SHOWN) parts.push({ id, share });
    else if (last && last.id === null) last.share += share;
    else parts.push({ id: null, share });
  });
  return parts;
}

function buildStrip(box) {
  const parts = make("div", { class: "strip-parts", "aria-hidden": "true" });
  const needle = makeSvg("line", { class: "strip-needle", y1: 0, y2: 40 });
  const over = makeSvg(
    "svg",
    { class: "strip-over", viewBox: `0 0 ${STRIP_WIDTH} 40`, preserveAspectRatio: "none" },
    needle,
  );
  setAttribute(over, "aria-hidden", "true");
  const words = make("p", { class: "strip-words" });
  box.append(make("div", { class: "strip" }, parts, over), words);
  return { parts, needle, words };
}
