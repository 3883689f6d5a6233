// From logits to the next token, in the browser: mygpt.core.sampling in float64.
// Order: repetition penalty, temperature, top-k, top-p, min-p, then the draw.
// Letters: T time, V vocabulary. Logits are V numbers; a token that is filtered out has
// logit -Infinity. Nothing is changed in place. Settings carry SamplingConfig's names.

// Below this temperature the distribution is its own argmax (mygpt.core.config.GREEDY_BELOW).
export const GREEDY_BELOW = 1e-30;

export const NEUTRAL = {
  temperature: 1,
  top_k: null,
  top_p: null,
  min_p: null,
  repetition_penalty: null,
};

// Whether the draw is argmax: no randomness can change it.
export function isGreedy(settings) {
  return temperatureOf(settings) < GREEDY_BELOW || settings.top_k === 1;
}

// An error message for invalid settings; empty if they are valid.
export function settingsError(settings) {
  const { top_k: k, top_p: p, min_p: least, repetition_penalty: penalty } = settings;
  const temperature = temperatureOf(settings);
  if (!Number.isFinite(temperature) || temperature < 0) {
    return "The temperature must be a number of at least 0 (0 is greedy, 1 changes nothing).";
  }
  if (isSet(k) && (!Number.isInteger(k) || k < 0)) {
    return "Top-k must be a whole number of at least 0 (0 is off).";
  }
  if (isSet(p) && !(p > 0 && p <= 1)) return "Top-p must be above 0 and at most 1 (1 is off).";
  if (isSet(least) && !(least >= 0 && least <= 1)) {
    return "Min-p must be between 0 (off) and 1.";
  }
  if (isSet(penalty) && !(penalty > 0 && penalty < Infinity)) {
    return "The repetition penalty must be above 0 (1 is off).";
  }
  return "";
}

// Divide the positive and multiply the negative logits of the tokens in `ids` (T,).
export function penalizeRepetition(logits, ids, penalty) {
  const penalized = Float64Array.from(logits);
  for (const id of ids) {
    penalized[id] = logits[id] < 0 ? logits[id] * penalty : logits[id] / penalty;
  }
  return penalized;
}

// Keep exactly the k largest logits; of equal ones, those of lower ids.
export function keepTopK(logits, k) {
  if (k >= logits.length) return logits;
  const cut = Float64Array.from(logits).sort()[logits.length - k];
  let remaining = k - logits.reduce((above, logit) => above + (logit > cut ? 1 : 0), 0);
  return logits.map((logit) => {
    if (logit > cut) return logit;
    if (logit < cut || remaining === 0) return -Infinity;
    remaining -= 1;
    return logit;
  });
}

// Keep the smallest set of most probable tokens whose total probability reaches p (nucleus).
export function keepTopP(logits, p) {
  return keepTopK(logits, nucleus(logits, p).length);
}

// The probabilities that top-p keeps, largest first.
// In descending order of probability (lower ids first among equals), a token is kept if the sum
// of those before it is below p; the first one is always kept.
export function nucleus(logits, p) {
  const probs = softmax(Float64Array.from(logits).sort().reverse());
  let sum = 0;
  const end = probs.findIndex((prob) => {
    sum += prob;
    return sum - prob >= p;
  });
  return end < 0 ? probs : probs.subarray(0, end);
}

// Keep tokens with at least `minP` times the highest probability.
export function keepMinP(logits, minP) {
  const least = largestOf(logits) + Math.log(minP);
  return logits.map((logit) => (logit < least ? -Infinity : logit));
}

// Logits (V,) after penalty, temperature and filters; `ids` (T,) is all text so far.
// The temperature must be above 0, since temperature 0 (argmax) has no finite logits.
export function filterLogits(logits, settings, ids) {
  const temperature = temperatureOf(settings);
  let kept = afterPenalty(logits, settings, ids).map((logit) => logit / temperature);
  if (settings.top_k) kept = keepTopK(kept, settings.top_k);
  if (isSet(settings.top_p) && settings.top_p < 1) kept = keepTopP(kept, settings.top_p);
  if (settings.min_p) kept = keepMinP(kept, settings.min_p);
  return kept;
}

// The distribution (V,) that the next token is sampled from; one-hot for argmax.
export function probabilities(logits, settings, ids) {
  if (!isGreedy(settings)) return softmax(filterLogits(logits, settings, ids));
  const oneHot = new Float64Array(logits.length);
  oneHot[argmax(afterPenalty(logits, settings, ids))] = 1;
  return oneHot;
}

// The index of the largest logit; the lowest one among equals.
export function argmax(logits) {
  let best = 0;
  for (let id = 1; id < logits.length; id += 1) if (logits[id] > logits[best]) best = id;
  return best;
}

// Probabilities (V,) of logits (V,).
export function softmax(logits) {
  const largest = largestOf(logits);
  const weights = Float64Array.from(logits).map((logit) => Math.exp(logit - largest));
  const total = weights.reduce((sum, weight) => sum + weight, 0);
  return weights.map((weight) => weight / total);
}

// Invert the cumulative distribution at a uniform number in [0, 1), summing in the order of ids.
// A token of probability 0 is never drawn: the uniform number times the total is less than it.
export function draw(probs, uniform) {
  const target = uniform * probs.reduce((sum, prob) => sum + prob, 0);
  let cumulative = 0;
  for (let id = 0; id < probs.length; id += 1) {
    cumulative += probs[id];
    if (cumulative > target) return id;
  }
  throw new RangeError("probabilities are not finite, or all are 0");
}

// Ids of the `count` largest logits, largest first, and lower ids before equal ones.
export function likeliestFirst(logits, count) {
  const kept = keepTopK(Float64Array.from(logits), Math.min(count, logits.length));
  const ids = Array.from(kept.keys()).filter((id) => kept[id] > -Infinity);
  return ids.sort((a, b) => kept[b] - kept[a] || a - b);
}

// All V logits from the known ones, `top` [[id, logit], ...], and the log-sum-exp of the others,
// which are assumed to be equal. `rest` is null if there are no others.
export function spreadRest(top, rest, vocabSize) {
  const others = vocabSize - top.length;
  const each = others && rest !== null ? rest - Math.log(others) : -Infinity;
  const logits = new Float64Array(vocabSize).fill(each);
  for (const [id, logit] of top) logits[id] = logit;
  return logits;
}

function afterPenalty(logits, settings, ids) {
  const penalty = settings.repetition_penalty;
  if (!isSet(penalty) || penalty === 1) return Float64Array.from(logits);
  return penalizeRepetition(logits, ids, penalty);
}

function temperatureOf(settings) {
  return settings.temperature ?? 1;
}

function isSet(value) {
  return value !== null && value !== undefined;
}

function largestOf(logits) {
  return logits.reduce((largest, logit) => (logit > largest ? logit : largest), -Infinity);
}
