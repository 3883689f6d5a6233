// The guided tour of chapter 15: its steps set the page's controls, the lines of the loop light up
// as they run, and a table shows how logits become probabilities.
// Letters: V vocabulary.

import { make, resizeChildren, setAttribute, setText } from "./dom.js";
import { GREEDY_BELOW, filterLogits } from "./sampling.js";
import { tokenName } from "./text.js";
import { tourSteps } from "./tour_steps.js";

const MOST_ROWS = 12; // tokens in the table; of larger vocabularies:
const LIKELIEST = 5; // and the next one
const MOST_POSITIONS = 16; // positions whose expected word is shown
const SLOW_MS = 350; // how long a line is lit in the step about the loop
const RUNNING_MS = 120; // and in a run

export class Tour {
  // `onStep(step)` sets the controls and begins a new text.
  constructor(element, model, { onStep }) {
    Object.assign(this, { element, model, onStep });
    this.steps = tourSteps(model);
    this.at = 0;
    this.build();
  }

  get step() {
    return this.steps[this.at];
  }

  // Show step number `at` and set the controls.
  async go(at) {
    this.at = Math.min(this.steps.length - 1, Math.max(0, at));
    const { section, title, words, cycle } = this.step;
    setText(this.title, `${section} ${title}`);
    resizeChildren(this.words, words.length, () => make("p"));
    words.forEach((sentence, n) => setText(this.words.children[n], sentence));
    this.names.forEach((button, n) =>
      setAttribute(button, "aria-current", n === this.at ? "step" : null),
    );
    setAttribute(this.back, "aria-disabled", String(this.at === 0));
    setAttribute(this.next, "aria-disabled", String(this.at === this.steps.length - 1));
    this.cycleBox.hidden = !cycle;
    await this.onStep(this.step);
  }

  // Light up a line of the loop, from 1; the promise is kept when the loop may go on.
  reach(line, running) {
    Array.from(this.lines.children).forEach((item, n) =>
      setAttribute(item, "aria-current", n === line - 1 ? "step" : null),
    );
    if (!this.step.slow || line === 3) return null; // the loop rests at line 3
    const ms = running ? RUNNING_MS : SLOW_MS;
    return new Promise((resolve) => setTimeout(resolve, ms));
  }

  // Show the numbers of the next token.
  // data: { story, settings, after: (V,) probabilities, next: the id drawn next, texts: by id }
  show(data) {
    this.showTable(data);
    if (this.step.cycle) this.showCycle(data.story.ids.slice(0, MOST_POSITIONS));
  }

  showTable({ story, settings, after, next, texts }) {
    const { logits, likeliest } = story.prediction;
    const argmax = settings.temperature < GREEDY_BELOW;
    const divided = argmax ? null : filterLogits(logits, settings, story.ids);
    const all = logits.length <= MOST_ROWS;
    const ids = all ? Array.from(logits.keys()) : likeliest.slice(0, LIKELIEST + 1);
    if (!ids.includes(next)) ids[LIKELIEST] = next;
    const penalty = settings.repetition_penalty === null ? "" : " after the penalty";
    setText(this.dividedName, `logit / ${settings.temperature}${penalty}`);
    setText(this.caption, all ? "The last position" : "The last position, in part");
    resizeChildren(this.rows, ids.length, buildRow);
    ids.forEach((id, n) => {
      const cells = [tokenName(texts[id], id), number(logits[id])];
      cells.push(argmax ? "argmax" : number(divided[id]), after[id].toFixed(3));
      const row = this.rows.children[n];
      cells.forEach((text, place) => setText(row.children[place], text));
      row.classList.toggle("is-next", id === next);
      row.classList.toggle("is-out", after[id] === 0);
    });
  }

  // The words of the text, and those that the cycle has at their positions.
  showCycle(ids) {
    const name = (id) => tokenName(this.model.tokens[id], id);
    resizeChildren(this.cycleRow, ids.length, buildPosition);
    ids.forEach((id, n) => {
      const wanted = (ids[0] + n) % this.model.vocab_size;
      const item = this.cycleRow.children[n];
      const texts = [`${n}`, name(id), id === wanted ? "OK" : `not ${name(wanted)}`];
      texts.forEach((text, place) => setText(item.children[place], text));
      item.classList.toggle("is-drift", id !== wanted);
    });
  }

  build() {
    this.title = make("h2", { id: "tour-title" });
    this.words = make("div", { class: "tour-words", "aria-live": "polite" });
    this.names = this.steps.map(({ name }, n) => {
      const button = make("button", { type: "button" }, name);
      button.addEventListener("click", () => this.go(n));
      return button;
    });
    const items = this.names.map((button) => make("li", {}, button));
    const nav = make("nav", { "aria-label": "Steps of the tour" });
    nav.append(make("ol", { class: "tour-names" }, ...items));
    this.back = make("button", { type: "button", id: "tour-back" }, "Previous step");
    this.next = make("button", { type: "button", id: "tour-next", class: "primary" }, "Next step");
    this.back.addEventListener("click", () => this.go(this.at - 1));
    this.next.addEventListener("click", () => this.go(this.at + 1));
    const actions = make("div", { class: "tour-actions" }, this.back, this.next);
    const head = make("div", { class: "tour-head" }, nav, actions);
    const text = make("div", {}, this.title, this.words);
    this.cycleBox = this.buildCycle();
    this.element.replaceChildren(head, text, this.buildLoop(), this.buildTable(), this.cycleBox);
    this.element.hidden = false;
  }

  // The loop of section 15.7, in four lines.
  buildLoop() {
    const lines = [
      ["Crop to the window", `ids_cond = ids[:, -${this.model.window}:]`],
      ["Forward pass", "logits, _ = model(ids_cond)"],
      ["Last position, to probabilities", "probs = softmax(logits[:, -1, :] / temperature)"],
      ["Draw and append", "ids = cat([ids, multinomial(probs)])"],
    ];
    const items = lines.map(([name, code]) =>
      make("li", {}, make("span", { class: "tour-line" }, name), make("code", {}, code)),
    );
    this.lines = make("ol", { class: "tour-loop", "aria-label": "The loop" }, ...items);
    return this.lines;
  }

  buildTable() {
    this.caption = make("caption");
    this.dividedName = make("th", { scope: "col" });
    const heads = [
      make("th", { scope: "col" }, "token"),
      make("th", { scope: "col" }, "logit"),
      this.dividedName,
      make("th", { scope: "col" }, "softmax"),
    ];
    this.rows = make("tbody");
    const head = make("thead", {}, make("tr", {}, ...heads));
    const table = make("table", { class: "tour-table" }, this.caption, head, this.rows);
    return make("div", { class: "tour-numbers" }, table);
  }

  buildCycle() {
    this.cycleRow = make("ol", { class: "tour-cycle", start: 0, "aria-label": "Positions" });
    const words = make("p", { class: "legend" }, "Position, word, and whether it is the cycle's:");
    return make("div", { class: "tour-positions" }, words, this.cycleRow);
  }
}

function buildRow() {
  const cells = [0, 1, 2].map(() => make("td"));
  return make("tr", {}, make("th", { scope: "row" }), ...cells);
}

function buildPosition() {
  return make("li", {}, make("span"), make("span"), make("span"));
}

// A logit as a number with two decimals.
function number(logit) {
  if (logit === -Infinity) return "−∞";
  return logit.toFixed(2).replace("-", "−");
}
