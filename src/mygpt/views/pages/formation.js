// The section of the report with a slider over a training's snapshots: what heads attend to, the
// loss by depth and by kind of token, the embeddings, a sample; and the loss without each head.

import { setSize } from "../static/axes.js";
import { make, makeSvg, setAttribute, setText } from "../static/dom.js";
import { grouped, visibleText } from "../static/text.js";
import { addBox, addSection, barCell, commandBox, keepDrawn, tableOf } from "./parts.js";
import { renderSeries } from "./series.js";

const PLAY_MS = 450; // from one snapshot to the next
const SHORT = ["previous", "same", "induction"]; // names of kinds of heads in a small cell
const LONGEST_LABEL = 8; // characters of a token in the picture

// Show the section; returns nothing, since it does not change while a training runs.
export function showFormation({ formation, costs }) {
  if (!formation) return;
  const words =
    "Measurements of the model at several steps of its training, on the beginning of the validation " +
    "text. The slider selects the step.";
  const box = addSection("formation", "Training, step by step", words);
  const slider = addSlider(box, formation);
  if (formation.story.length) box.append(storyList(formation.story, slider));
  const views = [
    headsView(box, formation),
    depthView(box, formation),
    kindsView(box, formation),
    embeddingView(box, formation),
    sampleView(box, formation),
  ];
  slider.onMove = () => {
    for (const view of views) view(slider.at);
  };
  keepDrawn(slider.onMove);
  if (costs) addCosts(formation, costs);
}

// A slider and a button that moves it. Its `at` is the index of the snapshot shown.
function addSlider(box, { steps, loss }) {
  const last = steps.length - 1;
  const range = { type: "range", id: "snapshot", min: 0, max: last, step: 1, value: last };
  const input = make("input", range);
  const play = make("button", { type: "button", class: "play" }, "Play");
  const output = make("output", { for: "snapshot", class: "snapshot-words" });
  const label = make("label", { for: "snapshot" }, "Step");
  box.append(make("div", { class: "snapshot-row" }, play, label, input), output);
  const slider = { at: last, onMove: null, move };
  let timer = null;
  const pause = () => {
    clearInterval(timer);
    timer = null;
    setText(play, "Play");
  };
  function move(at) {
    slider.at = at;
    input.value = at;
    const step = `step ${grouped(steps[at])}`;
    setAttribute(input, "aria-valuetext", step);
    setText(output, `After ${step} of ${grouped(steps[last])}: loss ${loss[at].toFixed(3)}.`);
    if (slider.onMove) slider.onMove();
  }
  play.addEventListener("click", () => {
    if (timer) return pause();
    setText(play, "Pause");
    move(slider.at === last ? 0 : slider.at);
    timer = setInterval(() => (slider.at < last ? move(slider.at + 1) : pause()), PLAY_MS);
  });
  input.addEventListener("input", () => {
    pause();
    move(Number(input.value));
  });
  move(last);
  return slider;
}

// What happened, each with a button that shows the snapshot.
function storyList(story, slider) {
  const items = story.map(({ at, step, text }) => {
    if (at === null) return make("li", {}, text);
    const button = make("button", { type: "button", class: "story-step" }, `Step ${grouped(step)}`);
    button.addEventListener("click", () => slider.move(at));
    return make("li", {}, button, " ", text);
  });
  return make("ul", { class: "story-list" }, ...items);
}

function headsView(box, { steps, scores, kinds_of_heads: kinds, threshold, uniform }) {
  const view = addBox(box, "What the heads attend to");
  const equal = uniform.map((value) => value.toFixed(2)).join(", ");
  const words =
    "On random tokens that are repeated: the fraction of its attention that a head gives to the " +
    "previous token, to the same token before, or to the token after that (induction); 1 is all " +
    `of it, and equal attention to all tokens gives ${equal}. The curves are the largest scores of ` +
    `all heads. A head is named by the kind if its score is ${threshold} or more.`;
  const chart = make("div");
  const wide = make("div", { class: "wide", tabindex: 0, role: "region", "aria-label": "Heads" });
  view.append(make("p", { class: "section-words" }, words), chart, wide);
  const series = kinds.map((name, kind) => ({
    name,
    values: scores.map((one) => Math.max(...one[kind].flat())),
  }));
  const level = { value: threshold, name: `a head is named from ${threshold} on` };
  return (at) => {
    const largest = series.map(({ name, values }) => `${name} ${values[at].toFixed(2)}`).join(", ");
    const text = `Largest head scores at step ${grouped(steps[at])}: ${largest}`;
    renderSeries(chart, { steps, series, at, low: 0, high: 1, digits: 2, level, words: text });
    wide.replaceChildren(headTable(scores[at], kinds, threshold));
  };
}

// A row for each block, a column for each head: its largest score and the kind of that.
function headTable(scores, kinds, threshold) {
  const count = scores[0][0].length;
  const columns = Array.from({ length: count }, (_, n) => `head ${n + 1}`);
  const rows = scores[0].map((_, block) => {
    const cells = Array.from({ length: count }, (__, head) => {
      const own = scores.map((kind) => kind[block][head]);
      const score = Math.max(...own);
      const kind = own.indexOf(score);
      const named = score >= threshold;
      const name = named ? make("span", { class: "head-kind" }, SHORT[kind]) : "";
      const title = `Head ${block + 1}.${head + 1}: ${kinds.map((k, n) => `${k} ${own[n].toFixed(2)}`).join(", ")}`;
      const cell = make("td", { class: named ? `head-cell head-${kind + 1}` : "head-cell", title });
      cell.append(make("span", {}, score.toFixed(2)), name);
      return cell;
    });
    return make("tr", {}, make("th", { scope: "row" }, `block ${block + 1}`), ...cells);
  });
  return tableOf("head-table", ["score", ...columns], rows);
}

function depthView(box, { lens }) {
  const view = addBox(box, "Loss after each block");
  const words =
    "The residual stream after the embedding and after each block, through the final norm and the " +
    "head (logit lens): how well the next token could be predicted there, in nats per token.";
  const most = Math.max(...lens.flat());
  const table = tableOf("baselines", ["after", "loss", ""], []);
  view.append(make("p", { class: "section-words" }, words), table);
  return (at) => {
    const rows = lens[at].map((loss, depth) =>
      make(
        "tr",
        {},
        make("th", { scope: "row" }, depth ? `block ${depth}` : "embedding"),
        make("td", {}, loss.toFixed(3)),
        barCell(loss / most),
      ),
    );
    table.tBodies[0].replaceChildren(...rows);
  };
}

function kindsView(box, { steps, kinds, kind_losses: losses }) {
  const view = addBox(box, "Loss by kind of token");
  const words = "The mean loss of the predicted tokens of each kind, the most frequent kind first.";
  const chart = make("div");
  view.append(make("p", { class: "section-words" }, words), chart);
  const series = kinds.map(([name, count], kind) => ({
    name: `${name} (${grouped(count)})`,
    values: losses.map((one) => one[kind]),
  }));
  const high = 1.04 * Math.max(...losses.flat());
  return (at) => {
    const text = `Loss by kind of token at step ${grouped(steps[at])}`;
    renderSeries(chart, { steps, series, at, low: 0, high, digits: 2, level: null, words: text });
  };
}

function embeddingView(box, { steps, tokens, positions, variance, kinds: lossKinds }) {
  const view = addBox(box, "Token embeddings");
  const words =
    `The ${tokens.length} most frequent tokens, along the two main axes of the last snapshot, which ` +
    `have ${Math.round(100 * variance)}% of the embeddings' variance. Earlier snapshots are rotated ` +
    "to fit the next one.";
  // In the order, and so in the colours, of the losses by kind.
  const own = new Set(tokens.map(([, kind]) => kind));
  const names = lossKinds.map(([name]) => name);
  const kinds = [...names, ...own].filter((kind, n, all) => own.has(kind) && all.indexOf(kind) === n);
  const key = make("div", { class: "curves-key" });
  kinds.forEach((kind, n) => key.append(make("span", { class: `key key-kind kind-${n % 8}` }, kind)));
  const picture = makeSvg("svg", { class: "embedding", role: "img" });
  const labels = tokens.map(([text, kind]) => {
    const shown = Array.from(visibleText(text)).slice(0, LONGEST_LABEL).join("");
    const number = kinds.indexOf(kind) % 8;
    return makeSvg("text", { class: `embedding-token kind-${number}` }, shown);
  });
  picture.append(...labels);
  view.append(make("p", { class: "section-words" }, words), key, picture);
  const most = Math.max(1e-9, ...positions.flat(2).map(Math.abs));
  return (at) => {
    const width = view.clientWidth || 320;
    const height = Math.min(440, Math.max(260, 0.6 * width));
    setSize(picture, width, height);
    const step = grouped(steps[at]);
    setAttribute(picture, "aria-label", `Embeddings of ${tokens.length} tokens at step ${step}`);
    labels.forEach((label, n) => {
      const [x, y] = positions[at][n];
      setAttribute(label, "x", (width / 2 + (x / most) * (width / 2 - 24)).toFixed(1));
      setAttribute(label, "y", (height / 2 + 5 - (y / most) * (height / 2 - 14)).toFixed(1));
    });
  };
}

function sampleView(box, { samples }) {
  if (!samples.some(Boolean)) return () => {};
  const view = addBox(box, "Sample");
  const text = make("p", { class: "sample-text" });
  view.append(text);
  const shown = (char) => (char === "\n" ? char : visibleText(char, true));
  return (at) => setText(text, Array.from(samples[at], shown).join(""));
}

// The validation loss without each head, the largest rise first.
function addCosts({ formed }, costs) {
  const words = "The best model on the whole validation text, with one head switched off.";
  const box = addSection("costs", "Loss without each head", words);
  if (costs.loss === null) {
    const late = `Not measured: it takes longer than ${costs.seconds} seconds.`;
    box.append(make("p", {}, late));
  } else {
    const step = costs.step === null ? "" : ` of step ${grouped(costs.step)}`;
    const all = `With all heads, the model${step} has a loss of ${costs.loss.toFixed(4)} nats per token`;
    box.append(make("p", {}, `${all}, on ${grouped(costs.tokens)} tokens.`));
    if (costs.rows.length) box.append(costTable(formed, costs));
    const left = costs.heads - costs.rows.length;
    if (left) {
      const more =
        `${grouped(left)} of ${grouped(costs.heads)} heads are not listed: this report takes at most ` +
        `${costs.seconds} seconds for them. mygpt report RUN takes up to 10 seconds, the report at the ` +
        "end of a training 1% of the training's time.";
      box.append(make("p", { class: "section-words" }, more));
    }
  }
  if (costs.command) box.append(commandBox("The same, for one head:", costs.command));
}

function costTable(formed, { loss, rows }) {
  const kindOf = new Map(formed.map(({ head, kind }) => [head, kind]));
  const sorted = [...rows].sort((a, b) => b[1] - a[1]);
  const lines = sorted.map(([head, without]) => {
    const rise = without - loss;
    return make(
      "tr",
      {},
      make("th", { scope: "row" }, head),
      make("td", {}, kindOf.get(head) ?? ""),
      make("td", {}, without.toFixed(4)),
      make("td", {}, `${rise < 0 ? "−" : "+"}${Math.abs(rise).toFixed(4)}`),
    );
  });
  return tableOf("baselines costs", ["head off", "kind", "loss", "difference"], lines);
}
