"""Experiment 39: train a character-level GPT on Tiny Shakespeare (2,000 steps, minutes)."""

import torch
from common import SHAKESPEARE_MODEL, SHAKESPEARE_TOKENIZER, corpus_parser, read_corpus

from mygpt import GPT, CharTokenizer, get_batch, set_seed


def train(model: GPT, data: torch.Tensor, steps: int) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    for step in range(1, steps + 1):
        x, y = get_batch(data, batch_size=16, seq_len=64)
        _, loss = model(x, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step == 1 or step % 500 == 0:
            print(f"step {step:>4}  loss {loss.item():.4f}", flush=True)


def main() -> None:
    parser = corpus_parser(__doc__)
    parser.add_argument("--steps", type=int, default=2000)
    arguments = parser.parse_args()
    text = read_corpus(arguments.path)
    tokenizer = CharTokenizer.from_text(text)
    set_seed(0)
    model = GPT(tokenizer.vocab_size, embed_dim=64, num_heads=4, num_layers=4, max_seq_len=64)
    print(f"parameters: {sum(p.numel() for p in model.parameters()):,}")
    set_seed(42)
    train(model, tokenizer.encode(text), arguments.steps)
    torch.save(model.state_dict(), SHAKESPEARE_MODEL)
    tokenizer.save(SHAKESPEARE_TOKENIZER)
    print(f"saved {SHAKESPEARE_MODEL} and {SHAKESPEARE_TOKENIZER}")


if __name__ == "__main__":
    main()
