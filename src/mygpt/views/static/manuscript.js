// The text of the writing view: a text field, the passages in it that the model wrote, and changes
// by the page that are undone like typing.

import { make } from "./dom.js";

const MOST_MARKED = 20_000; // characters: marks of more slow down typing
const MOST_KEPT = 100; // texts whose passages are known when undo or redo brings them back

export class Manuscript {
  // `marks` is the element behind the field that shows the passages; `onChange()` is called
  // after each change by the writer.
  constructor({ field, marks, onChange }) {
    Object.assign(this, { field, marks, onChange, text: field.value, changing: false });
    this.passages = []; // { start, end } in UTF-16 units, in order
    this.latest = null; // the last continuation, { start, end }; null once it was changed
    this.kept = new Map(); // text: { passages, latest }
    field.addEventListener("input", (event) => this.follow(event.inputType ?? ""));
    field.addEventListener("scroll", () => this.scroll());
    this.draw();
  }

  // The text up to the cursor: to the end of the selection, if there is one.
  get before() {
    return this.text.slice(0, this.field.selectionEnd);
  }

  // Put a continuation in place of the text from `start` to `end`; the cursor is then at its end.
  insert(text, start, end = start) {
    this.keep();
    this.endStep();
    this.replace(start, end, text, { start, end: start + text.length });
    this.reveal();
  }

  // Add text to the last continuation; a cursor elsewhere stays where it is.
  append(text) {
    const { start, end } = this.latest;
    const { selectionStart, selectionEnd } = this.field;
    this.replace(end, end, text, { start, end: end + text.length });
    if (selectionStart === end && selectionEnd === end) {
      this.reveal();
      return;
    }
    const moved = (place) => (place <= end ? place : place + text.length);
    this.field.setSelectionRange(moved(selectionStart), moved(selectionEnd));
  }

  // Scroll to the end of the last continuation; the browser does so only for typed text.
  reveal() {
    const { field, marks, latest } = this;
    if (latest.end === this.text.length) field.scrollTop = field.scrollHeight;
    if (latest.end === this.text.length || marks.hidden) return;
    const lines = marks.children[this.passages.indexOf(latest)].getClientRects();
    const line = lines[lines.length - 1];
    const box = field.getBoundingClientRect();
    field.scrollTop += Math.max(0, line.bottom - box.bottom) + Math.min(0, line.top - box.top);
  }

  // Put the text back that the last continuation replaced.
  restore(old) {
    const { start, end } = this.latest;
    this.replace(start, end, old);
    this.recall();
  }

  // The last continuation has ended: what follows is another step of the history.
  end() {
    this.keep();
    this.endStep();
  }

  // Chromium adds to the last step until the selection is changed.
  endStep() {
    const { selectionStart, selectionEnd } = this.field;
    this.field.select();
    this.field.setSelectionRange(selectionStart, selectionEnd);
  }

  // Replace the text from `start` to `end`; afterwards `passage` is by the model, and the latest.
  // The browser's own command does it, so that the browser's undo knows of it; assigning to the
  // field's value would end its history. The command needs the focus.
  replace(start, end, text, passage = null) {
    const { field } = this;
    const wanted = this.text.slice(0, start) + text + this.text.slice(end);
    this.change(wanted, { start, removed: end - start, inserted: text.length }, passage);
    this.changing = true;
    field.focus({ preventScroll: true });
    if (field.selectionStart !== start || field.selectionEnd !== end) {
      field.setSelectionRange(start, end);
    }
    const command = text ? "insertText" : "delete";
    if (start !== end || text) document.execCommand(command, false, text);
    if (field.value !== wanted) field.value = wanted; // a browser without the command
    this.changing = false;
  }

  undo() {
    return this.history("undo");
  }

  redo() {
    return this.history("redo");
  }

  // Undo or redo one change; whether there was one.
  history(command) {
    this.field.focus();
    return document.execCommand(command);
  }

  // After the browser changed the text: find what changed.
  follow(kind) {
    if (this.changing) return;
    const [before, after] = [this.text, this.field.value];
    const most = Math.min(before.length, after.length);
    // What was inserted ends at the cursor: equal letters before it do not move it.
    const last = this.field.selectionEnd - Math.max(0, after.length - before.length);
    let start = 0;
    while (start < Math.min(most, last) && before[start] === after[start]) start += 1;
    let same = 0;
    while (same < most - start && before.at(-1 - same) === after.at(-1 - same)) same += 1;
    const [removed, inserted] = [before, after].map((text) => text.length - same - start);
    this.change(after, { start, removed, inserted });
    if (kind.startsWith("history")) this.recall();
    this.onChange();
  }

  // The text is now this one; `passage` is by the model, and the latest.
  change(text, { start, removed, inserted }, passage = null) {
    this.text = text;
    const moved = (passages) => shifted(passages, start, removed, inserted);
    const size = this.latest ? this.latest.end - this.latest.start : 0;
    const [latest = null] = this.latest ? moved([this.latest]) : [];
    this.latest = latest && latest.end - latest.start === size ? latest : null;
    this.passages = moved(this.passages);
    if (passage) {
      const others = this.passages.filter(
        (one) => one.end <= passage.start || one.start >= passage.end,
      );
      this.passages = [...others, passage].sort((a, b) => a.start - b.start);
      this.latest = passage;
    }
    this.draw();
  }

  // Keep the passages of the present text, for undo and redo.
  keep() {
    this.kept.delete(this.text);
    this.kept.set(this.text, { passages: this.passages, latest: this.latest });
    if (this.kept.size > MOST_KEPT) this.kept.delete(this.kept.keys().next().value);
  }

  recall() {
    Object.assign(this, this.kept.get(this.text) ?? {});
    this.draw();
  }

  // The same text with marks, behind the field. Nodes are kept while the number of passages is the
  // same, as in `setText`.
  draw() {
    const { marks, text } = this;
    const passages = text.length > MOST_MARKED ? [] : this.passages;
    marks.hidden = !passages.length;
    const edges = [0, ...passages.flatMap(({ start, end }) => [start, end]), text.length];
    if (marks.children.length !== passages.length || !marks.firstChild) {
      marks.replaceChildren("", ...passages.flatMap(() => [make("mark", {}, ""), ""]));
    }
    marks.childNodes.forEach((node, index) => {
      const part = text.slice(edges[index], edges[index + 1]);
      // A line that is empty has a height only if something follows.
      const data = index === 2 * passages.length ? `${part}\u200b` : part;
      const own = node.firstChild ?? node;
      if (own.data !== data) own.data = data;
    });
    this.scroll();
  }

  scroll() {
    if (!this.marks.hidden) this.marks.scrollTop = this.field.scrollTop;
  }
}

// Passages after `removed` characters at `start` were replaced by `inserted` ones of the writer.
export function shifted(passages, start, removed, inserted) {
  const [end, change] = [start + removed, inserted - removed];
  return passages.flatMap((one) => {
    if (one.end <= start) return [one];
    if (one.start >= end) return [{ start: one.start + change, end: one.end + change }];
    const parts = [
      { start: one.start, end: start },
      { start: start + inserted, end: one.end + change },
    ];
    return parts.filter((part) => part.start < part.end);
  });
}
