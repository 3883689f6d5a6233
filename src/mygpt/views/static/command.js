// The command line that generates the same text as the page.

// `mygpt generate` with the page's settings, for `count` tokens and `samples` continuations.
export function generateCommand({ checkpoint, prompt, settings, seed, count, samples }) {
  const words = ["mygpt", "generate", "--checkpoint", checkpoint, "--prompt", prompt];
  words.push("--max-new-tokens", String(count));
  if (samples > 1) words.push("--num-samples", String(samples));
  words.push("--temperature", String(settings.temperature)); // the command's default is not 1
  for (const field of ["top_k", "top_p", "min_p", "repetition_penalty"]) {
    if (settings[field] === null) continue;
    words.push(`--${field.replaceAll("_", "-")}`, String(settings[field]));
  }
  words.push("--seed", String(seed));
  const command = words.map(shellQuoted).join(" ");
  // A prompt of one dash means standard input.
  return prompt === "-" ? `printf %s - | ${command}` : command;
}

// How the text of the command differs from the one on the page: `written` are the page's tokens,
// `key` names the present settings.
export function commandNote(written, key) {
  if (!written.length) return "";
  if (written.some((token) => token.byHand)) {
    return "Tokens were chosen by hand; the command generates the text without that.";
  }
  if (written.some((token) => token.key !== key)) {
    return "The settings were changed; the command uses the present ones from the start.";
  }
  return "It generates the text above, since the seed is the same.";
}

// A string quoted as one word for a POSIX shell.
export function shellQuoted(word) {
  if (/^[\w@%+=:,./-]+$/.test(word)) return word;
  return `'${word.replaceAll("'", "'\\''")}'`;
}
