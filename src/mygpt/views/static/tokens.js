// Text with each token's probability, or another number, as its background; hover and focus show
// the number.

import { make, moved, resizeChildren, setAttribute, setText, stateOf } from "./dom.js";
import { percent, tokenName, visibleText } from "./text.js";

// Draw the text into `element`, or update it.
// data: { tokens: [{ text, id, probability (null: none is known), note, kind }],
//         seenFrom: the number of first tokens that are outside the window (0) }
//   kind: "prompt", "written" or "chosen"; note: a remark for the line below;
//   untrained: whether it was predicted past the trained length;
//   shade: 0 to 1 in place of the probability.
// options: { label, legend: the words at both ends of the scale, or false,
//            waiting: the text to show while there are no tokens,
//            onSelect(index), selected: the index of the token that is marked }
export function renderTokens(element, data, options = {}) {
  const state = stateOf("tokens", element, (box) => buildTokens(box, options));
  state.tokens = data.tokens;
  state.seenFrom = data.seenFrom ?? 0;
  state.onSelect = options.onSelect;
  resizeChildren(state.text, data.tokens.length, () => make("span", { class: "token" }));
  state.at = Math.min(Math.max(0, state.at), Math.max(0, data.tokens.length - 1));
  const spans = state.text.children;
  data.tokens.forEach((token, place) => {
    fillToken(state, spans[place], token, place);
    setAttribute(spans[place], "aria-current", place === options.selected ? "true" : null);
  });
  setAttribute(state.text, "data-waiting", data.tokens.length ? null : (options.waiting ?? ""));
  showToken(state, state.shown);
}

function buildTokens(box, options) {
  const text = make("div", { class: "tokens-text", role: "group" });
  setAttribute(text, "aria-label", options.label ?? "Text, token by token");
  const readout = make("p", { class: "readout" });
  box.append(text, make("div", { class: "tokens-foot" }, readout, ...legendOf(options)));
  const state = { text, readout, tokens: [], at: 0, shown: null, shades: new WeakMap() };
  const placeOf = (event) => Array.prototype.indexOf.call(text.children, event.target);
  text.addEventListener("pointerover", (event) => showToken(state, placeOf(event)));
  text.addEventListener("pointerleave", () => showToken(state, null));
  text.addEventListener("focusin", (event) => showToken(state, placeOf(event)));
  text.addEventListener("focusout", () => showToken(state, null));
  text.addEventListener("click", (event) => selectToken(state, placeOf(event)));
  text.addEventListener("keydown", (event) => moveInTokens(state, event, placeOf(event)));
  return state;
}

function legendOf(options) {
  if (options.legend === false) return [];
  const [low, high] = options.legend ?? ["low probability", "high"];
  const ramp = make("span", { class: "tokens-ramp", "aria-hidden": "true" });
  return [make("p", { class: "legend" }, low, ramp, high)];
}

function fillToken(state, span, token, place) {
  const shown = token.text === "" ? "∅" : visibleText(token.text ?? `#${token.id}`, true);
  setText(span, token.text && token.text.includes("\n") ? `${shown}\n` : shown);
  const given = token.shade ?? token.probability;
  const known = given !== null && given !== undefined;
  const shade = known ? given.toFixed(4) : "0";
  if (state.shades.get(span) !== shade) {
    span.style.setProperty("--p", shade);
    state.shades.set(span, shade);
  }
  setAttribute(span, "data-probability", token.probability?.toPrecision(9));
  span.classList.toggle("is-known", known);
  span.classList.toggle("is-prompt", token.kind === "prompt");
  span.classList.toggle("is-chosen", token.kind === "chosen");
  span.classList.toggle("is-forgotten", place < state.seenFrom);
  span.classList.toggle("is-untrained", Boolean(token.untrained));
  setAttribute(span, "tabindex", place === state.at ? 0 : -1);
}

function showToken(state, place) {
  const token = place === null || place < 0 ? null : state.tokens[place];
  state.shown = token ? place : null;
  if (!token) {
    setText(state.readout, "");
    return;
  }
  const words = [`‘${tokenName(token.text, token.id)}’`];
  if (token.probability !== null && token.probability !== undefined) {
    words.push(percent(token.probability));
  }
  if (token.note) words.push(token.note);
  if (place < state.seenFrom) words.push("outside the window");
  setText(state.readout, words.join(" · "));
}

function selectToken(state, place) {
  if (place >= 0 && state.onSelect) state.onSelect(place);
}

function moveInTokens(state, event, place) {
  if (event.key === "Enter") selectToken(state, place);
  const to = moved(event.key, place, state.tokens.length);
  if (to === null || place < 0) return;
  event.preventDefault();
  setAttribute(state.text.children[state.at], "tabindex", -1);
  state.at = to;
  setAttribute(state.text.children[to], "tabindex", 0);
  state.text.children[to].focus();
}
