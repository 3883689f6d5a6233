// The uniform numbers of one sequence, computed as in mygpt.core.random, so that the page and
// the command line generate the same text from the same seed.
// Philox4x32-10 (Salmon, Moraes, Dror & Shaw, 2011): key is the seed, the counter says what
// the number is for.

const DRAW_TOKEN = 1n;
const LOW_32 = 0xffffffffn;

// The number in [0, 1) that draws token number `step` (from 0) of sample `index`.
// `seed` is a BigInt from 0 to 2**64 - 1.
export function uniform(seed, index, step) {
  let x0 = BigInt(step);
  let x1 = BigInt(index) & LOW_32;
  let x2 = DRAW_TOKEN;
  let x3 = BigInt(index) >> 32n;
  let key0 = seed & LOW_32;
  let key1 = seed >> 32n;
  for (let round = 0; round < 10; round += 1) {
    const p0 = x0 * 0xd2511f53n;
    const p1 = x2 * 0xcd9e8d57n;
    [x0, x1] = [(p1 >> 32n) ^ x1 ^ key0, p1 & LOW_32];
    [x2, x3] = [(p0 >> 32n) ^ x3 ^ key1, p0 & LOW_32];
    key0 = (key0 + 0x9e3779b9n) & LOW_32;
    key1 = (key1 + 0xbb67ae85n) & LOW_32;
  }
  return (Number(x0 >> 5n) * 2 ** 26 + Number(x1 >> 6n)) / 2 ** 53;
}

// An error message for a field's text that is not a seed.
export const SEED_ERROR =
  "The seed must be a whole number from 0 to 18,446,744,073,709,551,615; ‘New’ gives one.";

// The seed in a field's text as a BigInt; null if the text is not a seed.
export function parseSeed(text) {
  if (!/^\d{1,20}$/.test(text.trim())) return null;
  const seed = BigInt(text.trim());
  return seed < 2n ** 64n ? seed : null;
}

// A seed of 32 random bits, short enough to be read aloud.
export function freshSeed() {
  return BigInt(crypto.getRandomValues(new Uint32Array(1))[0]);
}
