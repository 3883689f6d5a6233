"""`mygpt train --preset tutorial` beside a plain PyTorch loop of the same model and batches.

The plain loop is what one writes first: three projections, explicit softmax attention with a
mask, windows stacked one by one, AdamW with its defaults. Both run the tutorial's 2,000 steps
in turns, in one process, on the same threads; the loop's own time is compared, validation and
saving left out of neither (the tutorial's run has none but its saves).

Usage: python benchmarks/training_loop.py PATH [--steps 2000] [--rounds 3]
"""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import mygpt
from mygpt.training.events import Event, Finished, StepDone

C, HEADS, LAYERS, WINDOW, BATCH, LR = 64, 4, 4, 64, 16, 1e-3


class PlainAttention(nn.Module):
    """Query, key, value and output projections; scores, mask, softmax, sum."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.output = (
            nn.Linear(C, C, bias=False) for _ in range(4)
        )
        self.register_buffer("mask", torch.tril(torch.ones(WINDOW, WINDOW)).bool())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, time_, _ = x.shape

        def heads(projected: torch.Tensor) -> torch.Tensor:
            return projected.view(batch, time_, HEADS, C // HEADS).transpose(1, 2)

        query, key, value = heads(self.query(x)), heads(self.key(x)), heads(self.value(x))
        scores = query @ key.transpose(-2, -1) / math.sqrt(C // HEADS)  # (B, H, T, T)
        scores = scores.masked_fill(~self.mask[:time_, :time_], float("-inf"))
        mixed = F.softmax(scores, dim=-1) @ value
        return self.output(mixed.transpose(1, 2).contiguous().view(batch, time_, C))


class PlainBlock(nn.Module):
    """Pre-norm block."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(C)
        self.attention = PlainAttention()
        self.norm2 = nn.LayerNorm(C)
        self.mlp = nn.Sequential(nn.Linear(C, 4 * C), nn.GELU(), nn.Linear(4 * C, C))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class PlainGPT(nn.Module):
    """The tutorial's model, drawn in the tutorial's order."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocab_size, C)
        self.positions = nn.Embedding(WINDOW, C)
        self.blocks = nn.ModuleList([PlainBlock() for _ in range(LAYERS)])
        self.norm = nn.LayerNorm(C)

    def forward(self, ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1]))
        for block in self.blocks:
            x = block(x)
        logits = self.norm(x) @ self.tokens.weight.T
        return F.cross_entropy(logits.view(-1, logits.shape[-1]), targets.reshape(-1))


def plain_run(text: str, steps: int) -> tuple[float, float, float]:
    """Seconds of the plain loop, and its first and last losses."""
    chars = sorted(set(text))
    index = {char: i for i, char in enumerate(chars)}
    data = torch.tensor([index[char] for char in text])
    torch.manual_seed(0)
    model = PlainGPT(len(chars))
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
    torch.manual_seed(42)
    first = last = math.nan
    began = time.perf_counter()
    for step in range(steps):
        starts = torch.randint(0, len(data) - WINDOW - 1, (BATCH,))
        x = torch.stack([data[i : i + WINDOW] for i in starts])
        y = torch.stack([data[i + 1 : i + WINDOW + 1] for i in starts])
        loss = model(x, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step in (0, steps - 1):
            first, last = (loss.item(), last) if step == 0 else (first, loss.item())
    return time.perf_counter() - began, first, last


def our_run(path: str, steps: int, folder: Path) -> tuple[float, float, float]:
    """Seconds of `mygpt train --preset tutorial`, saves included, and its losses."""
    heard: list[Event] = []
    mygpt.train(
        path,
        preset="tutorial",
        steps=steps,
        print_every=steps,
        output=folder / "run",
        overwrite=True,
        listener=heard.append,
    )
    losses = [event.loss for event in heard if isinstance(event, StepDone)]
    end = next(event for event in heard if isinstance(event, Finished))
    return end.elapsed_s, losses[0], losses[-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("path", help="Tiny Shakespeare")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    text = Path(options.path).read_text(encoding="utf-8")
    ratios = []
    print(f"{options.steps} steps of {BATCH} x {WINDOW}, {torch.get_num_threads()} threads")
    with tempfile.TemporaryDirectory() as folder:
        for number in range(options.rounds):
            plain_s, plain_first, plain_last = plain_run(text, options.steps)
            our_s, our_first, our_last = our_run(options.path, options.steps, Path(folder))
            ratios.append(our_s / plain_s)
            print(
                f"round {number + 1}: plain {plain_s:.1f} s (loss {plain_first:.4f} -> "
                f"{plain_last:.4f}), mygpt {our_s:.1f} s (loss {our_first:.4f} -> "
                f"{our_last:.4f}), ratio {ratios[-1]:.3f}"
            )
    print(f"median ratio mygpt / plain: {statistics.median(ratios):.3f}")


if __name__ == "__main__":
    main()
