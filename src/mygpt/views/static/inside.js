// The views of the panel "Inside": logit lens, contributions to a logit, heads as switches, and
// what changes with the parts that are pressed.
// Letters: N blocks, H heads, S the last tokens.

import { cellPaths } from "./attention.js";
import { renderBars } from "./bars.js";
import { make, makeSvg, moved, resizeChildren, setAttribute, setText, stateOf } from "./dom.js";
import { counted, percent, tokenName } from "./text.js";
import { renderTokens } from "./tokens.js";

const MOST_CONTRIBUTIONS = 12;
const UNCHANGED = "The most probable continuation, unchanged:";
const NAMED = 0.3; // relative score of a head that has a name: several times that of equal attention
const KINDS = new Map([
  ["", "head"],
  ["mlp", "MLP"],
  ["attention_bias", "attention bias"],
  ["position_embedding", "position embedding"],
  ["norm_bias", "final norm's bias"],
]);

// A part's name in a sentence: "1.3" is "head 1.3", "mlp2" is "MLP 2".
export function partName(part) {
  const [, kind, number] = /^(\D*)([\d.]*)$/.exec(part) ?? ["", part, ""];
  return `${KINDS.get(kind) ?? kind} ${number}`.trim();
}

// "head 1.3", "head 1.3 and MLP 2".
export function partNames(parts) {
  const names = parts.map(partName);
  const last = names.pop();
  return names.length ? `${names.join(", ")} and ${last}` : last;
}

// The logit lens as a table.
// data: { lens: [{ name, top: [[id, text, probability]], probability, rank }],
//         token: { id, text }, whose probability and rank they are }
export function renderLens(element, { lens, token }) {
  const state = stateOf("lens", element, buildLens);
  setText(state.token, `‘${tokenName(token.text, token.id)}’`);
  resizeChildren(state.rows, lens.length, buildLensRow);
  lens.forEach((row, n) => fillLensRow(state.rows.children[n], row, token));
}

function buildLens(box) {
  const token = make("th", { scope: "col" });
  const rows = make("tbody");
  const heads = ["after", "the likeliest next tokens"].map((text) => headCell(text));
  const head = make("thead", {}, make("tr", {}, ...heads, token, headCell("rank")));
  const caption = make("caption", { class: "visually-hidden" }, "Logit lens");
  box.append(make("table", { class: "lens" }, caption, head, rows));
  return { token, rows };
}

function headCell(text) {
  return make("th", { scope: "col" }, text);
}

function buildLensRow() {
  const cells = [0, 1, 2].map(() => make("td"));
  return make("tr", {}, make("th", { scope: "row" }), ...cells);
}

function fillLensRow(row, { name, top, probability, rank }, token) {
  const [title, likeliest, own, place] = row.children;
  setText(title, partName(name));
  setText(own, percent(probability));
  setText(place, String(rank));
  resizeChildren(likeliest, top.length, () =>
    make("span", { class: "lens-token" }, make("span", { class: "lens-name" }), " ", make("span")),
  );
  top.forEach(([id, text, share], n) => {
    const chip = likeliest.children[n];
    setText(chip.children[0], tokenName(text, id));
    setText(chip.children[1], percent(share));
    chip.style.setProperty("--p", share.toFixed(4));
    chip.classList.toggle("is-token", id === token.id);
  });
}

// Contributions to a logit as bars to the left (negative) and to the right; the smallest ones
// together in one row. data: { contributions: [[name, value]] or null, logit, total }
export function renderContributions(element, { contributions, logit, total }) {
  const state = stateOf("contributions", element, buildContributions);
  state.list.hidden = !contributions;
  if (!contributions) {
    setText(state.sum, "A block that is replaced is no sum of parts: there are no contributions.");
    return;
  }
  const sorted = [...contributions].sort(([, a], [, b]) => Math.abs(b) - Math.abs(a));
  const largest = sorted.slice(0, MOST_CONTRIBUTIONS).sort(([, a], [, b]) => b - a);
  const rows = largest.map(([name, value]) => [partName(name), value]);
  const others = sorted.slice(MOST_CONTRIBUTIONS);
  const sum = others.reduce((part, [, value]) => part + value, 0);
  if (others.length) rows.push([counted(others.length, "other"), sum]);
  const scale = Math.max(...rows.map(([, value]) => Math.abs(value))) || 1;
  resizeChildren(state.list, rows.length, buildContribution);
  rows.forEach(([name, value], n) => {
    const [title, picture, number] = state.list.children[n].children;
    setText(title, name);
    setText(number, signed(value, 3));
    const bar = picture.lastElementChild;
    setAttribute(bar, "x", ((50 * Math.min(0, value)) / scale).toFixed(2));
    setAttribute(bar, "width", ((50 * Math.abs(value)) / scale).toFixed(2));
    bar.classList.toggle("is-negative", value < 0);
  });
  setText(state.sum, `Together ${signed(total, 3)}; the model's logit is ${signed(logit, 3)}.`);
}

function buildContributions(box) {
  const list = make("div", { class: "contributions", role: "list" });
  setAttribute(list, "aria-label", "Contributions, the largest first");
  const sum = make("p", { class: "legend contributions-sum" });
  box.append(list, sum);
  return { list, sum };
}

function buildContribution() {
  const zero = makeSvg("line", { class: "contribution-zero", x1: 0, x2: 0, y1: 0, y2: 20 });
  const bar = makeSvg("rect", { class: "contribution-bar", y: 3, height: 14 });
  const box = { class: "contribution-picture", viewBox: "-50 0 100 20" };
  const hidden = { "aria-hidden": "true", preserveAspectRatio: "none" };
  const picture = makeSvg("svg", { ...box, ...hidden }, zero, bar);
  const name = make("span", { class: "contribution-name" });
  const number = make("span", { class: "contribution-number" });
  return make("div", { class: "contribution", role: "listitem" }, name, picture, number);
}

// A number with its sign, as in "+1.25".
function signed(value, digits) {
  const text = Math.abs(value).toFixed(digits);
  return Number(text) === 0 ? text : `${value < 0 ? "−" : "+"}${text}`;
}

// All parts as buttons that stay pressed: heads with their attention, then attention, MLP and both
// of each block. Arrow keys move between them.
// data: { attention: [N][H][S][S], names: [N][H] of [kind, relative score], or null,
//         pressed: a set of parts, verb: what a button does, onToggle(part) }
export function renderHeads(element, { attention, names, pressed, verb, onToggle }) {
  const state = stateOf("heads", element, (box) => buildHeads(box, attention));
  Object.assign(state, { pressed, onToggle });
  for (const [part, button] of state.buttons) {
    setAttribute(button, "aria-pressed", String(pressed.has(part)));
    setText(button.querySelector(".visually-hidden"), `${verb} `);
  }
  attention.forEach((heads, n) =>
    heads.forEach((weights, h) => {
      const button = state.buttons.get(`${n + 1}.${h + 1}`);
      const [picture, , , kind] = button.children;
      setAttribute(picture, "viewBox", `0 0 ${weights.length} ${weights.length}`);
      picture.replaceChildren(...cellPaths(weights));
      const [name, score] = names?.[n][h] ?? ["", 0];
      setText(kind, name && ` ${name} ${score.toFixed(2)}`);
      kind.classList.toggle("is-name", score >= NAMED);
    }),
  );
}

function buildHeads(box, attention) {
  const buttons = new Map();
  attention.forEach((heads, n) => {
    const ofHeads = heads.map((_, h) => buildPart(`${n + 1}.${h + 1}`, buttons, true));
    const kinds = ["attention", "mlp", "block"];
    const others = kinds.map((kind) => buildPart(`${kind}${n + 1}`, buttons));
    const row = make("div", { class: "parts-heads" }, ...ofHeads);
    const group = { class: "parts", role: "group", "aria-label": `Block ${n + 1}` };
    box.append(make("div", group, row, make("div", { class: "parts-others" }, ...others)));
  });
  const state = { buttons };
  const all = [...buttons.values()];
  setAttribute(all[0], "tabindex", 0);
  box.addEventListener("keydown", (event) => moveInParts(all, event));
  box.addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (!button) return;
    focusPart(all, all.indexOf(button));
    const part = button.getAttribute("data-part");
    state.onToggle(part);
    setAttribute(button, "aria-pressed", String(state.pressed.has(part)));
  });
  return state;
}

function buildPart(part, buttons, isHead = false) {
  const name = partName(part);
  const hidden = make("span", { class: "visually-hidden" });
  const children = [hidden, make("span", { class: "part-name" }, name)];
  if (isHead) {
    const picture = makeSvg("svg", { class: "part-picture", "aria-hidden": "true" });
    children.unshift(picture);
    children.push(make("span", { class: "part-kind" }));
  }
  const attributes = { type: "button", class: "part", "data-part": part, tabindex: -1 };
  const button = make("button", attributes, ...children);
  buttons.set(part, button);
  return button;
}

function moveInParts(all, event) {
  const to = moved(event.key, all.indexOf(event.target), all.length);
  if (to === null) return;
  event.preventDefault();
  focusPart(all, to);
}

function focusPart(all, place) {
  all.forEach((button, n) => setAttribute(button, "tabindex", n === place ? 0 : -1));
  all[place].focus();
}

// The next token, the loss and the continuation of the model, and of the changed one.
// data: { loss, continuation: [{ id, text }] or null, read: how many tokens were read,
//         change: null or { parts, next: [[id, text, before, after]], others: [count, before,
//         after], loss, continuation (if there is one) }, how: the change in words }
export function renderChange(element, { loss, continuation, read, change, how }) {
  const state = stateOf("change", element, buildChange);
  state.bars.hidden = !change;
  state.unchanged.hidden = !continuation;
  state.changed.hidden = !change?.continuation;
  setText(state.loss, lossWords(loss, read, change, how));
  if (continuation) showContinuation(state.unchanged, UNCHANGED, continuation);
  if (!change) return;
  if (change.continuation) showContinuation(state.changed, `And ${how}:`, change.continuation);
  const [count, before, after] = change.others;
  const tokens = change.next.map(([id, text, p, q]) => ({ id, text, before: p, after: q }));
  const options = { beforeName: "unchanged", afterName: "changed" };
  const label = "The next token of the unchanged and the changed model";
  renderBars(state.bars, { tokens, others: { count, before, after } }, { ...options, label });
}

function buildChange(box) {
  const parts = { loss: make("p", { class: "change-loss" }), bars: make("div", { class: "bars" }) };
  for (const name of ["unchanged", "changed"]) parts[name] = make("div", { class: "change-text" });
  box.append(parts.loss, parts.bars, parts.unchanged, parts.changed);
  return parts;
}

function lossWords(loss, read, change, how) {
  if (loss === null) return "One token has no loss: there is no token before it.";
  const unit = `nats per token, over ${counted(read - 1, "token")}`;
  const words = `Loss on this passage: ${loss.toFixed(3)}`;
  if (!change) return `${words} ${unit}.`;
  const difference = signed(change.loss - loss, 3);
  return `${words} unchanged, ${change.loss.toFixed(3)} ${how} (${difference} ${unit}).`;
}

function showContinuation(box, name, tokens) {
  const state = stateOf("continuation", box, () => {
    const title = make("p", { class: "field-name" });
    const text = make("div", { class: "tokens" });
    box.append(title, text);
    return { title, text };
  });
  setText(state.title, name);
  const shown = tokens.map(({ id, text }) => ({ id, text, probability: null }));
  renderTokens(state.text, { tokens: shown }, { label: "Continuation", legend: false });
}
