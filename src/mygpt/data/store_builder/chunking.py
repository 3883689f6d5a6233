"""Where a text may be cut so that the parts' ids in a row are the whole's.

Characters and bytes may be cut anywhere. Byte-level BPE may be cut where a word begins whatever
stands around it. For the rules of words known here that is so before a space that follows a
letter, and after a line's end between two ordinary characters; for our own rule (`words.py`) also
before a space that follows any ordinary character, and between a line's end and one. Any other
tokenizer must have each document whole.
"""

from __future__ import annotations

import re

from mygpt.errors import InputError
from mygpt.tokenization import BPETokenizer, ForeignTokenizer, Tokenizer
from mygpt.tokenization.tokenizer_json import check
from mygpt.tokenization.words import LONGEST_RUN, WordSplitter

# No white space in any version of Unicode: ASCII, Latin, Cyrillic, Chinese, Japanese, Korean.
_SURE = "!-~\u00c0-\u024f\u0400-\u04ff\u3001-\u30fa\u4e00-\u9fa5\uac00-\ud7a3\uff01-\uff5e"
_OURS = re.compile(rf"[{_SURE}](?= )|\n(?=[{_SURE}])")
_SPACES = re.compile(r"[^\W\d_](?= )")
_SPACES_AND_LINES = re.compile(rf"[^\W\d_](?= )|[{_SURE}]\n(?=[{_SURE}])")
_SLACK = 2**16  # characters in which a cut is looked for, before words are counted
_REACH = 2 * LONGEST_RUN + 1  # how far the rule for words looks
_LONGEST = 2**28  # characters of a document that must be whole


class Chunker:
    """Finds cuts; they depend on the text from the last cut on alone, not on how it comes.

    Args:
        tokenizer: what will encode the parts.
        length: characters that a part has at least, the document's last one apart.
    """

    def __init__(self, tokenizer: Tokenizer, length: int) -> None:
        self.length = length
        self._anywhere = tokenizer.kind in ("char", "byte")
        self._pattern, self._own_rule = _rule(tokenizer)
        self._words = WordSplitter()

    def find(self, text: str, begin: int, seen: int) -> int | None:
        """Where the part that begins at `begin` ends; None where more text must come.

        Args:
            text: what has come of the document.
            begin: where the part begins in it.
            seen: how much of `text` had come when this found no end before.

        Raises:
            InputError: for more text than a tokenizer can have that must have it whole.
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
        """The last place up to which no text that comes can change the words."""
        words = self._words.split(text[begin:last])
        end = last
        while words and last - end < _REACH:
            end -= len(words.pop())
        return end

    def _check_whole(self, length: int) -> None:
        if length > _LONGEST:
            raise InputError(
                f"a document of more than {_LONGEST:,} characters: this tokenizer must have each "
                "whole; give it in documents, as lines of a *.jsonl, say"
            )


def library_json(tokenizer: Tokenizer) -> dict[str, object] | None:
    """The `tokenizer.json` of what the library encodes as byte-level BPE; None of all others."""
    if isinstance(tokenizer, BPETokenizer) or (
        isinstance(tokenizer, ForeignTokenizer) and tokenizer.is_bpe
    ):
        description: dict[str, object] = tokenizer.to_state()["tokenizer"]
        return description
    return None


def _rule(tokenizer: Tokenizer) -> tuple[re.Pattern[str] | None, bool]:
    """What finds cuts, and whether words are cut by our own rule."""
    description = library_json(tokenizer)
    if description is None:
        return None, False
    contents = check(description)
    if contents.own_rule:
        return _OURS, True
    if not contents.splits_at_spaces:
        return None, False
    lines = any("\n" in name for name in contents.added.values())
    return (_SPACES if lines else _SPACES_AND_LINES), False
