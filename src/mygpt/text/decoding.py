"""Decode bytes to text: byte-order marks, named encodings, and checks that a file is text."""

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
    """Raised for bytes that are not text in the encoding used.

    Attributes:
        start: the first bytes of the file, at most `FIRST_BYTES`.
    """

    def __init__(self, problem: str, start: bytes) -> None:
        super().__init__(problem)
        self.start = start


def check_encoding(encoding: str | None) -> None:
    """Raise `InputError` unless `encoding` is None or a text encoding that Python knows."""
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
    """Decode a file's content.

    Args:
        data: the whole content.
        name: of the file, for error messages.
        encoding: None is UTF-8, or the encoding that a byte-order mark names; the mark is then
            removed.
        allow_bytes: return the bytes unchanged where they are not text, instead of raising.
        legacy: do not check the first bytes for other file types, as mygpt 0.1 did not.

    Raises:
        InputError: if the content is not text in that encoding, with the position.
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
    """Whether a file with these first bytes may be text in that encoding."""
    if why_not_text(data, encoding) is not None:
        return False
    start, codec = codec_of(data, encoding)
    try:
        return not any("\0" in piece for piece in _pieces(data, start, codec))
    except UnicodeError:
        return False


def remarks(data: bytearray, encoding: str | None) -> list[str]:
    """Notes for the user on a text with these first bytes, such as HTML or odd line ends."""
    start, codec = codec_of(data, encoding)
    text = ""
    with contextlib.suppress(UnicodeError):
        for piece in _pieces(data[:FIRST_BYTES], start, codec):
            text += piece
    found = []
    if "\r" in text and "\n" not in text:
        found.append(
            "lines end with carriage returns only, and the model is trained on them as they "
            "are (tr '\\r' '\\n' converts them)"
        )
    begin = text[:64].lstrip().lower()
    if begin.startswith("{\\rtf"):
        found.append(
            "this is RTF, and the model is trained on its markup too: save it as plain text"
        )
    if begin.startswith(("<!doctype html", "<html")):
        found.append("this is HTML, and the model is trained on its tags too")
    if "\0" in text:
        found.append(
            "it contains NUL characters, which is unusual; the model is trained on them too"
        )
    if encoding is not None and _is_utf8_read_as_bytes(data[:FIRST_BYTES], encoding):
        found.append(f"this is valid UTF-8, and {encoding} decodes it to other characters")
    return found


def _is_utf8_read_as_bytes(sample: bytearray, encoding: str) -> bool:
    """Whether valid non-ASCII UTF-8 is decoded with a single-byte encoding."""
    name = codecs.lookup(encoding).name
    if sample.isascii() or not name.startswith(("iso8859", "cp125", "mac")):
        return False
    try:
        codecs.getincrementaldecoder("utf-8")().decode(bytes(sample))
    except UnicodeDecodeError:
        return False
    return True


def text_bytes(data: bytearray, encoding: str | None) -> int:
    """Bytes of memory that the decoded text takes, up to the first undecodable byte.

    CPython stores every character of a string in the width of its widest one: 1, 2 or 4 bytes.
    """
    start, codec = codec_of(data, encoding)
    length = width = 0
    try:
        for piece in _pieces(data, start, codec):
            length += len(piece)
            width = max(width, min(4, sys.getsizeof(piece) // max(1, len(piece))))
    except UnicodeError:
        pass  # `decode` reports the position
    return length * width


def codec_of(data: bytearray, encoding: str | None, *, legacy: bool = False) -> tuple[int, str]:
    """The length of the byte-order mark to remove, and the codec to decode with."""
    bom, codec = bom_of(data)
    if encoding is None:
        return len(bom), codec or "utf-8"
    own = codec == codecs.lookup(encoding).name and not legacy
    return (len(bom) if own else 0), encoding


def _pieces(data: bytearray, start: int, codec: str) -> Iterator[str]:
    """The decoded text in pieces; an incomplete character at the end is not yielded."""
    decoder = codecs.getincrementaldecoder(codec)()
    for place in range(start, len(data), _PIECE):
        yield decoder.decode(bytes(data[place : min(place + _PIECE, len(data))]))


def _refuse_surrogates(text: str) -> None:
    """Raise `UnicodeError` for a lone surrogate, which some codecs accept."""
    for start in range(0, len(text), _PIECE):
        piece = text[start : start + _PIECE]
        try:
            piece.encode("utf-8")
        except UnicodeEncodeError as error:
            raise UnicodeError(
                f"character {start + error.start} is the lone surrogate "
                f"U+{ord(piece[error.start]):04X}"
            ) from None
