"""Baselines for a validation loss: n-gram models and compressors on the same text."""

from mygpt.baselines.compression import (
    gzip_bits_per_byte,
    xz_bits_per_byte,
    zstd_bits_per_byte,
)
from mygpt.baselines.ngram import (
    ngram_loss,
    ngram_losses,
    ngram_probabilities,
    token_counts,
    uniform_loss,
    unigram_loss,
)
from mygpt.baselines.summary import Baselines, Row, measure_baselines

__all__ = [
    "Baselines",
    "Row",
    "gzip_bits_per_byte",
    "measure_baselines",
    "ngram_loss",
    "ngram_losses",
    "ngram_probabilities",
    "token_counts",
    "uniform_loss",
    "unigram_loss",
    "xz_bits_per_byte",
    "zstd_bits_per_byte",
]
