// The place of a copied passage in the training text, with the text around it.

import { make } from "../static/dom.js";
import { grouped } from "../static/text.js";

// A closed view of a place { name, line, position, unit, before, text, after }; null if there is none.
export function placeView(place) {
  if (!place) return null;
  const { name, line, position, unit, before, text, after } = place;
  const file = name ? `${name}, ` : "";
  const where = `${file}line ${grouped(line)}, ${unit} ${grouped(position)}`;
  const words = make("p", { class: "copied-text place-text" });
  words.append(before, make("mark", { class: "copied" }, text), after);
  const summary = make("summary", {}, `In the training text: ${where}`);
  return make("details", { class: "place" }, summary, words);
}
