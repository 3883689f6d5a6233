// What the model reads of a text: the end of it, as the context window on the page.

import { counted } from "./text.js";
import { renderWindow } from "./window.js";

const REST_MS = 300; // without a change, before the server is asked
const PER_TOKEN = { char: 2, byte: 2 }; // characters that are sent for each token of the window
const MOST_PER_TOKEN = 8; // of other tokenizers, whose tokens have about four characters

export class Reading {
  // `element` shows the window; `onAnswer()` and `onError(error)` are called when the server has
  // read a text, or cannot.
  constructor(client, element, { onAnswer, onError }) {
    Object.assign(this, { client, element, onAnswer, onError });
    this.shown = null; // the text that the window is of
  }

  // The end of a text, with more tokens than the window has: the model reads no more of it.
  tail(text) {
    const { window, tokenizer } = this.client.facts;
    const end = text.slice(-window * (PER_TOKEN[tokenizer] ?? MOST_PER_TOKEN));
    return end.replace(/^[\udc00-\udfff]/, ""); // the second half of a character
  }

  // Read what `before()` returns, the text up to the cursor, once it has not changed for a while.
  readSoon(before) {
    clearTimeout(this.timer);
    this.timer = setTimeout(() => this.read(before()), REST_MS);
  }

  // The same, also if the text has been read: what the page says of it may be older.
  readAgain(before) {
    this.shown = null;
    this.readSoon(before);
  }

  async read(text) {
    if (!this.client.facts || text === this.shown) return;
    this.shown = text;
    this.pending?.abort();
    this.pending = new AbortController();
    try {
      const sent = this.tail(text);
      this.show(text, sent, await this.client.next({ text: sent }, this.pending.signal));
      this.onAnswer();
    } catch (error) {
      if (error.name === "AbortError") return;
      this.shown = null;
      this.onError(error);
    }
  }

  show(text, sent, { tokens, windowStart }) {
    const { window, trained_length: trained } = this.client.facts;
    let outside = null;
    if (sent.length < text.length) {
      const seen = tokens.slice(windowStart).map((token) => token.text).join("");
      const first = counted(text.length - seen.length, "character");
      outside = text.endsWith(seen) ? `the first ${first}` : "the text before";
    }
    renderWindow(this.element, {
      length: tokens.length,
      start: windowStart,
      ...{ window, trained, outside },
    });
  }
}
