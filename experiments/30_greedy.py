"""Experiment 30: greedy decoding, written out: the largest logit at every step."""

import torch
from common import load_trained, words

from mygpt import to_ids


def main() -> None:
    model = load_trained()
    ids = to_ids(["I"])[None]  # (1, 1)
    print(f"prompt: {words(ids[0])}")
    for _ in range(7):
        with torch.no_grad():
            logits, _ = model(ids)  # (1, T, V)
        best = logits[:, -1].argmax(dim=-1, keepdim=True)  # (1, 1)
        ids = torch.cat([ids, best], dim=1)
    print(f"output: {words(ids[0])}")


if __name__ == "__main__":
    main()
