// The steps of the guided tour: what each sets on the page, and what it says to look at.
// The numbers of sections, the prompt and the counts are those of the tutorial's chapter 15.

import { counted, grouped } from "./text.js";

const MOST_TOKENS = 1000; // that the page generates at once
const PAST = 8; // tokens past a length, so that something is seen there
const CYCLE = ["I", "love", "AI", "!"];

// Whether a model has the chapter's four words.
export function isOfChapter(model) {
  return model.tokens?.length === CYCLE.length && CYCLE.every((w, n) => model.tokens[n] === w);
}

// The tour for a model: [{ name, section, title, settings, count, prompt, slow, cycle, words }].
//   settings: SamplingConfig's fields; count: tokens of a run; prompt: null keeps the present one;
//   slow: whether the loop waits at each line; cycle: whether the words expected are shown;
//   words: the sentences.
export function tourSteps(model) {
  const chapter = isOfChapter(model);
  const size = model.vocab_size;
  return [
    {
      name: "Loop",
      section: "15.1",
      title: "The autoregressive loop",
      slow: true,
      words: [
        "A GPT generates one token at a time, and these four lines are all of it.",
        "Press Step: each line lights up as it runs, and the drawn token joins the text.",
        "Only the logits of the last position are used: they predict the next token.",
      ],
    },
    {
      name: "Greedy",
      section: "15.3",
      title: "Greedy decoding",
      settings: { top_k: 1 },
      words: [
        "Greedy decoding takes the largest logit; top_k=1 does the same, since every other logit " +
          "becomes −∞ and its probability 0. The button Greedy sets temperature 0: the same text.",
        "Press Run, then Start over and Run with another seed: the text is the same.",
        chapter ? "Seven new tokens complete the cycle: I love AI ! I love AI !" : "",
      ],
    },
    {
      name: "Sampling",
      section: "15.4",
      title: "Sampling from the softmax",
      words: [
        "Sampling draws a token by its probability. In the strip under the bars each token is as " +
          "wide as its probability, and the token under the marker, a random number, is drawn.",
        "Press Run, then New beside the seed, Start over and Run.",
        chapter
          ? "This model is so sure that 977 of 1,000 such texts keep the cycle."
          : "Each seed has its own text.",
      ],
    },
    {
      name: "Temperature",
      section: "15.5",
      title: "Temperature",
      settings: { temperature: chapter ? 5 : 2 },
      words: [
        "The logits are divided by the temperature before softmax: compare the three columns. The " +
          "order of the tokens stays. Above 1 the probabilities come closer to each other, below 1 " +
          "they move apart.",
        "Set the temperature to 0.5, to 2 and to 100 in its number field, and Run each time.",
        chapter
          ? "Of 1,000 such texts 977 keep the cycle at temperature 1, 631 at 2, 274 at 3, 40 at 5 " +
            "and none at 100."
          : "",
      ],
    },
    {
      name: "Top-k",
      section: "15.6",
      title: "Top-k sampling",
      settings: { temperature: chapter ? 5 : 2, top_k: chapter ? 2 : Math.min(5, size) },
      words: [
        "Top-k keeps the k largest logits and sets all others to −∞, so that their probability " +
          "is exactly 0. The probabilities of the kept ones are divided by their sum: they add up " +
          "to 1, in the same ratio as before.",
        `Set k to 1 (greedy) and to 0 (all ${grouped(size)} tokens) and compare the last column.`,
      ],
    },
    {
      name: "Top-p",
      section: "15.11",
      title: "Top-p sampling (exercise 3)",
      settings: { temperature: chapter ? 5 : 2, top_p: 0.9 },
      words: [
        "Top-p keeps tokens from the most probable one on, until their probabilities add up to p, " +
          "and drops the others. The line under Top-p in the settings shows the sum.",
        "Where the model is sure, the first token is enough; where it is not, many are kept. Top-k " +
          "keeps k tokens in both cases.",
        "Set the temperature to 1 and then to 100: how many tokens are kept?",
      ],
    },
    windowStep(model),
    driftStep(model, chapter),
  ].map((step) => ({
    settings: {},
    count: 7,
    prompt: chapter ? CYCLE[0] : null,
    slow: false,
    cycle: false,
    ...step,
    words: step.words.filter(Boolean),
  }));
}

function windowStep({ window, trained_length: trained }) {
  const longer = window + PAST;
  return {
    name: "Window",
    section: "15.7",
    title: "The context window",
    settings: { top_k: 1 },
    count: Math.min(MOST_TOKENS, longer),
    words: [
      `The model reads at most ${counted(window, "token")}, its context window.`,
      longer > MOST_TOKENS
        ? "Once a text is longer, line 1 crops it, and its first tokens have no influence any more."
        : "Press Run: once the text is longer, line 1 crops it, and the first tokens (pale) have " +
          "no influence any more.",
      trained && trained < window
        ? "The line in the strip under the text marks another length: the longest in training."
        : "",
    ],
  };
}

function driftStep({ window, trained_length: trained }, chapter) {
  const known = trained ?? (chapter ? 8 : null);
  const step = {
    name: "Drift",
    section: "15.9",
    title: "Past the trained length",
    settings: { top_k: 1 },
    cycle: chapter,
  };
  if (known === null || known >= window) {
    const words = known
      ? `This model was trained with its full window of ${counted(window, "token")}, so no ` +
        "position in it is untrained."
      : "The file of this model does not say how long its texts in training were.";
    return { ...step, words: [words, "`mygpt play` without a run shows a model that drifts."] };
  }
  const origin = trained ? "This model was" : "In the chapter this model is";
  return {
    ...step,
    count: Math.min(MOST_TOKENS, chapter ? 12 : known + PAST),
    words: [
      `${origin} trained on windows of ${grouped(known)} tokens. Its window has ` +
        `${grouped(window)}, but no training step has used a position from ${grouped(known)} on ` +
        "(counted from 0).",
      chapter
        ? "Press Run. The word at position 8 is predicted from position 7 and keeps the cycle. The " +
          "one at 9 is the first that is predicted from an untrained position: AI, not love."
        : "Press Run and look at the text after that position (underlined).",
      "Context window and trained length are not the same. Point at an underlined token, or click " +
        "it: the model can be sure of a wrong one.",
    ],
  };
}
