"""A file's decompressed bytes and decoded text, block by block, for `streams.py`."""

from __future__ import annotations

import codecs
import io
from collections.abc import Generator, Iterator

from mygpt.errors import InputError
from mygpt.text.compression import compression_by_content, compression_by_name, decompressed
from mygpt.text.decoding import codec_of
from mygpt.text.file_types import FIRST_BYTES, why_not_text
from mygpt.text.reading import file_errors, opened, shown

_BLOCK = 2**18  # bytes that are read at a time, at least


def texts_of(name: str, encoding: str | None) -> Iterator[tuple[str, int]]:
    """A file's decoded text in pieces, each with the number of bytes read of the file so far.

    Raises:
        InputError: if it is not text in that encoding, with the position.
    """
    decoder: codecs.IncrementalDecoder | None = None
    codec, reached, characters, read = "utf-8", 0, 0, 0
    for data, read in blocks_of(name):
        if decoder is None:
            if (why := why_not_text(data[:FIRST_BYTES], encoding)) is not None:
                raise InputError(f"{shown(name)} {why}")
            start, codec = codec_of(bytearray(data[:4]), encoding)
            decoder = codecs.getincrementaldecoder(codec)()
            data, reached = data[start:], start
        text = _decoded(decoder, data, name, codec, reached, characters)
        reached += len(data)
        characters += len(text)
        yield text, read
    if decoder is not None:
        yield _decoded(decoder, b"", name, codec, reached, characters), read


def _decoded(
    decoder: codecs.IncrementalDecoder,
    data: bytes,
    name: str,
    codec: str,
    reached: int,
    characters: int,
) -> str:
    """The next characters; empty `data` marks the end.

    `reached` and `characters` are the position of `data` in the file, for error messages.
    """
    waiting = decoder.getstate()[0]  # bytes of an incomplete character
    held = len(waiting) if isinstance(waiting, bytes) else 0
    try:
        text = decoder.decode(data, final=not data)
        if codec != "utf-8":
            text.encode("utf-8")
        return text
    except UnicodeDecodeError as error:
        wrong = error.object[error.start : error.start + 1].hex()
        raise InputError(
            f"{shown(name)} is not {codec}: byte 0x{wrong} at position "
            f"{reached - held + error.start}; name its encoding (--encoding latin-1?)"
        ) from None
    except UnicodeEncodeError as error:
        raise InputError(
            f"{shown(name)} is not {codec}: character {characters + error.start} is the lone "
            f"surrogate U+{ord(error.object[error.start]):04X}"
        ) from None
    except UnicodeError as error:
        raise InputError(f"{shown(name)} is not {codec}: {error}") from None


def blocks_of(name: str, least: int = _BLOCK) -> Generator[tuple[bytes, int], None, None]:
    """A file's decompressed bytes in blocks, each with the position reached in the file.

    Args:
        name: of the file; "-" is standard input.
        least: bytes that a block has at least, the last one apart.
    """
    with file_errors(name), opened(name) as file:
        gathered = bytearray()
        for data in decompressed(
            file, compression_by_name(name) or compression_by_content(file), _BLOCK
        ):
            gathered += data
            if len(gathered) >= least:
                yield bytes(gathered), _position(file)
                gathered.clear()
        if gathered:
            yield bytes(gathered), _position(file)


def _position(file: io.BufferedIOBase) -> int:
    """The position in a file; 0 for a pipe."""
    try:
        return file.tell()
    except OSError:  # a pipe
        return 0
