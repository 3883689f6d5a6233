// The page of `mygpt report`: a run's diagnosis, loss curves, samples, copied passages, attention,
// loss map, and the commands to reproduce it. While a training runs, live.js shows the same page.

import { renderAttention } from "../static/attention.js";
import { renderCurves } from "../static/curves.js";
import { make, setText } from "../static/dom.js";
import { renderSamples } from "../static/samples.js";
import { grouped, percent, visibleText } from "../static/text.js";
import { renderTokens } from "../static/tokens.js";
import { showFormation } from "./formation.js";
import { renderLine } from "./lines.js";
import { showLossMap } from "./loss_map.js";
import {
  addBox,
  addNotes,
  addSection,
  attentionData,
  barCell,
  beginPage,
  commandBox,
  factList,
  farthestHead,
  keepDrawn,
  pageData,
  quoted,
  sentence,
  showPart,
  tableOf,
  tokenData,
} from "./parts.js";
import { placeView } from "./training_place.js";

const DROPOUT =
  "Dropout is active only in training steps, so the training loss can be above the validation loss.";

const PACE = { rate: "Learning rate, by step", speed: "Tokens a second, by step" };

const ownData = pageData();
if (ownData) showReport(ownData); // the page of live.js has no data

// Show a report; called again, only the parts whose data has changed are shown again.
export function showReport(data) {
  showPart(showHead, data, ["name", "standing", "progress", "verdict", "facts"]);
  showPart(showCurves, data, ["curves", "dropout", "troubles", "standing"]);
  showPart(showTable, data, ["table", "bounds"]);
  showPart(showPace, data, ["rate", "speed"]);
  showPart(showFormation, data, ["formation", "costs"]);
  showPart(showSamples, data, ["samples", "written", "copied_chars"]);
  showPart(showPassages, data, ["passages", "places", "written", "copied_chars"]);
  showPart(showReading, data, ["reading"]);
  showPart(showLossMap, data, ["loss_map"]);
  showPart(showPlan, data, ["plan", "commands"]);
  showPart(showNotes, data, ["notes"]);
}

function showHead(data) {
  const head = beginPage("report", data.name, []);
  head.append(make("p", { class: `standing is-${data.standing}` }, `${data.progress}.`));
  if (data.verdict) head.append(make("p", { class: "verdict" }, sentence(data.verdict)));
  head.append(factList(data.facts));
}

// The curves are updated in place: a reader may have chosen an axis, or be on one of their points.
function showCurves(data) {
  const box = addSection(
    "curves",
    "Loss",
    "The loss is the mean negative log-probability of the next token; lower is better. Horizontal " +
      "lines are the losses of simpler models.",
  );
  const empty = make("p", { class: "section-words" });
  const note = make("p", { class: "section-words" }, DROPOUT);
  const view = make("div", { class: "page-view" });
  const list = make("ul", { class: "troubles" });
  box.append(empty, note, view, list);
  let shown = null;
  const update = ({ curves, dropout, troubles, standing }) => {
    const any = curves.training.length > 0 || curves.validation.length > 0;
    shown = any ? lossCurves(curves, standing) : null;
    empty.hidden = any;
    setText(empty, standing === "training" ? "Nothing has been reported yet." : "The log is empty.");
    note.hidden = !dropout || !curves.validation.length;
    list.hidden = !troubles.length;
    list.replaceChildren(
      ...troubles.map(([step, text]) => make("li", {}, `Step ${grouped(step)}: ${text}.`)),
    );
    if (shown) renderCurves(view, shown);
  };
  keepDrawn(() => shown && renderCurves(view, shown));
  update(data);
  return update;
}

// The data of renderCurves.
function lossCurves(curves, standing) {
  const points = (rows) => rows.map(([step, seconds, loss]) => ({ step, seconds, loss }));
  const validation = points(curves.validation);
  const series = [{ name: "training", role: "training", points: points(curves.training) }];
  if (validation.length) series.push({ name: "validation", role: "validation", points: validation });
  const best = validation.reduce((low, p) => (low && low.loss <= p.loss ? low : p), null);
  return { series, best, baselines: curves.baselines, growing: standing === "training" };
}

function showTable({ table, bounds }) {
  if (!table.length) return;
  const words = "On the validation text, from worst to best.";
  const box = addSection("table", "Baselines", bounds ? `${words} (${bounds})` : words);
  const most = Math.max(...table.map(([, bits]) => bits));
  const rows = table.map(([name, bits, loss]) => tableRow(name, bits, loss, most));
  box.append(tableOf("baselines", ["model", "bits per byte", "", "nats per token"], rows));
}

function tableRow(name, bits, loss, most) {
  return make(
    "tr",
    { class: name === "this model" ? "is-ours" : null },
    make("th", { scope: "row" }, name),
    make("td", {}, bits.toFixed(3)),
    barCell(bits / most),
    make("td", {}, loss === null ? "" : loss.toFixed(4)),
  );
}

function showPace(data) {
  const names = Object.keys(PACE).filter((name) => data[name].length > 1);
  if (!names.includes("rate")) return null;
  let shown = data;
  const box = addSection("pace", "Learning rate and speed");
  const pair = make("div", { class: "pair" });
  box.append(pair);
  const draws = names.map((name) => {
    const part = make("div", { class: "pair-part" });
    pair.append(part);
    const view = addBox(part, PACE[name]);
    return () => renderLine(view, { points: shown[name], words: PACE[name] });
  });
  draws.forEach(keepDrawn);
  if (names.length < Object.keys(PACE).length) return null; // the other one may be added
  return (newer) => {
    shown = newer;
    for (const draw of draws) draw();
  };
}

function showSamples({ samples, written, copied_chars: copiedChars }) {
  const all = [...samples];
  if (written) {
    const step = written.step ? `, step ${grouped(written.step)}` : "";
    all.push({ ...written, title: `The best model${step}` });
  }
  if (!all.length) return;
  const words = "Generated without a prompt, each with a different seed.";
  const box = addSection("samples", "Samples", words);
  renderSamples(addBox(box), all, { copiedChars });
}

function showPassages({ passages, places, written, copied_chars: least }) {
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
  const items = passages.map((one, n) => {
    const place = placeView(places[n]);
    const from = one.document ? `, also in ${one.document}` : "";
    const step = one.step === null ? "best model's sample" : `sample of step ${grouped(one.step)}`;
    return make(
      "li",
      {},
      make("p", { class: "copied-text" }, make("mark", { class: "copied" }, one.text)),
      make("p", { class: "copied-words" }, `${grouped(one.length)} characters, ${step}${from}`),
      ...(place ? [place] : []),
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
  if (!plan.length && !commands.length) return;
  const box = addSection("plan", "Settings");
  box.append(factList(plan));
  for (const [words, command] of commands) {
    if (command) box.append(commandBox(`${words}:`, command));
  }
}

function showNotes({ notes }) {
  addNotes(notes.map(sentence));
}
