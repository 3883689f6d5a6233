"""Section 15.10, first experiment: how hot the small model must get before the cycle breaks."""

from common import load_trained, words

from mygpt import VOCAB, generate, set_seed, to_ids

SAMPLES = 1000


def main() -> None:
    model = load_trained()
    prompts = to_ids(["I"]).repeat(SAMPLES, 1)  # (B, 1)
    cycle = to_ids(VOCAB * 2)  # (8,)
    print(f"Of {SAMPLES} continuations of 'I' by 7 words, those that keep the cycle:")
    for tau in (1.0, 2.0, 3.0, 5.0, 100.0):
        set_seed(0)
        ids = generate(model, prompts, max_new_tokens=7, temperature=tau)  # (B, 8)
        kept = int((ids == cycle).all(dim=1).sum())
        print(f"temperature {tau:>5.1f}: {kept:>4}; the first: {' '.join(words(ids[0]))}")


if __name__ == "__main__":
    main()
