"""Counts of n-grams, from which drafts of the next tokens are drawn while decoding.

A run keeps the table of its training text beside its models, as `drafts.safetensors`. No model
needs it, and it has no influence on a text: without it, or with a bad one, fewer drafts are right
(see `mygpt.cpu.decode.loop`). The model is `mygpt.evaluation.ngram`'s, interpolated Kneser-Ney;
contexts that occurred once are omitted, except for short ones.
Letters: V vocabulary, N tokens, C contexts, F followers.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from mygpt.checkpoint.container import read_arrays, write_arrays
from mygpt.checkpoint.safetensors import to_json
from mygpt.errors import CheckpointError, DamagedError, InputError
from mygpt.evaluation.ngram import discounts_of, grams_of
from mygpt.text import read_text
from mygpt.tokenization import Tokenizer
from mygpt.tokenization.unknown import without_unknown

if TYPE_CHECKING:
    from mygpt.cpu.decode.speculation import Drafts

FILE_NAME = "drafts.safetensors"
ORDER = 6  # a token is predicted from the ORDER - 1 before it
MOST_TOKENS = 2**20  # of a longer text the last ones are counted
_MOST_CHARACTERS = 2**22  # of a file that the user names
_MOST_BYTES = 4 * 2**20  # of a table: then contexts that occur seldom are omitted
_ALL_KEPT = 2  # contexts of fewer tokens are kept however seldom they occur
_MOST_COUNT = 255  # larger counts of a context are scaled down together
_MULTIPLIER = np.uint32(0x9E3779B1)

Words = NDArray[np.uint32]


@dataclass(frozen=True)
class DraftTable:
    """The n-grams of a text by their contexts, as the kernels read them.

        keys       | k0 | k1 | ... |            of contexts, sorted
        starts     | 0  | s1 | ... | F |        of each context's followers
        followers  ... | token, count | ...     token * 256 + count, by token

    Attributes:
        vocab_size: V.
        keys: (C,) uint32, a hash of each context (`keys_before`).
        starts: (C + 1,) uint32.
        followers: (F,) uint32.
        discounts: (ORDER, 4) float32, for each order of counts 0, 1, 2, and 3 or more.
    """

    vocab_size: int
    keys: Words
    starts: Words
    followers: Words
    discounts: NDArray[np.float32]

    @classmethod
    def count(cls, tokens: NDArray[np.integer], vocab_size: int) -> Self:
        """Count the n-grams of a text: 1-D ids."""
        tokens = tokens[max(0, len(tokens) - MOST_TOKENS) :]
        levels = [
            _level(tokens, n, *counts) for n, counts in enumerate(_counts(tokens, vocab_size))
        ]
        least = 2
        while sum(level.kept_bytes(least) for level in levels) > _MOST_BYTES:
            least *= 2
        return cls._joined([level.kept(least) for level in levels], vocab_size)

    @classmethod
    def _joined(cls, levels: list[_Level], vocab_size: int) -> Self:
        keys = np.concatenate([level.keys for level in levels])
        lengths = np.concatenate([np.diff(level.starts) for level in levels])
        begins = np.concatenate([[0], np.cumsum(lengths)])[:-1]
        order = keys.argsort(kind="stable")
        starts = np.concatenate([[0], np.cumsum(lengths[order])])
        places = np.arange(starts[-1]) + np.repeat(begins[order] - starts[:-1], lengths[order])
        tokens = np.concatenate([level.tokens for level in levels])
        counts = np.concatenate([level.small_counts() for level in levels])
        return cls(
            vocab_size,
            keys[order],
            starts.astype(np.uint32),
            (tokens.astype(np.uint32) << np.uint32(8) | counts)[places],
            np.stack([level.discounts for level in levels]),
        )

    @property
    def nbytes(self) -> int:
        """The memory that it needs, in bytes."""
        arrays = (self.keys, self.starts, self.followers, self.discounts, self.buckets)
        return sum(array.nbytes for array in arrays)

    @property
    def shift(self) -> int:
        """A key shifted to the right by so many bits is the number of its bucket."""
        return 32 - max(1, len(self.keys).bit_length())

    @cached_property
    def buckets(self) -> Words:
        """Where each bucket's keys begin, and the end of the last one's."""
        bounds = np.arange((1 << (32 - self.shift)) + 1, dtype=np.uint64) << np.uint64(self.shift)
        return np.searchsorted(self.keys, bounds).astype(np.uint32)

    def drafts(self, *, always: int | None = None) -> Drafts:
        """For an engine: drafts from this table and from the text itself.

        Args:
            always: the number of drafts of every pass; None measures which is best.
        """
        from mygpt.cpu.decode import layout as at
        from mygpt.cpu.decode.speculation import Drafts

        row = np.zeros(at.TABLE_SIZE, np.int64)
        for place, array in (
            (at.KEYS_OF_CONTEXTS, self.keys),
            (at.BUCKETS, self.buckets),
            (at.CONTEXT_STARTS, self.starts),
            (at.FOLLOWERS, self.followers),
            (at.DISCOUNTS, self.discounts),
        ):
            row[place] = array.ctypes.data
        row[at.SHIFT], row[at.ORDER] = self.shift, len(self.discounts)
        return Drafts(row, self, always=always)

    def probabilities(self, tokens: NDArray[np.integer]) -> NDArray[np.float32]:
        """The prediction of the token after `tokens`, (V,): the reference of the kernel's.

        With the formula of `mygpt.evaluation.ngram.probabilities_of`.
        """
        probs = np.full(self.vocab_size, 1.0 / self.vocab_size, np.float32)
        for n in range(min(len(self.discounts), len(tokens) + 1)):
            key = keys_before(tokens, np.array([len(tokens)]), n)[0]
            place = int(np.searchsorted(self.keys, key))
            if place == len(self.keys) or self.keys[place] != key:
                continue
            words = self.followers[self.starts[place] : self.starts[place + 1]]
            counts = (words & np.uint32(0xFF)).astype(np.int64)
            taken = self.discounts[n][np.minimum(counts, 3)]
            probs *= taken.sum() / counts.sum()
            probs[words >> np.uint32(8)] += (counts - taken) / counts.sum()
        return probs

    def save(self, path: str | Path, tokenizer: Tokenizer, *, inside: bool = False) -> None:
        """Write the table to a file; errors as for `write_arrays`.

        Args:
            path: the file.
            tokenizer: the one that the tokens are of.
            inside: as for `write_arrays`.
        """
        arrays = {name: getattr(self, name) for name in _ARRAYS}
        about = {"vocab_size": self.vocab_size, "tokenizer": _digest_of(tokenizer)}
        write_arrays(path, arrays, {"drafts": about}, inside=inside)

    @classmethod
    def load(cls, path: str | Path, tokenizer: Tokenizer) -> Self:
        """Read a table, and check everything that the kernels rely on.

        Raises:
            CheckpointError: if it is damaged, or was counted with another tokenizer.
        """
        arrays, parts = read_arrays(path)
        about = {"vocab_size": tokenizer.vocab_size, "tokenizer": _digest_of(tokenizer)}
        if parts.get("drafts") != about:  # also of another size, which no kernel checks
            raise CheckpointError(f"{path} was counted with another tokenizer than this model's")
        if any(arrays.get(name, _NOTHING).dtype != dtype for name, dtype in _ARRAYS.items()):
            raise DamagedError(f"{path} is damaged: it has no draft table")
        table = cls(tokenizer.vocab_size, *(arrays[name] for name in _ARRAYS))
        if not table._is_sound():
            raise DamagedError(f"{path} is damaged: its counts do not fit together")
        return table

    def _is_sound(self) -> bool:
        keys, starts, followers = self.keys, self.starts, self.followers
        shapes = keys.ndim == starts.ndim == followers.ndim == 1 and self.discounts.ndim == 2
        if not shapes or len(starts) != len(keys) + 1 or self.discounts.shape[1] != 4:
            return False
        return bool(
            (keys[1:] >= keys[:-1]).all()
            and starts[0] == 0
            and starts[-1] == len(followers)
            and (starts[1:] > starts[:-1]).all()
            and (followers >> np.uint32(8) < self.vocab_size).all()
            and (followers & np.uint32(0xFF) > 0).all()
            and ((self.discounts >= 0) & (self.discounts <= np.arange(4))).all()
        )


def _digest_of(tokenizer: Tokenizer) -> str:
    return hashlib.sha256(to_json(tokenizer.to_state()).encode()).hexdigest()


_ARRAYS = {
    "keys": np.uint32, "starts": np.uint32, "followers": np.uint32, "discounts": np.float32
}  # fmt: skip
_NOTHING = np.zeros(0, np.bool_)


def table_of_file(path: str | Path, tokenizer: Tokenizer) -> DraftTable:
    """The table of a text file; of a long one the last part is counted.

    Raises:
        InputError: if it cannot be read, is not text, or has nothing that the tokenizer knows.
    """
    text, _ = read_text(str(path))
    text, _ = without_unknown(tokenizer, text[-_MOST_CHARACTERS:])
    tokens = tokenizer.encode_array(text)
    if not len(tokens):
        raise InputError(f"{path} has no text for drafts: name another file")
    return DraftTable.count(tokens, tokenizer.vocab_size)


@dataclass(frozen=True)
class _Level:
    """The n-grams of one order: as a `DraftTable`, with counts apart."""

    keys: Words
    starts: NDArray[np.int64]
    tokens: NDArray[np.int64]
    counts: NDArray[np.int64]
    discounts: NDArray[np.float32]
    context: int  # tokens of a context

    def _chosen(self, least: int) -> NDArray[np.bool_]:
        """(C,) whether each context occurs often enough."""
        totals = (
            np.add.reduceat(self.counts, self.starts[:-1]) if len(self.keys) else self.starts[1:]
        )
        return totals >= (1 if self.context < _ALL_KEPT else least)

    def kept_bytes(self, least: int) -> int:
        """The size of what `kept` keeps."""
        chosen = self._chosen(least)
        return int(8 * chosen.sum() + 4 * np.diff(self.starts)[chosen].sum())

    def kept(self, least: int) -> _Level:
        """Only contexts that occur at least so often."""
        chosen = self._chosen(least)
        lengths = np.diff(self.starts)
        followers = np.repeat(chosen, lengths)
        return _Level(
            self.keys[chosen],
            np.concatenate([[0], np.cumsum(lengths[chosen])]),
            self.tokens[followers],
            self.counts[followers],
            self.discounts,
            self.context,
        )

    def small_counts(self) -> Words:
        """Counts of at most `_MOST_COUNT`; a context's are scaled together, to 1 at least."""
        if not len(self.keys):
            return self.counts.astype(np.uint32)
        largest = np.maximum.reduceat(self.counts, self.starts[:-1])
        scale = np.minimum(1.0, _MOST_COUNT / largest)
        scaled = np.rint(self.counts * np.repeat(scale, np.diff(self.starts)))
        return np.maximum(1, scaled).astype(np.uint32)


def keys_before(tokens: NDArray[np.integer], places: NDArray[np.integer], count: int) -> Words:
    """The hash of the `count` tokens before each place, as the kernels compute it: uint32."""
    keys = np.zeros(len(places), np.uint32)
    for n in range(1, count + 1):
        before = tokens[places - n].astype(np.uint32)
        keys = _hash32(keys * _MULTIPLIER + before + np.uint32(1))
    return keys


def _hash32(words: Words) -> Words:
    """`mygpt.cpu.common.arithmetic.hash32` of each word."""
    words = (words ^ (words >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    words = (words ^ (words >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return words ^ (words >> np.uint32(16))


def _counts(tokens: NDArray[np.integer], vocab_size: int) -> list[tuple[Any, ...]]:
    """Of each order: where its n-grams first end, their contexts' ids, and their counts."""
    grams = grams_of(tokens, tokens[:0], vocab_size, ORDER)
    found: list[tuple[Any, ...]] = []
    for n, gram in enumerate(grams, 1):
        counted = slice(None) if n == ORDER else grams[n].firsts
        counts = np.bincount(gram.ids[counted], minlength=gram.num_ids)[gram.ids[gram.firsts]]
        found.append((gram.firsts.astype(np.int64), gram.contexts[gram.firsts], counts))
    return found


def _level(
    tokens: NDArray[np.integer],
    context: int,
    ends: NDArray[np.int64],
    contexts: NDArray[np.int32],
    counts: NDArray[np.int64],
) -> _Level:
    """One order's n-grams, given as where each first ends, its context's id, and its count."""
    discounts = discounts_of(counts).astype(np.float32)
    whole = (ends >= context) & (counts > 0)  # not cut by the text's beginning
    ends, contexts, counts = ends[whole], contexts[whole], counts[whole]
    order = contexts.argsort(kind="stable")  # of equal contexts n-grams are sorted by token
    ends, contexts, counts = ends[order], contexts[order], counts[order]
    firsts = np.flatnonzero(np.append(True, contexts[1:] != contexts[:-1])[: len(contexts)])
    return _Level(
        keys_before(tokens, ends[firsts], context),
        np.append(firsts, len(ends)),
        tokens[ends].astype(np.int64),
        counts.astype(np.int64),
        discounts,
        context,
    )
