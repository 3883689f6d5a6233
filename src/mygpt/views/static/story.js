// One continuation: the prompt's tokens, those written after it, and the predictions on the way.

import { draw, isGreedy, probabilities } from "./sampling.js";
import { uniform } from "./randomness.js";

const NO_NUMBERS =
  "There is nothing to draw from: choose milder settings, or a model that predicts numbers.";
const MOST_KEPT = 256; // predictions, the prompt's aside

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

  // The prediction of the next token; null while the server has not told it.
  get prediction() {
    return this.predictions.get(this.written.length) ?? null;
  }

  // The prediction at the prompt's end.
  get first() {
    return this.predictions.get(0);
  }

  // Probabilities (V,) before and after the filters. Throws where they are no numbers.
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

  // What the seed draws next: { id, uniform: null where nothing is drawn }.
  nextDraw(settings, seed) {
    const { after } = this.distribution(settings);
    if (isGreedy(settings)) return { id: after.indexOf(1), uniform: null };
    const number = uniform(seed, this.index, this.written.length);
    return { id: draw(after, number), uniform: number };
  }

  // Take a token, drawn or picked by hand, and keep what was known of it.
  append(id, text, settings, { byHand, key }) {
    const { before, after } = this.distribution(settings);
    const place = { id, text, before: before[id], after: after[id], byHand, key };
    this.written.push(place);
    return place;
  }

  // The prediction for `length` written tokens has come.
  receive(length, prediction) {
    this.predictions.set(length, prediction);
    const spare = this.predictions.size - 1 - MOST_KEPT;
    const old = [...this.predictions.keys()].filter((kept) => kept > 0).sort((a, b) => a - b);
    for (const kept of old.slice(0, Math.max(0, spare))) this.predictions.delete(kept);
  }

  // Take the last written token away.
  back() {
    this.predictions.delete(this.written.length);
    this.written.pop();
  }
}
