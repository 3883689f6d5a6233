// The writing view: a text, and the model that continues it at the cursor.

import { Alternatives } from "./alternatives.js";
import { Client } from "./client.js";
import { copyText } from "./clipboard.js";
import { Continuation, LENGTHS } from "./continuation.js";
import { make, setAttribute, setText } from "./dom.js";
import { download, saveText, savedText } from "./draft.js";
import { Manuscript } from "./manuscript.js";
import { Notices, removedWords } from "./notices.js";
import { freshSeed } from "./randomness.js";
import { Reading } from "./reading.js";
import { counted, grouped } from "./text.js";

const REST_MS = 300; // without a change, before the text is saved
const NOT_SAVED = "The browser cannot save the text: copy or download it.";
const CHOICES = 4;
const PARTS = [
  ...["text", "marks", "continue", "again", "other", "undo", "redo", "copy", "download", "clear"],
  ...["length", "temperature", "temperature-value", "temperature-words", "status", "count"],
  ...["saved", "window", "facts", "notice", "alternatives", "choices"],
];

class Writing {
  constructor() {
    this.parts = Object.fromEntries(PARTS.map((id) => [id, document.getElementById(id)]));
    this.client = new Client();
    this.seed = Number(freshSeed());
    this.running = null; // the AbortController of a generation
    this.repeat = null; // repeats a request that failed
    this.notices = new Notices(this.parts.notice, this.client, {
      onRetry: () => this.retry(),
      onDrop: () => this.leaveOut(),
    });
    this.parts.text.value = savedText();
    this.manuscript = new Manuscript({
      field: this.parts.text,
      marks: this.parts.marks,
      onChange: () => {
        this.stop();
        this.repeat = null; // its place may be another one now
        this.changed();
      },
    });
    this.reading = new Reading(this.client, this.parts.window, {
      onAnswer: () => this.showReading(null),
      onError: (error) => this.showReading(error),
    });
    this.choices = new Alternatives(this.parts.alternatives, this.parts.choices, {
      onTake: (text, place) => this.take(text, place),
      onClose: () => this.parts.text.focus(),
    });
    this.buildSettings();
    this.listen();
  }

  buildSettings() {
    const { length, temperature } = this.parts;
    length.append(...LENGTHS.map(({ name }, value) => make("option", { value }, name)));
    temperature.addEventListener("input", () => this.showTemperature());
    this.showTemperature();
  }

  listen() {
    const actions = {
      continue: () => this.continueOrStop(),
      again: () => this.again(),
      other: () => this.alternatives(),
      undo: () => this.history("undo"),
      redo: () => this.history("redo"),
      copy: () => copyText(this.parts.copy, this.manuscript.text, () => this.parts.text.select()),
      download: () => download(this.manuscript.text),
      clear: () => this.clear(),
    };
    for (const [id, action] of Object.entries(actions)) {
      this.parts[id].addEventListener("click", action);
    }
    document.addEventListener("keydown", (event) => this.press(event));
    document.addEventListener("selectionchange", () => this.readSoon());
    addEventListener("pagehide", () => this.save());
  }

  press(event) {
    if (event.key === "Escape") {
      if (this.running) this.stop();
      else this.choices.close();
    }
    if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey)) return;
    event.preventDefault();
    if (event.shiftKey) this.alternatives();
    else this.continue();
  }

  async start() {
    this.notices.loading();
    this.show();
    try {
      await this.load();
      this.notices.clear();
      this.readSoon();
    } catch (error) {
      this.notices.error(error);
    }
  }

  async load() {
    const model = await this.client.model();
    setText(this.parts.facts, `${model.name}  ·  ${counted(model.parameters, "parameter")}`);
  }

  async retry() {
    const { repeat } = this;
    this.repeat = null;
    this.unread = true;
    if (repeat) await repeat();
    else if (this.client.facts) this.reading.readAgain(() => this.manuscript.before);
    else await this.start();
  }

  // --- generating --------------------------------------------------------------------------

  continueOrStop() {
    if (!this.running) return this.continue();
    this.parts.text.focus();
    return this.stop();
  }

  // Continue the text after the cursor, or after the selection.
  continue() {
    const place = this.manuscript.before.length;
    return this.write(place, place);
  }

  // Take the last continuation away, and draw another one.
  again() {
    const { latest } = this.manuscript;
    if (latest) return this.write(latest.start, latest.end);
    this.say("There is no continuation to replace: use Continue first.");
    return null;
  }

  // Write a continuation in place of the text from `start` to `end`.
  async write(start, end) {
    const old = this.manuscript.text.slice(start, end);
    const field = this.parts.text;
    const continuation = new Continuation(this.chosenLength);
    let added = 0; // characters of it in the text
    field.focus();
    const add = () => {
      const more = continuation.text.slice(added);
      if (more && added) this.manuscript.append(more);
      else if (more) this.manuscript.insert(more, start, end);
      added += more.length;
      this.show();
    };
    const done = await this.generate(start, 1, (_, piece) => {
      continuation.push(piece);
      if (document.activeElement === field) add(); // else later: another element keeps the focus
      return continuation.complete;
    });
    if (!done) return;
    const focused = document.activeElement;
    if (done === "failed") {
      this.repeat = () => this.write(start, end);
      if (added) this.manuscript.restore(old);
    } else {
      if (done === "ended") continuation.finish();
      add();
      this.manuscript.end();
      this.sayWritten(continuation, done);
    }
    if (focused !== document.body) focused.focus();
    this.changed();
  }

  // Show several continuations at the cursor.
  async alternatives() {
    const place = this.manuscript.before.length;
    const all = Array.from({ length: CHOICES }, () => new Continuation(this.chosenLength));
    const done = await this.generate(place, CHOICES, (index, piece) => {
      all[index].push(piece);
      return all.every(({ complete }) => complete);
    });
    this.show();
    if (done === "failed") this.repeat = () => this.alternatives();
    if (done === "stopped") this.say("Stopped.");
    if (done !== "ended") return;
    for (const one of all) one.finish();
    const texts = new Set(all.map(({ text }) => text).filter(Boolean));
    if (texts.size) this.choices.show([...texts], place);
    this.say(texts.size ? `${counted(texts.size, "alternative")}.` : "The model ends the text here.");
  }

  // Generate `count` continuations of the text up to `place`, until `onPiece(index, text)` returns
  // true. Returns "ended", "stopped" by the writer or "failed"; null if another one runs.
  async generate(place, count, onPiece) {
    if (this.running) return null;
    this.choices.close();
    const running = new AbortController();
    this.running = running;
    this.say("The model writes. Esc stops it.");
    this.show();
    let enough = false;
    try {
      if (!this.client.facts) await this.load();
      const question = {
        prompt: this.reading.tail(this.manuscript.text.slice(0, place)),
        n: count,
        max_tokens: this.chosenLength.tokens,
        temperature: Number(this.parts.temperature.value),
        seed: this.seed,
      };
      const receive = (index, text) => {
        if (running.signal.aborted) return;
        enough = onPiece(index, text);
        if (enough) running.abort();
      };
      await this.client.complete(question, receive, running.signal);
      enough = true;
    } catch (error) {
      if (error.name !== "AbortError") {
        running.abort();
        this.running = null;
        this.say("");
        this.notices.error(error);
        return "failed";
      }
    }
    this.running = null;
    this.seed += 1;
    this.notices.clear();
    return enough ? "ended" : "stopped";
  }

  stop() {
    this.running?.abort();
  }

  get chosenLength() {
    return LENGTHS[Number(this.parts.length.value)];
  }

  take(text, place) {
    this.manuscript.insert(text, place);
    this.manuscript.end();
    this.say(`${counted([...text].length, "character")} by the model.`);
    this.changed();
  }

  // --- the text ----------------------------------------------------------------------------

  // After a change of the text, by the writer or by the model.
  changed() {
    this.choices.close();
    this.unsaved = true;
    clearTimeout(this.saving);
    this.saving = setTimeout(() => this.save(), REST_MS);
    this.readSoon();
    this.show();
  }

  history(command) {
    this.stop();
    const some = this.manuscript.history(command);
    this.say(some ? "" : `There is nothing to ${command}.`);
  }

  clear() {
    this.stop();
    this.manuscript.replace(0, this.manuscript.text.length, "");
    this.changed();
    this.say("The text is cleared; Undo brings it back.");
  }

  save() {
    clearTimeout(this.saving);
    if (!this.unsaved) return; // another tab may have saved a newer text
    this.unsaved = !saveText(this.manuscript.text);
    if (this.unsaved) setText(this.parts.saved, NOT_SAVED);
  }

  // Remove characters before the cursor that the model does not know.
  async leaveOut() {
    const { before } = this.manuscript;
    const asked = this.reading.tail(before);
    try {
      const { text = asked, left_out: left = [] } = await this.client.known(asked);
      if (this.manuscript.before !== before) return; // the text was changed meanwhile
      this.manuscript.replace(before.length - asked.length, before.length, text);
      this.notices.clear();
      this.repeat = null;
      this.changed();
      this.say(removedWords(left));
    } catch (error) {
      this.notices.error(error);
    }
  }

  readSoon() {
    if (!this.running) this.reading.readSoon(() => this.manuscript.before);
  }

  // Show why the text before the cursor cannot be read; null if it can be.
  showReading(error) {
    if (error) this.notices.error(error);
    else if (this.unread) this.notices.clear();
    this.unread = error !== null;
  }

  // --- showing -----------------------------------------------------------------------------

  say(words) {
    setText(this.parts.status, words);
  }

  sayWritten({ text }, done) {
    const count = `${counted([...text].length, "character")} by the model`;
    if (done === "stopped") this.say(`Stopped after ${count}.`);
    else this.say(text ? `${count}.` : "The model ends the text here; Try again draws another.");
  }

  show() {
    const { text, passages, latest } = this.manuscript;
    setText(this.parts.continue, this.running ? "Stop" : "Continue");
    setAttribute(this.parts.again, "aria-disabled", String(!latest));
    const written = passages.reduce((sum, { start, end }) => sum + end - start, 0);
    const all = counted(text.length, "character");
    const marked = this.parts.marks.hidden ? "" : " (marked)";
    setText(this.parts.count, `${all}, ${grouped(written)} of them by the model${marked}.`);
  }

  showTemperature() {
    const value = Number(this.parts.temperature.value);
    setText(this.parts["temperature-value"], String(value));
    setText(this.parts["temperature-words"], temperatureWords(value));
  }
}

function temperatureWords(value) {
  if (value === 0) return "Always the most probable token: each try gives the same text.";
  if (value < 0.6) return "Mostly the most probable tokens: the text repeats itself more.";
  if (value < 1) return "Probable tokens are preferred.";
  if (value === 1) return "Tokens are sampled with the model's own probabilities.";
  return "Improbable tokens are sampled more often: the text has more mistakes.";
}

new Writing().start();
