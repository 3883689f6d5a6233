// A continuation by the model: how much of the generated text belongs to it, by the chosen length.

const NO_END = -1; // as many tokens as the server allows: the page stops at the length's end

// tokens: of the request; end: what is before the match's end belongs to the continuation;
// most: characters after which a text without such an end is ended.
export const LENGTHS = [
  {
    name: "One sentence",
    tokens: NO_END,
    end: /[.!?…]["'”’)\]]*(?=\s)|[。！？]/u,
    most: 600,
  },
  { name: "One line", tokens: NO_END, end: /^\s*\S[^\n]*(?=\n)/, most: 600 },
  { name: "One paragraph", tokens: NO_END, end: /^\s*\S[^]*?(?=\n[^\S\n]*\n)/, most: 3000 },
  { name: "20 tokens", tokens: 20 },
  { name: "100 tokens", tokens: 100 },
  { name: "500 tokens", tokens: 500 },
];

export class Continuation {
  // `length` is one of LENGTHS.
  constructor(length) {
    this.length = length;
    this.received = "";
    this.text = "";
    this.complete = false; // whether no more text is needed
  }

  // Add generated text. White space at its end is held back, since the end of a line or a sentence
  // is known only by what follows.
  push(piece) {
    if (this.complete) return;
    const { end, most } = this.length;
    this.received += piece;
    const found = end?.exec(this.received);
    this.complete = Boolean(found) || this.received.length >= most;
    if (found) this.text = this.received.slice(0, found.index + found[0].length);
    else this.text = this.complete ? this.received : this.received.trimEnd();
  }

  // No more text is generated.
  finish() {
    if (!this.complete) this.text = this.received;
    this.complete = true;
  }
}
