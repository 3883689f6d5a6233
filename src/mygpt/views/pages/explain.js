// The page of `mygpt explain`: a text token by token, what else it might have been, the window,
// and attention.

import { renderAttention } from "../static/attention.js";
import { renderBars } from "../static/bars.js";
import { make, setText } from "../static/dom.js";
import { counted, grouped, percent } from "../static/text.js";
import { renderTokens } from "../static/tokens.js";
import { renderWindow } from "../static/window.js";
import {
  addBox,
  addSection,
  attentionData,
  beginPage,
  commandBox,
  farthestHead,
  keepDrawn,
  pageData,
  predictionData,
  quoted,
  tokenData,
} from "./parts.js";

showExplanation(pageData());

function showExplanation(data) {
  const { about } = data;
  const head = beginPage("explain", about.name, [
    `${grouped(about.parameters)} parameters, ${about.tokenizer} tokens, ` +
      `a vocabulary of ${grouped(about.vocab_size)}, a window of ${grouped(about.window)}.`,
    settingsWords(data),
  ]);
  head.append(commandBox("The same text, on the command line:", about.command));
  showText(data);
  showWindow(data);
  showAttention(data);
}

function settingsWords({ sampling, seed, tokens }) {
  const written = tokens.filter((token) => token.written).length;
  const greedy = sampling.temperature < 1e-30 || sampling.top_k === 1;
  const filters = [
    ["repetition_penalty", "a repetition penalty of "],
    ["temperature", "temperature "],
    ["top_k", "top-k "],
    ["top_p", "top-p "],
    ["min_p", "min-p "],
  ]
    .filter(([name]) => sampling[name] !== null)
    .map(([name, words]) => `${words}${sampling[name]}`);
  const how = greedy ? "always the likeliest" : `${filters.join(", ")}, seed ${seed}`;
  return `${counted(written, "token")} written by the model: ${how}.`;
}

function showText(data) {
  const box = addSection(
    "text",
    "Token by token",
    "The deeper a token's colour, the likelier the model held it. Choose one to see what else " +
      "might have stood there.",
  );
  const text = addBox(box);
  const heading = make("h3", { class: "chosen", "aria-live": "polite" });
  const words = make("p", { class: "section-words" });
  const bars = make("div", { class: "page-view" });
  const next = make("button", { type: "button" }, "What may come next");
  box.append(heading, words, bars, next);
  const choose = (place) => {
    const token = place === null ? null : data.tokens[place];
    const prediction = token ? token.prediction : data.next;
    setText(heading, token ? `In place of ${quoted(token)}, token ${place + 1}` : "Next");
    setText(words, prediction ? predictionWords(prediction, token) : unpredicted(place));
    bars.hidden = !prediction;
    next.hidden = place === null;
    if (prediction) renderBars(bars, shortened(prediction, token), { next: token?.id });
  };
  next.addEventListener("click", () => choose(null));
  renderTokens(text, tokenData(data.tokens, data.window_start), { onSelect: choose });
  choose(null);
}

// At most a screen of bars.
function shortened(prediction, came) {
  const most = 20;
  const likeliest = prediction.likeliest.slice(0, most);
  const others = prediction.others + prediction.likeliest.length - likeliest.length;
  return predictionData({ likeliest, others }, came);
}

function predictionWords(prediction, came) {
  const vocabulary = prediction.likeliest.length + prediction.others;
  const left =
    prediction.kept === vocabulary
      ? "No token is filtered out."
      : `The settings leave ${grouped(prediction.kept)} of ${grouped(vocabulary)} tokens.`;
  if (!came) return left;
  return `${quoted(came)} had ${percent(came.before)} under the model itself, and ${percent(
    came.after,
  )} under the settings. ${left}`;
}

function unpredicted(place) {
  if (place > 0) {
    return "The model never read this far back: the prompt is longer than its window.";
  }
  return "The text begins here: nothing came before it to predict it from.";
}

function showWindow(data) {
  const box = addSection(
    "window",
    "What the model sees",
    "A model has no memory but its window. What lies before it is forgotten.",
  );
  const { tokens, window_start: start, about } = data;
  renderWindow(addBox(box), { length: tokens.length, start, window: about.window });
  if (start > 0) {
    const end = tokens.slice(Math.max(0, start - 60), start);
    const words = end.map((token) => token.text).join("");
    box.append(make("p", { class: "section-words" }, "The last that it has forgotten:"));
    box.append(make("blockquote", { class: "forgotten" }, words));
  }
}

function showAttention(data) {
  const { start, thousandths } = data.attention;
  const part = start > data.window_start ? ` The picture shows the last ${data.attention.size}.` : "";
  const box = addSection(
    "attention",
    "Where it looks",
    `To predict what comes next, each of ${counted(thousandths.length, "layer")} with ` +
      `${counted(thousandths[0].length, "head")} draws on the tokens before.${part}`,
  );
  const view = addBox(box);
  const shown = attentionData(data.attention, data.tokens);
  renderAttention(view, shown, farthestHead(shown));
  keepDrawn(() => renderAttention(view, shown));
}
