// Format texts and numbers: control characters as symbols, probabilities as percentages.

const NAMED_SIGNS = new Map([
  ["\n", "⏎"],
  ["\t", "⇥"],
  [" ", "␣"],
]);

// Control and format characters, which are invisible and may reorder a line.
const SHAPELESS = /[\p{Cc}\p{Cf}\p{Cs}\p{Zl}\p{Zp}\u00a0]/u;

// A token's text with symbols for invisible characters; spaces are kept if `spaces` is true.
export function visibleText(text, spaces = false) {
  return Array.from(text, (char) => (spaces && char === " " ? " " : visibleChar(char))).join("");
}

// A token in a sentence or a label: its visible text, shortened; its id where it has no text.
export function tokenName(text, id) {
  if (text === null || text === undefined) return `#${id}`;
  if (text === "") return "(empty)";
  const shown = Array.from(visibleText(text));
  return shown.length > 18 ? `${shown.slice(0, 17).join("")}…` : shown.join("");
}

// A probability in percent, with enough digits to distinguish small ones from 0.
export function percent(probability) {
  if (probability === 0) return "0%";
  const value = 100 * probability;
  if (value < 0.01) return "<0.01%";
  if (value < 1) return `${value.toFixed(2)}%`;
  return `${value.toFixed(1)}%`;
}

// A whole number with thin separators, as in 207,296.
export function grouped(number) {
  return Number(number).toLocaleString("en-US");
}

// "1 token", "2 tokens".
export function counted(number, noun) {
  return `${grouped(number)} ${noun}${number === 1 ? "" : "s"}`;
}

function visibleChar(char) {
  if (NAMED_SIGNS.has(char)) return NAMED_SIGNS.get(char);
  if (!SHAPELESS.test(char)) return char;
  return `‹${char.codePointAt(0).toString(16).toUpperCase().padStart(2, "0")}›`;
}
