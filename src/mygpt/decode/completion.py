"""One continuation, from tokens to text: decoding, stop strings, log-probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from mygpt.errors import InputError
from mygpt.tokenization import Tokenizer, ends_of
from mygpt.tokenization.base import shared_start

_CONTEXT = 64  # last tokens of a prompt that are decoded to see how it ends


@dataclass
class TokenLogprob:
    """One token's log-probability in nats under the model itself, before any filter.

    Attributes:
        id: the token.
        text: the token as text; a control token's is its name.
        logprob: its log-probability.
        top: the likeliest tokens at this position, text and log-probability, best first.
        top_ids: their ids.
    """

    id: int
    text: str
    logprob: float
    top: list[tuple[str, float]]
    top_ids: list[int]


@dataclass
class Completion:
    """One continuation of a prompt.

    Attributes:
        prompt: the text it continues.
        text: the new text alone, without a stop string or end-of-text.
        token_ids: the tokens drawn, all of them: also the end-of-text, and what a stop string
            has cut off the text.
        finish_reason: "length", "stop" (a stop string), "end" (end-of-text) or "window".
        seed: the seed of its random numbers.
        index: its number among the samples of that seed.
        logprobs: one entry for each of `token_ids` where asked for, else None.
        passes: passes of the model that drew the tokens; fewer than these where drafts of the next
            tokens were right. The text does not depend on it.
    """

    prompt: str
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str = ""
    seed: int = 0
    index: int = 0
    logprobs: list[TokenLogprob] | None = None
    passes: int = field(default=0, compare=False)


class Row:
    """One sample: decodes its tokens, searches for stop strings, collects log-probabilities.

    Args:
        tokenizer: the model's.
        completion: receives the results.
        stop: strings that end the text.
        logprobs: how many alternatives each token's entry has; None for no entries.
        after: (T,) int64 ids of the prompt's text.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        completion: Completion,
        stop: tuple[str, ...],
        logprobs: int | None,
        after: NDArray[np.int64] | None = None,
    ) -> None:
        self.tokenizer, self.ends = tokenizer, ends_of(tokenizer)
        self.completion = completion
        # Some tokenizers drop the space before the first word of a text; this text has a prompt.
        before = [] if after is None else after[-_CONTEXT:].tolist()
        self.decoder = tokenizer.decoder(continued=bool(completion.prompt), after=before)
        self.given = _undecoded_space(tokenizer, completion.prompt, before)
        self.stop = stop
        self.num_logprobs = logprobs
        self.pending = ""
        if logprobs is not None:
            completion.logprobs = []

    @property
    def ended(self) -> bool:
        """Whether this sample has ended."""
        return bool(self.completion.finish_reason)

    def push(self, token_id: int, logits: NDArray[np.float32] | None = None) -> str:
        """Add one token, drawn from these logits; return the text that is now certain."""
        if self.ended:
            return ""
        self.completion.token_ids.append(token_id)
        if self.completion.logprobs is not None and logits is not None:
            self.completion.logprobs.append(self._logprob(token_id, logits))
        if token_id in self.ends:
            return self._end("end", self.decoder.finish())
        return self._release(self.decoder.push(token_id))

    def finish(self, max_new_tokens: int) -> str:
        """End a row that no token ended; return the text that was pending."""
        if self.ended:
            return ""
        full = len(self.completion.token_ids) == max_new_tokens
        return self._end("length" if full else "window", self.decoder.finish())

    def _end(self, reason: str, rest: str) -> str:
        piece = self._release(rest)
        if self.ended:
            return piece
        self.completion.finish_reason = reason
        self.completion.text += self.pending
        return piece + self.pending

    def _release(self, new: str) -> str:
        """Add `new`; return the text that can no longer become part of a stop string."""
        if self.given and new:
            shared = shared_start(self.given, new)
            new, self.given = new[shared:], "" if new[shared:] else self.given[shared:]
        pending = self.pending + new
        found = [(pending.find(s), s) for s in self.stop if s in pending]
        if found:
            self.completion.finish_reason = "stop"
            pending, self.pending = pending[: min(found)[0]], ""
        else:
            keep = max((_overlap(pending, s) for s in self.stop), default=0)
            self.pending = pending[len(pending) - keep :]
            pending = pending[: len(pending) - keep]
        self.completion.text += pending
        return pending

    def _logprob(self, token_id: int, logits: NDArray[np.float32]) -> TokenLogprob:
        wide = logits.astype(np.float64)
        largest = wide.max()
        logprobs = wide - largest - np.log(np.exp(wide - largest).sum())  # (V,)
        best = np.argsort(-logprobs, kind="stable")[: self.num_logprobs or 0].tolist()
        text = self.tokenizer.token_text
        top = [(text(i), float(logprobs[i])) for i in best]
        return TokenLogprob(token_id, text(token_id), float(logprobs[token_id]), top, best)


def _undecoded_space(tokenizer: Tokenizer, prompt: str, ids: Sequence[int]) -> str:
    """White space at a prompt's end that its ids lack, and that the next token may contain."""
    space = prompt[len(prompt.rstrip()) :]
    if not space or not ids:
        return ""
    try:
        decoded = tokenizer.decode(ids)
    except InputError:  # its decoder fails: the new tokens raise the same
        return ""
    own = decoded[len(decoded.rstrip()) :]
    return space[len(own) :] if space.startswith(own) else ""


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop` without completing it."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
