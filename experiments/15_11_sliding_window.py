"""Section 15.11, exercise 4: what the crop forgets has no influence at all."""

import torch
from common import load_trained

from mygpt import generate


def main() -> None:
    model = load_trained()
    window = model.max_seq_len
    cropped = sum(1 + step > window for step in range(100))
    print(f"one token of prompt and 100 new ones: {cropped} steps see a cropped text")
    prompt = torch.tensor([0, 1, 2, 3] * 25)[None]  # (1, 100)
    old = prompt.clone()
    old[:, :-window] = 3
    new = prompt.clone()
    new[:, -window:] = 3
    written = [generate(model, ids, 50, seed=0)[:, 100:] for ids in (prompt, old, new)]
    print(f"prompt of {prompt.shape[1]} tokens, window of {window}, 50 new tokens")
    print(f"the first {100 - window} changed, same text: {written[1].equal(written[0])}")
    print(f"the last {window} changed, same text: {written[2].equal(written[0])}")


if __name__ == "__main__":
    main()
