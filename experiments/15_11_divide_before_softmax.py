"""Section 15.11, exercise 2: divide logits by tau, or raise probabilities to 1 / tau?"""

import torch


def divided(logits: torch.Tensor, tau: float) -> torch.Tensor:
    return (logits / tau).softmax(dim=-1)


def raised(logits: torch.Tensor, tau: float) -> torch.Tensor:
    return logits.softmax(dim=-1) ** (1 / tau)


def main() -> None:
    cases = [
        ((2.0, 1.0, 0.0), (0.5, 2.0, 100.0, 0.001)),
        ((1.0, 1.0, 1.0), (0.5, 2.0)),
        ((200.0, 0.0, 0.0), (100.0,)),
    ]
    for logits, temperatures in cases:
        z = torch.tensor(logits)
        for tau in temperatures:
            first, power = divided(z, tau), raised(z, tau)
            print(f"z = {logits}, tau = {tau}")
            print(f"  softmax(z / tau):           {shown(first)}")
            print(f"  softmax(z) ** (1 / tau):    {shown(power)}, sum {float(power.sum()):.3f}")
            print(f"  the latter, made to sum 1:  {shown(power / power.sum())}")


def shown(values: torch.Tensor) -> str:
    return " ".join(f"{value:.3f}" for value in values.tolist())


if __name__ == "__main__":
    main()
