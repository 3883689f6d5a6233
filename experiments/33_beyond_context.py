"""Experiment 33: past the eight positions that training used, the cycle breaks."""

from common import load_trained, words

from mygpt import VOCAB, generate, to_ids


def main() -> None:
    ids = generate(load_trained(), to_ids(["I"])[None], max_new_tokens=12, top_k=1)  # (1, 13)
    tokens = words(ids[0])
    cycle = [VOCAB[t % len(VOCAB)] for t in range(len(tokens))]
    print(f"output: {tokens}")
    print(f"expected: {cycle}")
    print()
    for t, (got, want) in enumerate(zip(tokens, cycle, strict=True)):
        verdict = "OK" if got == want else "DRIFT"
        print(f"  position {t}: got={got!r:<7} expected={want!r:<7} {verdict}")


if __name__ == "__main__":
    main()
