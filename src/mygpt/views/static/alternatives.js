// The list of alternatives: continuations of which one is taken by a click or a digit.

import { make, moved } from "./dom.js";
import { visibleText } from "./text.js";

export class Alternatives {
  // `panel` has the list `list`; `onTake(text, place)` is called with the alternative that was
  // taken, `onClose()` when the panel had the focus and is closed without one.
  constructor(panel, list, { onTake, onClose }) {
    Object.assign(this, { panel, list, onTake, onClose, texts: [], place: 0 });
    panel.addEventListener("keydown", (event) => this.press(event));
  }

  // Show continuations of the text up to `place`.
  show(texts, place) {
    Object.assign(this, { texts, place });
    const items = texts.map((text, index) => {
      const words = make("span", { class: "alternative-text" }, visibleText(text, true));
      const button = make("button", { type: "button", class: "alternative" }, words);
      button.addEventListener("click", () => this.take(index));
      return make("li", {}, button);
    });
    this.list.replaceChildren(...items);
    this.panel.hidden = false;
    this.buttons[0].focus();
  }

  get buttons() {
    return [...this.list.querySelectorAll("button")];
  }

  press(event) {
    if (event.ctrlKey || event.altKey || event.metaKey) return;
    const digit = Number(event.key) - 1;
    if (event.key.trim() && this.texts[digit] !== undefined) {
      event.preventDefault();
      this.take(digit);
      return;
    }
    const { buttons } = this;
    const next = moved(event.key, buttons.indexOf(document.activeElement), buttons.length);
    if (next === null) return;
    event.preventDefault();
    buttons[next].focus();
  }

  take(index) {
    const { texts, place } = this;
    this.hide();
    this.onTake(texts[index], place);
  }

  close() {
    const focused = this.panel.contains(document.activeElement);
    this.hide();
    if (focused) this.onClose();
  }

  hide() {
    if (this.panel.hidden) return;
    this.texts = [];
    this.panel.hidden = true;
    this.list.replaceChildren();
  }
}
