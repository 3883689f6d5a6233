// What the offline pages share: their data, their sections, and views that follow the window's
// width.

import { make } from "../static/dom.js";
import { tokenName } from "../static/text.js";

const redraws = [];

// The data that stands in the page.
export function pageData() {
  return JSON.parse(document.getElementById("data").textContent);
}

// Name the page; `lines` go below the name.
export function beginPage(kind, name, lines) {
  document.title = `${name} · mygpt ${kind}`;
  const head = make("header", { class: "page-head" }, make("h1", {}, name));
  for (const line of lines) head.append(make("p", { class: "page-line" }, line));
  pageBody().append(head);
  return head;
}

// A section with a heading and words of introduction; returns the box that its views fill.
export function addSection(id, heading, words = "") {
  const box = make("div", { class: "section-body" });
  const section = make("section", { id, class: "page-section" }, make("h2", {}, heading));
  if (words) section.append(make("p", { class: "section-words" }, words));
  section.append(box);
  pageBody().append(section);
  return box;
}

// A box of its own inside a section, with a smaller heading where one is given.
export function addBox(parent, heading = "") {
  if (heading) parent.append(make("h3", {}, heading));
  const box = make("div", { class: "page-view" });
  parent.append(box);
  return box;
}

// Draw now, and again whenever the width changes.
export function keepDrawn(draw) {
  draw();
  redraws.push(draw);
  if (redraws.length === 1) {
    let width = document.documentElement.clientWidth;
    window.addEventListener("resize", () => {
      if (document.documentElement.clientWidth === width) return;
      width = document.documentElement.clientWidth;
      for (const redraw of redraws) redraw();
    });
  }
}

// Names and values as a list of two columns.
export function factList(facts) {
  const list = make("dl", { class: "facts" });
  for (const [name, value] of facts) {
    list.append(make("dt", {}, name), make("dd", {}, value));
  }
  return list;
}

// A command to copy, with a button where the browser lets us.
export function commandBox(words, command) {
  const code = make("code", { class: "command-text", tabindex: 0 }, command);
  const box = make("div", { class: "command-box" }, make("p", { class: "command-words" }, words));
  const row = make("div", { class: "command-row" }, code);
  if (navigator.clipboard) {
    const button = make("button", { type: "button", class: "command-copy" }, "Copy");
    button.addEventListener("click", async () => {
      const done = navigator.clipboard.writeText(command);
      button.textContent = await done.then(
        () => "Copied",
        () => "Not allowed here",
      );
    });
    row.append(button);
  }
  box.append(row);
  return box;
}

// What renderTokens takes, of a page's tokens; `told` says whether each is the prompt's.
export function tokenData(tokens, seenFrom, told = true) {
  const origin = (token) => (token.written ? "written by the model" : "from the prompt");
  return {
    seenFrom,
    tokens: tokens.map((token) => ({
      id: token.id,
      text: token.text,
      probability: token.before,
      kind: told && !token.written ? "prompt" : "written",
      note: told ? `${rankOf(token)}, ${origin(token)}` : rankOf(token),
    })),
  };
}

// What renderBars takes, of a prediction [[id, text, before, after], ...] and the token that came.
export function predictionData(prediction, came = null) {
  const tokens = prediction.likeliest.map(([id, text, before, after]) => ({
    id,
    text,
    before,
    after,
  }));
  let count = prediction.others;
  if (came && !tokens.some((token) => token.id === came.id)) {
    tokens.push({ id: came.id, text: came.text, before: came.before, after: came.after });
    count -= 1;
  }
  const left = (side) => Math.max(0, 1 - tokens.reduce((sum, token) => sum + token[side], 0));
  // What is left of rounded numbers is nothing.
  const rest = (side) => (left(side) < 1e-4 ? 0 : left(side));
  return { tokens, others: { count, before: rest("before"), after: rest("after") } };
}

// What renderAttention takes: the thousandths of each row, spread over [layer][head][T][T].
export function attentionData(attention, tokens) {
  const { start, size, thousandths } = attention;
  const shown = tokens.slice(start, start + size);
  const weights = thousandths.map((heads) =>
    heads.map((flat) =>
      Array.from({ length: size }, (_, row) => {
        const first = (row * (row + 1)) / 2;
        return Array.from({ length: size }, (__, column) =>
          column <= row ? flat[first + column] / 1000 : 0,
        );
      }),
    ),
  );
  return { tokens: shown.map(({ id, text }) => ({ id, text })), weights };
}

// The layer and head to show first: whose last token leans most on one that is farther back than
// the one before it, as many heads do nothing but look one back.
export function farthestHead({ weights }) {
  let found = { layer: 0, head: 0 };
  let most = -1;
  weights.forEach((heads, layer) =>
    heads.forEach((rows, head) => {
      const last = rows[rows.length - 1];
      const largest = Math.max(0, ...last.slice(0, -2));
      if (largest > most) [found, most] = [{ layer, head }, largest];
    }),
  );
  return found;
}

// A token in a sentence.
export function quoted(token) {
  return `‘${tokenName(token.text, token.id)}’`;
}

function rankOf(token) {
  if (token.prediction === null) return "nothing predicted it";
  const { likeliest } = token.prediction;
  const place = likeliest.findIndex(([id]) => id === token.id);
  if (place < 0) return `not among the ${likeliest.length} likeliest`;
  return place === 0 ? "the likeliest" : `number ${place + 1} of the likeliest`;
}

function pageBody() {
  return document.getElementById("page");
}
