"""Limits on a tokenizer.json from an untrusted source, checked before the library builds it.

A tokenizer.json of one kilobyte can make a text a billion times as long (nine replacements of one
character by ten), or let encoding a word take hours. The checks here bound the time for encoding
and the length of the result, given the length of the text.
"""

from __future__ import annotations

import base64
from typing import TYPE_CHECKING, Any

from mygpt.errors import InputError
from mygpt.tokenization.library import refusals

if TYPE_CHECKING:
    from mygpt.tokenization.tokenizer_json import TokenizerFile

# "Usual" is the maximum in published tokenizers.
_MOST_STEPS = 100  # of a normaliser or another part; usual: 10
_MOST_GROWTH = 64  # characters that one character may become
_LONGEST_TOKEN = 2**12  # characters; usual: some hundred, for runs of spaces
_LONGEST_WORD = 1000  # characters; WordPiece's time grows with their cube; usual: 100
_LONGEST_TEXT = 1000  # characters of a text that a step inserts
_LONGEST_REGEX = 2**14
MOST_IDS = 2**22  # from 0 to the largest one, with and without a token; usual: 2**18
MOST_AROUND = 1000  # tokens that a post-processor adds to a text
_MOST_ADDED, _MOST_ADDED_CHARACTERS = 2**18, 2**24  # added tokens: each is searched for in a text
_PARTS = {
    "normalizer": "normalizers",
    "pre_tokenizer": "pretokenizers",
    "decoder": "decoders",
}  # parts of a tokenizer.json, and the key of the steps in a part of type Sequence
_INSERTED = ("prepend", "content", "prefix", "suffix", "replacement", "word_delimiter_token")


def check_bounds(file: TokenizerFile) -> None:
    """Raise `InputError` if a tokenizer.json exceeds a limit of this module.

    Other errors in the file are not checked here: the library refuses them.
    """
    for part in _PARTS:
        steps = _steps(part, file.description.get(part))
        if part != "pre_tokenizer":
            _check_growth(part, steps)
        for step in steps:
            _check_step(part, step)
    limit("added tokens", len(file.added), _MOST_ADDED)
    characters = sum(len(token["content"]) for token in file.added)
    limit("characters in added tokens", characters, _MOST_ADDED_CHARACTERS)
    longest = file.model.get("max_input_chars_per_word")
    if isinstance(longest, int):
        limit("characters per word (max_input_chars_per_word)", longest, _LONGEST_WORD)
    limit("characters in a token", max(map(len, file.names.values())), _LONGEST_TOKEN)


def _refused(what: str) -> InputError:
    return InputError(f"the tokenizer {what}: the file is damaged or malicious; use another one")


def limit(what: str, found: int, most: int) -> None:
    """Raise `InputError` if a tokenizer.json has more than `most` of something."""
    if found > most:
        raise _refused(f"has {found!s:.20} {what}, more than the limit of {most:,}")


def _length(value: Any) -> int:
    return len(value) if isinstance(value, str) else 0


def _objects(values: Any) -> list[dict[str, Any]]:
    """The JSON objects in a list; empty for any other value."""
    return [v for v in values if isinstance(v, dict)] if isinstance(values, list) else []


def _steps(part: str, content: Any) -> list[dict[str, Any]]:
    """The steps of a part, with nested sequences flattened."""
    found: list[dict[str, Any]] = []
    waiting = _objects([content])
    while waiting:
        step = waiting.pop()
        inner = step.get(_PARTS[part])
        if step.get("type") == "Sequence" and isinstance(inner, list):
            waiting += reversed(_objects(inner))
        else:
            found.append(step)
        limit(f"steps or more in its {part}", len(found) + len(waiting), _MOST_STEPS)
    return found


def _check_growth(part: str, steps: list[dict[str, Any]]) -> None:
    """Refuse replacements whose combination makes a text much longer."""
    before: list[tuple[float, set[str]]] = []  # the growth up to a step, the characters inserted
    for step in steps:
        factor, content, pattern = _replacement(step)
        linked = [g for g, put in before if pattern is None or put & set(pattern)]
        growth = factor * max(linked, default=1.0)
        if growth > _MOST_GROWTH:
            raise _refused(f"has a {part} that makes texts more than {_MOST_GROWTH} times as long")
        # Any other kind of step may change every character.
        put = set().union(*(put for _, put in before)) if pattern is None else set()
        before.append((growth, put | set(content)))


def _replacement(step: dict[str, Any]) -> tuple[float, str, str | None]:
    """A step's growth factor, the text it inserts, and the text it replaces (None: any text)."""
    if step.get("type") == "ByteLevel":  # a non-ASCII character becomes one character per byte
        return 4.0, "", None
    content, pattern = step.get("content"), step.get("pattern")
    if step.get("type") != "Replace" or not isinstance(content, str):
        return 1.0, "", ""
    if not isinstance(pattern, dict):
        return 1.0, "", ""
    literal, regex = pattern.get("String"), pattern.get("Regex")
    if isinstance(literal, str) and literal:
        return max(1.0, len(content) / len(literal)), content, literal
    empty = not isinstance(regex, str) or _matches_nothing(regex)
    return float(max(1, len(content) + empty)), content, None


def _matches_nothing(regex: str) -> bool:
    """Whether a pattern matches the empty string; True if it is too long to test."""
    from tokenizers import Regex, normalizers

    if len(regex) > _LONGEST_REGEX:
        return True
    with refusals("the tokenizer has a pattern that the tokenizers library rejects"):
        probe = normalizers.Replace(Regex(regex), "\ue001")
        return any(len(probe.normalize_str(text)) > len(text) for text in ("\ue000\ue000", "a b1"))


def _check_step(part: str, step: dict[str, Any]) -> None:
    for name in _INSERTED:
        limit(f"characters inserted by a {part}", _length(step.get(name)), _LONGEST_TEXT)
    pattern = step.get("pattern")
    longest = max(map(_length, pattern.values()), default=0) if isinstance(pattern, dict) else 0
    limit(f"characters in a pattern of its {part}", longest, _LONGEST_REGEX)
    kind = step.get("type")
    if kind == "FixedLength" and step.get("length") == 0:
        raise _refused("splits text into words of length 0")
    if kind == "Precompiled":
        _check_charsmap(step.get("precompiled_charsmap"))


def _check_charsmap(table: Any) -> None:
    """Refuse a normaliser's table that replaces a character by a long text.

    The table is base64 of: the length of a trie (4 bytes), the trie, and NUL-terminated texts.
    """
    try:
        data = base64.b64decode(table) if isinstance(table, str) else b""
    except ValueError:
        raise _refused("has a normalizer whose table cannot be read") from None
    texts = data[4 + int.from_bytes(data[:4], "little") :].split(b"\0")
    limit("bytes in a text that replaces a character", max(map(len, texts)), 4 * _MOST_GROWTH)
