// Shared parts of the offline pages: their data, their sections, and views that adapt to the
// browser window's width.

import { make, makeSvg } from "../static/dom.js";
import { tokenName } from "../static/text.js";

const LEAST = 1e-9; // the probability of tokens whose numbers were rounded to 0

const redraws = [];
const parts = new Map(); // by function: where a part is shown, its values as text, its update
let place = null; // the part to which sections are added; null for the page

// The data in the page; null if it has none.
export function pageData() {
  return JSON.parse(document.getElementById("data")?.textContent ?? "null");
}

// Show a part of the page with `show(data)`, which adds sections and may return a function that
// updates them. Called again with other data, nothing happens unless one of `fields` has changed:
// then the part is updated, or replaced if it cannot be.
export function showPart(show, data, fields) {
  if (!parts.has(show)) {
    const box = make("div");
    document.getElementById("page").append(box);
    parts.set(show, { box, values: null, update: null });
  }
  const part = parts.get(show);
  const values = JSON.stringify(fields.map((field) => data[field]));
  if (part.values === values) return;
  part.values = values;
  if (part.update) {
    part.update(data);
    return;
  }
  part.box.replaceChildren();
  place = part.box;
  part.update = show(data) ?? null;
  place = null;
}

// Set the page's title; `lines` are shown below it.
export function beginPage(kind, name, lines) {
  document.title = `${name} · mygpt ${kind}`;
  const head = make("header", { class: "page-head" }, make("h1", {}, name));
  for (const line of lines) head.append(make("p", { class: "page-line" }, line));
  pageBody().append(head);
  return head;
}

// Add a section with a heading and an introduction; returns the box for its views.
export function addSection(id, heading, words = "") {
  const box = make("div", { class: "section-body" });
  const section = make("section", { id, class: "page-section" }, make("h2", {}, heading));
  if (words) section.append(make("p", { class: "section-words" }, words));
  section.append(box);
  pageBody().append(section);
  return box;
}

// Add a box inside a section, with an optional smaller heading.
export function addBox(parent, heading = "") {
  if (heading) parent.append(make("h3", {}, heading));
  const box = make("div", { class: "page-view" });
  parent.append(box);
  return box;
}

// Add a section with a list of notes, if there are any.
export function addNotes(notes) {
  if (!notes.length) return;
  const items = notes.map((note) => make("li", {}, note));
  addSection("notes", "Notes").append(make("ul", { class: "notes" }, ...items));
}

// The words with a capital letter and a full stop.
export function sentence(words) {
  const text = words.charAt(0).toUpperCase() + words.slice(1);
  return /[.!?]$/.test(text) ? text : `${text}.`;
}

// Call `draw` now and whenever the width changes.
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

// A table with the names of its columns, of which an empty one has no name, and rows.
export function tableOf(kind, names, rows) {
  const heads = names.map((name) => (name ? make("th", { scope: "col" }, name) : make("td")));
  const head = make("thead", {}, make("tr", {}, ...heads));
  return make("table", { class: kind }, head, make("tbody", {}, ...rows));
}

// A cell with a bar that fills this share of it.
export function barCell(share) {
  const bar = makeSvg("svg", { viewBox: "0 0 100 10", preserveAspectRatio: "none" });
  bar.append(makeSvg("rect", { width: (100 * share).toFixed(2), height: 10 }));
  bar.setAttribute("aria-hidden", "true");
  return make("td", { class: "baseline-bar" }, bar);
}

// A command, with a button to copy it if the browser supports that.
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
        () => "Not allowed",
      );
    });
    row.append(button);
  }
  box.append(row);
  return box;
}

// The data of renderTokens for a page's tokens; with `origins`, prompt and output are marked.
export function tokenData(tokens, seenFrom, origins = true) {
  const origin = (token) => (token.written ? "generated by the model" : "from the prompt");
  return {
    seenFrom,
    tokens: tokens.map((token) => ({
      id: token.id,
      text: token.text,
      probability: token.before,
      kind: origins && !token.written ? "prompt" : "written",
      note: origins ? `${rankOf(token)}, ${origin(token)}` : rankOf(token),
    })),
  };
}

// The data of renderBars for a prediction [[id, text, before, after], ...] and the actual token.
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
  // What the listed tokens leave. Their rounded numbers may sum to 1 although tokens are left: the
  // others are out only if the filters keep none of them.
  const rest = (side) => {
    const sum = tokens.reduce((total, token) => total + token[side], 0);
    return Math.max(LEAST, 1 - sum);
  };
  const kept = prediction.kept - tokens.filter((token) => token.after > 0).length;
  return { tokens, others: { count, before: rest("before"), after: kept > 0 ? rest("after") : 0 } };
}

// The data of renderAttention: the thousandths of each row as weights [layer][head][T][T].
export function attentionData(attention, tokens) {
  const { start, size, thousandths } = attention;
  const shown = tokens.slice(start, start + size);
  const weights = thousandths.map((heads) => heads.map((flat) => triangle(flat, size, 1000)));
  return { tokens: shown.map(({ id, text }) => ({ id, text })), weights };
}

// The square matrix whose lower triangle `flat` is, row by row, in parts of 1 such as 1000.
export function triangle(flat, size, parts) {
  return Array.from({ length: size }, (_, row) => {
    const first = (row * (row + 1)) / 2;
    return Array.from({ length: size }, (__, column) =>
      column <= row ? flat[first + column] / parts : 0,
    );
  });
}

// The layer and head to show first: the one whose last token has the largest weight on a token
// before the previous one, since many heads attend only to the previous token.
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
  if (token.prediction === null) return "not predicted";
  const { likeliest } = token.prediction;
  const place = likeliest.findIndex(([id]) => id === token.id);
  if (place < 0) return `not among the ${likeliest.length} most probable`;
  return `rank ${place + 1}`;
}

function pageBody() {
  return place ?? document.getElementById("page");
}
