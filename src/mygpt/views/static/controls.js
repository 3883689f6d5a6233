// The sliders of the sampling settings, each with a number field and an explanation.

import { make, setAttribute, setText } from "./dom.js";
import {
  GREEDY_BELOW,
  NEUTRAL,
  filterLogits,
  likeliestFirst,
  nucleus,
  settingsError,
} from "./sampling.js";
import { grouped, percent, tokenName } from "./text.js";

const MOST_TOP_K = 100;
const MOST_ADDED = 4; // probabilities that are added up in words

// In the order in which they are applied.
const CONTROLS = [
  {
    name: "repetition_penalty",
    label: "Repetition penalty",
    range: [0.5, 2, 0.05],
    neutral: 1,
    words: "Above 1 makes tokens of the text so far less probable; 1 changes nothing.",
  },
  {
    name: "temperature",
    label: "Temperature",
    range: [0, 3, 0.05],
    neutral: 1,
    words: "Below 1 sharpens the distribution, above 1 flattens it; 0 takes the most probable token.",
  },
  {
    name: "top_k",
    label: "Top-k",
    range: [0, MOST_TOP_K, 1],
    neutral: 0,
    words: "Keeps only the k most probable tokens; 0 keeps all.",
  },
  {
    name: "top_p",
    label: "Top-p",
    range: [0.01, 1, 0.01],
    neutral: 1,
    words: "Keeps the most probable tokens, until they add up to this; 1 keeps all.",
  },
  {
    name: "min_p",
    label: "Min-p",
    range: [0, 1, 0.01],
    neutral: 0,
    words: "Drops tokens below this fraction of the highest probability; 0 keeps all.",
  },
];

const PRESETS = [
  ["Plain", {}, "Sample from the model's distribution"],
  ["Greedy", { temperature: 0 }, "Always take the most probable token"],
  ["Focused", { temperature: 0.8, top_k: 10 }, "Temperature 0.8, the 10 most probable tokens"],
];

// Build the sliders into `element`; `onChange()` is called after each change.
// Returns { settings(): SamplingConfig's fields, or null if a value is invalid;
//           error(): why a value is invalid, or an empty string;
//           set(values): sets the fields; those without a value are off;
//           showKept(logits, ids, texts): what top-p keeps of these logits (V,) }.
export function buildControls(element, { vocabSize, onChange }) {
  const fields = new Map();
  const error = make("p", { class: "error-line", role: "alert" });
  const read = () => settingsOf(fields);
  const changed = () => {
    setText(error, settingsError(read()));
    showPreset(presets, read());
    onChange();
  };
  const set = (values) => {
    setFields(fields, values);
    changed();
  };
  const presets = PRESETS.map(([name, values, title]) => {
    const button = make("button", { type: "button", title, "data-preset": name }, name);
    button.addEventListener("click", () => set(values));
    return button;
  });
  element.replaceChildren(
    make("div", { class: "presets", role: "group", "aria-label": "Presets" }, ...presets),
    ...CONTROLS.map((control) => buildControl(control, fields, vocabSize, changed)),
    error,
  );
  const kept = make("p", { class: "control-words", id: "kept" });
  fields.get("top_p").slider.after(kept);
  showPreset(presets, read());
  return {
    settings: () => (settingsError(read()) ? null : read()),
    error: () => settingsError(read()),
    set,
    showKept: (logits, ids, texts) => setText(kept, keptWords(logits, read(), ids, texts)),
  };
}

// What top-p keeps, in words; empty where it is off or there is nothing to sample.
// logits: (V,) of the model; ids: (T,), the text so far; texts: by id.
function keptWords(logits, settings, ids, texts) {
  const { temperature, top_p: p } = settings;
  if (p === null || p >= 1 || temperature < GREEDY_BELOW) return "";
  const open = filterLogits(logits, { ...settings, top_p: null, min_p: null }, ids);
  const probs = nucleus(open, p);
  const size = `${grouped(probs.length)} of ${grouped(logits.length)} tokens`;
  const sum = percent(probs.reduce((total, prob) => total + prob, 0));
  if (probs.length > MOST_ADDED) return `Now it keeps ${size}, together ${sum}.`;
  const parts = likeliestFirst(open, probs.length).map(
    (id, n) => `‘${tokenName(texts[id], id)}’ ${percent(probs[n])}`,
  );
  const total = parts.length > 1 ? ` = ${sum}` : "";
  return `Now it keeps ${size}: ${parts.join(" + ")}${total}.`;
}

// Mark the preset that has these settings, if one has.
function showPreset(buttons, settings) {
  PRESETS.forEach(([, values], place) => {
    const same = Object.keys(NEUTRAL).every(
      (name) => settings[name] === (values[name] ?? NEUTRAL[name]),
    );
    setAttribute(buttons[place], "aria-pressed", String(same));
  });
}

function buildControl(control, fields, vocabSize, changed) {
  const { name, label, range, neutral, words } = control;
  const most = name === "top_k" ? Math.min(range[1], vocabSize) : range[1];
  const [id, wordsId] = [`control-${name}`, `control-${name}-words`];
  const bounds = { min: range[0], max: most, step: range[2], value: neutral };
  const slider = make("input", { type: "range", id, "aria-describedby": wordsId, ...bounds });
  const number = make("input", { type: "number", id: `${id}-number`, step: "any", value: neutral });
  number.setAttribute("aria-label", `${label} as a number`);
  slider.addEventListener("input", () => {
    number.value = slider.value;
    changed();
  });
  number.addEventListener("input", () => {
    slider.value = number.value === "" ? neutral : number.value;
    changed();
  });
  fields.set(name, { slider, number, neutral });
  return make(
    "div",
    { class: "control" },
    make("div", { class: "control-head" }, make("label", { for: id }, label), number),
    slider,
    make("p", { class: "control-words", id: wordsId }, words),
  );
}

function setFields(fields, values) {
  for (const [name, { slider, number, neutral }] of fields) {
    slider.value = String(values[name] ?? neutral);
    number.value = String(values[name] ?? neutral);
  }
}

// A field that is empty or at its neutral value is off.
function settingsOf(fields) {
  const settings = { ...NEUTRAL };
  for (const [name, { number, neutral }] of fields) {
    let value = number.value === "" ? neutral : Number(number.value);
    if (number.validity.badInput) value = NaN;
    if (value !== neutral) settings[name] = value;
  }
  return settings;
}
