"""Write and validate the `tokenizer.json` of byte-level BPE.

The file is kept as a JSON object. It is untrusted: everything that encoding depends on is checked
here before the `tokenizers` library reads it.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

from mygpt.errors import InputError
from mygpt.tokenization.base import END_OF_TEXT
from mygpt.tokenization.bounds import check_bounds
from mygpt.tokenization.words import LIBRARY_PATTERN

if TYPE_CHECKING:
    import tokenizers

# GPT-2's alphabet: a printable byte is the character of that code point, the others are the
# characters from U+0100 on.
_PRINTABLE = {*range(33, 127), *range(161, 173), *range(174, 256)}
_HIDDEN = [byte for byte in range(256) if byte not in _PRINTABLE]
SYMBOLS = "".join(chr(b if b in _PRINTABLE else 256 + _HIDDEN.index(b)) for b in range(256))
_BYTES = {symbol: byte for byte, symbol in enumerate(SYMBOLS)}

CANNOT_ENCODE = "the tokenizers library could not encode this text"
BRIEF = 2**16  # characters: standard error is redirected only for shorter texts (see `refusals`)
_LONG = 4096  # characters: the library needs a few ms for them

_SPLIT = {
    "type": "Sequence",
    "pretokenizers": [
        {
            "type": "Split",
            "pattern": {"Regex": LIBRARY_PATTERN},
            "behavior": "Isolated",
            "invert": False,
        },
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False},
    ],
}


# The rules for words of Llama 3 and Qwen2; as in GPT-2's, a word begins at a space after a letter.
_NUMBERS = {"Llama 3": r"\p{N}{1,3}", "Qwen2": r"\p{N}"}
_KNOWN_RULES = {
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|" + numbers + "|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    for numbers in _NUMBERS.values()
}


class Contents(NamedTuple):
    """The checked contents of a `tokenizer.json`.

    Attributes:
        tokens: the bytes of each id.
        added: added tokens: ids that merges do not produce, with their text.
        control: ids of control tokens, which no text is encoded as; a subset of `added`.
        end_of_text: the id of `<|endoftext|>` if that is a control token, else None.
        own_rule: whether text is split into words by the rule in `words.py`.
        splits_at_spaces: whether a word is known to begin at a space after a letter.
    """

    tokens: list[bytes]
    added: dict[int, str]
    control: frozenset[int]
    end_of_text: int | None
    own_rule: bool
    splits_at_spaces: bool


def describe(merged: Sequence[str], merges: Sequence[Sequence[str]]) -> dict[str, Any]:
    """The `tokenizer.json` of a BPE that mygpt trained.

    Ids 0 to 255 are the bytes, 256 is end-of-text, and the merged tokens follow.

    Args:
        merged: tokens in GPT-2's alphabet, in the order of their merges.
        merges: pairs of tokens, in order of priority.
    """
    tokens = [*SYMBOLS, END_OF_TEXT, *merged]
    end = {"id": 256, "content": END_OF_TEXT, "special": True, "normalized": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{**end, "single_word": False, "lstrip": False, "rstrip": False}],
        "normalizer": None,
        "pre_tokenizer": _SPLIT,
        "post_processor": None,
        "decoder": {
            "type": "ByteLevel",
            "add_prefix_space": False,
            "trim_offsets": False,
            "use_regex": False,
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: number for number, token in enumerate(tokens)},
            "merges": [list(pair) for pair in merges],
        },
    }


def check(description: Any) -> Contents:
    """Validate a `tokenizer.json` and return its contents.

    Raises:
        InputError: if it is not byte-level BPE, or is incomplete.
    """
    try:
        return _checked(description)
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"the tokenizer's JSON is incomplete ({type(error).__name__}: {str(error)[:80]}): "
            "use a tokenizer.json that the tokenizers library wrote"
        ) from None


def _checked(description: dict[str, Any]) -> Contents:
    model = description["model"]
    kind = model.get("type", "BPE" if "merges" in model else None)
    if kind != "BPE":
        raise _refused(f"of kind {kind!r:.40}")
    for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"):
        if model.get(name):
            raise _refused(f"with {name}={model[name]!r:.40}")
    normalizer = description.get("normalizer")
    if normalizer is not None and normalizer != {"type": "NFC"}:
        raise _refused("with a normalizer, which changes the text")
    _check_splitting(description.get("pre_tokenizer"))
    decoder = description.get("decoder")
    if not isinstance(decoder, dict) or decoder.get("type") != "ByteLevel":
        raise _refused("without the decoder ByteLevel")
    listed = description.get("added_tokens") or []
    added = {token["id"]: token["content"] for token in listed}
    if len(added) < len(listed) or len(set(added.values())) < len(added):
        raise _refused("two of whose added tokens share an id or a text")
    control = frozenset(token["id"] for token in listed if token["special"])
    tokens = _tokens(model["vocab"], added)
    _check_control(model, {added[number] for number in control})
    ends = [number for number in control if added[number] == END_OF_TEXT]
    own_rule = (
        normalizer is None and description["pre_tokenizer"] == _SPLIT and len(added) == len(ends)
    )
    words_alone = all(t["special"] or not _takes_spaces(t) for t in listed)
    spaces = words_alone and _begins_words_at_spaces(description["pre_tokenizer"])
    return Contents(tokens, added, control, ends[0] if ends else None, own_rule, spaces)


def _refused(what: str) -> InputError:
    return InputError(f"a tokenizer {what} is not supported: only byte-level BPE is")


def _check_splitting(splitter: Any) -> None:
    """Refuse pre-tokenizers that do not end with ByteLevel, or that add or drop text."""
    if not isinstance(splitter, dict):
        raise _refused("without the pre-tokenizer ByteLevel")
    steps = splitter["pretokenizers"] if splitter.get("type") == "Sequence" else [splitter]
    *cuts, last = steps or [{}]
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space", True):
        raise _refused("that does not encode the text's bytes unchanged")
    for cut in cuts:
        harmless = cut.get("type") == "Digits" or (
            cut.get("type") == "Split" and cut["behavior"] == "Isolated" and not cut["invert"]
        )
        if not harmless:
            raise _refused(f"with the pre-tokenizer {cut.get('type')!r:.40}")


def _begins_words_at_spaces(splitter: dict[str, Any]) -> bool:
    """Whether a checked pre-tokenizer's rule is GPT-2's, Llama 3's or Qwen2's."""
    *cuts, last = splitter.get("pretokenizers", [splitter])
    if not cuts:
        return bool(last.get("use_regex", True))
    rules = [cut["pattern"].get("Regex") for cut in cuts if cut["type"] == "Split"]
    return len(cuts) == 1 and len(rules) == 1 and rules[0] in _KNOWN_RULES


def _takes_spaces(token: dict[str, Any]) -> bool:
    return " " in token["content"] or bool(token.get("lstrip") or token.get("rstrip"))


def _tokens(vocab: Mapping[str, int], added: Mapping[int, str]) -> list[bytes]:
    """The bytes of each id. Ids must have no gaps, and every byte must have a token."""
    names = {**{number: token for token, number in vocab.items()}, **added}
    for number, name in names.items():
        if type(number) is not int or not isinstance(name, str):
            raise _refused(f"with the id {number!r:.40} of {name!r:.40}")
    if len(names) < len(vocab) or sorted(names) != list(range(len(names))):
        raise InputError(f"the tokenizer's {len(vocab):,} ids do not run from 0 without gaps")
    missing = [byte for byte, symbol in enumerate(SYMBOLS) if symbol not in vocab]
    if missing:
        raise InputError(f"the tokenizer has no token for byte {missing[0]}: every byte needs one")
    tokens = []
    for number in range(len(names)):
        name = names[number]
        if number in added:
            tokens.append(name.encode("utf-8"))
        elif name and all(symbol in _BYTES for symbol in name):
            tokens.append(bytes([_BYTES[symbol] for symbol in name]))
        else:
            raise _refused(f"whose token {number}, {name!r:.40}, is not a sequence of bytes,")
    return tokens


def _check_control(model: dict[str, Any], names: set[str]) -> None:
    """Refuse a vocabulary in which text can be encoded as a control token."""
    merges = model["merges"]
    joined = {m.replace(" ", "", 1) if isinstance(m, str) else "".join(m) for m in merges}
    reached = names & {*joined, *SYMBOLS, *(model["vocab"] if model.get("ignore_merges") else ())}
    if reached:
        raise _refused(f"in which text can be encoded as the control token {min(reached)!r:.40}")


def build(description: dict[str, Any]) -> tokenizers.Tokenizer:
    """Build the library's tokenizer; it encodes text that spells a special token as text.

    Raises:
        InputError: if the library rejects the JSON.
    """
    from tokenizers import Tokenizer

    check_bounds(description)
    text = json.dumps({**description, "truncation": None, "padding": None})
    with refusals("the tokenizers library rejects this tokenizer's JSON"):
        built = Tokenizer.from_str(text)
    built.encode_special_tokens = True
    return built


def library_ids(library: tokenizers.Tokenizer, text: str) -> list[int]:
    """Ids of a text as the library encodes it, without the post-processor's tokens.

    A long text is encoded as a batch of one: for a batch the library releases Python's global
    lock, and `encode_batch_fast` does not compute offsets.
    """
    if len(text) < _LONG:
        found = library.encode(text, add_special_tokens=False)
    else:
        (found,) = library.encode_batch_fast([text], add_special_tokens=False)
    ids: list[int] = found.ids
    return ids


@contextmanager
def refusals(what: str, *, quiet: bool = True) -> Iterator[None]:
    """Turn the library's exceptions and panics into an `InputError`.

    Args:
        what: the beginning of the error message.
        quiet: suppress the message that a panic writes to standard error. This redirects the
            process's standard error, so it applies in the main thread only.
    """
    try:
        with _without_panics() if quiet else nullcontext():
            yield
    except BaseException as error:
        # A panic in Rust arrives as a BaseException that is not an Exception.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        lines = str(error).splitlines() or [type(error).__name__]
        raise InputError(f"{what}: {lines[0][:120]}") from None


_PANIC = re.compile(rb"\n?thread '.*", re.DOTALL)  # the lines that a panic writes


@contextmanager
def _without_panics() -> Iterator[None]:
    """Suppress panic messages on standard error; other output is written afterwards.

    A panic in Rust writes to file descriptor 2 directly, not through `sys.stderr`, and does so
    before the exception reaches Python.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    try:
        kept = os.dup(2)
    except OSError:  # it is closed
        yield
        return
    sink = _sink()
    os.dup2(sink, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        length = os.fstat(sink).st_size
        if length:
            os.lseek(sink, 0, os.SEEK_SET)
            written = _PANIC.sub(b"", os.read(sink, length))
            os.lseek(sink, 0, os.SEEK_SET)
            os.ftruncate(sink, 0)
            with suppress(OSError):
                os.write(2, written)


@cache
def _sink() -> int:
    """The descriptor of an anonymous file that collects standard error."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("mygpt-stderr")
    with tempfile.TemporaryFile(buffering=0) as file:
        return os.dup(file.fileno())
