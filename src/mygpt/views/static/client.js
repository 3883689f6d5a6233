// Requests to the playground's server: the model, predictions, attention, continuations.
// Letters: T time, V vocabulary.

import { likeliestFirst, softmax, spreadRest } from "./sampling.js";

const MOST_LIKELIEST = 10; // tokens with a bar; with more, the strip below is out of sight

// An error response (status 4xx or 5xx), or no response at all (status 0).
export class ServerError extends Error {
  constructor(message, status, code = null) {
    super(message);
    this.status = status;
    this.code = code;
  }
}

export class Client {
  constructor(base = "api/") {
    this.base = base;
    this.key = "";
  }

  // { name, parameters, shape, vocab_size, tokenizer, window, tokens }
  async model() {
    this.facts = await this.send("model");
    return this.facts;
  }

  // The prediction of the token after `question`, { text } or { ids }.
  async next(question, signal) {
    return predictionOf(await this.send("next", question, signal), this.facts.vocab_size);
  }

  // A text without the characters that the model does not know: { text, left_out }, or {} if it
  // knows all of them.
  async known(text) {
    return this.send("next", { text, unknown: "drop" });
  }

  // { layers, heads, start, weights } for the last tokens of { ids } (T,).
  async attention(question, signal) {
    return this.send("attention", question, signal);
  }

  // One prediction of { ids, position, token }, without the parts of `ablate`; see /openapi.json.
  async inside(question, signal) {
    return this.send("inside", question, signal);
  }

  // Continue a text: `onPiece(index, text)` is called with each new piece of a choice. `question`
  // has fields of POST /v1/completions. `signal` also ends the generation in the server.
  async complete(question, onPiece, signal) {
    const body = { model: this.facts.name, stream: true, ...question };
    const response = await this.request("../v1/completions", body, signal);
    if (!response.ok) parsedAnswer(await answered(response.text()), response);
    for await (const { error, choices = [] } of eventsOf(response)) {
      if (error) throw new ServerError(error.message, 500, error.code);
      for (const { index, text } of choices) onPiece(index, text);
    }
  }

  async send(path, question, signal) {
    const response = await this.request(path, question, signal);
    return parsedAnswer(await answered(response.text()), response);
  }

  request(path, question, signal) {
    const headers = {};
    if (this.key) headers.Authorization = `Bearer ${this.key}`;
    if (question) headers["Content-Type"] = "application/json";
    const body = question ? JSON.stringify(question) : undefined;
    const method = question ? "POST" : "GET";
    return answered(fetch(this.base + path, { method, headers, body, signal, cache: "no-store" }));
  }
}

// What `fetch` or a response's body gives; a `ServerError` if the connection fails.
async function answered(promise) {
  try {
    return await promise;
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError("The server does not answer.", 0);
  }
}

// The objects of a stream of server-sent events.
async function* eventsOf(response) {
  const reader = response.body.getReader();
  const decoder = new TextDecoder();
  let text = "";
  for (;;) {
    const { done, value } = await answered(reader.read());
    if (done) throw new ServerError("The server's answer is incomplete.", 0);
    const events = (text + decoder.decode(value, { stream: true })).split("\n\n");
    text = events.pop();
    for (const event of events) {
      const data = event.slice("data: ".length);
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

function parsedAnswer(text, response) {
  let answer = null;
  try {
    answer = JSON.parse(text);
  } catch {
    answer = null;
  }
  if (response.ok && answer !== null) return answer;
  const { status } = response;
  const message = answer?.error?.message;
  const words = message ?? `The server answered with status ${status}.`;
  throw new ServerError(words, status, answer?.error?.code);
}

// The part of a response that the page keeps: tokens (T,), logits (V,), and values derived from
// them.
function predictionOf(answer, vocabSize) {
  const top = answer.top ?? [];
  const logits = answer.logits
    ? Float64Array.from(answer.logits, (logit) => logit ?? -Infinity)
    : spreadRest(top, answer.rest, vocabSize);
  return {
    tokens: answer.tokens,
    windowStart: answer.window_start,
    logits,
    before: softmax(logits),
    likeliest: likeliestFirst(logits, MOST_LIKELIEST),
    known: answer.logits ? vocabSize : top.length,
    texts: top.filter((one) => one.length > 2).map(([id, , text]) => [id, text]),
  };
}
