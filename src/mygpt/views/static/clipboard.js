// Copying a text with a button.

import { setText } from "./dom.js";

const COPIED_MS = 1500;

// Copy `text` and say so on `button`; where that is not possible, `select()` it.
export async function copyText(button, text, select) {
  try {
    await navigator.clipboard.writeText(text);
    setText(button, "Copied");
  } catch {
    select();
    setText(button, "Selected");
  }
  setTimeout(() => setText(button, "Copy"), COPIED_MS);
}
