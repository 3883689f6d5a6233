"""Compressed size of a text in bits per byte, a baseline: a model that predicts compresses.

gzip compresses the text alone, so `gzip -9 < FILE | wc -c` gives the same number. xz and zstd also
get the training text, as a model does: counted is by how much the text makes the result longer.
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

# xz takes about 0.7 s per megabyte, and the training text is compressed twice.
MOST_BEFORE_BYTES = 2**20  # the last bytes of the training text
MOST_XZ_BYTES = 2**18  # the first bytes of the text
MOST_GZIP_BYTES = 2**22  # the first bytes of the text
_ZSTD_LEVEL = 19
_DICTIONARY_BYTES = 2**21  # holds both texts; the preset's 64 MiB would take 640 MiB of memory


def gzip_bits_per_byte(text: bytes) -> float:
    """Size after `gzip -9`, in bits per byte of a non-empty text (of its first 4 MiB)."""
    text = text[:MOST_GZIP_BYTES]
    return len(gzip.compress(text, 9, mtime=0)) * 8 / len(text)


def xz_bits_per_byte(text: bytes, before: bytes = b"") -> float | None:
    """What a non-empty text adds to the size of `before` after `xz -9e`, in bits per byte.

    None where this Python was built without lzma.

    Args:
        text: its first 256 KiB are compressed.
        before: the text before it, of which the last 1 MiB are compressed; empty: `text` alone.
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
    """The same for `zstd -19`; None without Python 3.14 or later and without `zstandard`."""
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
    """The first `most` bytes of the concatenated documents."""
    found = bytearray()
    for document in documents:
        for piece in document.pieces():
            found += as_bytes(piece)
            if len(found) >= most:
                return bytes(found[:most])
    return bytes(found)


def last_bytes(documents: Sequence[Document], most: int) -> bytes:
    """The last `most` bytes of the concatenated documents."""
    found: list[bytes] = []
    left = most
    for document in reversed(documents):
        end = document.start + len(document)
        found.append(as_bytes(document.whole[max(document.start, end - left) : end])[-left:])
        left -= len(found[-1])
        if not left:
            break
    return b"".join(reversed(found))
