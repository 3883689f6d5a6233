// A panel that can be closed: it asks the server only while it is open and its question is new.

import { setText } from "./dom.js";

const REST_MS = 150;
const WAITING = "Waiting for the server …"; // the first time: it may have to load a library

export class AskingPanel {
  // `details` is the panel's element, null if it is always open, `words` that of messages; `ask(question, signal)` returns an
  // answer, which `draw(answer, about)` shows.
  constructor({ details, words, ask, draw }) {
    Object.assign(this, { details, words, ask, draw, asked: "", wanted: null, timer: 0 });
    Object.assign(this, { pending: null, drawn: false });
    details?.addEventListener("toggle", () => this.later(0));
  }

  // The question is now this one, { ids, ... }; `about` is passed to `draw`.
  follow(question, about, wait = REST_MS) {
    this.wanted = { question, about };
    this.later(wait);
  }

  later(wait) {
    clearTimeout(this.timer);
    if ((this.details?.open ?? true) && this.wanted) this.timer = setTimeout(() => this.show(), wait);
  }

  async show() {
    const { question, about } = this.wanted;
    const key = JSON.stringify(question);
    if (key === this.asked || !question.ids.length) return; // it is shown, or its answer is pending
    this.asked = key;
    this.pending?.abort();
    this.pending = new AbortController();
    if (!this.drawn) setText(this.words, WAITING);
    try {
      const answer = await this.ask(question, this.pending.signal);
      setText(this.words, "");
      this.draw(answer, about);
      this.drawn = true;
    } catch (error) {
      if (error.name === "AbortError") return;
      this.asked = "";
      setText(this.words, error.message);
    }
  }
}
