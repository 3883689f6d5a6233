"""Count the text that a tokenizer encodes as its unknown token, or as nothing at all.

For tokenizers with character fallback (BPE, Unigram), unknown characters are counted: each
distinct character is encoded once by itself. For tokenizers of complete words (WordLevel,
WordPiece), unknown tokens are counted. Not counted are white space, control and format characters
that a tokenizer drops, and characters that it normalises (case, accents of composed letters).
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

from mygpt.errors import InputError, UnknownTokenError
from mygpt.tokenization.base import Tokenizer
from mygpt.tokenization.foreign import ForeignTokenizer

MOST_UNKNOWN = 0.1  # fraction of a training or evaluation text; more is refused
CORPUS_POLICIES = ("error", "keep")  # for training texts
PROMPT_POLICIES = ("error", "drop")
_SHOWN = 5  # unknown characters or words in a message
_SEARCHED = 2**16  # characters searched for unknown words to show as examples


class UnknownText:
    """Accumulates counts of unknown characters and tokens over texts.

    Args:
        tokenizer: any. For one that encodes every text, or raises for unknown characters, all
            counts stay 0.

    Attributes:
        counts: whether text can be unknown to the tokenizer without an error.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.counts = not tokenizer.is_lossless
        self._tokenizer = tokenizer
        self._is_lost: dict[str, bool] = {}  # whether a character cannot be encoded
        self._found: Counter[str] = Counter()  # unknown characters, and examples of unknown words
        self._chars = self._lost_chars = self._ids = self._unknown_ids = self._searched = 0

    def add(self, texts: Iterable[str | bytes] | None, ids: NDArray[np.integer]) -> None:
        """Count texts and the ids they were encoded to.

        Args:
            texts: strings or UTF-8; None if only the ids are available.
            ids: 1-D.
        """
        tokenizer = self._tokenizer
        if tokenizer.is_lossless or not isinstance(tokenizer, ForeignTokenizer):
            return
        more = 0
        if tokenizer.unknown_id is not None and not (
            texts is not None and tokenizer.falls_back_to_characters
        ):
            self._ids += len(ids)
            more = int(np.count_nonzero(ids == tokenizer.unknown_id))
            self._unknown_ids += more
        for text in texts or ():
            text = text if isinstance(text, str) else text.decode("utf-8", "replace")
            self._chars += len(text)
            distinct = set(text)
            for char in distinct - self._is_lost.keys():
                self._is_lost[char] = tokenizer.cannot_encode(char)
            if any(map(self._is_lost.__getitem__, distinct)):
                counts = Counter(filter(self._is_lost.__getitem__, text))
                self._lost_chars += counts.total()
                self._found += counts
            if more and self._searched < _SEARCHED:
                start = text[: _SEARCHED - self._searched]
                self._searched += len(start)
                spans = tokenizer.unknown_token_spans(start)
                self._found.update(start[begin:end] for begin, end in spans)

    @property
    def _fractions(self) -> tuple[float, float]:
        """Of the characters, and of the tokens."""
        return self._lost_chars / max(1, self._chars), self._unknown_ids / max(1, self._ids)

    @property
    def fraction(self) -> float:
        """The unknown fraction of the text, from 0 to 1."""
        return max(self._fractions)

    def __str__(self) -> str:
        """The unknown fraction with examples, for a message; empty if nothing is unknown."""
        if not self.fraction:
            return ""
        of_chars, of_tokens = self._fractions
        unit = "tokens" if of_tokens > of_chars else "characters"
        often = sorted(self._found, key=lambda text: (-self._found[text], text))
        examples = f" ({_examples(often)})" * bool(often)
        return f"{_percent(self.fraction)} of the {unit} are unknown to the tokenizer{examples}"

    def notes(self, name: str, policy: str) -> list[str]:
        """A note if part of the text is unknown, else an empty list.

        Args:
            name: of the text, for the message.
            policy: "error" to refuse a text of which more than 10 % is unknown, or "keep".

        Raises:
            InputError: if the text is refused, or the policy is not known.
        """
        check_policy(policy, (*CORPUS_POLICIES, "drop"))
        if not self.fraction:
            return []
        if self.fraction > MOST_UNKNOWN and policy == "error":
            raise InputError(
                f"{name}: {self}, and the limit is {_percent(MOST_UNKNOWN)}, since the loss would "
                "not measure how well the text is predicted; use a tokenizer that knows them, or "
                "give --unknown keep to use the text anyway"
            )
        return [f"{name}: {self}; they are encoded as the unknown token, or dropped"]


def check_policy(policy: object, known: tuple[str, ...]) -> None:
    """Raise `InputError` for a policy that is not one of these."""
    if policy not in known:
        raise InputError(f"unknown={policy!r:.40} is not known: choose {' or '.join(known)}")


def without_unknown(tokenizer: Tokenizer, text: str) -> tuple[str, list[str]]:
    """Remove unknown characters and words from a text.

    Returns:
        The remaining text, and the distinct removed strings in order.
    """
    kept: list[str] = []
    removed: dict[str, None] = {}
    reached = 0
    for begin, end in tokenizer.unknown_spans(text):
        kept.append(text[reached:begin])
        removed[text[begin:end]] = None
        reached = end
    return "".join([*kept, text[reached:]]), list(removed)


@contextlib.contextmanager
def adding_remedy(remedy: str) -> Iterator[None]:
    """Append a remedy to the message of an `UnknownTokenError` raised in the `with` body."""
    try:
        yield
    except UnknownTokenError as error:
        raise UnknownTokenError(f"{error}; {remedy}") from None


def dropped_note(left: list[str], *, kept: str = "") -> str:
    """A note on unknown strings that were dropped from a text; `kept` says what happened else."""
    return f"the model does not know {_examples(left)}: {kept or 'removed from the text'}"


def _examples(unknown: list[str]) -> str:
    """The first unknown characters or words as messages show them."""
    points = [
        f" U+{ord(text):04X}" if len(text) == 1 and not text.isascii() else "" for text in unknown
    ]
    shown = [f"{text!r:.40}{point}" for text, point in zip(unknown, points, strict=True)]
    return ", ".join(shown[:_SHOWN]) + ", ..." * (len(shown) > _SHOWN)


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %" if share >= 0.001 else "less than 0.1 %"
