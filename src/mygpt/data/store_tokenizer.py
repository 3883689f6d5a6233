"""Train the tokenizer of a new store on blocks at equal distances in all of its sources."""

from __future__ import annotations

import codecs
import contextlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain

from mygpt.data.store_index import Index
from mygpt.errors import InputError
from mygpt.text import Piece, TextSource
from mygpt.text.documents import without_separators
from mygpt.text.reading import codec_of, file_errors, start_of
from mygpt.tokenization import BPETokenizer, ByteTokenizer, CharTokenizer, Tokenizer
from mygpt.tokenization.bpe import LARGEST, SMALLEST

BPE_SIZES = (512, 1024, 2048, 4096)  # vocabulary sizes to choose from if "bpe" has no size
_EACH_TOKEN = 250  # bytes of text per token of the vocabulary, so that tokens occur often enough
_BLOCKS = 128  # blocks to train on
_BLOCK = 2**16  # bytes or characters per block
_LONGEST_LINE = 2**22  # bytes of a line to train on


def check_name(name: str) -> None:
    """Raise `InputError` unless `name` is bpe, bpe:SIZE, char or byte."""
    if name.startswith("bpe:"):
        bpe_size(name, 0)
    elif name not in ("bpe", "char", "byte"):
        raise InputError(
            f"tokenizer={name!r} is not known: choose bpe, bpe:SIZE, char, byte, or a file"
        )


def make_tokenizer(
    name: str,
    sources: Sequence[TextSource],
    index: Index,
    read: Callable[[TextSource], Iterator[Piece]],
) -> Tokenizer:
    """Create, and if needed train, the tokenizer called `name`.

    Args:
        name: "byte"; "char", which reads all of the text; or "bpe" or "bpe:SIZE", which reads at
            most 128 blocks of 64 KiB.
        sources: of the store.
        index: of the store; says how the sources are read.
        read: starts reading a source.

    Raises:
        InputError: if the text is empty, or all of a pipe would have to be read.
    """
    if name == "byte":
        return ByteTokenizer()
    lasting = all(source.is_lasting for source in sources)
    if name == "char":
        if not lasting:
            raise InputError(
                "a character tokenizer needs all of the text before encoding starts, which a pipe "
                "does not allow: write the text to a file first, or give a tokenizer's file"
            )
        return CharTokenizer(sorted(characters_in(map(read, sources))), end_of_text=True)
    length = sum(source.size for source in sources) if lasting else BPE_SIZES[-1] * _EACH_TOKEN
    size = bpe_size(name, length)
    texts = _sample(sources, index, read)
    first = next((text for text in texts if text), "")
    if not first:
        raise InputError(
            "there is no text in these files: name files with text to train a tokenizer"
        )
    return BPETokenizer.train(chain([first], texts), size)


def bpe_size(name: str, length: int) -> int:
    """The size that "bpe:SIZE" names; of "bpe" one that suits a text of so many bytes.

    Raises:
        InputError: if SIZE is not the size of a vocabulary.
    """
    if name == "bpe":
        return next((n for n in BPE_SIZES if n >= length / _EACH_TOKEN), BPE_SIZES[-1])
    size = name.removeprefix("bpe:")
    is_number = size.isascii() and size.isdigit() and len(size) < 20
    if not (is_number and SMALLEST <= int(size) <= LARGEST):
        raise InputError(
            f"tokenizer={name!r}: SIZE must be an integer from {SMALLEST:,} (all bytes, and "
            f"end-of-text) to {LARGEST:,}, as in bpe:4096"
        )
    return int(size)


def characters_in(found: Iterable[Iterator[Piece]], most: float = math.inf) -> set[str]:
    """The distinct characters in some sources; reading stops when there are more than `most`."""
    characters: set[str] = set()
    for piece in chain.from_iterable(found):
        characters.update(piece.text)
        if len(characters) > most:
            break
    return characters


def _sample(
    sources: Sequence[TextSource], index: Index, read: Callable[[TextSource], Iterator[Piece]]
) -> Iterator[str]:
    """All of a short text; of a long one, blocks at equal distances."""
    total = sum(max(0, source.size) for source in sources)
    begin = 0
    for source in sources:
        end = begin + max(0, source.size)
        # Block number k begins at (k + 1/2) / _BLOCKS of the total length.
        places = [(2 * k + 1) * total // (2 * _BLOCKS) for k in range(_BLOCKS)]
        offsets = [place - begin for place in places if begin <= place < end]
        begin = end
        whole = source.is_plain and total <= _BLOCKS * _BLOCK
        if not source.is_lasting:
            yield from _first(read(source), _BLOCKS * _BLOCK // len(sources))
        elif offsets and source.is_plain and not whole and _is_utf8(source, index.encoding):
            blocks = _blocks(source, offsets, index.field)
            yield from map(without_separators, blocks) if index.split_documents else blocks
        elif offsets or whole:
            yield from _first(read(source), _BLOCK * (_BLOCKS if whole else len(offsets)))


def _first(found: Iterator[Piece], length: int) -> Iterator[str]:
    """The first `length` characters or more, with a newline after each document."""
    for piece in found:
        yield piece.text + "\n" * piece.ends
        length -= len(piece.text)
        if length <= 0:
            return


def _is_utf8(source: TextSource, encoding: str | None) -> bool:
    """Whether the text is UTF-8, so that decoding can start at any position."""
    codec = codec_of(start_of(source.name), encoding)[1]
    return codecs.lookup(codec).name in ("utf-8", "ascii")


def _blocks(source: TextSource, offsets: Sequence[int], field: str) -> Iterator[str]:
    with file_errors(source.name), open(source.name, "rb") as file:
        for offset in offsets:
            file.seek(offset)
            if source.kind == "text":
                yield file.read(_BLOCK).decode("utf-8", "ignore")
                continue
            file.readline(_LONGEST_LINE)  # the rest of the line that `offset` is in
            length = 0
            while length < _BLOCK and (line := file.readline(_LONGEST_LINE)):
                text = _text_in(line, field)
                length += len(text) + 1
                yield text + "\n"


def _text_in(line: bytes, field: str) -> str:
    """The text of a line; empty for an invalid one, which is reported when it is encoded."""
    with contextlib.suppress(ValueError, RecursionError, KeyError, TypeError):
        text = json.loads(line)[field]
        if isinstance(text, str):
            return text.encode("utf-8", "ignore").decode("utf-8")
    return ""
