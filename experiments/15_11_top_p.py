"""Section 15.11, exercise 3: how many tokens top-p and top-k keep of a flat and a sharp row."""

import torch

from mygpt.core.sampling import keep_top_k, keep_top_p


def main() -> None:
    rows = {
        "flat": torch.zeros(1, 10),
        "sloping": -torch.arange(10.0)[None] / 2,
        "sharp": -torch.arange(10.0)[None] * 4,
    }
    for name, logits in rows.items():
        largest = float(logits.softmax(dim=-1).max())
        by_p = int(keep_top_p(logits, 0.85).isfinite().sum())
        by_k = int(keep_top_k(logits, 3).isfinite().sum())
        print(f"{name:<7}  largest {largest:.3f}: top_p 0.85 keeps {by_p}, top_k 3 keeps {by_k}")


if __name__ == "__main__":
    main()
