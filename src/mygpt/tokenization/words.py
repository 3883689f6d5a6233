"""Split text into the words of BPE, by the rules of this and other programs.

BPE merges only within a word, so a text can be split between words, and each word be encoded by
itself. mygpt's rule is Qwen2's, which other programs know by name: a word includes the space before
it, a contraction ('s, 'll) and every digit are words, and punctuation includes the newlines after
it. In addition, every run is limited to 256 characters, far more than any real word has. This
bounds memory and time on hostile text, and makes the words at a text's beginning independent of
what follows.

A rule is written for the `tokenizers` library, and translated for Python's `re`. That has no
\\p{L}, and its Unicode tables may be older or newer than the library's. The classes of characters
are therefore determined with the library, in blocks of 256 code points, and only for blocks that
occur in a text.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Iterator

LONGEST_RUN = 256  # characters
REACH = 2 * LONGEST_RUN + 1  # characters from a word's first one on that mygpt's rule depends on
_BLOCK = 2**16  # characters split at a time

LIBRARY_PATTERN = (
    r"'(?:[sStTmMdD]|[rR][eE]|[vV][eE]|[lL][lL])"
    r"|[^\r\n\p{L}\p{N}]?[\p{L}]{1,R}"
    r"|[\p{N}]"
    r"| ?[^\s\p{L}\p{N}]{1,R}[\r\n]{0,R}"
    r"|[\s]{0,R}[\r\n]{1,R}"
    r"|[\s]{1,R}(?![^\s])"
    r"|[\s]{1,R}"
).replace("R}", f"{LONGEST_RUN}}}")
GPT_2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
QWEN_2, LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|" + numbers + "|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    for numbers in (r"\p{N}", r"\p{N}{1,3}")
)
_CLASSES = (r"\p{L}", r"\p{N}", r"\s")  # letters, numbers, white space


class WordSplitter:
    """Splits text into the same words as the library does.

    Args:
        rule: one of this module's.
    """

    def __init__(self, rule: str = LIBRARY_PATTERN) -> None:
        self._rule = rule
        self._state = _compiled(rule, frozenset([0]))

    def split(self, text: str) -> list[str]:
        """The words of `text`; their concatenation is the text."""
        blocks, pattern = self._state
        if not text.isascii():
            touched = {ord(char) >> 8 for char in set(text)}
            if not touched <= blocks:
                # In one assignment: other threads see the old pair or the new one.
                self._state = blocks, pattern = _compiled(self._rule, blocks | touched)
        words: list[str] = pattern.findall(text)
        return words

    def split_pieces(self, pieces: Iterable[str]) -> Iterator[list[str]]:
        """The words, by mygpt's rule, of a text given in pieces, wherever it is split."""
        waiting = ""
        for block in in_blocks(pieces):
            words = self.split(waiting + block)
            final = len(words)
            open_length = 0
            while final and open_length < REACH:  # the following text may change these words
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
def _compiled(rule: str, blocks: frozenset[int]) -> tuple[frozenset[int], re.Pattern[str]]:
    """The blocks of code points, and the rule as a Python pattern for text within them."""
    found = [_classified(block) for block in sorted(blocks)]
    ranges = {name: _ranges([p for each in found for p in each[name]]) for name in _CLASSES}
    rule = rule.replace(r"\S", r"[^\s]")
    rule = re.sub(r"\(\?i:([^)]*)\)", _any_case, rule)
    inside = False  # whether a part is within []
    parts = []
    for part in re.split(r"(\\p\{L\}|\\p\{N\}|\\s|\[|\])", rule):
        inside = part == "[" or (inside and part != "]")
        written = ranges.get(part, part)
        parts.append(f"[{written}]" if part in ranges and not inside else written)
    return blocks, re.compile("".join(parts))


def _any_case(found: re.Match[str]) -> str:
    """ASCII letters in both cases, spelled out: case folding in Python and the library differs."""
    both = re.sub("[a-z]", lambda letter: f"[{letter[0]}{letter[0].upper()}]", found[1])
    return f"(?:{both})"


@functools.cache
def _classified(block: int) -> dict[str, list[int]]:
    """The code points of a block that are in each of the library's classes."""
    from tokenizers import Regex, pre_tokenizers

    points = [p for p in range(block << 8, (block + 1) << 8) if not 0xD800 <= p <= 0xDFFF]
    text = "".join(map(chr, points))
    found = {}
    for name in _CLASSES:
        outside = pre_tokenizers.Split(Regex(f"[{name}]"), "removed").pre_tokenize_str(text)
        others = set("".join(part for part, _ in outside))
        found[name] = [point for point in points if chr(point) not in others]
    return found


def _ranges(points: list[int]) -> str:
    """Ascending code points as ranges within a regular expression's []."""
    written = []
    first = last = points[0]
    for point in [*points[1:], 0x110001]:  # the last one closes the range before it
        if point != last + 1:
            written.append(f"\\U{first:08x}-\\U{last:08x}")
            first = point
        last = point
    return "".join(written)
