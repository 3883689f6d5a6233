// The playground: reads the page's controls, runs the generation loop, and updates the views.

import { AskingPanel } from "./asking_panel.js";
import { renderAttention } from "./attention.js";
import { barData, renderBars } from "./bars.js";
import { Client } from "./client.js";
import { copyText } from "./clipboard.js";
import { renderColumns, startWords } from "./columns.js";
import { commandNote, generateCommand } from "./command.js";
import { buildControls } from "./controls.js";
import { setAttribute, setText } from "./dom.js";
import { InsidePanel } from "./inside_panel.js";
import { Loop } from "./loop.js";
import { Notices, removedWords } from "./notices.js";
import { SEED_ERROR, freshSeed, parseSeed } from "./randomness.js";
import { renderStrip } from "./strip.js";
import { counted, grouped, percent, tokenName } from "./text.js";
import { Tour } from "./tour.js";

const TYPING_MS = 200;
const PREVIEWED = 4; // bars above the sliders, where the others are out of sight
const ENDED = "The text has ended: its last token is the end of a text. Step back, or start over.";
const PARTS = [
  ...["prompt", "step", "run", "back", "restart", "count", "samples", "status", "columns"],
  ...["bars", "strip", "known", "controls", "seed", "new-seed", "command", "command-note", "copy"],
  ...["facts", "notice", "attention", "attention-box", "attention-words"],
  ...["inside", "inside-box", "inside-words"],
  ...["start-words", "seed-error", "preview", "tour"],
];

class Playground {
  constructor() {
    this.parts = Object.fromEntries(PARTS.map((id) => [id, document.getElementById(id)]));
    this.client = new Client();
    this.loop = new Loop(this.client, {
      choices: () => this.choices(),
      onChange: () => this.show(),
      onToken: (token, uniform) => this.showToken(token, uniform),
      onError: (error) => this.notices.error(error),
      onAnswer: () => this.notices.clear(),
      onLine: (line) => this.tour?.reach(line, this.loop.running),
    });
    this.notices = new Notices(this.parts.notice, this.client, {
      onRetry: () => this.retry(),
      onDrop: () => this.leaveOut(),
    });
    this.panel = new AskingPanel({
      details: this.parts.attention,
      words: this.parts["attention-words"],
      ask: (question, signal) => this.client.attention(question, signal),
      draw: ({ start, weights }, tokens) =>
        renderAttention(this.parts["attention-box"], { tokens: tokens.slice(start), weights }),
    });
    this.inside = new InsidePanel({
      details: this.parts.inside,
      box: this.parts["inside-box"],
      words: this.parts["inside-words"],
      ask: (question, signal) => this.client.inside(question, signal),
    });
    this.parts.seed.value = String(freshSeed());
    this.listenToButtons();
    this.listenToFields();
  }

  listenToButtons() {
    const { loop } = this;
    const { copy, command } = this.parts;
    const selectCommand = () => getSelection().selectAllChildren(command);
    const actions = {
      step: () => this.stepOnce(),
      run: () => this.runOrStop(),
      back: () => this.stepBack(),
      restart: () => this.begin(),
      copy: () => copyText(copy, command.textContent, selectCommand),
      "new-seed": () => {
        this.parts.seed.value = String(freshSeed());
        this.showSoon();
      },
    };
    for (const [id, action] of Object.entries(actions)) {
      this.parts[id].addEventListener("click", action);
    }
  }

  listenToFields() {
    const { prompt, samples, seed, count } = this.parts;
    samples.addEventListener("change", () => this.loop.resize(Number(samples.value)));
    for (const field of [seed, count]) field.addEventListener("input", () => this.showSoon());
    prompt.addEventListener("input", () => {
      this.loop.leave();
      clearTimeout(this.typing);
      this.typing = setTimeout(() => this.begin(), TYPING_MS);
    });
    prompt.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) this.stepOnce();
    });
  }

  async start() {
    this.notices.loading();
    if (!(await this.loop.load())) return;
    const { model } = this.loop;
    document.body.classList.remove("no-model");
    const facts = [
      model.name,
      counted(model.parameters, "parameter"),
      `vocabulary ${grouped(model.vocab_size)}`,
      `window ${grouped(model.window)}`,
    ];
    setText(this.parts.facts, facts.join("  ·  "));
    this.sampling = buildControls(this.parts.controls, {
      vocabSize: model.vocab_size,
      onChange: () => this.showSoon(),
    });
    document.body.classList.toggle("is-words", model.tokenizer === "word");
    if (model.tour) await this.startTour();
    else await this.begin();
  }

  async startTour() {
    document.body.classList.add("has-tour");
    this.tour = new Tour(this.parts.tour, this.loop.model, { onStep: (step) => this.set(step) });
    await this.tour.go(0);
  }

  // Set the controls, and begin a new text.
  async set({ prompt, settings, count }) {
    const { parts } = this;
    this.sampling.set(settings);
    parts.samples.value = "1";
    parts.seed.value = "0";
    parts.count.value = String(count);
    parts.prompt.value = prompt ?? parts.prompt.value;
    await this.begin();
  }

  async begin() {
    clearTimeout(this.typing);
    this.typing = 0;
    setText(this.parts.status, "");
    const { prompt, samples } = this.parts;
    if (this.loop.model) await this.loop.begin(prompt.value, Number(samples.value));
    setText(this.parts["start-words"], prompt.value ? "" : startWords(this.loop.story, this.loop.model));
  }

  // Read the prompt that was just typed.
  async settle() {
    if (this.typing) await this.begin();
  }

  async retry() {
    if (!this.loop.model) await this.start();
    else if (!this.loop.stories.length) await this.begin();
    else await this.loop.catchUp();
  }

  // Remove characters from the prompt that the model does not know.
  async leaveOut() {
    const { prompt, status } = this.parts;
    const asked = prompt.value;
    try {
      const { text = asked, left_out: left = [] } = await this.client.known(asked);
      if (prompt.value !== asked) return; // the prompt was changed meanwhile
      prompt.value = text;
      await this.begin();
      setText(status, removedWords(left));
      prompt.focus();
    } catch (error) {
      this.notices.error(error);
    }
  }

  // Show why no token can be appended to these continuations; whether that is so.
  refuses(stories) {
    const ended = stories.length && stories.every((story) => this.loop.hasEnded(story));
    this.refusal = this.invalid() || (ended ? ENDED : "");
    if (this.refusal) setText(this.parts.status, this.refusal);
    return this.refusal !== "";
  }

  // Remove the message of `refuses` once the settings are valid.
  endRefusal() {
    const { status } = this.parts;
    if (this.refusal && status.textContent === this.refusal && !this.invalid()) setText(status, "");
  }

  // An error message if a setting or the seed is invalid.
  invalid() {
    const seed = parseSeed(this.parts.seed.value);
    return this.sampling?.error() || (seed === null ? SEED_ERROR : "");
  }

  async stepOnce() {
    await this.settle();
    if (!this.refuses(this.loop.stories)) await this.loop.step();
  }

  async runOrStop() {
    if (this.loop.running) {
      this.loop.stop();
      return;
    }
    await this.settle();
    if (this.refuses(this.loop.stories)) return;
    const going = this.loop.run(this.runLength());
    this.show();
    await going;
  }

  async stepBack() {
    const before = this.loop.stories.some((story) => story.written.length);
    if (await this.loop.back()) setText(this.parts.status, before ? "One step back." : "");
  }

  runLength() {
    return Math.max(1, Math.floor(Number(this.parts.count.value) || 1));
  }

  // The page's settings and seed; null if one of them is invalid.
  choices() {
    const settings = this.sampling?.settings() ?? null;
    const seed = parseSeed(this.parts.seed.value);
    setAttribute(this.parts.seed, "aria-invalid", seed === null ? "true" : null);
    setText(this.parts["seed-error"], seed === null ? SEED_ERROR : "");
    if (!settings || seed === null) return null;
    return { settings, seed, key: JSON.stringify([settings, String(seed)]) };
  }

  // --- showing -----------------------------------------------------------------------------

  showSoon() {
    if (this.frame) return;
    this.frame = requestAnimationFrame(() => {
      this.frame = 0;
      this.endRefusal();
      this.showDistribution();
      this.showCommand();
    });
  }

  show() {
    const { loop, parts } = this;
    if (!loop.model) return;
    const none = !loop.stories.length;
    const unwritten = loop.stories.every((story) => !story.written.length);
    setText(parts.run, loop.running ? "Stop" : "Run");
    const disabled = { step: none, run: none, back: unwritten, restart: unwritten };
    for (const [id, value] of Object.entries(disabled)) {
      setAttribute(parts[id], "aria-disabled", String(value));
    }
    document.body.classList.toggle("is-empty", none);
    // They show an earlier text until there is one again.
    for (const id of ["next-panel", "attention-panel", "inside-panel", "command-panel"]) {
      document.getElementById(id).inert = none;
    }
    for (const story of loop.stories) story.ended = loop.hasEnded(story);
    renderColumns(parts.columns, loop.stories, {
      active: loop.active,
      window: loop.model.window,
      trained: loop.model.trained_length,
      onChoose: (index) => {
        loop.active = index;
        this.show();
      },
    });
    this.showDistribution();
    this.showCommand();
    const { story } = loop;
    if (!story || loop.running) return;
    const tokens = [...story.prompt, ...story.written];
    this.panel.follow({ ids: story.ids }, tokens);
    this.inside.follow(story.ids, tokens);
  }

  showDistribution() {
    const choices = this.choices();
    const prediction = this.loop.story?.prediction;
    if (!choices || !prediction) return;
    try {
      this.drawDistribution(choices, prediction);
      if (this.undrawn) this.notices.clear();
      this.undrawn = false;
    } catch (error) {
      this.undrawn = true;
      this.notices.error(error);
    }
  }

  // The bars and the sampled number. This runs while a slider moves, so it must be fast.
  drawDistribution(choices, prediction) {
    const { loop, parts } = this;
    const { before, after } = loop.story.distribution(choices.settings);
    const next = loop.story.nextDraw(choices.settings, choices.seed);
    renderBars(parts.bars, barData(before, after, prediction.likeliest, loop.texts), {
      next: next.id,
      onPick: (id) => this.refuses([loop.story]) || loop.pick(id),
      label: "The next token; Enter chooses one by hand",
    });
    const few = prediction.likeliest.slice(0, PREVIEWED);
    renderBars(parts.preview, barData(before, after, few, loop.texts), { next: next.id });
    renderStrip(parts.strip, { after, texts: loop.texts, ...next });
    const { settings } = choices;
    this.sampling.showKept(prediction.logits, loop.story.ids, loop.texts);
    this.tour?.show({ story: loop.story, settings, after, next: next.id, texts: loop.texts });
    const about =
      `The page has the ${grouped(prediction.known)} most probable of ${grouped(before.length)} ` +
      "tokens and treats the others as equally probable.";
    setText(parts.known, prediction.known < before.length ? about : "");
  }

  showToken(token, uniform) {
    const name = `‘${tokenName(token.text, token.id)}’`;
    const after = percent(token.after);
    let words = `Sampled ${name} (${after}) with the random number ${uniform?.toFixed(4)}.`;
    if (uniform === null) words = `Took ${name}, the most probable token.`;
    if (token.byHand) words = `Chose ${name} by hand (${percent(token.before)} from the model).`;
    setText(this.parts.status, words);
  }

  showCommand() {
    const { loop, parts } = this;
    const choices = this.choices();
    if (!choices || !loop.model) return;
    const written = loop.stories.flatMap((story) => story.written);
    const longest = Math.max(0, ...loop.stories.map((story) => story.written.length));
    const command = generateCommand({
      checkpoint: loop.model.checkpoint,
      prompt: parts.prompt.value,
      settings: choices.settings,
      seed: choices.seed,
      count: longest || this.runLength(),
      samples: Number(parts.samples.value),
    });
    setText(parts.command, command);
    setText(parts["command-note"], commandNote(written, choices.key));
  }
}

new Playground().start();
