"""Section 15.11, exercise 1: top_k=1 against argmax where two logits are equal."""

import math

import torch

from mygpt.core.sampling import keep_top_k


def main() -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0, 0.0]])
    cut = logits.topk(1).values  # (1, 1)
    by_value = logits.masked_fill(logits < cut, -math.inf)
    print(f"logits: {logits[0].tolist()}")
    print(f"argmax: {int(logits.argmax())}")
    print(f"cut by value, probabilities: {by_value.softmax(dim=-1)[0].tolist()}")
    print(f"keep_top_k, probabilities:   {keep_top_k(logits, 1).softmax(dim=-1)[0].tolist()}")


if __name__ == "__main__":
    main()
