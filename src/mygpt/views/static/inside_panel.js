// The playground's panel "Inside": which prediction is shown, and which parts are off, or are
// replaced by those of a second text.

import { AskingPanel } from "./asking_panel.js";
import { make, setAttribute, setText } from "./dom.js";
import { partNames, renderChange, renderContributions, renderHeads, renderLens } from "./inside.js";
import { tokenName } from "./text.js";
import { renderTokens } from "./tokens.js";

export class InsidePanel {
  // `details` is the panel's element, `box` that of its content, `words` that of messages;
  // `ask(question, signal)` returns the answer of POST /api/inside. With `precomputed`, there are
  // answers for one part switched off at a time, with the complete model's lens and contributions.
  constructor({ details, box, words, ask, precomputed = false }) {
    Object.assign(this, { text: "", tokens: [], position: null, token: null, pressed: new Set() });
    const draw = (answer, tokens) => this.draw(answer, tokens);
    this.panel = new AskingPanel({ details, words, ask, draw });
    Object.assign(this, { box, precomputed });
    this.build();
  }

  // The text is now these tokens, with these ids (T,).
  follow(ids, tokens) {
    const text = ids.join(" ");
    if (text !== this.text) Object.assign(this, { text, ids, position: null, token: null });
    this.tokens = tokens;
    this.ask();
  }

  ask(wait) {
    const { ids, position, token } = this;
    this.panel.follow({ ids, position, token, ...this.changes() }, this.tokens, wait);
  }

  // The fields of the request for the parts that are pressed.
  changes() {
    const { mode, other, at } = this.parts;
    const parts = [...this.pressed].sort();
    if (this.precomputed || mode.value === "ablate" || !parts.length) return { ablate: parts };
    const place = at.value === "all" ? null : (this.position ?? this.ids.length - 1);
    return { patch: parts, other: other.value, patch_position: place };
  }

  change(values) {
    Object.assign(this, values);
    this.ask(0);
  }

  toggle(part) {
    const { pressed } = this;
    const off = pressed.delete(part);
    if (this.precomputed) pressed.clear();
    if (!off) pressed.add(part);
    this.change({});
  }

  draw(answer, tokens) {
    const { start, position, token } = answer;
    const change = answer.ablation ?? answer.patch ?? null;
    const how = change ? changeWords(answer) : "";
    this.box.hidden = false;
    this.drawn = [answer, tokens];
    const read = tokens.slice(start).map(({ id, text }) => ({ id, text, probability: null }));
    renderTokens(this.parts.text, { tokens: read }, {
      label: "The tokens that are read; Enter chooses one",
      legend: false,
      onSelect: (n) => this.change({ position: start + n, token: null }),
      selected: position - start,
    });
    setText(this.parts.about, aboutWords(answer, tokens, this.precomputed ? "" : how));
    this.fillChoice(answer);
    renderLens(this.parts.lens, answer);
    const name = `‘${tokenName(token.text, token.id)}’`;
    setText(this.parts.logit, `The logit of ${name} is the sum of what each part adds to it.`);
    renderContributions(this.parts.contributions, answer);
    const onToggle = (part) => this.toggle(part);
    const { pressed } = this;
    const verb = this.parts.mode?.value === "patch" ? "Replace" : "Switch off";
    renderHeads(this.parts.heads, { ...answer, pressed, verb, onToggle });
    setAttribute(this.parts.none, "aria-disabled", String(!pressed.size));
    renderChange(this.parts.change, { ...answer, change, how, read: read.length });
  }

  // The tokens that can be chosen: the server's own choice, and the likeliest ones.
  fillChoice({ token, lens }) {
    const { choice } = this.parts;
    if (this.token === null) this.first = token;
    const likeliest = lens[lens.length - 1].top.map(([id, text]) => ({ id, text }));
    const all = new Map([this.first, ...likeliest, token].map((one) => [one.id, one.text]));
    const option = ([id, text]) => make("option", { value: id }, tokenName(text, id));
    choice.replaceChildren(...Array.from(all, option));
    choice.value = String(token.id);
  }

  build() {
    const choice = make("select", { class: "choice" });
    choice.addEventListener("change", () => this.change({ token: Number(choice.value) }));
    const none = make("button", { type: "button", id: "inside-none" }, "Release all");
    none.addEventListener("click", () => {
      this.pressed.clear();
      this.change({});
    });
    this.parts = { choice, none, about: make("p", { class: "legend" }), logit: lead("") };
    for (const name of ["text", "lens", "contributions", "heads", "change"]) {
      this.parts[name] = make("div");
    }
    setAttribute(this.parts.about, "aria-live", "polite");
    const { text, about, lens, logit, contributions, heads, change } = this.parts;
    const of = field("The probability and the logit of", choice);
    const modes = this.precomputed ? [] : this.buildModes();
    this.box.hidden = true; // until there is an answer
    this.box.append(
      section("Which prediction", PREDICTION, text, of, about),
      section("Logit lens", LENS, lens),
      make("section", {}, make("h3", {}, "Contributions"), logit, contributions),
      section("Heads, attention and MLPs", HEADS, ...modes, heads, none),
      section("What changes", this.precomputed ? PRECOMPUTED : CHANGE, change),
    );
  }

  // What a pressed part is: off, or that of a second text.
  buildModes() {
    const mode = select("inside-mode", [["ablate", "switched off"], ["patch", "replaced"]]);
    const at = select("inside-at", [["all", "every position"], ["one", "the chosen position"]]);
    const other = make("textarea", { id: "inside-other", rows: 2, spellcheck: "false" });
    const second = make("div", {}, lead(SECOND), field("The second text", other), field("at", at));
    second.hidden = true;
    mode.addEventListener("change", () => {
      second.hidden = mode.value === "ablate";
      const between = document.body.classList.contains("is-words") ? " " : "";
      other.value ||= this.tokens.map(({ text }) => text ?? "").join(between);
      this.draw(...this.drawn); // the names of the buttons
      this.ask(0);
    });
    at.addEventListener("change", () => this.ask(0));
    other.addEventListener("input", () => this.ask());
    Object.assign(this.parts, { mode, at, other });
    return [field("A pressed part is", mode), second];
  }
}

const PREDICTION = "Choose a token of the text: the prediction after it is shown.";
const LENS =
  "What the model would predict if it ended after the embedding, or after a block.";
const HEADS =
  "A picture is a head's attention between the last tokens: each row is a token, and a dark " +
  "square a large weight on an earlier one. Below it is what the head attends to on repeated " +
  "random tokens; 1.00 is all of its attention. Press a part to change it.";
const SECOND =
  "A pressed part gets what it computed for a second text with as many tokens: what the part " +
  "carries over shows in the prediction.";
const CHANGE = "The model without the parts that are off, or with those of the second text.";
const PRECOMPUTED =
  "The model without the part that is off. The lens, the contributions and the pictures above are " +
  "of the complete model. mygpt serve also switches several parts off together.";

function section(title, words, ...content) {
  return make("section", {}, make("h3", {}, title), lead(words), ...content);
}

function lead(words) {
  return make("p", { class: "lead" }, words);
}

// An element with its name before it.
function field(name, element) {
  return make("label", { class: "inside-choice" }, `${name} `, element);
}

// A menu of [value, name].
function select(id, options) {
  const items = options.map(([value, name]) => make("option", { value }, name));
  return make("select", { class: "choice", id }, ...items);
}

function changeWords({ ablation, patch }) {
  if (ablation) return `without ${partNames(ablation.parts)}`;
  return `with ${partNames(patch.parts)} of the second text`;
}

function aboutWords({ start, position }, tokens, how) {
  const { id, text } = tokens[position];
  const read = start ? ` The last ${tokens.length - start} tokens are read.` : "";
  const changed = how && `, ${how}`;
  return `Shown is the prediction after ‘${tokenName(text, id)}’${changed}.${read}`;
}
