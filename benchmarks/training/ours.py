"""mygpt's training in this process, timed by the events of its steps.

The only place that calls mygpt for measurements of training speed.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mygpt
from mygpt.training.events import Event, Started, StepDone


@dataclass(frozen=True)
class Timed:
    """Measurements of some steps: speed, first and last loss, number of parameters."""

    tokens_per_s: float
    first_loss: float
    last_loss: float
    parameters: int


def timed_steps(path: str, steps: int, **options: Any) -> Timed:
    """Train for `steps` (at least 2) and time all but the first, including reports.

    Samples, validation and timed saves are off; `options` are those of `mygpt.train`.
    """
    events: list[Event] = []
    quiet = {"print_every": steps, "sample_tokens": 0, "val_fraction": 0.0, "save_seconds": 1e6}
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "run"
        mygpt.train(
            path, steps=steps, output=output, listener=events.append, **{**quiet, **options}
        )
    started = next(event for event in events if isinstance(event, Started))
    first, *_, last = (event for event in events if isinstance(event, StepDone))
    seconds = last.elapsed_s - first.elapsed_s
    tokens = last.tokens - first.tokens
    return Timed(tokens / seconds, first.loss, last.loss, started.parameters)


def tutorial_step(path: str, steps: int) -> Timed:
    """`mygpt train --preset tutorial`: the tutorial's model, batches, rate and seeds."""
    return timed_steps(path, steps, preset="tutorial")


def large_step(path: str, steps: int, *, modern: bool, batch: int, dropout: float) -> Timed:
    """6 layers of width 384, windows of 256, AdamW and clipping as nanoGPT's.

    Args:
        path: a text.
        steps: number of steps.
        modern: the modern block; else LayerNorm, GELU and position embeddings.
        batch: windows per step.
        dropout: probability.
    """
    return timed_steps(
        path,
        steps,
        preset="medium" if modern else "tutorial",
        tokenizer="char",
        embed_dim=384,
        num_heads=6,
        num_layers=6,
        max_seq_len=256,
        batch_size=batch,
        dropout=dropout,
        lr=1e-3,
        weight_decay=0.1,
        decay_all=False,
        beta2=0.99,
        grad_clip=1.0,
    )
