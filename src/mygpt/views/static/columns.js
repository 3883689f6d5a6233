// Several continuations side by side; the bars show the distribution of the chosen one.

import { make, resizeChildren, setAttribute, setText, stateOf } from "./dom.js";
import { counted, percent, tokenName } from "./text.js";
import { renderTokens } from "./tokens.js";
import { renderWindow } from "./window.js";

// Draw the continuations into `element`, or update them.
// options: { active: the chosen one's index, window: the model's window,
//            trained: its trained length or null, onChoose(index) }
export function renderColumns(element, stories, options) {
  const state = stateOf("columns", element, () => ({ parts: new WeakMap() }));
  state.onChoose = options.onChoose;
  resizeChildren(element, stories.length, (index) => buildColumn(state, index));
  element.classList.toggle("is-single", stories.length === 1);
  stories.forEach((story, index) => {
    const column = element.children[index];
    const parts = state.parts.get(column);
    const chosen = index === options.active;
    column.classList.toggle("is-chosen", chosen);
    setAttribute(parts.choose, "aria-pressed", String(chosen));
    setText(parts.count, story.ended ? "ended" : counted(story.written.length, "new token"));
    renderTokens(parts.text, storyTokens(story, options), {
      label: `Continuation ${index + 1}, token by token`,
      legend: false,
      waiting: "…",
    });
    renderWindow(parts.window, {
      length: story.length,
      start: Math.max(0, story.length - options.window),
      window: options.window,
      trained: options.trained,
    });
  });
}

function buildColumn(state, index) {
  const name = `Continuation ${index + 1}`;
  const choose = make("button", { type: "button", class: "column-name" }, name);
  choose.addEventListener("click", () => state.onChoose(index));
  const count = make("span", { class: "column-count" });
  const text = make("div", { class: "tokens" });
  const window = make("div", { class: "window" });
  const head = make("div", { class: "column-head" }, choose, count);
  const column = make("article", { class: "column" }, head, text, window);
  state.parts.set(column, { choose, count, text, window });
  return column;
}

function storyTokens(story, { window, trained }) {
  const prompt = story.prompt.map(({ id, text }) => ({
    id,
    text,
    probability: null,
    kind: "prompt",
    note: "prompt",
  }));
  const written = story.written.map((token) => ({
    id: token.id,
    text: token.text,
    probability: token.before,
    kind: token.byHand ? "chosen" : "written",
    note: writtenNote(token),
  }));
  const tokens = [...prompt, ...written];
  const past = trained && trained < window ? trained + 1 - prompt.length : written.length;
  for (const token of written.slice(Math.max(0, past))) {
    token.untrained = true;
    token.note += ", predicted past the trained length";
  }
  return { tokens, seenFrom: Math.max(0, story.length - window) };
}

function writtenNote(token) {
  const dropped = token.after === 0;
  const after = dropped ? "dropped by the filters" : `${percent(token.after)} after the filters`;
  return token.byHand ? `${after}, chosen by hand` : after;
}

// Which tokens the model reads where the prompt is empty; empty if there is no story.
export function startWords(story, model) {
  if (!story || !story.prompt.length) return "";
  const names = story.prompt.map(({ text, id }) => `‘${tokenName(text, id)}’`).join(" ");
  const isEnd = story.prompt.length === 1 && story.prompt[0].id === model.end_of_text;
  const role = isEnd ? ", the token between two texts" : "";
  return `The prompt is empty, so the model starts from ${names}${role}.`;
}
