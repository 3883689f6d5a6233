"""Experiment 31: what temperature does to the softmax of three logits."""

import torch


def main() -> None:
    logits = torch.tensor([2.0, 1.0, 0.0])
    print(f"logits: {logits}")
    print()
    for tau in (1.0, 0.5, 2.0, 100.0):
        probabilities = (logits / tau).softmax(dim=-1)
        rounded = [f"{p:.3f}" for p in probabilities.tolist()]
        print(f"  tau = {tau:>5.1f}: softmax = {rounded}")


if __name__ == "__main__":
    main()
