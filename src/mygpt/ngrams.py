"""`NgramEmbedding`: what the last two, three, ... tokens together add to a position's embedding.

Bigram and trigram input tables: an n-gram that occurs in the training text has a vector of its
own, which is added to the token's. What n-grams are known, and how they are numbered, is
`ngram_keys`'.
Letters: B batch, T time, C embedding, N highest order, P tokens before, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import nn

from mygpt.errors import InputError
from mygpt.ngram_keys import check_keys, count_ngrams, ngram_rows_of

__all__ = ["NgramEmbedding", "NgramKeys", "check_keys", "count_ngrams", "ngram_rows_of"]

NO_TOKEN = -1  # stands before the window: no n-gram holds it


class NgramKeys(nn.Module):
    """Each table's keys, sorted: buffers "0", "1", ... of int64.

    Fresh ones are the first keys that can be: a model of them can be saved and read again.
    """

    def __init__(self, vocab_size: int, rows: Sequence[int]) -> None:
        super().__init__()
        for number, count in enumerate(rows):
            least = vocab_size if number else 0  # a context of row 0 is no n-gram
            self.register_buffer(str(number), torch.arange(least, least + count - 1))

    def __iter__(self) -> Iterator[torch.Tensor]:
        return self.buffers()


class NgramEmbedding(nn.Module):
    """The sum of the rows of a position's n-grams, of orders 2 to N.

    Args:
        vocab_size: V.
        embed_dim: C.
        rows: rows of each table, row 0 included, which is zeros and for every n-gram that is
            not known or would begin before the window.

    Attributes:
        tables: N - 1 parameters (rows, C), which begin as zeros: no random number is drawn.
        keys: N - 1 buffers (rows - 1,), int64; see `set_keys`.
    """

    def __init__(self, vocab_size: int, embed_dim: int, rows: Sequence[int]) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        self.tables = nn.ParameterList([torch.zeros(count, embed_dim) for count in rows])
        self.keys = NgramKeys(vocab_size, rows)

    def set_keys(self, keys: Sequence[NDArray[np.int64]]) -> None:
        """Make these the n-grams that have rows: `count_ngrams`' arrays, one for each table.

        Raises:
            InputError: where they do not fit the tables, or are no keys.
        """
        wanted, given = [len(held) for held in self.keys], [len(known) for known in keys]
        if wanted != given:
            raise InputError(
                f"the n-gram tables have room for {wanted} keys and {given} are given: set "
                "ngram_rows to one more than each"
            )
        arrays = [np.asarray(known, np.int64) for known in keys]
        check_keys(arrays, self.vocab_size)
        for held, known in zip(self.keys, arrays, strict=True):
            held.copy_(torch.from_numpy(known))

    def rows(self, ids: torch.Tensor, before: torch.Tensor | None = None) -> torch.Tensor:
        """The row of each position's n-gram, (N - 1, B, T) int64.

        Args:
            ids: (B, T) int64.
            before: (B, P) int64, the tokens right before, as many as the window has, up to
                N - 1; negative ones stand for none. None where a window begins.
        """
        text = ids if before is None else torch.cat([before, ids], dim=1)  # (B, P + T)
        row, found = text, []
        for keys in self.keys:
            known = _look_up(row[:, :-1] * self.vocab_size + text[:, 1:], keys)
            row = F.pad(known, (1, 0))  # (B, P + T); nothing is known of what lies before
            found.append(row[:, text.shape[1] - ids.shape[1] :])
        return torch.stack(found)

    def forward(self, ids: torch.Tensor, before: torch.Tensor | None = None) -> torch.Tensor:
        """What to add to the embeddings of `ids`, (B, T, C); arguments as for `rows`."""
        total: Any = 0
        for table, rows in zip(self.tables, self.rows(ids, before), strict=True):
            total = total + F.embedding(rows, table, padding_idx=0)  # row 0 gets no gradient
        return total


def _look_up(wanted: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """The row of each wanted key: its place among the sorted keys plus 1, or 0."""
    if len(keys) == 0:
        return torch.zeros_like(wanted)
    wanted = wanted.contiguous()
    place = torch.searchsorted(keys, wanted)
    held = keys[place.clamp(max=len(keys) - 1)]
    return torch.where(held == wanted, place + 1, 0)
