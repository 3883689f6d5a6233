// Notices of the playground and the writing view: loading, no server, a missing API key, errors.

import { make, setText } from "./dom.js";
import { visibleText } from "./text.js";

const NO_SERVER =
  "The server does not answer. Restart it with `mygpt serve`, then try again; " +
  "your text is kept.";

const UNKNOWN = "unknown_characters"; // the server's code for them

export class Notices {
  // `client` gets the typed key; `onRetry()` repeats the request; `onDrop()` removes the characters
  // that the model does not know.
  constructor(element, client, { onRetry, onDrop }) {
    this.element = element;
    this.words = make("p", { class: "notice-words" });
    this.retry = make("button", { type: "button" }, "Try again");
    this.drop = make("button", { type: "button", class: "notice-drop" }, "Remove them");
    this.key = make("input", { type: "password", id: "api-key", autocomplete: "off" });
    const use = make("button", { type: "submit" }, "Use this key");
    const label = make("label", { for: "api-key" }, "API key");
    this.keyRow = make("form", { class: "notice-key" }, label, this.key, use);
    element.replaceChildren(this.words, this.retry, this.drop, this.keyRow);
    this.retry.addEventListener("click", onRetry);
    this.drop.addEventListener("click", onDrop);
    this.keyRow.addEventListener("submit", (event) => {
      event.preventDefault();
      client.key = this.key.value.trim();
      onRetry();
    });
    this.loading();
  }

  loading() {
    this.show("Loading the model…", {});
  }

  // Show a server error, with a remedy if there is one; other errors are shown unchanged.
  error(error) {
    if (error.status === 401) this.show("This server needs an API key.", { key: true });
    else if (error.status === 0) this.show(NO_SERVER, { retry: true });
    else if (error.code === UNKNOWN) this.show(withoutRemedy(error.message), { drop: true });
    else this.show(error.message, { retry: error.status > 400 });
    if (error.status === 401) this.key.focus();
  }

  clear() {
    this.element.hidden = true;
  }

  show(words, { retry = false, key = false, drop = false }) {
    setText(this.words, words);
    this.retry.hidden = !retry;
    this.drop.hidden = !drop;
    this.keyRow.hidden = !key;
    this.element.hidden = false;
  }
}

// What `onDrop` says afterwards; `left` is the response's list of characters.
export function removedWords(left) {
  const shown = left.map((part) => `‘${visibleText(part)}’`).join(" ");
  return `Removed characters that the model does not know: ${shown}.`;
}

// The server's message without its last remedy, a field of the API: the page has a button for it.
function withoutRemedy(message) {
  return message.replace(/; send "unknown": .*$/, ".");
}
