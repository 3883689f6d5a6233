"""Experiment 29: after every prefix of the cycle the likeliest word is the cycle's next one."""

import torch
from common import load_trained

from mygpt import VOCAB, to_ids


def main() -> None:
    model = load_trained()
    cycle = list(VOCAB) * 3
    with torch.no_grad():
        for length in range(1, 9):
            logits, _ = model(to_ids(cycle[:length])[None])  # (1, T, V)
            best = VOCAB[int(logits[0, -1].argmax())]
            mark = "right" if best == cycle[length] else "wrong"
            print(f"{' '.join(cycle[:length]):<24} -> {best:<4} {mark}")


if __name__ == "__main__":
    main()
