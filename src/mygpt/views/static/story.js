// One continuation: the prompt's tokens, the generated tokens, and their predictions.

import { draw, isGreedy, probabilities } from "./sampling.js";
import { uniform } from "./randomness.js";

const NO_NUMBERS =
  "The probabilities are not finite: choose less extreme settings, or another model.";
const MOST_KEPT = 256; // predictions, not counting the prompt's

export class Story {
  // `index` numbers the sample among those of a seed; `prediction` is the prompt's.
  constructor(index, prediction) {
    this.index = index;
    this.prompt = prediction.tokens;
    this.written = [];
    this.predictions = new Map([[0, prediction]]);
    this.latest = null;
  }

  // All ids so far (T,).
  get ids() {
    return [...this.prompt, ...this.written].map((token) => token.id);
  }

  get length() {
    return this.prompt.length + this.written.length;
  }

  // The prediction of the next token; null until the server has sent it.
  get prediction() {
    return this.predictions.get(this.written.length) ?? null;
  }

  // The prediction at the prompt's end.
  get first() {
    return this.predictions.get(0);
  }

  // Probabilities (V,) before and after the filters. Throws if they are not finite.
  distribution(settings) {
    const { logits, before } = this.prediction;
    const key = JSON.stringify(settings);
    if (this.latest?.logits !== logits || this.latest.key !== key) {
      const after = probabilities(logits, settings, this.ids);
      if (!after.some((prob) => prob > 0)) throw new Error(NO_NUMBERS);
      this.latest = { logits, key, after };
    }
    return { before, after: this.latest.after };
  }

  // The next sampled token: { id, uniform: the random number, null for greedy }.
  nextDraw(settings, seed) {
    const { after } = this.distribution(settings);
    if (isGreedy(settings)) return { id: after.indexOf(1), uniform: null };
    const number = uniform(seed, this.index, this.written.length);
    return { id: draw(after, number), uniform: number };
  }

  // Append a token, sampled or chosen by hand, with its probabilities.
  append(id, text, settings, { byHand, key }) {
    const { before, after } = this.distribution(settings);
    const place = { id, text, before: before[id], after: after[id], byHand, key };
    this.written.push(place);
    return place;
  }

  // Store the prediction after `length` generated tokens.
  receive(length, prediction) {
    this.predictions.set(length, prediction);
    const spare = this.predictions.size - 1 - MOST_KEPT;
    const old = [...this.predictions.keys()].filter((kept) => kept > 0).sort((a, b) => a - b);
    for (const kept of old.slice(0, Math.max(0, spare))) this.predictions.delete(kept);
  }

  // Remove the last generated token.
  back() {
    this.predictions.delete(this.written.length);
    this.written.pop();
  }
}
