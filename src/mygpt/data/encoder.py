"""Encode a text of any length chunk by chunk, to the ids of the whole text.

With characters and bytes as tokens, a text can be split anywhere. With byte-level BPE it can be
split where a word begins regardless of context. For the rules for words known here that is before
a space that follows a letter, and after a line end between two ordinary characters; for mygpt's own
rule (`tokenization/words.py`) also before a space that follows any ordinary character, and between
a line end and an ordinary character. Any other tokenizer needs complete documents.

This module does not import torch.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from mygpt.data.tokens import dtype_of
from mygpt.errors import InputError
from mygpt.tokenization import BPETokenizer, ForeignTokenizer, Tokenizer
from mygpt.tokenization.words import REACH, WordSplitter

# Ordinary characters, which are not white space in any version of Unicode: ASCII, Latin, Cyrillic,
# Chinese, Japanese, Korean.
_ORDINARY = "!-~\u00c0-\u024f\u0400-\u04ff\u3001-\u30fa\u4e00-\u9fa5\uac00-\ud7a3\uff01-\uff5e"
_OURS = re.compile(rf"[{_ORDINARY}](?= )|\n(?=[{_ORDINARY}])")
_SPACES = re.compile(r"[^\W\d_](?= )")
_SPACES_AND_LINES = re.compile(rf"[^\W\d_](?= )|[{_ORDINARY}]\n(?=[{_ORDINARY}])")
_SLACK = 2**16  # characters in which a split point is searched for, before words are counted
_LONGEST = 2**28  # characters of a document that cannot be split


class Chunker:
    """Finds the ends of chunks.

    A chunk's end depends only on the text from the chunk's beginning on, not on how much of it is
    read at a time.

    Args:
        tokenizer: will encode the chunks.
        length: minimum number of characters of a chunk, except for a document's last one.
    """

    def __init__(self, tokenizer: Tokenizer, length: int) -> None:
        self.length = length
        self._anywhere = tokenizer.kind in ("char", "byte")
        self._pattern, self._own_rule = _rule(tokenizer)
        self._words = WordSplitter()

    def find(self, text: str, begin: int, seen: int) -> int | None:
        """The end of the chunk that begins at `begin`; None if more text is needed.

        Args:
            text: the part of the document that has been read.
            begin: the index of the chunk's first character in `text`.
            seen: the length of `text` at the previous call, which returned None; else 0.

        Raises:
            InputError: if the tokenizer needs complete documents and this one is too long.
        """
        least = begin + self.length
        if len(text) <= least:
            return None
        if self._anywhere:
            return least
        if self._pattern is None:
            self._check_whole(len(text) - begin)
            return None
        last = least + _SLACK if self._own_rule else len(text)
        found = self._pattern.search(text, max(least, seen - 2), last)
        if found is not None:
            return found.end()
        if not self._own_rule:
            self._check_whole(len(text) - begin)
            return None
        return self._before_a_word(text, begin, last) if len(text) > last else None

    def _before_a_word(self, text: str, begin: int, last: int) -> int:
        """The last position up to which the words do not depend on the text that follows."""
        words = self._words.split(text[begin:last])
        end = last
        while words and last - end < REACH:
            end -= len(words.pop())
        return end

    def _check_whole(self, length: int) -> None:
        if length > _LONGEST:
            raise InputError(
                f"a document has more than {_LONGEST:,} characters, the limit for a tokenizer that "
                "needs complete documents: split it into several, for instance lines of a *.jsonl"
            )


def _rule(tokenizer: Tokenizer) -> tuple[re.Pattern[str] | None, bool]:
    """The pattern before which a text can be split, and whether `words.py`'s rule applies."""
    if not isinstance(tokenizer, (BPETokenizer, ForeignTokenizer)) or tokenizer.encoder is None:
        return None, False
    rules = tokenizer.encoder.rules
    if rules.own_rule:
        return _OURS, True
    if not rules.splits_at_spaces:
        return None, False
    return (_SPACES_AND_LINES if rules.splits_at_lines else _SPACES), False


class Encoder:
    """Encodes chunks of documents to the same ids as `encode_documents`."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._dtype = np.dtype(dtype_of(tokenizer)).newbyteorder("<")
        ends = [] if tokenizer.end_of_text is None else [tokenizer.end_of_text]
        self._before = np.array([*ends, *tokenizer.beginning], np.int32).tobytes()

    def encode(self, texts: Sequence[str], begins: Sequence[bool]) -> tuple[list[int], bytes]:
        """Encode chunks.

        Args:
            texts: the chunks.
            begins: whether each begins a document, and so gets the tokens before a document.

        Returns:
            The number of ids of each chunk, and the bytes of all ids.

        Raises:
            InputError: as the tokenizer does.
        """
        rows = [
            self._before * begin + self._tokenizer.encode_part(text)
            for text, begin in zip(texts, begins, strict=True)
        ]
        ids = np.frombuffer(b"".join(rows), np.int32)
        return [len(row) // ids.itemsize for row in rows], ids.astype(self._dtype).tobytes()
