"""Bytes to text: byte-order marks, named encodings, and where a file is not text."""

from __future__ import annotations

import codecs
import sys
from collections.abc import Iterator

from mygpt.errors import InputError

_BOMS = (  # the longer first: UTF-32's begins with UTF-16's
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
_FOR_HOST_NAMES = ("idna", "punycode")  # their time grows with the square of the length
_PIECE = 2**20  # bytes or characters


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


def decode(data: bytearray, name: str, encoding: str | None, *, allow_bytes: bool) -> str | bytes:
    """The text of a file's bytes; those bytes where it has none in that encoding.

    Args:
        data: all that the file holds.
        name: how an error calls the file.
        encoding: None is UTF-8, or what a byte-order mark says; the mark is left out then.
        allow_bytes: take bytes that are not text as they are instead of refusing them.

    Raises:
        InputError: for what is not text in that encoding, with its place.
    """
    start, codec = codec_of(data, encoding)
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
    raise InputError(f"{name} is not {codec}: {problem}")


def begins_as_text(data: bytearray, encoding: str | None) -> bool:
    """Whether a file that begins so may be text: nothing here says that it is not."""
    start, codec = codec_of(data, encoding)
    try:
        return not any("\0" in piece for piece in _pieces(data, start, codec))
    except UnicodeError:
        return False


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


def codec_of(data: bytearray, encoding: str | None) -> tuple[int, str]:
    """Where the text begins, and what decodes it."""
    if encoding is not None:
        return 0, encoding
    return next(((len(bom), codec) for bom, codec in _BOMS if data.startswith(bom)), (0, "utf-8"))


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
