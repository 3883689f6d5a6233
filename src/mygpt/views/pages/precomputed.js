// The answers of POST /api/inside that a page contains: the prediction after each token that is
// read, and the effect of switching off each part alone.

import { triangle } from "./parts.js";

// A function that answers questions { position, token, ablate } from the data in the page.
// data: { start: tokens that are not read, parts: [name] of contributions, loss, names,
//         size: S, hundredths: [N][H] of the lower triangle (S, S) of attention, row by row,
//         positions: [{ top: the lens [[id, text, probability]] at each depth,
//                       tokens: [{ id, text, logit, total, ranks: [[probability, rank]] at each
//                                  depth, contributions: [value] }] }],
//         without: { part: { loss, next, others } } }
export function precomputed(data) {
  const attention = data.hundredths.map((heads) =>
    heads.map((flat) => triangle(flat, data.size, 100)),
  );
  return async ({ position, token, ablate }) => {
    const at = (position ?? data.start + data.positions.length - 1) - data.start;
    const { top, tokens } = data.positions[at];
    const chosen = tokens.find(({ id }) => id === token) ?? tokens[0];
    const answer = {
      ...{ start: data.start, position: data.start + at, names: data.names, attention },
      token: { id: chosen.id, text: chosen.text },
      lens: top.map((likeliest, depth) => {
        const [probability, rank] = chosen.ranks[depth];
        return { name: depth ? `block${depth}` : "embedding", top: likeliest, probability, rank };
      }),
      contributions: data.parts.map((name, n) => [name, chosen.contributions[n]]),
      ...{ logit: chosen.logit, total: chosen.total, loss: data.loss, continuation: null },
    };
    const [part] = ablate;
    if (part) answer.ablation = { parts: [part], ...data.without[part] };
    return answer;
  };
}
