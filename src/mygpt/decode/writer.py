"""`Writer`: a loaded model and its tokenizer, turning prompts into text."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mygpt.checkpoint.model_file import (
    Checkpoint,
    read_checkpoint,
    resolve,
    trained_length,
)
from mygpt.core.config import SamplingConfig
from mygpt.core.random import Stream
from mygpt.core.window import OVERFLOW_POLICIES, Overflow
from mygpt.decode.choice import Backend, tokens_to_read
from mygpt.decode.completion import Completion, Row
from mygpt.decode.draft_table import FILE_NAME, DraftTable, table_of_file
from mygpt.engine import Batch, Decoding, Request, check_prompt_fits, fresh_seed
from mygpt.errors import CheckpointError, InputError, require_choice, require_int
from mygpt.tokenization import Tokenizer, ends_of
from mygpt.tokenization.unknown import PROMPT_POLICIES, adding_remedy, check_policy, without_unknown

if TYPE_CHECKING:
    from mygpt.core.config import GPTConfig
    from mygpt.core.model import GPT
    from mygpt.cpu.decode.speculation import Drafts
    from mygpt.decode.numpy_network import Reading
    from mygpt.evaluation.head_scores import HeadScores
    from mygpt.evaluation.inside import Inside, Patch

# Steps of small models are so short that one call for each would cost time: a call makes as many
# steps as fit in this time.
_BLOCK_S = 0.002
_MOST_AHEAD = 7  # tokens that a call may draw beyond these, where one pass gives several
_CACHE_BYTES = 2**30  # the most for keys and values of samples that are decoded together
_MAX_GROUP = 64
_log = logging.getLogger("mygpt")
_OPTIONS = ("seed", "stop", "logprobs", "overflow", "unknown")


class Writer:
    """A model and its tokenizer, ready to continue text.

    Args:
        model: a `GPT`, on the device and in the number format it is to run in, or a
            checkpoint, whose weights then need no torch unless torch is to run them.
        tokenizer: the model's own.
        provenance: where the model comes from, as its checkpoint records it.
        device: for a checkpoint: "auto", or torch's name of a device.
        dtype: for a checkpoint: float32, bfloat16, float16 (torch), int8 or int4 (the cpu engine);
            "auto" is bfloat16 on a GPU that computes in it, else float32.
        engine: "auto", "numpy", "cpu" or "torch".
        compile: for torch: compile the step from one token to the next (see `TorchEngine`).
        speculate: for the cpu engine: guess the next tokens and check several at once. The text is
            the same, to the bit, and is there sooner where guesses are often right.
        drafts_from: what guesses come from, in addition to the text itself: a table of n-grams, or
            the file in which a run keeps it.
    """

    def __init__(
        self,
        model: GPT | Checkpoint,
        tokenizer: Tokenizer,
        provenance: dict[str, Any] | None = None,
        *,
        device: str = "auto",
        dtype: str = "auto",
        engine: str = "auto",
        compile: bool = False,
        speculate: bool = True,
        drafts_from: DraftTable | Path | None = None,
    ) -> None:
        if tokenizer.vocab_size != model.config.vocab_size:
            raise InputError(
                f"the tokenizer has {tokenizer.vocab_size} ids and the model "
                f"{model.config.vocab_size}: they are of different models"
            )
        self.config: GPTConfig = model.config
        self.tokenizer = tokenizer
        self.provenance = provenance or {}
        self._drafts_from, self._speculate = drafts_from, speculate
        self._engine_options: dict[str, Any] = {
            "device": device, "dtype": dtype, "engine": engine, "compile": compile
        }  # fmt: skip
        make_drafts = self._make_drafts if speculate else None
        self.backend = Backend(model, **self._engine_options, make_drafts=make_drafts)

    def __repr__(self) -> str:
        return (
            f"Writer({self.config.num_parameters():,} parameters, window "
            f"{self.config.max_seq_len}, {self.tokenizer.kind} tokens, vocabulary "
            f"{self.tokenizer.vocab_size})"
        )

    @property
    def model(self) -> GPT:
        """The model as a torch module; a checkpoint's is built at the first access."""
        return self.backend.model

    @property
    def trained_length(self) -> int | None:
        """The longest window in training, in tokens; None if it is not known."""
        return trained_length(self.config, self.provenance)

    def open_batch(self, size: int) -> Batch:
        """A batch of `size` slots, which requests join and leave between tokens, as in a server.

        Raises:
            InputError: for fewer than one slot, or an engine that is not available.
        """
        require_int("size", size, least=1)
        return self.backend.open(size)

    def read(self, ids: Sequence[int], shown: int | None = None) -> Reading:
        """The model's prediction at each position of a text, and its attention weights.

        Args:
            ids: the text, at most as long as the window.
            shown: for how many of the last positions the attention is kept; None is all.

        Raises:
            InputError: for no token, or more than fit in the window.
        """
        return self.backend.network().read_all(ids, shown)

    def inside(self, text: str | Sequence[int], patches: Sequence[Patch] = ()) -> Inside:
        """What happens inside the model as it reads a text; torch runs it.

        Args:
            text: a text or its ids, at most as long as the window.
            patches: activations of another text, from its `Inside.patch`, that replace this one's.

        Returns:
            Logits, losses, residual stream, heads and attention as arrays, with the logit lens and
            the contributions to a logit as methods; see `mygpt.evaluation.inside.Inside`.

        Raises:
            InputError: for ids or patches that do not fit the model or the text.
            UnknownTokenError: for characters outside the vocabulary.
        """
        from mygpt.evaluation.inside import read_activations

        ids = self.prompt_ids(text) if isinstance(text, str) else text
        return read_activations(self.backend.read_only_model, ids, patches)

    def ablated(self, *parts: str) -> Writer:
        """A `Writer` of the model with parts switched off; this one stays as it is.

        Args:
            parts: "1.3" is head 3 of block 1, counted from 1 as on the pages; "attention1", "mlp1"
                and "block1" are the attention, the MLP and both of block 1.

        Raises:
            InputError: for a part that the model does not have.
        """
        from mygpt.evaluation.ablation import Part, ablated

        found = [Part.parse(part, self.config) for part in parts]
        return Writer(
            ablated(self.backend.source, found),
            self.tokenizer,
            self.provenance,
            **self._engine_options,
            speculate=self._speculate,
            drafts_from=self._drafts_from,
        )

    def head_scores(self, *, seed: int = 0) -> HeadScores:
        """Which heads attend to the previous token, the same token before, or the one after that.

        Measured on random tokens that are repeated, which `seed` draws; see
        `mygpt.evaluation.head_scores.HeadScores`.
        """
        from mygpt.evaluation.head_scores import measure_heads

        return measure_heads(self.backend.read_only_model, seed=seed)

    def _make_drafts(self) -> Drafts:
        """Drafts from the table, if there is one that can be used, and from the text itself."""
        from mygpt.cpu.decode.speculation import Drafts

        table = self._drafts_from
        if isinstance(table, Path):
            try:
                table = DraftTable.load(table, self.tokenizer)
            except CheckpointError as error:  # no text depends on it
                _log.warning("%s; generating without it", error)
                table = None
        if table is None:
            return Drafts()
        if table.vocab_size != self.config.vocab_size:
            raise InputError(
                f"drafts_from has {table.vocab_size} tokens and the model "
                f"{self.config.vocab_size}: count it with the model's tokenizer"
            )
        return table.drafts()

    def prompt_ids(self, prompt: str) -> list[int]:
        """Ids of a prompt, after the tokenizer's begin-of-text ids.

        An empty prompt becomes end-of-text, or a newline where the tokenizer has none.

        Raises:
            UnknownTokenError: for characters outside the vocabulary.
        """
        ids = [*self.tokenizer.beginning, *self.tokenizer.encode_array(prompt).tolist()]
        if ids:
            return ids
        if self.tokenizer.end_of_text is not None:
            return [self.tokenizer.end_of_text]
        try:
            newline: list[int] = self.tokenizer.encode_array("\n").tolist()
        except InputError:
            return [0]
        return newline or [0]  # some tokenizers drop white space

    def generate(self, prompt: str = "", max_new_tokens: int = 200, **options: Any) -> str:
        """`prompt` and its continuation as one text; options as for `complete`."""
        completion = self.complete(prompt, max_new_tokens, **options)[0]
        return completion.prompt + completion.text

    def stream(self, prompt: str = "", max_new_tokens: int = 200, **options: Any) -> Iterator[str]:
        """The continuation in pieces as they become certain; options as for `complete`.

        A piece never ends within a character, nor in the beginning of a stop string.
        """
        job = _TextCall(self, prompt, max_new_tokens, **options)
        return (piece for pieces in job.pieces(range(1)) for piece in pieces if piece)

    def complete(
        self, prompt: str = "", max_new_tokens: int = 200, num_samples: int = 1, **options: Any
    ) -> list[Completion]:
        """`num_samples` continuations of `prompt`.

        Args:
            prompt: the text to continue; empty starts from nothing.
            max_new_tokens: where to end at the latest.
            num_samples: how many continuations; number i depends on the seed and i alone.
            options: `temperature`, `top_k`, `top_p`, `min_p`, `repetition_penalty` and
                `overflow` as for `generate`; `seed` (None draws one, which the result
                contains); `stop`, strings that end the text and are not part of it;
                `logprobs`, how many alternatives to report for each token; `unknown`, "drop" to
                remove from the prompt what the tokenizer does not know ("error").

        Raises:
            InputError: for a value outside its range.
            UnknownTokenError: for characters outside the vocabulary.
        """
        return list(self.samples(prompt, max_new_tokens, num_samples, **options))

    def samples(
        self, prompt: str = "", max_new_tokens: int = 200, num_samples: int = 1, **options: Any
    ) -> Iterator[Completion]:
        """The results of `complete` one by one, decoded in groups as large as memory allows."""
        require_int("num_samples", num_samples, least=1)
        return _TextCall(self, prompt, max_new_tokens, **options).samples(num_samples)


class _TextCall:
    """One call: options are checked at once, samples decoded in groups, tokens become text."""

    def __init__(
        self,
        writer: Writer,
        prompt: str,
        max_new_tokens: int,
        *,
        seed: int | None = None,
        stop: Sequence[str] | None = None,
        logprobs: int | None = None,
        overflow: Overflow = "crop",
        unknown: str = "error",
        **sampling: Any,
    ) -> None:
        if not isinstance(prompt, str):
            raise InputError(f"prompt={prompt!r:.40} must be text")
        check_policy(unknown, PROMPT_POLICIES)
        if unknown == "drop":
            prompt, _ = without_unknown(writer.tokenizer, prompt)
        stop = [] if stop is None else stop
        if isinstance(stop, str) or not all(isinstance(text, str) and text for text in stop):
            raise InputError("stop must be a list of strings of at least one character each")
        vocab_size = writer.tokenizer.vocab_size
        if logprobs is not None:
            require_int("logprobs", logprobs, least=0)
            if logprobs > vocab_size:
                raise InputError(
                    f"logprobs={logprobs} must be at most the vocabulary's size, {vocab_size}"
                )
        others = sorted(set(sampling) - {field.name for field in fields(SamplingConfig)})
        if others:
            raise InputError(
                f"unknown option {', '.join(others)}: there are {', '.join(_OPTIONS)} and "
                f"{', '.join(field.name for field in fields(SamplingConfig))}"
            )
        require_int("max_new_tokens", max_new_tokens, least=0)
        require_choice("overflow", overflow, OVERFLOW_POLICIES)
        self.writer, self.prompt, self.max_new_tokens = writer, prompt, max_new_tokens
        self.seed = Stream(fresh_seed() if seed is None else seed).seed
        self.stop, self.logprobs, self.overflow = tuple(stop), logprobs, overflow
        self.sampling = SamplingConfig(**sampling)
        with adding_remedy('unknown="drop" leaves them out'):
            self.prompt_ids = np.array(writer.prompt_ids(prompt), np.int64)
        given = len(writer.tokenizer.beginning) if prompt else len(self.prompt_ids)
        self.text_ids = self.prompt_ids[given:]
        check_prompt_fits(len(self.prompt_ids), writer.config.max_seq_len, overflow)

    def samples(self, count: int) -> Iterator[Completion]:
        """Samples 0 to count - 1, in groups that fit in memory."""
        config = self.writer.config
        positions = min(config.max_seq_len, len(self.prompt_ids) + self.max_new_tokens)
        row_bytes = 8 * config.num_layers * config.kv_heads * config.head_size * max(1, positions)
        group_size = max(1, min(_MAX_GROUP, _CACHE_BYTES // row_bytes))
        for first in range(0, count, group_size):
            group = range(first, min(first + group_size, count))
            rows = self._rows(group)
            for _ in self._pieces(rows, total=count):
                pass
            yield from (row.completion for row in rows)

    def pieces(self, indices: range) -> Iterator[list[str]]:
        """The newly certain text of each sample at each step."""
        return self._pieces(self._rows(indices), total=len(indices))

    def _rows(self, indices: range) -> list[Row]:
        return [
            Row(
                self.writer.tokenizer,
                Completion(self.prompt, seed=self.seed, index=index),
                self.stop,
                self.logprobs,
                self.text_ids,
            )
            for index in indices
        ]

    def _requests(self, rows: list[Row]) -> list[Request]:
        ends = ends_of(self.writer.tokenizer)
        return [
            Request(
                self.prompt_ids,
                self.max_new_tokens,
                self.sampling,
                Stream(self.seed, row.completion.index),
                self.overflow,
                ends,
            )
            for row in rows
        ]

    def _pieces(self, rows: list[Row], total: int) -> Iterator[list[str]]:
        most, window = self.max_new_tokens, self.writer.config.max_seq_len
        reads = tokens_to_read(len(self.prompt_ids), most, window, self.overflow)
        engine = self.writer.backend.engine(total * most, total * reads)
        decoding = engine.start(self._requests(rows))
        length = 1
        while True:
            began = time.perf_counter()
            # With log-probabilities, each token needs the logits of its own step.
            if self.logprobs is not None:
                new = decoding.advance(1)
            else:
                new = decoding.advance(length + _MOST_AHEAD, least=length)
            if not any(new):
                break
            if decoding.draws_in_blocks:
                drawn = max(map(len, new))
                length = max(1, int(_BLOCK_S * drawn / (time.perf_counter() - began)))
            for step in range(max(map(len, new))):
                yield [self._push(row, n, new[n], step, decoding) for n, row in enumerate(rows)]
        for number, row in enumerate(rows):
            drawn, passes = len(row.completion.token_ids), decoding.passes(number)
            row.completion.passes = drawn if passes is None else min(drawn, passes)
        yield [row.finish(self.max_new_tokens) for row in rows]

    def _push(self, row: Row, number: int, ids: list[int], step: int, decoding: Decoding) -> str:
        """Pass a row its token of this step; end the row in the engine at a stop string."""
        if step >= len(ids):
            return ""
        text = row.push(ids[step], None if self.logprobs is None else decoding.logits(number))
        if row.ended:
            decoding.end(number)
        return text


def load(
    path: str | Path | None = None,
    *,
    device: str = "auto",
    dtype: str = "auto",
    engine: str = "auto",
    compile: bool = False,
    speculate: bool = True,
    drafts_from: str | Path | None = None,
) -> Writer:
    """The `Writer` of a run folder or checkpoint file; None takes the newest run.

    Options as for `Writer`, but `drafts_from` is a text file here; None takes the table that the
    run keeps beside its models, where there is one.

    Raises:
        CheckpointError: when there is none, or it is damaged, foreign or newer.
        InputError: for a device, a number format or an engine that is not available, or a text
            that cannot be read.
    """
    found = resolve(path)
    checkpoint = read_checkpoint(found)
    drafts: DraftTable | Path | None = table_beside(found)
    if drafts_from is not None:
        drafts = table_of_file(drafts_from, checkpoint.tokenizer)
    return Writer(
        checkpoint,
        checkpoint.tokenizer,
        checkpoint.provenance,
        device=device,
        dtype=dtype,
        engine=engine,
        compile=compile,
        speculate=speculate,
        drafts_from=drafts,
    )


def table_beside(model: Path) -> Path | None:
    """The table of the run that a model's file belongs to; None if there is none."""
    for folder in (model.with_name(f"{model.name}.run"), model.parent):
        if (path := folder / FILE_NAME).is_file():
            return path
    return None
