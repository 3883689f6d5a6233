"""Section 15.10, second experiment: top-k on a sure model, and on the same model made unsure."""

from common import load_trained

from mygpt import VOCAB, generate, set_seed, to_ids

SAMPLES = 1000


def main() -> None:
    model = load_trained()
    prompts = to_ids(["I"]).repeat(SAMPLES, 1)  # (B, 1)
    cycle = to_ids(VOCAB * 2)  # (8,)
    print(f"Of {SAMPLES} continuations of 'I' by 7 words, those that keep the cycle:")
    for tau in (1.0, 5.0):
        for k in (1, 2, 3, 4):
            set_seed(0)
            ids = generate(model, prompts, max_new_tokens=7, temperature=tau, top_k=k)  # (B, 8)
            kept = int((ids == cycle).all(dim=1).sum())
            print(f"temperature {tau}, top_k {k}: {kept:>4}")


if __name__ == "__main__":
    main()
