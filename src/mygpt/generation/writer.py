"""`Writer`: a loaded model and its tokenizer, turning prompts into text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from mygpt.checkpoint import read_checkpoint, resolve
from mygpt.config import Overflow, SamplingConfig
from mygpt.errors import InputError
from mygpt.generation.completion import Completion, Row
from mygpt.generation.tokens import Step, decode
from mygpt.machine import choose_device, choose_dtype
from mygpt.model import GPT
from mygpt.randomness import Stream, fresh_seed
from mygpt.tokenization import Tokenizer


class Writer:
    """A model and its tokenizer, ready to continue text.

    Args:
        model: a `GPT`, on the device and in the number format it is to run in.
        tokenizer: the model's own.
        provenance: where the model comes from, as its checkpoint tells.
    """

    def __init__(
        self, model: GPT, tokenizer: Tokenizer, provenance: dict[str, Any] | None = None
    ) -> None:
        if tokenizer.vocab_size != model.config.vocab_size:
            raise InputError(
                f"the tokenizer has {tokenizer.vocab_size} ids and the model "
                f"{model.config.vocab_size}: they do not belong together"
            )
        self.model = model
        self.tokenizer = tokenizer
        self.provenance = provenance or {}

    def __repr__(self) -> str:
        config = self.model.config
        return (
            f"Writer({config.num_parameters():,} parameters, window {config.max_seq_len}, "
            f"{self.tokenizer.kind} tokens, vocabulary {self.tokenizer.vocab_size})"
        )

    def prompt_ids(self, prompt: str) -> list[int]:
        """Ids of a prompt; an empty one starts from end-of-text, or from a newline.

        Raises:
            UnknownTokenError: for characters the model never saw.
        """
        ids: list[int] = self.tokenizer.encode_array(prompt).tolist()
        if ids:
            return ids
        if self.tokenizer.end_of_text is not None:
            return [self.tokenizer.end_of_text]
        try:
            newline: list[int] = self.tokenizer.encode_array("\n").tolist()
        except InputError:
            return [0]
        return newline

    def generate(self, prompt: str = "", max_new_tokens: int = 200, **options: Any) -> str:
        """`prompt` and its continuation as one text; options as for `complete`."""
        return prompt + self.complete(prompt, max_new_tokens, **options)[0].text

    def stream(self, prompt: str = "", max_new_tokens: int = 200, **options: Any) -> Iterator[str]:
        """The continuation in pieces, as they become certain; options as for `complete`.

        Never half a character, and never the beginning of a stop string.
        """
        _, steps = self._start(prompt, max_new_tokens, 1, **options)
        return (piece for pieces in steps for piece in pieces if piece)

    def complete(
        self, prompt: str = "", max_new_tokens: int = 200, num_samples: int = 1, **options: Any
    ) -> list[Completion]:
        """`num_samples` continuations of `prompt`.

        Args:
            prompt: the text to continue; empty starts from nothing.
            max_new_tokens: where to end at the latest.
            num_samples: how many continuations; number i depends on the seed and i alone.
            options: `temperature`, `top_k`, `top_p`, `min_p`, `repetition_penalty` and
                `overflow` as for `generate`; `seed` (None draws a fresh one, told in the
                result); `stop`, strings that end the text and are not part of it;
                `logprobs`, how many alternatives to tell for each token.

        Raises:
            InputError: for a value outside its range.
            UnknownTokenError: for characters the model never saw.
        """
        rows, steps = self._start(prompt, max_new_tokens, num_samples, **options)
        for _ in steps:
            pass
        return [row.completion for row in rows]

    def _start(
        self,
        prompt: str,
        max_new_tokens: int,
        num_samples: int,
        *,
        seed: int | None = None,
        stop: Sequence[str] = (),
        logprobs: int | None = None,
        overflow: Overflow = "crop",
        **sampling: Any,
    ) -> tuple[list[Row], Iterator[list[str]]]:
        """Check everything; return one row a sample and the steps that fill them.

        Each step gives every row's newly certain text.
        """
        if isinstance(num_samples, bool) or not isinstance(num_samples, int) or num_samples < 1:
            raise InputError(f"num_samples={num_samples!r} must be a whole number of at least 1")
        if isinstance(stop, str) or not all(stop):
            raise InputError("stop must be a list of strings of at least one character each")
        if logprobs is not None and not 0 <= logprobs <= self.tokenizer.vocab_size:
            raise InputError(
                f"logprobs={logprobs} must be from 0 to the vocabulary's size, "
                f"{self.tokenizer.vocab_size}"
            )
        seed = fresh_seed() if seed is None else seed
        rows = [
            Row(self.tokenizer, Completion(prompt, seed=seed, index=i), tuple(stop), logprobs)
            for i in range(num_samples)
        ]
        ids = torch.tensor([self.prompt_ids(prompt)] * num_samples)
        steps = decode(
            self.model,
            ids.to(self.model.token_embedding.weight.device),
            max_new_tokens,
            SamplingConfig(**sampling),
            [Stream(seed, i) for i in range(num_samples)],
            overflow,
        )
        return rows, _pieces(rows, steps, max_new_tokens)


def _pieces(rows: list[Row], steps: Iterator[Step], max_new_tokens: int) -> Iterator[list[str]]:
    for step in steps:
        ids: list[int] = step.ids.tolist()
        yield [row.push(ids[b], step.logits[b]) for b, row in enumerate(rows)]
        if all(row.ended for row in rows):
            return
    yield [row.finish(max_new_tokens) for row in rows]


def load(path: str | Path | None = None, *, device: str = "auto", dtype: str = "float32") -> Writer:
    """The `Writer` of a run folder or checkpoint file; None takes the newest run.

    Raises:
        CheckpointError: when there is none, or it is damaged, foreign or newer.
        InputError: for a device or number format that cannot be had.
    """
    checkpoint = read_checkpoint(resolve(path))
    model = checkpoint.build_model().to(choose_device(device), choose_dtype(dtype))
    model.eval()
    return Writer(model, checkpoint.tokenizer, checkpoint.provenance)
