// The playground's attention panel: requests the weights while it is open and the text is unchanged.

import { setText } from "./dom.js";
import { renderAttention } from "./attention.js";

const REST_MS = 150;

export class AttentionPanel {
  // `details` is the panel's element, `box` that of the picture, `words` that of messages;
  // `ask(ids, signal)` returns { start, weights }.
  constructor({ details, box, words, ask }) {
    Object.assign(this, { details, box, words, ask, shown: "", wanted: null, timer: 0 });
    this.pending = null;
    details.addEventListener("toggle", () => this.later(0));
  }

  // The text is now these tokens (T,).
  follow(tokens) {
    this.wanted = tokens;
    this.later(REST_MS);
  }

  later(wait) {
    clearTimeout(this.timer);
    if (this.details.open && this.wanted) this.timer = setTimeout(() => this.show(), wait);
  }

  async show() {
    const tokens = this.wanted;
    const ids = tokens.map((token) => token.id);
    const key = ids.join(" ");
    if (key === this.shown || !ids.length) return;
    this.pending?.abort();
    this.pending = new AbortController();
    try {
      const answer = await this.ask(ids, this.pending.signal);
      this.shown = key;
      setText(this.words, "");
      renderAttention(this.box, { tokens: tokens.slice(answer.start), weights: answer.weights });
    } catch (error) {
      if (error.name !== "AbortError") setText(this.words, error.message);
    }
  }
}
