// The generation loop for several continuations: predict, sample, append, repeat.
// It requests predictions from the server, samples in the browser, and does not use the page.

import { Story } from "./story.js";

const PAUSE_MS = 12; // between the steps of a run, so that the page is redrawn
const MOST_STEPS = 1000;
const END_OF_TEXT = "<|endoftext|>";

export class Loop {
  // `choices()` returns the present { settings, seed, key }, or null if one is invalid.
  // Callbacks: `onChange()` after each change, `onToken(token, uniform)` for each token of the
  // active continuation, `onError(error)` for a failed request, `onAnswer()` for a successful one.
  // `onLine(line)` is awaited as the loop reaches a line: 1 crop, 2 forward pass, 3 probabilities,
  // 4 draw and append.
  constructor(client, { choices, onChange, onToken, onError, onAnswer, onLine = () => {} }) {
    Object.assign(this, { client, choices, onChange, onToken, onError, onAnswer, onLine });
    this.model = null;
    this.texts = [];
    this.stories = [];
    this.active = 0;
    this.running = false;
    this.leave();
  }

  get story() {
    return this.stories[this.active] ?? null;
  }

  // Request the model's description; false if that failed.
  async load() {
    try {
      this.model = await this.client.model();
      this.texts = [...(this.model.tokens ?? [])];
      return true;
    } catch (error) {
      this.onError(error);
      return false;
    }
  }

  // Cancel pending requests.
  leave() {
    this.running = false;
    this.pending?.abort();
    this.pending = new AbortController();
    this.queue = Promise.resolve(true);
  }

  // Discard all continuations and read a prompt for `count` new ones.
  begin(prompt, count) {
    this.leave();
    this.queue = this.read(prompt, count);
    return this.queue;
  }

  async read(prompt, count) {
    try {
      const prediction = await this.ask({ text: prompt }, this.pending.signal);
      this.stories = Array.from({ length: count }, (_, index) => new Story(index, prediction));
      this.active = Math.min(this.active, count - 1);
      this.onAnswer();
    } catch (error) {
      if (error.name === "AbortError") return;
      this.stories = [];
      this.onError(error);
    }
    this.onChange();
  }

  // Change the number of continuations; new ones start at the prompt.
  resize(count) {
    if (!this.stories.length) return;
    const { first } = this.stories[0];
    const kept = this.stories.slice(0, count);
    while (kept.length < count) kept.push(new Story(kept.length, first));
    this.stories = kept;
    this.active = Math.min(this.active, count - 1);
    this.onChange();
  }

  // Add a token to every continuation; false if that failed.
  step() {
    return this.inTurn(() => {
      const choices = this.choices();
      const going = this.stories.filter((story) => !this.hasEnded(story));
      if (!choices || !going.length) return false;
      for (const story of going) {
        const { id, uniform } = story.nextDraw(choices.settings, choices.seed);
        const token = this.append(story, id, choices, false);
        if (story === this.story) this.onToken(token, uniform);
      }
      return true;
    }, true);
  }

  // Step `count` times, or until `stop` is called or all continuations have ended.
  async run(count) {
    this.running = true;
    const { signal } = this.pending;
    for (let done = 0; done < Math.min(count, MOST_STEPS) && this.running; done += 1) {
      if (!(await this.step())) break;
      await new Promise((resolve) => setTimeout(resolve, PAUSE_MS));
    }
    if (signal.aborted) return;
    this.stop();
  }

  stop() {
    this.running = false;
    this.onChange();
  }

  // Remove the last token of every continuation.
  back() {
    this.running = false;
    return this.inTurn(() => {
      for (const story of this.stories) if (story.written.length) story.back();
      return true;
    });
  }

  // Append a token of the reader's choice to the active continuation.
  pick(id) {
    this.running = false;
    return this.inTurn(() => {
      const choices = this.choices();
      if (!choices || this.hasEnded(this.story)) return false;
      this.onToken(this.append(this.story, id, choices, true), null);
      return true;
    }, true);
  }

  // Repeat failed requests for predictions.
  catchUp() {
    return this.inTurn(() => true);
  }

  hasEnded(story) {
    const last = story.written[story.written.length - 1];
    if (!last) return false;
    return this.model.ends ? this.model.ends.includes(last.id) : last.text === END_OF_TEXT;
  }

  append(story, id, { settings, key }, byHand) {
    return story.append(id, this.texts[id] ?? null, settings, { byHand, key });
  }

  // After all earlier changes: load missing predictions, apply `change`, load missing ones again.
  // `draws`: whether the change appends a token.
  inTurn(change, draws = false) {
    const { signal } = this.pending;
    const turn = this.queue.then(async () => {
      if (signal.aborted || !this.stories.length || !(await this.predict())) return false;
      const changed = this.attempt(change);
      this.onChange();
      if (changed && draws) await this.onLine(4);
      const whole = changed && (await this.predict());
      if (!signal.aborted) this.onChange();
      return whole;
    });
    this.queue = turn.catch(() => false);
    return turn;
  }

  attempt(change) {
    try {
      return change();
    } catch (error) {
      this.running = false;
      this.onError(error);
      return false;
    }
  }

  // Request every missing prediction; false if one failed.
  async predict() {
    const { signal } = this.pending;
    const missing = this.stories.filter((story) => !story.prediction);
    if (!missing.length) return true;
    try {
      await Promise.all(missing.map((story) => this.predictFor(story, signal)));
      this.onAnswer();
      return true;
    } catch (error) {
      if (error.name === "AbortError") return false;
      this.running = false;
      this.onError(error);
      return false;
    }
  }

  async predictFor(story, signal) {
    const length = story.written.length;
    const prediction = await this.ask({ ids: story.ids }, signal);
    for (const token of story.written) token.text ??= this.texts[token.id] ?? null;
    story.receive(length, prediction);
  }

  // Request a prediction: lines 1 to 3 of the loop.
  async ask(question, signal) {
    await this.onLine(1);
    await this.onLine(2);
    const prediction = await this.client.next(question, signal);
    this.learn(prediction);
    await this.onLine(3);
    return prediction;
  }

  learn(prediction) {
    for (const { id, text } of prediction.tokens) this.texts[id] ??= text;
    for (const [id, text] of prediction.texts) this.texts[id] ??= text;
  }
}
