"""What compressors reach on a text, in bits per byte: a model that predicts well would do better.

gzip sees the text alone, so `gzip -9 < FILE | wc -c` gives the same number. xz and zstd are given
the training text too, as a model is: they are charged for what the text adds to it.
"""

from __future__ import annotations

import gzip
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from importlib import import_module
from importlib.util import find_spec

from mygpt.text import Document
from mygpt.text.documents import as_bytes

# xz takes about 0.7 s a megabyte, and the training text is compressed twice.
MOST_BEFORE_BYTES = 2**20  # of the training text, its end
MOST_XZ_BYTES = 2**18  # of the text, its beginning
MOST_GZIP_BYTES = 2**22  # of the text, its beginning
_ZSTD_LEVEL = 19
_DICTIONARY_BYTES = 2**21  # holds both; the preset's own 64 MiB take ten times that in memory


def gzip_bits_per_byte(text: bytes) -> float:
    """The size `gzip -9` makes of a text that is not empty (beyond 4 MiB: of its beginning)."""
    text = text[:MOST_GZIP_BYTES]
    return len(gzip.compress(text, 9, mtime=0)) * 8 / len(text)


def xz_bits_per_byte(text: bytes, before: bytes = b"") -> float | None:
    """What a text that is not empty adds to the size `xz -9e` makes of the text before it.

    None where this Python was built without lzma.

    Args:
        text: beyond 256 KiB its beginning counts.
        before: beyond 1 MiB its end counts; empty gives the size of the text alone.
    """
    if find_spec("_lzma") is None:
        return None
    text = text[:MOST_XZ_BYTES]
    before = before[-MOST_BEFORE_BYTES:]
    if not before:
        return _xz_size(text) * 8 / len(text)
    with ThreadPoolExecutor(2) as threads:
        alone, both = threads.map(_xz_size, (before, before + text))
    return (both - alone) * 8 / len(text)


def zstd_bits_per_byte(text: bytes, before: bytes = b"") -> float | None:
    """The same of `zstd -19`; None where neither Python (from 3.14 on) nor `zstandard` has it."""
    compress = _zstd()
    if compress is None:
        return None
    text, before = text[:MOST_XZ_BYTES], before[-MOST_BEFORE_BYTES:]
    alone = len(compress(before)) if before else 0
    return (len(compress(before + text)) - alone) * 8 / len(text)


def _zstd() -> Callable[[bytes], bytes] | None:
    if find_spec("compression") is not None:
        with suppress(ImportError):
            zstd = import_module("compression.zstd")
            return partial(zstd.compress, level=_ZSTD_LEVEL)
    if find_spec("zstandard") is None:
        return None
    compressor = import_module("zstandard").ZstdCompressor(level=_ZSTD_LEVEL)
    return lambda data: bytes(compressor.compress(data))


def _xz_size(data: bytes) -> int:
    import lzma

    preset = {"preset": 9 | lzma.PRESET_EXTREME, "dict_size": _DICTIONARY_BYTES}
    return len(lzma.compress(data, filters=[{"id": lzma.FILTER_LZMA2, **preset}]))


def first_bytes(documents: Iterable[Document], most: int) -> bytes:
    """The first bytes of documents in a row, at most `most`."""
    found = bytearray()
    for document in documents:
        for piece in document.pieces():
            found += as_bytes(piece)
            if len(found) >= most:
                return bytes(found[:most])
    return bytes(found)


def last_bytes(documents: Sequence[Document], most: int) -> bytes:
    """The last bytes of documents in a row, at most `most`."""
    found: list[bytes] = []
    left = most
    for document in reversed(documents):
        end = document.start + len(document)
        found.append(as_bytes(document.whole[max(document.start, end - left) : end])[-left:])
        left -= len(found[-1])
        if not left:
            break
    return b"".join(reversed(found))
