"""What a run reports while it trains: records in log.jsonl, events for the listener, samples."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from mygpt.core.config import GPTConfig
from mygpt.core.model import GPT
from mygpt.decode.writer import Writer
from mygpt.evaluation.copied import measure_novelty
from mygpt.evaluation.losses import Evaluation
from mygpt.text import Document
from mygpt.tokenization import Tokenizer
from mygpt.training.events import Evaluated, Listener, Sampled, Spiked, StepDone, StepsSkipped
from mygpt.training.run import RunFolder
from mygpt.training.state import Progress


class Reporter:
    """Logs what happens in a run, and notifies its listener.

    Args:
        run: whose log is written.
        listener: called with every event.
    """

    def __init__(self, run: RunFolder, listener: Listener) -> None:
        self.run = run
        self.notify = listener

    def step(
        self, progress: Progress, lr: float, *, tokens: int, tokens_per_s: float, remaining_s: float
    ) -> None:
        """A step; its loss is in nats per token."""
        self.run.append_log(
            {
                "step": progress.step,
                "loss": progress.loss,
                "lr": lr,
                "tokens": tokens,
                "elapsed_s": round(progress.elapsed_s, 3),
            }
        )
        self.notify(
            StepDone(
                step=progress.step,
                loss=progress.loss,
                lr=lr,
                tokens=tokens,
                elapsed_s=progress.elapsed_s,
                tokens_per_s=tokens_per_s,
                remaining_s=remaining_s,
            )
        )

    def validation(self, progress: Progress, result: Evaluation, *, best: bool) -> None:
        """A validation: losses in nats per token and in bits."""
        error = result.standard_error
        self.run.append_log(
            {
                "step": progress.step,
                "val_loss": result.loss,
                "val_bits_per_byte": result.bits_per_byte,
                "val_bits_per_char": result.bits_per_char,
                "val_standard_error": error if math.isfinite(error) else None,
                "val_window": result.seq_len,
                "elapsed_s": round(progress.elapsed_s, 3),
            }
        )
        self.notify(Evaluated(progress.step, result, best))

    def skipped(self, step: int, loss: float, count: int, batch: list[int]) -> None:
        """`count` steps up to `step` that were not applied, since `loss` is not finite."""
        self.run.append_log({"step": step, "left_out": str(loss), "steps": count, "batch": batch})
        self.notify(StepsSkipped(step, loss, count, batch))

    def spike(self, step: int, loss: float, usual: float, batch: list[int]) -> None:
        """A loss far above the usual one."""
        self.run.append_log({"step": step, "spike": loss, "usual": usual, "batch": batch})
        self.notify(Spiked(step, loss, usual, batch))

    def sample(self, step: int, text: str, documents: Sequence[Document]) -> None:
        """A generated text, and the passages in it that are also in `documents`."""
        novelty = measure_novelty(text, documents) if documents else None
        copied = [] if novelty is None else [[p.start, p.end] for p in novelty.passages]
        record: dict[str, Any] = {"step": step, "sample": text, "copied": copied}
        self.run.append_log(record)
        self.notify(Sampled(step, text, novelty))


def write_sample(
    model: GPT, shape: GPTConfig, tokenizer: Tokenizer, num_tokens: int, seed: int
) -> str:
    """A text generated without a prompt; torch's random generators are not used.

    Args:
        model: left in evaluation mode.
        shape: the model's, with the window that it has been trained on so far.
        tokenizer: the model's own.
        num_tokens: length of the text.
        seed: of the draws.
    """
    full_shape = model.config
    model.config = shape
    try:
        return Writer(model, tokenizer).generate("", num_tokens, seed=seed)
    finally:
        model.config = full_shape
