"""All baselines of a text, in units that are comparable across tokenizers.

Letters: V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mygpt.errors import InputError
from mygpt.evaluation import compression, ngram
from mygpt.text import Document
from mygpt.text.documents import TextSize, bytes_of, chars_of


@dataclass(frozen=True)
class Row:
    """One baseline as a table row.

    Attributes:
        name: for example "5-gram".
        bits_per_byte: of the text.
        loss: nats per token; None for a compressor.
    """

    name: str
    bits_per_byte: float
    loss: float | None


@dataclass(frozen=True)
class Baselines:
    """Losses of simpler models (nats per token) and sizes by compressors (bits per byte).

    Attributes:
        uniform: predicting every token with probability 1/V.
        unigram: token frequencies; None, as the next two, without a training text.
        bigram: predicting from one token before.
        fivegram: predicting from four tokens before.
        gzip: the text alone.
        xz: the text after the training text, or alone without one; None where this Python was
            built without lzma.
        zstd: as xz; None where there is no zstd.
        tokens: number of tokens of the text.
        num_bytes: number of bytes of the text.
        num_chars: number of characters of the text; None where it is bytes.
        learned_tokens: number of tokens that the n-gram models were trained on.
        scored_tokens: number of tokens that the n-gram models predicted.
        predicted: size of the part that a language model predicts (all but the first token), used
            to convert losses to bits; None is all of the text.
    """

    uniform: float
    unigram: float | None
    bigram: float | None
    fivegram: float | None
    gzip: float
    xz: float | None
    zstd: float | None
    tokens: int
    num_bytes: int
    num_chars: int | None
    learned_tokens: int
    scored_tokens: int
    predicted: TextSize | None = None

    def bits_per_byte(self, loss: float) -> float:
        """A loss in nats per token as bits per byte of the text, a model's or a baseline's."""
        size = self.predicted or TextSize(self.tokens, self.num_bytes, self.num_chars)
        return size.bits_per_byte(loss)

    def bits_per_char(self, bits_per_byte: float) -> float | None:
        """Bits per byte of the text as bits per character; None where it is bytes."""
        return bits_per_byte * self.num_bytes / self.num_chars if self.num_chars else None

    def rows(self) -> list[Row]:
        """The baselines that were computed, from worst to best."""
        losses = {
            "uniform": self.uniform,
            "unigram": self.unigram,
            "bigram": self.bigram,
            "5-gram": self.fivegram,
        }
        rows = [
            Row(name, self.bits_per_byte(loss), loss)
            for name, loss in losses.items()
            if loss is not None
        ]
        rows.append(Row("gzip -9", self.gzip, None))
        if self.xz is not None:
            rows.append(Row("xz -9e", self.xz, None))
        if self.zstd is not None:
            rows.append(Row("zstd -19", self.zstd, None))
        return sorted(rows, key=lambda row: -row.bits_per_byte)

    @property
    def bounds(self) -> str:
        """Which baselines used only a part of the texts, in words; empty where none did."""
        parts = []
        if self.learned_tokens == ngram.MOST_TRAIN_TOKENS:
            parts.append(f"n-grams of the last {self.learned_tokens:,} tokens")
        if self.scored_tokens < self.tokens and self.unigram is not None:
            parts.append(f"scored on the first {self.scored_tokens:,} tokens")
        if self.num_bytes > compression.MOST_XZ_BYTES:
            parts.append(f"xz and zstd on the first {compression.MOST_XZ_BYTES:,} bytes")
        return ", ".join(parts)


def measure_baselines(
    train: NDArray[np.integer],
    test: NDArray[np.integer],
    vocab_size: int,
    *,
    train_documents: Sequence[Document] = (),
    test_documents: Sequence[Document],
    predicted: TextSize | None = None,
) -> Baselines:
    """Compute the baselines of a text: about 1 s for a megabyte, at most about 4 s for any length.

    Args:
        train: 1-D ids of the training text; empty for none.
        test: 1-D ids of the text, at least one.
        vocab_size: V.
        train_documents: the training text, for xz and zstd.
        test_documents: the text.
        predicted: size of the part that a language model predicts (`mygpt.data.predicted_size`).

    Raises:
        InputError: for a text without tokens or bytes.
    """
    num_bytes = bytes_of(test_documents)
    if not num_bytes or not len(test):
        raise InputError(f"a text of {len(test)} tokens, {num_bytes} bytes: give at least one")
    text = compression.first_bytes(test_documents, compression.MOST_GZIP_BYTES)
    before = compression.last_bytes(train_documents, compression.MOST_BEFORE_BYTES)
    unigram = bigram = fivegram = None
    if len(train):
        unigram, bigram, fivegram = ngram.ngram_losses(train, test, vocab_size, (1, 2, 5))
    return Baselines(
        uniform=ngram.uniform_loss(vocab_size),
        unigram=unigram,
        bigram=bigram,
        fivegram=fivegram,
        gzip=compression.gzip_bits_per_byte(text),
        xz=compression.xz_bits_per_byte(text, before),
        zstd=compression.zstd_bits_per_byte(text, before),
        tokens=len(test),
        num_bytes=num_bytes,
        num_chars=chars_of(test_documents),
        learned_tokens=min(len(train), ngram.MOST_TRAIN_TOKENS),
        scored_tokens=min(len(test), ngram.MOST_TEST_TOKENS),
        predicted=predicted,
    )
