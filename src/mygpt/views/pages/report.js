// The page of `mygpt report`: a run's diagnosis, loss curves, samples, copied passages, attention,
// and the commands to reproduce it.

import { renderAttention } from "../static/attention.js";
import { renderCurves } from "../static/curves.js";
import { make, makeSvg } from "../static/dom.js";
import { renderSamples } from "../static/samples.js";
import { grouped, percent, visibleText } from "../static/text.js";
import { renderTokens } from "../static/tokens.js";
import { renderLine } from "./lines.js";
import {
  addBox,
  addNotes,
  addSection,
  attentionData,
  beginPage,
  commandBox,
  factList,
  farthestHead,
  keepDrawn,
  pageData,
  quoted,
  sentence,
  tokenData,
} from "./parts.js";

const DROPOUT =
  "Dropout is active only in training steps, so the training loss can be above the validation loss.";

showReport(pageData());

function showReport(data) {
  const head = beginPage("report", data.name, []);
  head.append(make("p", { class: `standing is-${data.standing}` }, `${data.progress}.`));
  if (data.verdict) head.append(make("p", { class: "verdict" }, sentence(data.verdict)));
  head.append(factList(data.facts));
  showCurves(data);
  showTable(data);
  showPace(data);
  showSamples(data);
  showPassages(data);
  showReading(data);
  showPlan(data);
  addNotes(data.notes.map(sentence));
}

function showCurves({ curves, dropout, troubles, standing }) {
  const box = addSection(
    "curves",
    "Loss",
    "The loss is the mean negative log-probability of the next token; lower is better. Horizontal " +
      "lines are the losses of simpler models.",
  );
  if (!curves.training.length && !curves.validation.length) {
    const words = standing === "training" ? "Nothing has been reported yet." : "The log is empty.";
    box.append(make("p", { class: "section-words" }, words));
    return;
  }
  const points = (rows) => rows.map(([step, seconds, loss]) => ({ step, seconds, loss }));
  const validation = points(curves.validation);
  const series = [{ name: "training", role: "training", points: points(curves.training) }];
  if (validation.length) series.push({ name: "validation", role: "validation", points: validation });
  const best = validation.reduce((low, p) => (low && low.loss <= p.loss ? low : p), null);
  if (dropout && validation.length) box.append(make("p", { class: "section-words" }, DROPOUT));
  const view = addBox(box);
  keepDrawn(() => renderCurves(view, { series, best, baselines: curves.baselines }));
  if (troubles.length) {
    const list = troubles.map(([step, text]) => make("li", {}, `Step ${grouped(step)}: ${text}.`));
    box.append(make("ul", { class: "troubles" }, ...list));
  }
}

function showTable({ table, bounds }) {
  if (!table.length) return;
  const words = "On the validation text, from worst to best.";
  const box = addSection("table", "Baselines", bounds ? `${words} (${bounds})` : words);
  const most = Math.max(...table.map(([, bits]) => bits));
  const rows = table.map(([name, bits, loss]) => tableRow(name, bits, loss, most));
  const column = (name) => make("th", { scope: "col" }, name);
  const head = [column("model"), column("bits per byte"), make("td"), column("nats per token")];
  const body = make("tbody", {}, ...rows);
  box.append(make("table", { class: "baselines" }, make("thead", {}, make("tr", {}, ...head)), body));
}

function tableRow(name, bits, loss, most) {
  const full = { width: ((100 * bits) / most).toFixed(2), height: 10 };
  const bar = makeSvg("svg", { viewBox: "0 0 100 10", preserveAspectRatio: "none" });
  bar.append(makeSvg("rect", full));
  bar.setAttribute("aria-hidden", "true");
  return make(
    "tr",
    { class: name === "this model" ? "is-ours" : null },
    make("th", { scope: "row" }, name),
    make("td", {}, bits.toFixed(3)),
    make("td", { class: "baseline-bar" }, bar),
    make("td", {}, loss === null ? "" : loss.toFixed(4)),
  );
}

function showPace({ rate, speed }) {
  if (rate.length < 2) return;
  const box = addSection("pace", "Learning rate and speed");
  const pair = make("div", { class: "pair" });
  box.append(pair);
  const charts = [["Learning rate, by step", rate], ["Tokens a second, by step", speed]];
  for (const [words, points] of charts) {
    if (points.length < 2) continue;
    const part = make("div", { class: "pair-part" });
    pair.append(part);
    const view = addBox(part, words);
    keepDrawn(() => renderLine(view, { points, words }));
  }
}

function showSamples({ samples, written, copied_chars: copiedChars }) {
  const all = [...samples];
  if (written) {
    const step = written.step ? `, step ${grouped(written.step)}` : "";
    all.push({ ...written, title: `The best model${step}` });
  }
  if (!all.length) return;
  const words = "Generated without a prompt, each with another seed.";
  const box = addSection("samples", "Samples", words);
  renderSamples(addBox(box), all, { copiedChars });
}

function showPassages({ passages, written, copied_chars: least }) {
  if (!written && !passages.length) return;
  const box = addSection("copied", "Copied passages");
  const words = [];
  if (!passages.length && written && written.novelty) {
    words.push(`No sample contains a passage of ${least} or more characters of the training text.`);
  }
  if (!passages.length && written && !written.novelty) {
    words.push("Unknown: the training text is unavailable.");
  }
  if (written && written.novelty) words.push(`Best model's sample: ${visibleText(written.novelty, true)}.`);
  for (const line of words) box.append(make("p", { class: "section-words" }, line));
  const items = passages.map((one) => {
    const from = one.document ? `, also in ${one.document}` : "";
    const step = one.step === null ? "best model's sample" : `sample of step ${grouped(one.step)}`;
    return make(
      "li",
      {},
      make("p", { class: "copied-text" }, make("mark", { class: "copied" }, one.text)),
      make("p", { class: "copied-words" }, `${grouped(one.length)} characters, ${step}${from}`),
    );
  });
  if (items.length) box.append(make("ol", { class: "copied-list" }, ...items));
}

function showReading({ reading }) {
  if (!reading) return;
  const box = addSection(
    "reading",
    "Token probabilities of the best model",
    `A passage from ${reading.from}. The darker a token's colour, the higher its probability.`,
  );
  renderTokens(addBox(box), tokenData(reading.tokens, reading.window_start, false));
  const surprise = leastExpected(reading.tokens);
  if (surprise) {
    const words = `The least probable token is ${quoted(surprise)}: ${percent(surprise.before)}.`;
    box.append(make("p", { class: "section-words" }, words));
  }
  const view = addBox(box, "Attention");
  const shown = attentionData(reading.attention, reading.tokens);
  renderAttention(view, shown, farthestHead(shown));
  keepDrawn(() => renderAttention(view, shown));
}

function leastExpected(tokens) {
  const judged = tokens.filter((token) => token.before !== null);
  return judged.reduce((low, one) => (low && low.before <= one.before ? low : one), null);
}

function showPlan({ plan, commands }) {
  const box = addSection("plan", "Settings");
  box.append(factList(plan));
  for (const [words, command] of commands) {
    if (command) box.append(commandBox(`${words}:`, command));
  }
}
