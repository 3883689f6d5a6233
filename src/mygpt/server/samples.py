"""Choices: rows of the server's batch whose tokens become pieces of text."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from mygpt.decode.completion import Completion, Row, TokenLogprob
from mygpt.engine import Request
from mygpt.tokenization import Tokenizer


@dataclass
class Entry:
    """One token's log-probability, in the API's form.

    Attributes:
        text: the token as text; for a control token its name.
        logprob: in nats; None for the first token of a text.
        top: log-probabilities of the most probable tokens and of this one, or None. If several
            tokens have the same text, this one, or else the most probable, has the text as its
            key; the others have "token_id:" and their id.
        offset: the token's position in the choice's text, in characters; at most its length.
    """

    text: str
    logprob: float | None
    top: dict[str, float] | None
    offset: int

    @classmethod
    def of(cls, token: TokenLogprob, offset: int) -> Entry:
        """The entry of a token at `offset`."""
        top: dict[str, float] = {}
        for number, (text, logprob) in zip(token.top_ids, token.top, strict=True):
            taken = number != token.id and (text in top or text == token.text)
            top[f"token_id:{number}" if taken else text] = logprob
        top.setdefault(token.text, token.logprob)
        return cls(token.text, token.logprob, top, offset)


@dataclass
class Piece:
    """A new piece of one choice's text.

    Attributes:
        number: the choice's number in its request.
        text: the new text that cannot change any more.
        entries: log-probabilities of its tokens, if requested.
        finish_reason: "stop" or "length" in the last piece, else None.
        tokens: in the last piece, the choice's number of generated tokens.
    """

    number: int
    text: str = ""
    entries: list[Entry] = field(default_factory=list)
    finish_reason: Literal["stop", "length"] | None = None
    tokens: int = 0


class Sample:
    """One choice: turns its tokens into pieces of text.

    Args:
        request: the request to the engine; the number of its random stream is the choice's number.
        prompt: the prompt's text.
        tokenizer: the model's tokenizer.
        stop: strings that end the text.
        logprobs: how many alternatives to return for each token, or None.
        before: how many characters of the choice's text are the echoed prompt.
        added: how many tokens at the prompt's beginning are not of its text.
    """

    def __init__(
        self,
        request: Request,
        *,
        prompt: str,
        tokenizer: Tokenizer,
        stop: tuple[str, ...],
        logprobs: int | None,
        before: int,
        added: int = 0,
    ) -> None:
        self.request, self.before, self.number = request, before, request.stream.index
        self.completion = Completion(prompt, seed=request.stream.seed, index=self.number)
        self.row = Row(tokenizer, self.completion, stop, logprobs, request.prompt[added:])
        self.wants_logits = logprobs is not None
        self._text = ""
        self._entries: list[Entry] = []

    @property
    def ended(self) -> bool:
        """Whether the choice has ended."""
        return self.row.ended

    def take(self, token_id: int, logits: NDArray[np.float32] | None) -> None:
        """Add a token, with the logits (V,) that it was sampled from if `wants_logits`."""
        offset = self.before + len(self.completion.text) + len(self.row.pending)
        self._text += self.row.push(token_id, logits)
        if self.completion.logprobs is not None:
            self._entries.append(Entry.of(self.completion.logprobs[-1], offset))
        if len(self.completion.token_ids) == self.request.max_new_tokens:
            self.finish()

    def finish(self) -> None:
        """End the choice: no more tokens are sampled."""
        self._text += self.row.finish(self.request.max_new_tokens)

    def update(self) -> Piece | None:
        """The new piece since the last call; None if there is nothing new."""
        reason = self.completion.finish_reason
        entries = self._released(reason)
        if not (self._text or entries or reason):
            return None
        piece = Piece(self.number, self._text, entries)
        if reason:
            piece.finish_reason = "stop" if reason in ("stop", "end") else "length"
            piece.tokens = len(self.completion.token_ids)
        self._text = ""
        return piece

    def _released(self, reason: str) -> list[Entry]:
        """Entries of tokens that begin in text that cannot change any more; at the end, all."""
        fixed = self.before + len(self.completion.text)
        if reason:
            for entry in self._entries:  # a stop string may have removed their text
                entry.offset = min(entry.offset, fixed)
            out, self._entries = self._entries, []
            return out
        out = [entry for entry in self._entries if entry.offset < fixed]
        self._entries = self._entries[len(out) :]
        return out
