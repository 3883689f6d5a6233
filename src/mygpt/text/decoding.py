"""Bytes to text: byte-order marks, named encodings, and where a file is not text."""

from __future__ import annotations

import codecs
import contextlib
import sys
from collections.abc import Iterator

from mygpt.errors import InputError
from mygpt.text.file_types import FIRST_BYTES, bom_of, why_not_text

_FOR_HOST_NAMES = ("idna", "punycode")  # their time grows with the square of the length
_PIECE = 2**20  # bytes or characters


class NotDecodedError(InputError):
    """Bytes that are not text in the encoding that they were read in.

    Attributes:
        start: the first of them.
    """

    def __init__(self, problem: str, start: bytes) -> None:
        super().__init__(problem)
        self.start = start


def check_encoding(encoding: str | None) -> None:
    """Raise `InputError` where Python knows no encoding of texts by this name; None is one."""
    if encoding is None:
        return
    try:
        "".encode(encoding)  # a codec from bytes to bytes is a LookupError here
        name = codecs.lookup(encoding).name
    except (LookupError, ValueError):  # a ValueError: "undefined", or a NUL in the name
        name = ""
    if not name or name in _FOR_HOST_NAMES:
        raise InputError(
            f"encoding={encoding!r} is not known: try utf-8, utf-16, latin-1 or cp1252"
        )


def decode(
    data: bytearray, name: str, encoding: str | None, *, allow_bytes: bool, legacy: bool = False
) -> str | bytes:
    """The text of a file's bytes; those bytes where it has none in that encoding.

    Args:
        data: all that the file holds.
        name: how an error calls the file.
        encoding: None is UTF-8, or what a byte-order mark says; the mark is left out then.
        allow_bytes: take bytes that are not text as they are instead of refusing them.
        legacy: believe the encoding, whatever the first bytes say, as an older mygpt did.

    Raises:
        InputError: for what is not text in that encoding, with its place.
    """
    why = None if legacy else why_not_text(data[:FIRST_BYTES], encoding)
    if why is not None:
        if allow_bytes:
            return bytes(data)
        raise InputError(f"{name} {why}")
    start, codec = codec_of(data, encoding, legacy=legacy)
    try:
        text = str(memoryview(data)[start:], codec)
        if codec != "utf-8":
            _refuse_surrogates(text)
        return text
    except UnicodeDecodeError as error:
        wrong = error.object[error.start : error.start + 1].hex()
        problem = (
            f"byte 0x{wrong} at position {start + error.start}; name its encoding "
            "(--encoding latin-1?); training can take its bytes with --tokenizer byte"
        )
    except UnicodeError as error:
        problem = str(error)
    if allow_bytes:
        return bytes(data)
    raise NotDecodedError(f"{name} is not {codec}: {problem}", bytes(data[:FIRST_BYTES]))


def begins_as_text(data: bytearray, encoding: str | None) -> bool:
    """Whether a file that begins so may be text: nothing here says that it is not."""
    if why_not_text(data, encoding) is not None:
        return False
    start, codec = codec_of(data, encoding)
    try:
        return not any("\0" in piece for piece in _pieces(data, start, codec))
    except UnicodeError:
        return False


def remarks(data: bytearray, encoding: str | None) -> list[str]:
    """What has to be known about a text that begins so, and is read all the same."""
    start, codec = codec_of(data, encoding)
    text = ""
    with contextlib.suppress(UnicodeError):
        for piece in _pieces(data[:FIRST_BYTES], start, codec):
            text += piece
    found = []
    if "\r" in text and "\n" not in text:
        found.append(
            "lines end with carriage returns alone, which are learned as they are "
            "(tr '\\r' '\\n' converts them)"
        )
    begin = text[:64].lstrip().lower()
    if begin.startswith("{\\rtf"):
        found.append("this is RTF, whose markup is learned too: save it as plain text")
    if begin.startswith(("<!doctype html", "<html")):
        found.append("this is HTML, whose tags are learned too")
    if "\0" in text:
        found.append("there are NUL characters in it, as in no plain text; they are learned too")
    if encoding is not None and _is_utf8_read_as_bytes(data[:FIRST_BYTES], encoding):
        found.append(f"this is valid UTF-8, and {encoding} gives other characters")
    return found


def _is_utf8_read_as_bytes(sample: bytearray, encoding: str) -> bool:
    """Whether UTF-8 of more than ASCII is read in an encoding of one byte a character."""
    name = codecs.lookup(encoding).name
    if sample.isascii() or not name.startswith(("iso8859", "cp125", "mac")):
        return False
    try:
        codecs.getincrementaldecoder("utf-8")().decode(bytes(sample))
    except UnicodeDecodeError:
        return False
    return True


def text_bytes(data: bytearray, encoding: str | None) -> int:
    """Bytes of memory that the decoded text will take, or what of it can be decoded.

    All characters of a text take what its widest one needs: 1, 2 or 4 bytes.
    """
    start, codec = codec_of(data, encoding)
    length = width = 0
    try:
        for piece in _pieces(data, start, codec):
            length += len(piece)
            width = max(width, min(4, sys.getsizeof(piece) // max(1, len(piece))))
    except UnicodeError:
        pass  # decoding it will say where
    return length * width


def codec_of(data: bytearray, encoding: str | None, *, legacy: bool = False) -> tuple[int, str]:
    """Where the text begins, and what decodes it."""
    bom, codec = bom_of(data)
    if encoding is None:
        return len(bom), codec or "utf-8"
    own = codec == codecs.lookup(encoding).name and not legacy
    return (len(bom) if own else 0), encoding


def _pieces(data: bytearray, start: int, codec: str) -> Iterator[str]:
    """The text piece by piece, up to a character that is not whole yet."""
    decoder = codecs.getincrementaldecoder(codec)()
    for place in range(start, len(data), _PIECE):
        yield decoder.decode(bytes(data[place : min(place + _PIECE, len(data))]))


def _refuse_surrogates(text: str) -> None:
    """Raise `UnicodeError` at a lone surrogate: some codecs let them through."""
    for start in range(0, len(text), _PIECE):
        piece = text[start : start + _PIECE]
        try:
            piece.encode("utf-8")
        except UnicodeEncodeError as error:
            raise UnicodeError(
                f"character {start + error.start} is the lone surrogate "
                f"U+{ord(piece[error.start]):04X}"
            ) from None
