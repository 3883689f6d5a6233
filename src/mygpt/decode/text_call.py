"""One call of a `Writer`: options are checked, prompts decoded in groups, tokens become text."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mygpt.core.config import SamplingConfig
from mygpt.core.random import Stream
from mygpt.core.window import OVERFLOW_POLICIES, Overflow
from mygpt.decode.choice import tokens_to_read
from mygpt.decode.completion import Completion, Row
from mygpt.decode.options import Seed
from mygpt.engine import Decoding, Request, check_prompt_fits, fresh_seed
from mygpt.errors import InputError, require_choice, require_int
from mygpt.options import defaults_of, names_of, require_known
from mygpt.tokenization import ends_of
from mygpt.tokenization.unknown import PROMPT_POLICIES, adding_remedy, check_policy, without_unknown

if TYPE_CHECKING:
    from mygpt.decode.writer import Writer

Prompts = list[str] | tuple[str, ...]

# Steps of small models are so short that one call for each would cost time: a call makes as many
# steps as fit in this time.
_BLOCK_S = 0.010
_MOST_AHEAD = 7  # tokens that a call may draw beyond these, where one pass gives several
_CACHE_BYTES = 2**30  # the most for keys and values of samples that are decoded together
_MAX_GROUP = 64


@dataclass(frozen=True)
class _Prompt:
    """One prompt of a call."""

    text: str
    ids: NDArray[np.int64]  # (T,) what the model reads
    text_ids: NDArray[np.int64]  # those of `ids` that stand for the text
    seed: int  # of its samples


class TextCall:
    """One call: the arguments of `Writer.complete`, checked at once.

    Args:
        writer: whose method is called.
        prompt: a text, or several.
        max_new_tokens: where to end at the latest.
        seed, stop, logprobs, overflow, unknown: as for `Writer.complete`.
        sampling: the fields of `SamplingConfig`.

    Raises:
        InputError: for an option that does not exist, or a value outside its range.
        UnknownTokenError: for characters outside the vocabulary.
    """

    def __init__(
        self,
        writer: Writer,
        prompt: str | Prompts,
        max_new_tokens: int,
        *,
        seed: Seed | None = None,
        stop: Prompts | None = None,
        logprobs: int | None = None,
        overflow: Overflow = "crop",
        unknown: str = "error",
        **sampling: Any,
    ) -> None:
        require_known(sampling, _OPTIONS)
        check_policy(unknown, PROMPT_POLICIES)
        self.stop, self.logprobs = _checked_stop(stop), logprobs
        vocab_size = writer.tokenizer.vocab_size
        if logprobs is not None:
            require_int("logprobs", logprobs, least=0)
            if logprobs > vocab_size:
                raise InputError(
                    f"logprobs={logprobs} must be at most the vocabulary's size, {vocab_size}"
                )
        require_int("max_new_tokens", max_new_tokens, least=0)
        require_choice("overflow", overflow, OVERFLOW_POLICIES)
        self.writer, self.max_new_tokens, self.overflow = writer, max_new_tokens, overflow
        self.sampling = SamplingConfig(**sampling)
        self._seed: Any = seed  # checked by `Stream`
        self._drops_unknown = unknown == "drop"
        texts = prompt if isinstance(prompt, (list, tuple)) else [prompt]
        self._prompts = [self._prompt(text) for text in texts]

    def _prompt(self, text: str) -> _Prompt:
        writer = self.writer
        if not isinstance(text, str):
            raise InputError(f"prompt={text!r:.40} must be text, or a list of texts")
        if self._drops_unknown:
            text, _ = without_unknown(writer.tokenizer, text)
        with adding_remedy('unknown="drop" removes them'):
            ids = np.array(writer.prompt_ids(text), np.int64)
        given = len(writer.tokenizer.beginning) if text else len(ids)
        check_prompt_fits(len(ids), writer.config.max_seq_len, self.overflow)
        seed = Stream(fresh_seed() if self._seed is None else self._seed).seed
        return _Prompt(text, ids, ids[given:], seed)

    def samples(self, count: int) -> Iterator[Completion]:
        """Samples 0 to count - 1 of each prompt in turn, in groups that fit in memory."""
        config = self.writer.config
        longest = max((len(prompt.ids) for prompt in self._prompts), default=0)
        positions = min(config.max_seq_len, longest + self.max_new_tokens)
        row_bytes = 8 * config.num_layers * config.kv_heads * config.head_size * max(1, positions)
        group_size = max(1, min(_MAX_GROUP, _CACHE_BYTES // row_bytes))
        wanted = ((prompt, index) for prompt in self._prompts for index in range(count))
        while group := list(islice(wanted, group_size)):
            rows = [self._row(prompt, index) for prompt, index in group]
            requests = [self._request(prompt, index) for prompt, index in group]
            for _ in self._pieces(rows, requests, total=count * len(self._prompts)):
                pass
            yield from (row.completion for row in rows)

    def pieces(self) -> Iterator[list[str]]:
        """The newly certain text of the first sample of each prompt, at each step."""
        rows = [self._row(prompt, 0) for prompt in self._prompts]
        requests = [self._request(prompt, 0) for prompt in self._prompts]
        return self._pieces(rows, requests, total=len(rows))

    def _row(self, prompt: _Prompt, index: int) -> Row:
        completion = Completion(prompt.text, seed=prompt.seed, index=index)
        return Row(self.writer.tokenizer, completion, self.stop, self.logprobs, prompt.text_ids)

    def _request(self, prompt: _Prompt, index: int) -> Request:
        return Request(
            prompt.ids,
            self.max_new_tokens,
            self.sampling,
            Stream(prompt.seed, index),
            self.overflow,
            ends_of(self.writer.tokenizer),
        )

    def _pieces(self, rows: list[Row], requests: list[Request], total: int) -> Iterator[list[str]]:
        most, window = self.max_new_tokens, self.writer.config.max_seq_len
        lengths = (len(request.prompt) for request in requests)
        reads = sum(tokens_to_read(length, most, window, self.overflow) for length in lengths)
        engine = self.writer.backend.engine(total * most, total * reads // max(1, len(rows)))
        decoding = engine.start(requests)
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


DEFAULTS = {**defaults_of(SamplingConfig), **defaults_of(TextCall)}  # of the options, by name
_OPTIONS = {*names_of(TextCall), *names_of(SamplingConfig)} - {"writer", "sampling"}


def _checked_stop(stop: Any) -> tuple[str, ...]:
    found = () if stop is None else stop
    if isinstance(found, str) or not all(isinstance(text, str) and text for text in found):
        raise InputError("stop must be a list of strings of at least one character each")
    return tuple(found)
