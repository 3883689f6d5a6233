"""Limits on a tokenizer.json from an untrusted source, checked before the library builds it.

A tokenizer.json of one kilobyte can make a text a billion times as long (nine replacements of one
character by ten), or let encoding a word take hours. The checks here bound the time for encoding
and the length of the result, given the length of the text.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterable, Iterator
from typing import Any

from mygpt.errors import InputError

# "Usual" is the maximum in published tokenizers.
_MOST_STEPS = 100  # of a normaliser or another part; usual: 10
_MOST_GROWTH = 64  # characters that one character may become
_LONGEST_TOKEN = 2**12  # characters; usual: some hundred, for runs of spaces
_LONGEST_WORD = 1000  # characters; WordPiece's time grows with their cube; usual: 100
_LONGEST_TEXT = 1000  # characters of a text that a step inserts
_LONGEST_REGEX = 2**14
_MOST_AROUND = 1000  # tokens and texts in a post-processor's template
_MOST_ADDED, _MOST_ADDED_CHARACTERS = 2**18, 2**24  # added tokens: each is searched for in a text
_PARTS = {
    "normalizer": "normalizers",
    "pre_tokenizer": "pretokenizers",
    "decoder": "decoders",
    "post_processor": "processors",
}  # parts of a tokenizer.json, and the key of the steps in a part of type Sequence


def check_bounds(description: dict[str, Any]) -> None:
    """Raise `InputError` if a tokenizer.json exceeds a limit of this module.

    Other errors in the file are not checked here: the library refuses them.
    """
    steps = {part: _steps(part, description.get(part)) for part in _PARTS}
    for part in ("normalizer", "decoder"):
        _check_growth(part, steps[part])
    for part, own in steps.items():
        for step in own:
            _check_step(part, step)
    added = description.get("added_tokens")
    listed = added if isinstance(added, list) else []
    names = [token.get("content") for token in listed if isinstance(token, dict)]
    if len(names) > _MOST_ADDED or sum(map(_length, names)) > _MOST_ADDED_CHARACTERS:
        raise _refused(
            f"has {len(names):,} added tokens, more than the limits of {_MOST_ADDED:,} tokens and "
            f"{_MOST_ADDED_CHARACTERS:,} characters"
        )
    _check_lengths(names)
    model = description.get("model")
    if isinstance(model, dict):
        _check_model(model)


def _refused(what: str) -> InputError:
    return InputError(f"the tokenizer {what}: the file is damaged or malicious; use another one")


def _length(value: Any) -> int:
    return len(value) if isinstance(value, str) else 0


def _steps(part: str, whole: Any) -> list[dict[str, Any]]:
    """The steps of a part, with nested sequences flattened."""
    found: list[dict[str, Any]] = []
    waiting = [whole]
    while waiting:
        step = waiting.pop()
        if not isinstance(step, dict):
            continue
        inner = step.get(_PARTS[part])
        if step.get("type") == "Sequence" and isinstance(inner, list):
            waiting += reversed(inner)
        else:
            found.append(step)
        if len(found) + len(waiting) > _MOST_STEPS:
            raise _refused(f"has a {part} of more than {_MOST_STEPS} steps")
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
    kind = step.get("type")
    if kind == "ByteLevel":  # a non-ASCII character becomes one character per byte
        return 4.0, "", None
    if kind != "Replace":
        return 1.0, "", ""
    content, pattern = step.get("content"), step.get("pattern")
    if not isinstance(content, str) or not isinstance(pattern, dict):
        return 1.0, "", ""
    literal = pattern.get("String")
    if isinstance(literal, str) and literal:
        return max(1.0, len(content) / len(literal)), content, literal
    regex = pattern.get("Regex")
    empty = not isinstance(regex, str) or _matches_nothing(regex)
    return float(max(1, len(content) + empty)), content, None


def _matches_nothing(regex: str) -> bool:
    """Whether a pattern matches the empty string; True if it is too long to test."""
    from tokenizers import Regex, normalizers

    from mygpt.tokenization.tokenizer_json import refusals

    if len(regex) > _LONGEST_REGEX:
        return True
    with refusals("the tokenizer has a pattern that the tokenizers library rejects"):
        probe = normalizers.Replace(Regex(regex), "\ue001")
        return any(len(probe.normalize_str(text)) > len(text) for text in ("\ue000\ue000", "a b1"))


def _check_step(part: str, step: dict[str, Any]) -> None:
    kind = step.get("type")
    for name in ("prepend", "content", "prefix", "suffix", "replacement", "word_delimiter_token"):
        if _length(step.get(name)) > _LONGEST_TEXT:
            raise _refused(
                f"has a {part} that inserts {_length(step[name]):,} characters, more than "
                f"{_LONGEST_TEXT:,}"
            )
    pattern = step.get("pattern")
    if isinstance(pattern, dict) and max(map(_length, pattern.values()), default=0) > (
        _LONGEST_REGEX
    ):
        raise _refused(f"has a {part} with a pattern of more than {_LONGEST_REGEX:,} characters")
    if kind == "FixedLength" and step.get("length") == 0:
        raise _refused("splits text into words of length 0")
    if kind == "Precompiled":
        _check_charsmap(step.get("precompiled_charsmap"))
    if kind == "TemplateProcessing":
        _check_template(step)


def _check_charsmap(table: Any) -> None:
    """Refuse a normaliser's table that replaces a character by a long text.

    The table is base64 of: the length of a trie (4 bytes), the trie, and NUL-terminated texts.
    """
    try:
        data = base64.b64decode(table) if isinstance(table, str) else b""
    except (ValueError, binascii.Error):
        raise _refused("has a normalizer whose table cannot be read") from None
    texts = data[4 + int.from_bytes(data[:4], "little") :]
    if max(map(len, texts.split(b"\0")), default=0) > 4 * _MOST_GROWTH:
        raise _refused(f"has a normalizer that makes texts more than {_MOST_GROWTH} times as long")


def _check_template(step: dict[str, Any]) -> None:
    """Refuse templates that insert a text twice, or many tokens around it."""
    special = step.get("special_tokens")
    ids = {
        name: len(token["ids"])
        for name, token in (special.items() if isinstance(special, dict) else ())
        if isinstance(token, dict) and isinstance(token.get("ids"), list)
    }
    for pieces in (step.get("single"), step.get("pair")):
        found = [p for p in pieces if isinstance(p, dict)] if isinstance(pieces, list) else []
        put = sum(ids.get(name, 0) for name in _special_names(found))
        if len(found) > _MOST_AROUND or put > _MOST_AROUND:
            raise _refused(f"adds more than {_MOST_AROUND:,} tokens around a text")
        texts = [str(p["Sequence"])[:99] for p in found if "Sequence" in p]
        if len(set(texts)) < len(texts):
            raise _refused("inserts a text twice")


def _special_names(pieces: list[dict[str, Any]]) -> Iterator[str]:
    for piece in pieces:
        token = piece.get("SpecialToken")
        if isinstance(token, dict) and isinstance(token.get("id"), str):
            yield token["id"]


def _check_model(model: dict[str, Any]) -> None:
    longest = model.get("max_input_chars_per_word")
    if isinstance(longest, int) and longest > _LONGEST_WORD:
        raise _refused(
            f"tries words of up to max_input_chars_per_word={longest!s:.20}, more than "
            f"{_LONGEST_WORD:,}"
        )
    vocab = model.get("vocab")
    if isinstance(vocab, dict):
        _check_lengths(vocab)
    elif isinstance(vocab, list):
        _check_lengths(pair[0] for pair in vocab if isinstance(pair, list) and pair)


def _check_lengths(names: Iterable[Any]) -> None:
    longest = max(map(_length, names), default=0)
    if longest > _LONGEST_TOKEN:
        raise _refused(f"has a token of {longest:,} characters, more than {_LONGEST_TOKEN:,}")
