// The distribution of the next token as bars: an outline for the model's probability, a filled
// bar for the probability after the filters. A click or Enter chooses a token by hand.

import { make, makeSvg, moved, resizeChildren, setAttribute, setText, stateOf } from "./dom.js";
import { counted, percent, tokenName } from "./text.js";

// The probabilities that the full width of a bar may represent.
const BAR_SCALES = [1, 0.5, 0.25, 0.1, 0.05, 0.02, 0.01, 0.005, 0.002, 0.001];

// The data of renderBars, from distributions (V,) `before` and `after` the filters, the ids to
// show (most probable first) and the tokens' texts by id.
export function barData(before, after, shown, texts) {
  const tokens = shown.map((id) => ({
    id,
    text: texts[id],
    before: before[id],
    after: after[id],
  }));
  const count = before.length - shown.length;
  const others = { count, before: sumOfOthers(before, shown), after: sumOfOthers(after, shown) };
  return { tokens, others };
}

function sumOfOthers(probs, shown) {
  const others = probs.slice();
  for (const id of shown) others[id] = 0;
  return others.reduce((sum, prob) => sum + prob, 0);
}

// Draw the bars into `element`, or update them.
// data: { tokens: [{ id, text, before, after }], others: { count, before, after } or null }
// options: { onPick(id): bars become buttons; next: the id that is sampled next;
//            label: the list's name; beforeName, afterName: names of the two bars }
export function renderBars(element, data, options = {}) {
  const state = stateOf("bars", element, (box) => buildBars(box, options));
  state.onPick = options.onPick;
  const rows = [...data.tokens];
  if (data.others && data.others.count > 0) rows.push({ ...data.others, others: true });
  const scale = barScale(rows.filter((row) => !row.others));
  setText(state.scale, percent(scale).replace(".0%", "%"));
  resizeChildren(state.list, rows.length, () => buildBar(state));
  state.at = Math.min(state.at, Math.max(0, data.tokens.length - 1));
  const { next } = options;
  const isListed = data.tokens.some((token) => token.id === next);
  rows.forEach((row, place) => {
    fillBar(state, place, row, scale);
    const isNext = row.others ? next !== undefined && !isListed : row.id === next;
    state.list.children[place].classList.toggle("is-next", isNext);
  });
}

function buildBars(box, options) {
  const scale = make("span", { class: "bars-scale" });
  const before = options.beforeName ?? "the model";
  const after = options.afterName ?? "your settings";
  const head = make(
    "div",
    { class: "bars-head" },
    make("span", { class: "bars-full" }, "a full bar is ", scale),
    make("span", { class: "key key-before" }, before),
    make("span", { class: "key key-after" }, after),
  );
  const list = make("div", { class: "bars-list", role: options.onPick ? "group" : "list" });
  setAttribute(list, "aria-label", options.label ?? "The next token");
  box.append(head, list);
  const state = { list, scale, at: 0, parts: new WeakMap(), pickable: Boolean(options.onPick) };
  state.names = { before, after };
  list.addEventListener("keydown", (event) => moveInBars(state, event));
  list.addEventListener("click", (event) => pickBar(state, event.target.closest(".bar")));
  return state;
}

function buildBar(state) {
  const token = make("span", { class: "bar-token" });
  const after = makeSvg("rect", { class: "bar-after", x: 0, y: 3, height: 14 });
  const before = makeSvg("rect", { class: "bar-before", x: 0, y: 3, height: 14 });
  const picture = makeSvg(
    "svg",
    { class: "bar-picture", viewBox: "0 0 100 20", preserveAspectRatio: "none" },
    after,
    before,
  );
  setAttribute(picture, "aria-hidden", "true");
  const numberBefore = make("span", {});
  const numberAfter = make("span", {});
  const name = state.pickable ? "button" : "div";
  const attributes = state.pickable ? { type: "button" } : { role: "listitem" };
  const numbers = [
    make("span", { class: "bar-number-before" }, spoken(state.names.before), numberBefore),
    make("span", { class: "bar-number" }, spoken(state.names.after), numberAfter),
  ];
  const bar = make(name, { class: "bar", ...attributes }, token, picture, ...numbers);
  state.parts.set(bar, { token, before, after, numberBefore, numberAfter });
  return bar;
}

// Names a number for screen readers. It is a part of the row's text and not an aria-label, so that
// the accessible name contains the visible text.
function spoken(name) {
  return make("span", { class: "visually-hidden" }, `, ${name} `);
}

function fillBar(state, place, row, scale) {
  const bar = state.list.children[place];
  const parts = state.parts.get(bar);
  const name = row.others ? counted(row.count, "other") : tokenName(row.text, row.id);
  setText(parts.token, name);
  setText(parts.numberBefore, percent(row.before));
  setText(parts.numberAfter, row.after === 0 ? "out" : percent(row.after));
  for (const side of ["before", "after"]) {
    setAttribute(parts[side], "width", (100 * Math.min(1, row[side] / scale)).toFixed(3));
    setAttribute(bar, `data-${side}`, row[side].toPrecision(9));
  }
  setAttribute(bar, "data-id", row.others ? null : row.id);
  bar.classList.toggle("is-others", Boolean(row.others));
  bar.classList.toggle("is-out", row.after === 0);
  if (!state.pickable) return;
  setAttribute(bar, "disabled", Boolean(row.others));
  setAttribute(bar, "tabindex", place === state.at ? 0 : -1);
}

// The smallest scale in which every bar fits.
function barScale(rows) {
  const largest = rows.reduce((most, row) => Math.max(most, row.before, row.after), 0);
  return BAR_SCALES.findLast((scale) => scale >= largest * 0.999999) ?? 1;
}

function moveInBars(state, event) {
  const buttons = Array.from(state.list.querySelectorAll("button.bar:not([disabled])"));
  const to = moved(event.key, buttons.indexOf(event.target), buttons.length);
  if (to === null || !buttons.length) return;
  event.preventDefault();
  state.at = to;
  buttons.forEach((button, place) => setAttribute(button, "tabindex", place === to ? 0 : -1));
  buttons[to].focus();
}

function pickBar(state, bar) {
  if (!bar || !state.onPick || !bar.hasAttribute("data-id")) return;
  state.onPick(Number(bar.getAttribute("data-id")));
}
