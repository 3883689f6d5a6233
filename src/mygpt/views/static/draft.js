// The writer's text outside the page: saved in the browser, and as a file.

import { make } from "./dom.js";

const SAVED_AS = "mygpt.text";

// The text that was saved for this address; empty if there is none.
export function savedText() {
  try {
    return localStorage.getItem(SAVED_AS) ?? "";
  } catch {
    return ""; // the browser's settings forbid it
  }
}

// Save a text; whether the browser could.
export function saveText(text) {
  try {
    if (text) localStorage.setItem(SAVED_AS, text);
    else localStorage.removeItem(SAVED_AS);
    return true;
  } catch {
    return false;
  }
}

// Offer a text as a file.
export function download(text) {
  const address = URL.createObjectURL(new Blob([text], { type: "text/plain;charset=utf-8" }));
  make("a", { href: address, download: "text.txt" }).click();
  setTimeout(() => URL.revokeObjectURL(address), 1000);
}
