// The report's map of the validation text's losses: a strip of the whole text, the passage at one
// position, lists of passages, and the prediction and the attention at the hardest ones.
// Letters: K characters.

import { renderAttention } from "../static/attention.js";
import { renderBars } from "../static/bars.js";
import { make, setAttribute, setText } from "../static/dom.js";
import { mergedSpans } from "../static/samples.js";
import { counted, grouped, percent, visibleText } from "../static/text.js";
import { renderTokens } from "../static/tokens.js";
import { renderLossStrip } from "./loss_strip.js";
import {
  addBox,
  addSection,
  attentionData,
  farthestHead,
  keepDrawn,
  predictionData,
  quoted,
} from "./parts.js";
import { placeView } from "./training_place.js";

const SHOWN = 320; // characters of the passage
const STEP = 80; // characters that an arrow key moves
const LEVELS = 254;
const UNKNOWN = 255;

const STRIP_WORDS =
  "Height and shade: the mean loss of the characters at a place. Dotted line: the mean of the " +
  "text. Triangles: the hardest passages. Lines below: passages that are also in the training text.";

// The section of the report for data.loss_map, which may be null.
export function showLossMap({ loss_map: map }) {
  if (!map) return;
  const box = addSection("losses", "Loss map", introduction(map));
  const view = new LossMap(map, box);
  const [first] = map.hardest;
  if (first) view.select(first);
  else view.move(0);
  keepDrawn(() => view.draw());
}

function introduction(map) {
  const { mean, mean_of_characters: perCharacter, tokens, all_tokens: all, window } = map;
  const words = [
    "The loss of each character of the validation text under the best model, in nats: the negative " +
      `logarithm of its probability. The text is read in windows of ${grouped(window)} tokens, as ` +
      "mygpt eval reads it.",
  ];
  if (!map.by_character) {
    words.push(
      "A token's loss is divided equally among its characters; those of the bytes of one " +
        "character are added.",
    );
  }
  const own = map.by_character || perCharacter === null ? "" : `, ${perCharacter.toFixed(4)} per character`;
  words.push(`Mean: ${mean.toFixed(4)} nats per token${own}.`);
  if (tokens < all) {
    words.push(
      `This is the first part of the text, ${grouped(tokens)} of ${grouped(all)} predicted tokens: ` +
        "the report's time and size are limited. mygpt report RUN takes more time for it than the " +
        "report at the end of a training.",
    );
  }
  return words.join(" ");
}

// The losses (K,) of characters, NaN where unknown, from one byte each in base64.
export function decodedLosses(base64, largest) {
  const bytes = Uint8Array.from(atob(base64), (char) => char.charCodeAt(0));
  return Float64Array.from(bytes, (byte) =>
    byte === UNKNOWN ? NaN : largest * (byte / LEVELS) ** 2,
  );
}

class LossMap {
  constructor(map, box) {
    this.map = map;
    this.chars = Array.from(map.text);
    this.losses = decodedLosses(map.losses, map.largest);
    this.copied = mergedSpans(map.copied.spans, this.chars.length);
    this.length = Math.min(SHOWN, this.chars.length);
    this.start = 0;
    this.selected = null;
    this.sumLosses();
    this.build(box);
  }

  // Prefix sums, from which the mean of any part follows.
  sumLosses() {
    const count = this.losses.length;
    this.sums = new Float64Array(count + 1);
    this.known = new Float64Array(count + 1);
    this.losses.forEach((loss, n) => {
      const unknown = Number.isNaN(loss);
      this.sums[n + 1] = this.sums[n] + (unknown ? 0 : loss);
      this.known[n + 1] = this.known[n] + (unknown ? 0 : 1);
    });
    const sorted = this.losses.filter((loss) => !Number.isNaN(loss)).sort();
    // The loss of the darkest shade: a few rare characters have far higher ones.
    this.darkest = sorted[Math.floor(0.99 * (sorted.length - 1))] || 1;
    this.meanOf = (start, end) =>
      (this.sums[end] - this.sums[start]) / (this.known[end] - this.known[start]);
  }

  build(box) {
    this.strip = addBox(box);
    box.append(make("p", { class: "legend" }, STRIP_WORDS));
    this.buildControls(box);
    this.heading = make("h3", {});
    this.passage = make("div", { class: "page-view loss-passage" });
    this.detail = make("div", { class: "loss-detail" });
    this.buttons = new Map();
    box.append(this.heading, this.passage);
    this.buildLists(box);
    this.predictionHeading = make("h3", {});
    this.predictionWords = make("p", { class: "section-words" });
    this.bars = make("div", { class: "page-view" });
    this.detail.append(this.predictionHeading, this.predictionWords, this.bars);
    this.attention = addBox(this.detail, "Attention there");
  }

  buildControls(box) {
    const most = this.chars.length - this.length;
    const limits = { min: 0, max: Math.ceil(most / STEP) * STEP, step: STEP };
    this.slider = make("input", { type: "range", class: "loss-slider", ...limits });
    this.slider.addEventListener("input", () => this.move(Number(this.slider.value)));
    const button = (words, step) => {
      const made = make("button", { type: "button" }, words);
      made.addEventListener("click", () => this.move(this.start + step * this.length));
      return made;
    };
    const label = make("label", { class: "loss-position" }, "Position in the text", this.slider);
    box.append(
      make("div", { class: "loss-controls" }, label, button("Previous", -1), button("Next", 1)),
    );
  }

  buildLists(box) {
    const { hardest, easiest, copied, least_context: least } = this.map;
    const words =
      "By the mean loss of the passage. Characters with a context of fewer than " +
      `${counted(least, "token")}, at the beginning of a window, do not count.`;
    this.buildList(box, "Hardest passages", words, hardest);
    box.append(this.detail);
    if (easiest.length) this.buildList(box, "Easiest passages", "", easiest);
    this.buildList(box, "Also in the training text", copiedWords(this.map, this.copied), copied.longest);
  }

  buildList(box, title, words, passages) {
    box.append(make("h3", {}, title));
    if (words) box.append(make("p", { class: "section-words" }, words));
    if (!passages.length) return;
    const items = passages.map((passage) => {
      const { start, end, loss } = passage;
      const shown = loss ?? this.meanOf(start, end);
      const button = make(
        "button",
        { type: "button", class: "loss-pick", "aria-pressed": "false" },
        make("span", { class: "loss-mean" }, Number.isNaN(shown) ? "?" : shown.toFixed(2)),
        make("span", { class: "loss-text" }, visibleText(this.chars.slice(start, end).join(""), true)),
      );
      button.addEventListener("click", () => {
        this.select(passage);
        this.passage.scrollIntoView({ block: "nearest" });
      });
      this.buttons.set(passage, button);
      const place = placeView(passage.place);
      return make("li", {}, button, ...(place ? [place] : []));
    });
    box.append(make("ol", { class: "loss-list" }, ...items));
  }

  // Show a listed passage in the middle.
  select(passage) {
    const around = this.length - (passage.end - passage.start);
    this.selected = passage;
    this.show(passage.start - Math.max(0, Math.floor(around / 2)));
  }

  move(start) {
    this.selected = null;
    this.show(start);
  }

  show(start) {
    this.start = Math.min(Math.max(0, start), this.chars.length - this.length);
    for (const [passage, button] of this.buttons) {
      setAttribute(button, "aria-pressed", String(passage === this.selected));
    }
    this.draw();
  }

  draw() {
    const { start, selected } = this;
    const end = start + this.length;
    const mean = this.meanOf(start, end);
    const where =
      `Characters ${grouped(start + 1)} to ${grouped(end)} of ${grouped(this.chars.length)}` +
      (Number.isNaN(mean) ? "" : `, mean loss ${mean.toFixed(2)}`);
    this.slider.value = String(start);
    setAttribute(this.slider, "aria-valuetext", where);
    setText(this.heading, where);
    this.drawStrip(start, end);
    const tokens = this.chars.slice(start, end).map((text, n) => this.token(text, start + n));
    renderTokens(this.passage, { tokens }, {
      label: "Text, character by character",
      legend: ["loss 0", `${this.darkest.toFixed(1)} or more`],
      selected: selected?.worst ? selected.worst[0] - start : undefined,
    });
    this.drawReading(selected?.reading);
  }

  // A click near the triangle of a hardest passage selects it.
  moveOnStrip(position, near) {
    const distance = (passage) => Math.abs(centerOf(passage) - position);
    const nearest = this.map.hardest.find((passage) => distance(passage) <= near);
    if (nearest) this.select(nearest);
    else this.move(position - Math.floor(this.length / 2));
  }

  drawStrip(start, end) {
    const data = { count: this.chars.length, meanOf: this.meanOf, start, end };
    const marks = this.map.hardest.map(centerOf);
    const words = `The losses of the whole text, ${counted(data.count, "character")}`;
    const mean = this.meanOf(0, data.count);
    renderLossStrip(
      this.strip,
      { ...data, marks, mean, spans: this.copied, words },
      { onMove: (position, near) => this.moveOnStrip(position, near) },
    );
  }

  token(text, at) {
    const loss = this.losses[at];
    const { selected } = this;
    const isCopied = this.copied.some(([start, end]) => start <= at && at < end);
    const also = isCopied ? ", also in the training text" : "";
    return {
      text,
      probability: null,
      shade: Number.isNaN(loss) ? null : Math.min(1, loss / this.darkest),
      kind: selected && selected.start <= at && at < selected.end ? "chosen" : "written",
      note: (Number.isNaN(loss) ? "not predicted" : `loss ${lossWords(loss)}`) + also,
    };
  }

  drawReading(reading) {
    this.detail.hidden = !reading;
    if (!reading) return;
    const { came, prediction } = reading;
    setText(this.predictionHeading, `Prediction of ${quoted(came)}, the least expected there`);
    setText(this.predictionWords, predictionWords(reading));
    const label = "The most probable next tokens";
    renderBars(this.bars, predictionData(prediction, came), { next: came.id, label });
    const shown = attentionData(reading.attention, reading.tokens);
    const from = shown.tokens.length - 1;
    if (this.drawn === reading) renderAttention(this.attention, shown);
    else renderAttention(this.attention, shown, { ...farthestHead(shown), from });
    this.drawn = reading;
  }
}

function centerOf({ start, end }) {
  return (start + end) / 2;
}

// One byte a character distinguishes losses of 0.01 only where they are small.
function lossWords(loss) {
  return loss.toFixed(loss < 1 ? 2 : 1);
}

function predictionWords({ came, prediction, context, loss }) {
  const [id, text, before] = prediction.likeliest[0];
  const most = id === came.id ? "" : ` The most probable one was ${quoted({ id, text })}: ${percent(before)}.`;
  return (
    `After ${counted(context, "token")} of context the model gave ${quoted(came)} a probability of ` +
    `${percent(came.before)}, a loss of ${loss.toFixed(2)}.${most}`
  );
}

function copiedWords({ copied, text }, spans) {
  const { searched, least } = copied;
  if (!searched) return "Unknown: the training text is too long to search it for this page.";
  const length = Array.from(text).length;
  const part = searched < length ? `the first ${counted(searched, "character")} of ` : "";
  if (!spans.length) return `No passage of ${least} or more characters of ${part}this text.`;
  const share = spans.reduce((sum, [start, end]) => sum + end - start, 0) / searched;
  return (
    `${percent(share)} of ${part}this text is in passages of ${least} or more characters that are ` +
    "also in the training text. The longest:"
  );
}
