"""What decodes in the server's batch: a choice that becomes text, or a look at one prediction."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from mygpt.engines.contract import Request
from mygpt.generation.completion import Completion, Row, TokenLogprob
from mygpt.tokenization import Tokenizer


@dataclass
class Entry:
    """One token's log-probability, as the API has it.

    Attributes:
        text: the token as text; a control token's is its name.
        logprob: in nats; None where nothing came before.
        top: log-probabilities of the likeliest tokens and of this one, or None. Of tokens that
            look alike this one, else the likeliest, has the text; another is "token_id:" and
            its number.
        offset: where the token begins in the choice's text, in characters; at most its length.
    """

    text: str
    logprob: float | None
    top: dict[str, float] | None
    offset: int

    @classmethod
    def of(cls, token: TokenLogprob, offset: int) -> Entry:
        """A token's entry at its place."""
        top: dict[str, float] = {}
        for number, (text, logprob) in zip(token.top_ids, token.top, strict=True):
            taken = number != token.id and (text in top or text == token.text)
            top[f"token_id:{number}" if taken else text] = logprob
        top.setdefault(token.text, token.logprob)
        return cls(token.text, token.logprob, top, offset)


@dataclass
class Piece:
    """What is new of one choice.

    Attributes:
        number: the choice's number in its request.
        text: the text that has become certain.
        entries: log-probabilities of its tokens, where asked for.
        finish_reason: "stop" or "length" with the last piece, else None.
        tokens: how many tokens were drawn for the choice, with the last piece.
    """

    number: int
    text: str = ""
    entries: list[Entry] = field(default_factory=list)
    finish_reason: str | None = None
    tokens: int = 0


class Sample:
    """One choice on its way from tokens to pieces of text.

    Args:
        number: its number in its request, and of its random numbers.
        request: what the engine is to continue.
        prompt: the prompt's text.
        tokenizer: the model's.
        stop: strings that end the text.
        logprobs: how many alternatives to tell for each token, or None.
        before: how many characters of the choice's text come before its new ones.
        given: how many tokens at the request's beginning are none of the prompt's text.
    """

    def __init__(
        self,
        number: int,
        request: Request,
        *,
        prompt: str,
        tokenizer: Tokenizer,
        stop: tuple[str, ...],
        logprobs: int | None,
        before: int,
        given: int = 0,
    ) -> None:
        self.number, self.request, self.before = number, request, before
        completion = Completion(prompt, seed=request.stream.seed, index=number)
        self.completion = completion
        self.row = Row(tokenizer, completion, stop, logprobs, request.prompt[given:])
        self.wants_logits = logprobs is not None
        self._text = ""
        self._entries: list[Entry] = []

    @property
    def ended(self) -> bool:
        """Whether it takes no more tokens."""
        return self.row.ended

    def take(self, token_id: int, logits: NDArray[np.float32] | None) -> None:
        """Take in a token, and the logits it was drawn from where they are wanted."""
        offset = self.before + len(self.completion.text) + len(self.row.held_back)
        self._text += self.row.push(token_id, logits)
        if self.completion.logprobs is not None:
            self._entries.append(Entry.of(self.completion.logprobs[-1], offset))
        if len(self.completion.token_ids) == self.request.max_new_tokens:
            self.finish()

    def finish(self) -> None:
        """Close it where nothing more is drawn."""
        self._text += self.row.finish(self.request.max_new_tokens)

    def news(self) -> Piece | None:
        """What is new since it was asked last; None for nothing."""
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
        """Entries of tokens that begin in the text that is certain; at the end all of them."""
        certain = self.before + len(self.completion.text)
        if reason:
            for entry in self._entries:  # a stop string may have cut off their text
                entry.offset = min(entry.offset, certain)
            out, self._entries = self._entries, []
            return out
        out = [entry for entry in self._entries if entry.offset < certain]
        self._entries = self._entries[len(out) :]
        return out


class Peek:
    """One look at what the model predicts after some tokens."""

    wants_logits = True

    def __init__(self, request: Request) -> None:
        self.request = request
        self.logits: NDArray[np.float32] | None = None

    @property
    def ended(self) -> bool:
        """Whether it has been taken."""
        return self.logits is not None

    def take(self, token_id: int, logits: NDArray[np.float32] | None) -> None:
        """Keep the logits."""
        assert logits is not None
        self.logits = logits.copy()  # (V,)

    def finish(self) -> None:
        """Nothing is left to do."""

    def news(self) -> NDArray[np.float32] | None:
        """The logits (V,)."""
        return self.logits
