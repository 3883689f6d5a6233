"""Experiment 28: train the small GPT on the cycle; the weights go to trained_gpt.pt."""

import torch
from common import CHECKPOINT, tiny_gpt

from mygpt import get_batch, set_seed

STEPS = 200
SHOWN = (1, 10, 50, 100, 200)


def main() -> None:
    data = torch.tensor([0, 1, 2, 3] * 64)
    set_seed(0)
    model = tiny_gpt()
    print(f"parameters: {sum(p.numel() for p in model.parameters()):,}")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    set_seed(42)
    for step in range(1, STEPS + 1):
        x, y = get_batch(data, batch_size=4, seq_len=8)
        _, loss = model(x, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step in SHOWN:
            print(f"step {step:>3}  loss {loss.item():.4f}")
    torch.save(model.state_dict(), CHECKPOINT)
    print(f"saved {CHECKPOINT}")


if __name__ == "__main__":
    main()
