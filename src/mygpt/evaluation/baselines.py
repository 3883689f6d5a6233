"""All baselines of a text, in units that are comparable across tokenizers.

The compressed size of a text is one of them: a model that predicts compresses. gzip compresses the
text alone, so `gzip -9 < FILE | wc -c` gives the same number. xz, zstd and PPMd also get the
training text, as a model does: counted is by how much the text makes the result longer.

Letters: V vocabulary.
"""

from __future__ import annotations

import gzip
import math
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.util import find_spec

import numpy as np
from numpy.typing import NDArray

from mygpt.errors import InputError
from mygpt.evaluation import ngram
from mygpt.text import Document
from mygpt.text.documents import TextSize, as_bytes, bytes_of, chars_of

# xz takes about 0.7 s per megabyte, and the training text is compressed twice. Of a whole text it
# takes about twice as long a byte as of the first 32 KiB; zstd and PPMd take 1.1 and 1.4 times as
# long as xz, and the n-gram models this (four texts of 60 KB to 2 MB, two cores).
_XZ_OF_SAMPLE, _OTHERS_OF_XZ, _S_PER_TOKEN = 2.0, 1.3, 3.5e-7
MOST_BEFORE_BYTES = 2**20  # the last bytes of the training text
MOST_XZ_BYTES = 2**18  # the first bytes of the text
MOST_GZIP_BYTES = 2**22  # the first bytes of the text
_ZSTD_LEVEL = 19
_PPMD_ORDER, _PPMD_BYTES = 16, 2**26  # of memory
_PPMD_RESTART = 0  # when that is full; it is enough for both texts
_DICTIONARY_BYTES = 2**21  # holds both texts; the preset's 64 MiB would take 640 MiB of memory


@dataclass(frozen=True)
class Row:
    """One baseline as a table row."""

    name: str  # for example "5-gram"
    bits_per_byte: float
    loss: float | None  # nats per token; None for a compressor


@dataclass(frozen=True)
class Baselines:
    """Losses of simpler models and sizes by compressors on one text."""

    # Nats per token; the last three are None without a training text.
    uniform: float  # every token has probability 1/V
    unigram: float | None  # token frequencies
    bigram: float | None  # from one token before
    fivegram: float | None  # from four tokens before
    # Bits per byte; None where the compressor is not installed.
    gzip: float  # of the text alone
    xz: float | None  # of the text after the training text, or alone without one
    zstd: float | None  # as xz; None also where there was no time for it
    ppmd: float | None  # as zstd
    # The text's size; the number of characters is None if it is bytes.
    tokens: int
    num_bytes: int
    num_chars: int | None
    learned_tokens: int  # tokens that the n-gram models were trained on
    scored_tokens: int  # tokens that they predicted
    # The part that a language model predicts (all but the first token), to convert losses to bits.
    predicted: TextSize

    def bits_per_byte(self, loss: float) -> float:
        """A loss in nats per token as bits per byte of the text, a model's or a baseline's."""
        return self.predicted.bits_per_byte(loss)

    def rows(self) -> list[Row]:
        """The baselines that were computed, from worst to best."""
        losses = [
            ("uniform", self.uniform),
            ("unigram", self.unigram),
            ("bigram", self.bigram),
            ("5-gram", self.fivegram),
        ]
        sizes = [
            ("gzip -9", self.gzip),
            ("xz -9e", self.xz),
            ("zstd -19", self.zstd),
            ("PPMd -o16", self.ppmd),
        ]
        rows = [
            *(Row(name, self.bits_per_byte(x), x) for name, x in losses if x is not None),
            *(Row(name, bits, None) for name, bits in sizes if bits is not None),
        ]
        return sorted(rows, key=lambda row: -row.bits_per_byte)

    @property
    def bounds(self) -> str:
        """Which baselines used only a part of the texts, in words; empty where none did."""
        parts = []
        if self.learned_tokens == ngram.MOST_TRAIN_TOKENS:
            parts.append(f"n-grams of the last {self.learned_tokens:,} tokens")
        if self.scored_tokens < self.tokens and self.unigram is not None:
            parts.append(f"scored on the first {self.scored_tokens:,} tokens")
        if self.num_bytes > MOST_XZ_BYTES:
            parts.append(f"xz, zstd and PPMd on the first {MOST_XZ_BYTES:,} bytes")
        return ", ".join(parts)


def measure_baselines(
    train: NDArray[np.integer],
    test: NDArray[np.integer],
    vocab_size: int,
    *,
    train_documents: Sequence[Document] = (),
    test_documents: Sequence[Document],
    predicted: TextSize,
    others_s: float = math.inf,
) -> Baselines:
    """Compute the baselines of a text: about 1 s for a megabyte, at most about 4 s for any length.

    Args:
        train: 1-D ids of the training text; empty for none.
        test: 1-D ids of the text, at least one.
        vocab_size: V.
        train_documents: the training text, for xz and zstd.
        test_documents: the text.
        predicted: size of the part that a language model predicts (`mygpt.data.predicted_size`).
        others_s: seconds for zstd and PPMd: what is expected to take longer is not computed.

    Raises:
        InputError: for a text without tokens or bytes.
    """
    num_bytes = bytes_of(test_documents)
    if not num_bytes or not len(test):
        raise InputError(f"a text of {len(test)} tokens, {num_bytes} bytes: give at least one")
    text = first_bytes(test_documents, MOST_GZIP_BYTES)
    before = last_bytes(train_documents, MOST_BEFORE_BYTES)
    unigram = bigram = fivegram = None
    if len(train):
        unigram, bigram, fivegram = ngram.ngram_losses(train, test, vocab_size, (1, 2, 5))
    began = time.perf_counter()
    xz = xz_bits_per_byte(text, before)
    other_s = _OTHERS_OF_XZ * (time.perf_counter() - began)
    return Baselines(
        uniform=ngram.uniform_loss(vocab_size),
        unigram=unigram,
        bigram=bigram,
        fivegram=fivegram,
        gzip=gzip_bits_per_byte(text),
        xz=xz,
        ppmd=ppmd_bits_per_byte(text, before) if other_s <= others_s else None,
        zstd=zstd_bits_per_byte(text, before) if _both(other_s) <= others_s else None,
        tokens=len(test),
        num_bytes=num_bytes,
        num_chars=chars_of(test_documents),
        learned_tokens=min(len(train), ngram.MOST_TRAIN_TOKENS),
        scored_tokens=min(len(test), ngram.MOST_TEST_TOKENS),
        predicted=predicted,
    )


def estimated_s(ids: NDArray[np.integer], tokens: int, others_s: float) -> float:
    """About how many seconds `measure_baselines` will take, from the time of xz for a few tokens.

    Args:
        ids: (N,) ids as those of the text, at least one; 32,768 are enough.
        tokens: of the training text and the text.
        others_s: as `measure_baselines` gets it.
    """
    data = ids.astype(np.uint8 if ids.max() < 256 else np.uint16).tobytes()
    ngrams_s = tokens * _S_PER_TOKEN
    began = time.perf_counter()
    if xz_bits_per_byte(data) is None:
        return ngrams_s
    sample_s = (time.perf_counter() - began) / len(ids)
    xz_s = _XZ_OF_SAMPLE * sample_s * min(tokens, MOST_BEFORE_BYTES + MOST_XZ_BYTES)
    other_s = _OTHERS_OF_XZ * xz_s
    found = other_s if find_spec("pyppmd") is not None and other_s <= others_s else 0.0
    found += other_s if _zstd() is not None and _both(other_s) <= others_s else 0.0
    return ngrams_s + xz_s + found


def _both(other_s: float) -> float:
    """The time of zstd, and of PPMd, which is stronger and comes first, where it is installed."""
    return other_s if find_spec("pyppmd") is None else 2 * other_s


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
    return None if find_spec("_lzma") is None else _added_bits(text, before, _xz)


def zstd_bits_per_byte(text: bytes, before: bytes = b"") -> float | None:
    """The same for `zstd -19`; None without Python 3.14 or later and without `zstandard`."""
    compress = _zstd()
    return None if compress is None else _added_bits(text, before, compress)


def ppmd_bits_per_byte(text: bytes, before: bytes = b"") -> float | None:
    """The same for PPMd, variant I (Shkarin, 2002); None without `pyppmd`."""
    return None if find_spec("pyppmd") is None else _added_bits(text, before, _ppmd)


def _added_bits(text: bytes, before: bytes, compress: Callable[[bytes], bytes]) -> float:
    text, before = text[:MOST_XZ_BYTES], before[-MOST_BEFORE_BYTES:]
    if not before:
        return len(compress(text)) * 8 / len(text)
    with ThreadPoolExecutor(2) as threads:
        alone, both = (len(data) for data in threads.map(compress, (before, before + text)))
    return (both - alone) * 8 / len(text)


def _zstd() -> Callable[[bytes], bytes] | None:
    if find_spec("compression") is not None:
        with suppress(ImportError):
            zstd = import_module("compression.zstd")
            return partial(zstd.compress, level=_ZSTD_LEVEL)
    if find_spec("zstandard") is None:
        return None
    compressor = import_module("zstandard").ZstdCompressor  # an object of it is for one thread
    return lambda data: bytes(compressor(level=_ZSTD_LEVEL).compress(data))


def _xz(data: bytes) -> bytes:
    import lzma

    preset = {"preset": 9 | lzma.PRESET_EXTREME, "dict_size": _DICTIONARY_BYTES}
    return lzma.compress(data, filters=[{"id": lzma.FILTER_LZMA2, **preset}])


def _ppmd(data: bytes) -> bytes:
    encoder = import_module("pyppmd").Ppmd8Encoder(_PPMD_ORDER, _PPMD_BYTES, _PPMD_RESTART)
    return bytes(encoder.encode(data)) + bytes(encoder.flush())


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
