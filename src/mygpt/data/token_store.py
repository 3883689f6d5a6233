"""Read token stores: token ids on disk, memory-mapped, so that only what is used is read.

A store is a folder. `docs/stores.md` describes its files, `building.py` writes them. A store may
come from an untrusted source: its index is validated before it is used.

Letters: B batch.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import stat
from bisect import bisect_right
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from mygpt.data.store_index import (
    DTYPES,
    FORMAT,
    INDEX,
    RETOKENIZE,
    SHARDS,
    TOKENIZER,
    Index,
    Shard,
    read_regular,
    shard_paths,
)
from mygpt.errors import CheckpointError, DamagedError
from mygpt.file_access import open_regular, require_folder, require_regular
from mygpt.json_objects import STATE, parse_object
from mygpt.text.documents import TextSize
from mygpt.tokenization import ForeignTokenizer, Tokenizer, from_state

START_DTYPE = np.dtype("<i8")  # of the positions where documents start
_FIRST_BYTES = 2**12  # of an index: they contain its format
_MOST_MAPPED = 256  # shards at a time: each keeps a file open, of which a process may have 1,024


class StoredTokens:
    """A 1-D sequence of ids in memory-mapped shards on disk.

    Args:
        paths: the shards' files, in order.
        lengths: the number of ids in each shard.
        dtype: the integer type of the ids on disk.
        vocab_size: V; an id outside 0..V-1 means that a file is damaged.

    Attributes:
        dtype: uint16 or int32, little-endian on disk.
    """

    def __init__(
        self, paths: list[Path], lengths: list[int], *, dtype: np.dtype[Any], vocab_size: int
    ) -> None:
        self.dtype = dtype
        self._paths = paths
        self._vocab_size = vocab_size
        self._bounds = [0, *accumulate(lengths)]
        self._shard = lru_cache(_MOST_MAPPED)(self._map)  # parts share it
        self._start, self._stop = 0, self._bounds[-1]

    def __len__(self) -> int:
        """The number of ids."""
        return self._stop - self._start

    def part(self, start: int, stop: int) -> StoredTokens:
        """The ids from `start` to `stop`, as `StoredTokens` that share the mapping.

        Raises:
            IndexError: unless 0 <= start <= stop <= len(self).
        """
        if not 0 <= start <= stop <= len(self):
            raise IndexError(f"part({start}, {stop}) of {len(self)} tokens")
        inside = object.__new__(StoredTokens)
        inside.__dict__.update(self.__dict__)
        inside._start, inside._stop = self._start + start, self._start + stop
        return inside

    def __getitem__(self, key: slice) -> NDArray[np.integer]:
        """A copy of consecutive ids, (n,).

        Raises:
            DamagedError: for an id outside the vocabulary.
        """
        if not isinstance(key, slice) or key.step not in (None, 1):
            raise TypeError("stored tokens are read in slices of step 1")
        start, stop, _ = key.indices(len(self))
        stop = max(start, stop)
        ids = np.empty(stop - start, self.dtype)
        self._copy(self._start + start, ids)
        self._check(ids)
        return ids

    def cut(self, starts: NDArray[np.int64], length: int) -> NDArray[np.int64]:
        """The windows of `length` ids that begin at `starts` (B,).

        Returns:
            (B, length) int64.

        Raises:
            DamagedError: for an id outside the vocabulary.
        """
        starts = np.asarray(starts, np.int64)
        if len(starts) and (starts.min() < 0 or starts.max() + length > len(self)):
            raise IndexError(f"windows of {length} go past {len(self)} tokens")
        windows = np.empty((len(starts), length), np.int64)
        for window, start in zip(windows, starts.tolist(), strict=True):
            self._copy(self._start + start, window)
        self._check(windows)
        return windows

    def _copy(self, start: int, ids: NDArray[np.integer]) -> None:
        """Fill `ids` with the store's ids from position `start` on."""
        number = bisect_right(self._bounds, start) - 1
        filled = 0
        while filled < len(ids):
            begin = start + filled - self._bounds[number]
            found = self._shard(number)[begin : begin + len(ids) - filled]
            ids[filled : filled + len(found)] = found
            filled += len(found)
            number += 1

    def _map(self, number: int) -> NDArray[np.integer]:
        """A shard's ids, mapped into memory."""
        length = self._bounds[number + 1] - self._bounds[number]
        return _mapped(self._paths[number], self.dtype, length)

    def _check(self, ids: NDArray[np.integer]) -> None:
        if ids.size and (int(ids.max()) >= self._vocab_size or int(ids.min()) < 0):
            raise DamagedError(
                f"{self._paths[0].parent} is damaged: it contains ids outside the vocabulary of "
                f"{self._vocab_size:,} tokens; {RETOKENIZE}"
            )


def _mapped(path: Path, dtype: np.dtype[Any], length: int) -> NDArray[np.integer]:
    try:
        with open_regular(path) as file:
            mapped = np.memmap(file, dtype, "r", shape=(length,))
    except (OSError, ValueError) as error:
        raise DamagedError(f"{path} cannot be read: {error}") from None
    return mapped.view(np.ndarray)  # plain arrays are sliced faster


# A row of ids in memory, or in a store on disk: a slice of either is an array.
Tokens: TypeAlias = NDArray[np.integer] | StoredTokens


@dataclass(frozen=True)
class TokenStore:
    """A finished store.

    Attributes:
        path: its folder.
        name: of a run on it.
        tokenizer: encoded the text.
        tokens: all ids, as `encode_documents` returns them.
        sha256: of its content: the ids, the documents' starts, and the tokenizer.
        num_bytes: of the text in UTF-8.
        num_documents: number of documents, which are not empty.
        shards: in order.
    """

    path: Path
    name: str
    tokenizer: Tokenizer
    tokens: StoredTokens
    sha256: str
    num_bytes: int
    num_documents: int
    shards: tuple[Shard, ...]

    @classmethod
    def open(cls, path: str | Path, *, check: bool = False) -> TokenStore:
        """Open a store.

        Args:
            path: its folder.
            check: read every shard and verify its digest.

        Raises:
            DamagedError: if a file is truncated, changed or missing.
            CheckpointError: if the folder is not a store, or the store is not finished.
        """
        path = Path(path)
        index = Index.read(path)
        if not index.finished or index.tokenizer is None:
            raise CheckpointError(
                f"{path} is not finished: repeat the command that began it, "
                f"mygpt tokenize ... --out {shlex.quote(str(path))}, which continues it"
            )
        tokenizer = read_tokenizer(path, index.tokenizer)
        if index.dtype == "uint16" and tokenizer.vocab_size > 2**16:
            raise DamagedError(
                f"{path / INDEX} is damaged: its dtype is too small for the tokenizer's "
                f"vocabulary; {RETOKENIZE}"
            )
        for number, shard in enumerate(index.shards):
            _check_shard(path, number, shard, DTYPES[index.dtype].itemsize, check=check)
        require_folder(path / SHARDS)
        paths = [shard_paths(path, number)[0] for number in range(len(index.shards))]
        lengths = [shard.tokens for shard in index.shards]
        dtype, vocab_size = DTYPES[index.dtype], tokenizer.vocab_size
        return cls(
            path=path,
            name=index.name,
            tokenizer=tokenizer,
            tokens=StoredTokens(paths, lengths, dtype=dtype, vocab_size=vocab_size),
            sha256=index.sha256,
            num_bytes=index.bytes,
            num_documents=index.documents,
            shards=index.shards,
        )

    def size_of(self, start: int, stop: int) -> TextSize:
        """The size of the text that the ids from `start` to `stop` were encoded from.

        It is exact for complete shards, whose sizes the index has. For a part of a shard the bytes
        are estimated: each id counts with the bytes it decodes to, and the difference to the
        shard's bytes is divided equally among its unknown tokens, or among all ids if there are
        none. The characters of such a part are known only if the shard's text is ASCII.
        """
        num_bytes = num_chars = 0.0
        counted, begin = True, 0
        for shard in self.shards:
            first, end = max(start, begin), min(stop, begin + shard.tokens)
            if first < end:
                part = 1.0
                if end - first < shard.tokens:
                    part = self._fraction_of_bytes(first, end, begin, shard)
                    counted = counted and shard.characters == shard.bytes
                num_bytes += shard.bytes * part
                num_chars += (shard.characters or 0) * part
                counted = counted and shard.characters is not None
            begin += shard.tokens
        return TextSize(stop - start, round(num_bytes), round(num_chars) if counted else None)

    def _fraction_of_bytes(self, first: int, end: int, begin: int, shard: Shard) -> float:
        """The fraction of a shard's bytes that its ids from `first` to `end` account for.

        `first`, `end` and `begin`, the shard's first id, are positions in the store.
        """
        ids = self.tokens[begin : begin + shard.tokens]
        lengths = self.tokenizer.byte_lengths()[ids].astype(np.float64)
        unknown = np.ones(len(ids), bool)
        if isinstance(self.tokenizer, ForeignTokenizer) and self.tokenizer.falls_back_to_characters:
            found = ids == self.tokenizer.unknown_id
            unknown = found if found.any() else unknown
        lengths[unknown] += (shard.bytes - lengths.sum()) / np.count_nonzero(unknown)
        inside = lengths[first - begin : end - begin].sum()
        return float(min(1.0, max(0.0, inside / max(1, shard.bytes))))

    def document_starts(self, start: int, stop: int) -> NDArray[np.int64]:
        """The positions from `start` to `stop` where documents begin.

        Returns:
            1-D int64, ascending.

        Raises:
            DamagedError: for a position outside its shard.
        """
        found = [np.empty(0, np.int64)]
        begin = 0
        for number, shard in enumerate(self.shards):
            end = begin + shard.tokens
            if begin < stop and end > start and shard.documents:
                path = shard_paths(self.path, number)[1]
                starts = _mapped(path, START_DTYPE, shard.documents).astype(np.int64)
                rising = bool((np.diff(starts) >= 0).all())
                if not rising or starts[0] < 0 or starts[-1] > shard.tokens:
                    raise DamagedError(
                        f"{path} is damaged: documents begin outside the shard; {RETOKENIZE}"
                    )
                starts += begin
                found.append(starts[(starts >= start) & (starts < stop)])
            begin = end
        return np.concatenate(found)


def is_store(path: str | Path) -> bool:
    """Whether a folder is a token store; it may be unfinished or damaged."""
    index = Path(path) / INDEX
    try:
        with open_regular(index) as file:
            start: bytes = file.read(_FIRST_BYTES)
    except (OSError, ValueError):  # it does not exist; its name contains a NUL
        return False
    return json.dumps(FORMAT).encode() in start


def read_tokenizer(store: Path, sha256: str) -> Tokenizer:
    """Read a store's tokenizer.

    Raises:
        DamagedError: if the file does not have the digest `sha256`.
        CheckpointError: if its content is not a valid tokenizer.
    """
    path = store / TOKENIZER
    content = read_regular(path, STATE.most_bytes)
    if hashlib.sha256(content).hexdigest() != sha256:
        raise DamagedError(
            f"{path} is damaged: its SHA-256 is not the one in the index; {RETOKENIZE}"
        )
    try:
        return from_state(parse_object(content, STATE))
    except (ValueError, AttributeError) as error:  # an InputError is a ValueError
        raise CheckpointError(f"{path}: {error}") from None


def _check_shard(store: Path, number: int, shard: Shard, itemsize: int, *, check: bool) -> None:
    """Check that a shard's files exist with the right length, and with `check` their digests."""
    lengths = shard.tokens * itemsize, shard.documents * START_DTYPE.itemsize
    digests = shard.sha256, shard.documents_sha256
    for path, length, digest in zip(shard_paths(store, number), lengths, digests, strict=True):
        try:
            status = require_regular(path) or os.stat(path)
        except FileNotFoundError:
            raise DamagedError(f"{path} does not exist: {RETOKENIZE}") from None
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
        if not stat.S_ISREG(status.st_mode) or status.st_size != length:
            raise DamagedError(
                f"{path} is damaged: it has {status.st_size:,} bytes, but the index says "
                f"{length:,}; {RETOKENIZE}"
            )
        if check and _digest_of(path) != digest:
            raise DamagedError(
                f"{path} is damaged: its SHA-256 is not the one in the index; {RETOKENIZE}"
            )


def _digest_of(path: Path) -> str:
    try:
        with open_regular(path, buffering=0) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
