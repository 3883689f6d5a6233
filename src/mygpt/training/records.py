"""What a run's log says: the records of log.jsonl, and the samples in it."""

from __future__ import annotations

import math
from typing import Any

from mygpt.core.config import GPTConfig
from mygpt.core.model import GPT
from mygpt.evaluation import Evaluation
from mygpt.generation.writer import Writer
from mygpt.tokenization import Tokenizer
from mygpt.training.config import TrainConfig
from mygpt.training.state import Progress


def step_record(progress: Progress, lr: float, tokens: int) -> dict[str, Any]:
    """A reported step: its loss (nats per token), rate, tokens read and seconds so far."""
    return {
        "step": progress.step,
        "loss": progress.loss,
        "lr": lr,
        "tokens": tokens,
        "elapsed_s": round(progress.elapsed_s, 3),
    }


def validation_record(progress: Progress, result: Evaluation) -> dict[str, Any]:
    """A validation: losses in nats per token and in bits."""
    return {
        "step": progress.step,
        "val_loss": result.loss,
        "val_bits_per_byte": result.bits_per_byte,
        "val_bits_per_char": result.bits_per_char,
        "val_standard_error": _finite(result.standard_error),
        "val_window": result.seq_len,
        "elapsed_s": round(progress.elapsed_s, 3),
    }


def _finite(value: float) -> float | None:
    """A number that JSON has."""
    return value if math.isfinite(value) else None


def write_sample(
    model: GPT, shape: GPTConfig, tokenizer: Tokenizer, config: TrainConfig, step: int
) -> str:
    """A little text from nothing; the seed keeps training's own random numbers as they are.

    Args:
        model: with its weights; left in the mode in which it writes.
        shape: the model's, with the window that it was trained on so far.
        tokenizer: the model's own.
        config: says how long the text is.
        step: the seed.
    """
    whole = model.config
    model.config = shape
    try:
        return Writer(model, tokenizer).generate("", config.sample_tokens, seed=step)
    finally:
        model.config = whole
