"""Section 15.10, fourth experiment: the loop without its crop ends where the window does."""

import torch
from common import load_trained

from mygpt import generate, set_seed, to_ids


def main() -> None:
    model = load_trained()
    set_seed(0)
    prompt = ids = to_ids(["I"])[None]  # (1, 1)
    try:
        for _ in range(100):
            with torch.no_grad():
                logits, _ = model(ids)  # (1, T, V)
            drawn = logits[:, -1].softmax(dim=-1).multinomial(1)  # (1, 1)
            ids = torch.cat([ids, drawn], dim=1)
    except ValueError as error:
        print(f"without the crop, at {ids.shape[1]} tokens: {error}")
    set_seed(0)
    whole = generate(model, prompt, max_new_tokens=100)  # (1, 101)
    print(f"with the crop: {whole.shape[1]} tokens")
    print(f"the same as far as both go: {whole[:, : ids.shape[1]].equal(ids)}")


if __name__ == "__main__":
    main()
