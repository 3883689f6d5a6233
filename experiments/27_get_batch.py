"""Experiment 27: a batch is a few random windows, and the same windows one token later."""

import torch

from mygpt import get_batch, set_seed


def main() -> None:
    data = torch.tensor([0, 1, 2, 3] * 64)
    set_seed(42)
    x, y = get_batch(data, batch_size=4, seq_len=8)  # each (4, 8)
    print(f"corpus: {len(data)} tokens, x: {tuple(x.shape)}, y: {tuple(y.shape)}")
    for row, (inputs, targets) in enumerate(zip(x.tolist(), y.tolist(), strict=True)):
        print(f"row {row}: x = {inputs}")
        print(f"       y = {targets}")


if __name__ == "__main__":
    main()
