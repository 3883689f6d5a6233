"""What of a text a tokenizer does not know: what becomes its unknown token, or nothing at all.

Of tokenizers that fall back to characters (BPE, Unigram) the unknown characters are counted: each
distinct one is encoded once, alone. Of those that know whole words (WordLevel, WordPiece) the
unknown tokens are counted. White space, control and format characters that a tokenizer drops are
not counted as unknown, nor is what it changes (letters' case, accents of composed letters).
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

from mygpt.errors import InputError, UnknownTokenError
from mygpt.tokenization.base import Tokenizer
from mygpt.tokenization.char import CharTokenizer
from mygpt.tokenization.foreign import ForeignTokenizer

MOST_UNKNOWN = 0.1  # of a text that is learned from or scored; more is refused
CORPUS_POLICIES = ("error", "keep")  # for texts to learn from
PROMPT_POLICIES = ("error", "drop")
_SHOWN = 5  # unknown characters or words in a message
_FEW = 16  # characters that are counted one by one
_SEARCHED = 2**16  # characters in which unknown words are looked for, to be shown


class UnknownText:
    """Counts what a tokenizer does not know, as texts and their ids come.

    Args:
        tokenizer: any; one that knows every text, or refuses what it does not, counts nothing.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._foreign = (
            tokenizer
            if isinstance(tokenizer, ForeignTokenizer) and not tokenizer.is_lossless
            else None
        )
        self._known: set[str] = set()
        self._lost: set[str] = set()
        self._found: Counter[str] = Counter()  # unknown characters; of words those to be shown
        self._chars = self._lost_chars = self._ids = self._unknown_ids = self._searched = 0

    @property
    def counts(self) -> bool:
        """Whether the tokenizer may have unknown text at all."""
        return self._foreign is not None

    def add(self, texts: Iterable[str | bytes] | None, ids: NDArray[np.integer]) -> None:
        """Count texts, and the ids that they became; of a text that is not at hand, these alone."""
        if self._foreign is None:
            return
        unknown = self._foreign.unknown_id
        more = 0
        if unknown is not None and not (
            texts is not None and self._foreign.falls_back_to_characters
        ):
            self._ids += len(ids)
            more = int(np.count_nonzero(ids == unknown))
            self._unknown_ids += more
        for text in texts or ():
            text = text if isinstance(text, str) else text.decode("utf-8", "replace")
            self._add_characters(text)
            if more and self._searched < _SEARCHED:
                start = text[: _SEARCHED - self._searched]
                self._searched += len(start)
                spans = self._foreign.unknown_spans(start)
                self._found.update(start[begin:end] for begin, end in spans)

    def _add_characters(self, text: str) -> None:
        assert self._foreign is not None
        self._chars += len(text)
        distinct = set(text)
        for char in distinct - self._known - self._lost:
            (self._lost if self._foreign.cannot_encode(char) else self._known).add(char)
        lost = distinct & self._lost
        if not lost:
            return
        if len(lost) <= _FEW:
            counts = Counter({char: text.count(char) for char in lost})
        else:
            whole = Counter(text)
            counts = Counter({char: whole[char] for char in lost})
        self._lost_chars += counts.total()
        self._found += counts

    @property
    def share(self) -> float:
        """The part of the text that is unknown, from 0 to 1."""
        return max(self._lost_chars / max(1, self._chars), self._unknown_ids / max(1, self._ids))

    def __str__(self) -> str:
        """What is unknown, for people; empty where nothing is."""
        if not self.share:
            return ""
        by_token = self._unknown_ids / max(1, self._ids) > self._lost_chars / max(1, self._chars)
        unit = "tokens" if by_token else "characters"
        often = sorted(self._found, key=lambda text: (-self._found[text], text))
        shown = [shown_unknown(text) for text in often[:_SHOWN]]
        more = ", ..." * (len(often) > _SHOWN)
        examples = f" ({', '.join(shown)}{more})" * bool(shown)
        return f"{_percent(self.share)} of the {unit} are unknown to the tokenizer{examples}"

    def notes(self, name: str, policy: str) -> list[str]:
        """A note where something is unknown; refused where it is too much, unless it is kept.

        Args:
            name: what the text is called.
            policy: "error", or "keep" to take any share.

        Raises:
            InputError: for a share above 10 %, or a policy that is not known.
        """
        check_policy(policy, (*CORPUS_POLICIES, "drop"))
        if not self.share:
            return []
        if self.share > MOST_UNKNOWN and policy == "error":
            raise InputError(
                f"{name}: {self}, and at most {_percent(MOST_UNKNOWN)} may be, for a loss over "
                "them says nothing of the text; take a tokenizer that knows them, or "
                "--unknown keep to take the text all the same"
            )
        return [f"{name}: {self}; the model reads the unknown token for them, or nothing"]


def check_policy(policy: object, known: tuple[str, ...]) -> None:
    """Raise `InputError` for a policy that is not one of these."""
    if policy not in known:
        raise InputError(f"unknown={policy!r:.40} is not known: choose {' or '.join(known)}")


def without_unknown(tokenizer: Tokenizer, text: str) -> tuple[str, list[str]]:
    """A text without what the tokenizer does not know, and what that is, each once, in order."""
    if isinstance(tokenizer, CharTokenizer):
        known = tokenizer.stoi
        others = list(dict.fromkeys(char for char in text if char not in known))
        return text.translate(dict.fromkeys(map(ord, others))), others
    if not isinstance(tokenizer, ForeignTokenizer) or tokenizer.is_lossless:
        return text, []
    kept: list[str] = []
    left: dict[str, None] = {}
    reached = 0
    lost = set(filter(tokenizer.cannot_encode, set(text)))
    dropped = ((n, n + 1) for n, char in enumerate(text) if char in lost)
    for begin, end in sorted({*tokenizer.unknown_spans(text), *dropped}):
        if end <= reached:
            continue
        begin = max(begin, reached)
        kept.append(text[reached:begin])
        left[text[begin:end]] = None
        reached = end
    return "".join([*kept, text[reached:]]), list(left)


@contextlib.contextmanager
def adding_remedy(remedy: str) -> Iterator[None]:
    """Add what helps here to the error of a text that a tokenizer refuses."""
    try:
        yield
    except UnknownTokenError as error:
        raise UnknownTokenError(f"{error}; {remedy}") from None


def dropped_note(left: list[str], *, kept: str = "") -> str:
    """A note on what was left out of a text, or on what of it is unknown."""
    shown = ", ".join(map(shown_unknown, left[:_SHOWN])) + ", ..." * (len(left) > _SHOWN)
    return f"the model does not know {shown}: {kept or 'left out'}"


def shown_unknown(text: str) -> str:
    """An unknown character or word, as messages show it."""
    point = f" U+{ord(text):04X}" if len(text) == 1 and not text.isascii() else ""
    return f"{text!r:.40}{point}"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %" if share >= 0.001 else "less than 0.1 %"
