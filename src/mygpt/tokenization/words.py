"""Split text into the words of BPE by one rule, for the `tokenizers` library and for Python.

BPE merges only within a word, so a text can be split between words, and each word be encoded by
itself. The rule is Qwen2's, which other programs know by name: a word includes the space before
it, a contraction ('s, 'll) and every digit are words, and punctuation includes the newlines after
it. In addition, every run is limited to 256 characters, far more than any real word has. This
bounds memory and time on hostile text, and makes the words at a text's beginning independent of
what follows.

Python's `re` has no \\p{L}, and its Unicode tables may be older or newer than the library's. The
classes of characters are therefore determined with the library, in blocks of 256 code points, and
only for blocks that occur in a text.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Iterator

LONGEST_RUN = 256  # characters
_REACH = 2 * LONGEST_RUN + 1  # characters from a word's first one on that the rule depends on
_BLOCK = 2**16  # characters split at a time

# {L}, {N} and {S} are placeholders for letters, numbers and white space within [].
_RULE = (
    r"'(?:[sStTmMdD]|[rR][eE]|[vV][eE]|[lL][lL])"
    r"|[^\r\n{L}{N}]?[{L}]{1,R}"
    r"|[{N}]"
    r"| ?[^{S}{L}{N}]{1,R}[\r\n]{0,R}"
    r"|[{S}]{0,R}[\r\n]{1,R}"
    r"|[{S}]{1,R}(?![^{S}])"
    r"|[{S}]{1,R}"
).replace("R}", f"{LONGEST_RUN}}}")
CLASSES = {"{L}": r"\p{L}", "{N}": r"\p{N}", "{S}": r"\s"}


def _filled(classes: dict[str, str]) -> str:
    rule = _RULE
    for name, written in classes.items():
        rule = rule.replace(name, written)
    return rule


LIBRARY_PATTERN = _filled(CLASSES)


class WordSplitter:
    """Splits text into the same words as the library does."""

    def __init__(self) -> None:
        self._state = _compiled(frozenset([0]))

    def split(self, text: str) -> list[str]:
        """The words of `text`; their concatenation is the text."""
        blocks, pattern = self._state
        if not text.isascii():
            touched = {ord(char) >> 8 for char in set(text)}
            if not touched <= blocks:
                # In one assignment: other threads see the old pair or the new one.
                self._state = blocks, pattern = _compiled(blocks | touched)
        words: list[str] = pattern.findall(text)
        return words

    def split_pieces(self, pieces: Iterable[str]) -> Iterator[list[str]]:
        """The words of a text given in pieces; they do not depend on where it is split."""
        waiting = ""
        for block in in_blocks(pieces):
            words = self.split(waiting + block)
            final = len(words)
            open_length = 0
            while final and open_length < _REACH:  # the following text may change these words
                final -= 1
                open_length += len(words[final])
            waiting = "".join(words[final:])
            if final:
                yield words[:final]
        if waiting:
            yield self.split(waiting)


def in_blocks(pieces: Iterable[str]) -> Iterator[str]:
    """The text in blocks of `_BLOCK` characters; the last one may be shorter."""
    waiting = ""
    for piece in pieces:
        waiting += piece
        whole = len(waiting) - len(waiting) % _BLOCK
        yield from (waiting[start : start + _BLOCK] for start in range(0, whole, _BLOCK))
        waiting = waiting[whole:]
    if waiting:
        yield waiting


@functools.lru_cache(maxsize=32)
def _compiled(blocks: frozenset[int]) -> tuple[frozenset[int], re.Pattern[str]]:
    """The blocks of code points, and the rule for text within them."""
    members: dict[str, list[int]] = {name: [] for name in CLASSES}
    for block in sorted(blocks):
        for name, points in classified(block).items():
            members[name] += points
    return blocks, re.compile(_filled({name: ranges(points) for name, points in members.items()}))


@functools.cache
def classified(block: int) -> dict[str, list[int]]:
    """The code points of a block that are in each of the library's classes."""
    from tokenizers import Regex, pre_tokenizers

    points = [p for p in range(block << 8, (block + 1) << 8) if not 0xD800 <= p <= 0xDFFF]
    text = "".join(map(chr, points))
    found = {}
    for name, written in CLASSES.items():
        outside = pre_tokenizers.Split(Regex(f"[{written}]"), "removed").pre_tokenize_str(text)
        others = set("".join(part for part, _ in outside))
        found[name] = [point for point in points if chr(point) not in others]
    return found


def ranges(points: list[int]) -> str:
    """Ascending code points as ranges within a regular expression's []."""
    written = []
    first = last = points[0]
    for point in [*points[1:], 0x110001]:  # the last one closes the range before it
        if point != last + 1:
            written.append(f"\\U{first:08x}-\\U{last:08x}")
            first = point
        last = point
    return "".join(written)
