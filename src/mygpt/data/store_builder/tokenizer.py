"""The tokenizer of a new store: learned from blocks that lie evenly in all of its sources."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from itertools import chain

from mygpt.errors import InputError
from mygpt.text import Piece, TextSource, pieces
from mygpt.text.documents import without_separators
from mygpt.text.reading import file_errors
from mygpt.tokenization import BPETokenizer, ByteTokenizer, CharTokenizer, Tokenizer

BPE_SIZES = (512, 1024, 2048, 4096)  # tokens, where "bpe" names no size
_EACH_TOKEN = 250  # bytes of text for each token: it is to occur some hundreds of times
_BLOCKS = 128  # that are learned from
_BLOCK = 2**16  # bytes or characters of one
_LONGEST_LINE = 2**22  # bytes of a line that is learned from

Reader = Callable[[TextSource], Iterator[Piece]]


def check_name(name: str) -> None:
    """Raise `InputError` for a tokenizer that has no such name."""
    size = name.removeprefix("bpe:")
    known = name in ("bpe", "char", "byte")
    if not known and not (size != name and size.isascii() and size.isdigit() and len(size) < 20):
        raise InputError(
            f"tokenizer={name!r} is not known: choose bpe, bpe:SIZE, char, byte, or a file"
        )


def make_tokenizer(
    name: str,
    sources: Sequence[TextSource],
    *,
    field: str,
    encoding: str | None,
    split: bool,
    read: Reader,
) -> Tokenizer:
    """The tokenizer called `name`, for these sources.

    Args:
        name: "byte"; "char", for which all text is read; "bpe" or "bpe:SIZE", for which at most
            128 blocks of 64 KiB are.
        sources: of the store.
        field: of an object or a table that holds the text.
        encoding: of the text.
        split: whether `SEPARATOR` is none of it (see `pieces`).
        read: begins a source that can be read only once; what is taken of it is not lost.

    Raises:
        InputError: for a text that has no characters to learn from.
    """
    if name == "byte":
        return ByteTokenizer()
    if name == "char":
        characters = _characters(sources, field, encoding, split=split)
        return CharTokenizer(sorted(characters), end_of_text=True)
    size = name.removeprefix("bpe").removeprefix(":")
    length = sum(max(0, source.size) for source in sources)
    if any(not source.is_lasting for source in sources):
        length = BPE_SIZES[-1] * _EACH_TOKEN
    chosen = next((n for n in BPE_SIZES if n >= length / _EACH_TOKEN), BPE_SIZES[-1])
    texts = _sample(sources, field, encoding, read, split=split)
    first = next((text for text in texts if text), "")
    if not first:
        raise InputError("there is no text in these files: a tokenizer learns from text")
    return BPETokenizer.train(chain([first], texts), int(size) if size else chosen)


def _characters(
    sources: Sequence[TextSource], field: str, encoding: str | None, *, split: bool
) -> set[str]:
    found: set[str] = set()
    for source in sources:
        if not source.is_lasting:
            raise InputError(
                "the characters of standard input or a pipe are not known before its end: write "
                "it to a file first, or give a tokenizer's file"
            )
        for piece in pieces(source, field=field, encoding=encoding, split=split):
            found.update(piece.text)
    return found


def _sample(
    sources: Sequence[TextSource],
    field: str,
    encoding: str | None,
    read: Reader,
    *,
    split: bool,
) -> Iterator[str]:
    """All of a short text; of a long one, blocks at even distances."""
    total = sum(max(0, source.size) for source in sources)
    begin = 0
    for source in sources:
        end = begin + max(0, source.size)
        # Block number k lies at (k + 1/2) / _BLOCKS of the whole.
        places = [(2 * k + 1) * total // (2 * _BLOCKS) for k in range(_BLOCKS)]
        offsets = [place - begin for place in places if begin <= place < end]
        begin = end
        whole = source.is_plain and total <= _BLOCKS * _BLOCK
        if not source.is_lasting:
            yield from _first(read(source), _BLOCKS * _BLOCK // len(sources))
        elif offsets and source.is_plain and not whole and _is_utf8(source, encoding):
            blocks = _blocks(source, offsets, field)
            yield from map(without_separators, blocks) if split else blocks
        elif offsets or whole:
            found = pieces(source, field=field, encoding=encoding, split=split)
            yield from _first(found, _BLOCK * (_BLOCKS if whole else len(offsets)))


def _first(found: Iterator[Piece], length: int) -> Iterator[str]:
    """The first characters, with an end of line between documents."""
    for piece in found:
        yield piece.text + "\n" * piece.ends
        length -= len(piece.text)
        if length <= 0:
            return


def _is_utf8(source: TextSource, encoding: str | None) -> bool:
    """Whether the text can be read from any place on."""
    if encoding is not None and encoding.lower() not in ("utf-8", "utf8", "ascii"):
        return False
    with file_errors(source.name), open(source.name, "rb") as file:
        return file.read(2) not in (b"\xff\xfe", b"\xfe\xff", b"\x00\x00")


def _blocks(source: TextSource, offsets: Sequence[int], field: str) -> Iterator[str]:
    with file_errors(source.name), open(source.name, "rb") as file:
        for offset in offsets:
            file.seek(offset)
            if source.kind == "text":
                yield file.read(_BLOCK).decode("utf-8", "ignore")
                continue
            file.readline(_LONGEST_LINE)  # what is left of the line before
            length = 0
            while length < _BLOCK and (line := file.readline(_LONGEST_LINE)):
                text = _text_in(line, field)
                length += len(text) + 1
                yield text + "\n"


def _text_in(line: bytes, field: str) -> str:
    """The text of a line; none of one that is wrong, which encoding will say."""
    with contextlib.suppress(ValueError, RecursionError, KeyError, TypeError):
        text = json.loads(line)[field]
        if isinstance(text, str):
            return text.encode("utf-8", "ignore").decode("utf-8")
    return ""
