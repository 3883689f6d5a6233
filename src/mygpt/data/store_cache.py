"""A cache of token stores for texts too large for memory, so that each is tokenized once.

The stores are in `stores/` in the folder MYGPT_CACHE, or in `mygpt/stores/` in the user's cache
folder. A store's name is a digest of everything that it depends on: the files (paths, sizes,
modification times), their encoding and the tokenizer. Before a store is built, the least recently
used ones are removed until a tenth of the disk is free and all stores together take at most
64 GiB. A process that uses a store holds a shared lock on NAME.lock until it ends; a process that
builds or removes the store holds that lock as exclusive.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mygpt.checkpoint.locks import try_lock
from mygpt.data import building
from mygpt.data.building import StoreProgress
from mygpt.data.store_index import Index
from mygpt.data.store_request import StoreOptions
from mygpt.data.store_tokenizer import characters_in
from mygpt.data.token_cache import is_digest
from mygpt.data.token_store import TokenStore
from mygpt.errors import CheckpointError, InputError, StorageError
from mygpt.file_access import (
    PRIVATE_FILE,
    cache_folder,
    make_private_folder,
    not_private,
    open_descriptor,
)
from mygpt.machine import free_memory_bytes
from mygpt.text import RecordOptions, TextSource, find_sources, pieces
from mygpt.text.reading import (
    NotTextError,
    begins_as_text,
    blocks_of,
    require_sensible_ratio,
    start_of,
)
from mygpt.tokenization import CharTokenizer, Tokenizer, load_tokenizer

MOST_BYTES = 2**36  # of all stores together
DISK_KEPT = 0.1  # fraction of the disk that must stay free
ABOVE = 2**28  # bytes of text files: larger texts are tokenized into a store
_OF_MEMORY = 8  # and so are texts of more than 1/8 of the free memory
MOST_CHARACTERS = 512  # distinct ones: "auto" chooses merges of bytes for texts with more
MERGES = "bpe:1024"  # 1 MB of Russian in half a minute: 1.72 nats per character, bytes 2.20
_EXPANSION = 4  # expected ratio of uncompressed to compressed size
_BYTES_PER_TOKEN = 2  # on disk; each token stands for at least one byte of text
_POLL_S = 0.1
_VERSION = 1
_REMEDY = "MYGPT_CACHE=FOLDER moves the cache, MYGPT_STORE_ABOVE=off avoids it"
NAMES = ("auto", "bpe", "char", "byte")
_PLAIN = RecordOptions(legacy_names=True)
_in_use: dict[Path, _StoreLock] = {}  # by this process, until it ends


def in_memory_limit() -> float:
    """The size in bytes above which a text is tokenized into a store.

    It is MYGPT_STORE_ABOVE, or by default 256 MiB or an eighth of the free memory, whichever is
    less.

    Raises:
        InputError: if the variable is neither a number nor "off".
    """
    chosen = os.environ.get("MYGPT_STORE_ABOVE", "")
    if chosen == "off" or os.environ.get("MYGPT_TOKEN_CACHE") == "off":
        return float("inf")
    if chosen and not (chosen.isascii() and chosen.isdigit() and len(chosen) < 20):
        raise InputError(
            f"MYGPT_STORE_ABOVE={chosen!r} must be a number of bytes, for instance {ABOVE}, or off"
        )
    if chosen:
        return int(chosen)
    free = free_memory_bytes()
    return ABOVE if free is None else min(ABOVE, free // _OF_MEMORY)


def large_sources(
    names: Sequence[str], encoding: str | None, records: RecordOptions | None = None
) -> list[TextSource]:
    """The files that paths stand for, if the text is large enough for a store; else no files.

    A compressed file counts with its uncompressed size. The result is empty for standard input,
    which cannot be read twice, for files that are not text, and, without `records`, for files of
    records.

    Raises:
        InputError: if a file is missing or empty, or expands too much, or if MYGPT_STORE_ABOVE is
            invalid.
    """
    most = in_memory_limit()
    if not names or "-" in names or most == math.inf:
        return []
    try:
        sources, _ = find_sources(names, encoding=encoding, records=records or _PLAIN)
    except NotTextError:  # the caller may want to read them as bytes
        return []
    kinds = {source.kind for source in sources}
    if not all(source.is_lasting for source in sources) or (records is None and kinds != {"text"}):
        return []
    measured: list[TextSource] = []
    for source in sources:
        left = most - sum(found.num_bytes for found in measured)
        measured.append(_measured(source, left) if source.compression and left >= 0 else source)
    if sum(source.num_bytes for source in measured) <= most:
        return []
    texts = (source for source in sources if source.kind != "table")
    as_text = (begins_as_text(start_of(source.name), encoding) for source in texts)
    return measured if all(as_text) else []


def _measured(source: TextSource, most: float) -> TextSource:
    """A compressed file's source with `uncompressed_bytes`, measured up to just above `most`."""
    length = 0
    with contextlib.closing(blocks_of(source.name)) as blocks:
        for block, read in blocks:
            length += len(block)
            require_sensible_ratio(source.name, length, min(read, source.size))
            if length > most:
                break
    return replace(source, uncompressed_bytes=length)


@dataclass(frozen=True)
class CachedStore:
    """A store in the cache.

    Attributes:
        store: open, and locked against removal until this process ends.
        built_s: seconds that building it took; 0 if it was in the cache.
    """

    store: TokenStore
    built_s: float


def cached_store(
    sources: Sequence[TextSource],
    tokenizer: str | Tokenizer,
    options: StoreOptions | None = None,
    *,
    progress: Callable[[StoreProgress], None] | None = None,
) -> CachedStore:
    """The store for some files, from the cache; it is built if it is not there.

    Args:
        sources: the files.
        tokenizer: "auto" (characters if there are at most 512 distinct ones, else BPE), a name
            as in `StoreOptions`, the path of a tokenizer's JSON file, or a tokenizer.
        options: how the store is built, apart from the tokenizer.
        progress: called with the progress of building, several times per second.

    Raises:
        InputError: as `build_store` does.
        StorageError: if there is not enough disk space, or the cache is not writable.
    """
    folder, options = stores_folder(), options or StoreOptions()
    if isinstance(tokenizer, str) and tokenizer.removeprefix("bpe:") == tokenizer:
        tokenizer = tokenizer if tokenizer in NAMES else load_tokenizer(tokenizer)
    path = folder / _key(sources, options, tokenizer)
    lock = _in_use.setdefault(path, _StoreLock(folder / f"{path.name}.lock"))
    while True:
        if lock.acquire(shared=True):  # else another process builds it
            if (found := _opened(path)) is not None:
                return CachedStore(found, 0.0)
            if lock.acquire(shared=False):
                break
        time.sleep(_POLL_S)
    began = time.monotonic()
    try:
        if (found := _opened(path)) is None:
            _free_space(folder, path, sum(map(_expected_bytes, sources)))
            if tokenizer == "auto":
                tokenizer = _automatic(sources, options)
            found = _built(path, sources, replace(options, tokenizer=tokenizer), progress)
    except BaseException:
        lock.release()
        raise
    lock.acquire(shared=True)
    return CachedStore(found, time.monotonic() - began)


def _automatic(sources: Sequence[TextSource], options: StoreOptions) -> str | Tokenizer:
    """A character tokenizer if the text has few distinct ones, else BPE; reads all the text."""
    read = partial(
        pieces,
        field=options.records.field_name,
        encoding=options.encoding,
        split=bool(options.split_documents),
    )
    found = characters_in(map(read, sources), MOST_CHARACTERS)
    if len(found) > MOST_CHARACTERS:
        return MERGES
    return CharTokenizer(sorted(found), end_of_text=True)


class _StoreLock:
    """A lock that many processes can hold as shared, or one as exclusive, on an empty file.

    It is held until it is released or the process ends. On a system or file system without such
    locks, acquiring it always succeeds.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor: int | None = None

    def acquire(self, *, shared: bool) -> bool:
        """Acquire it, if other processes allow it; else release it. Returns whether it is held."""
        if self._descriptor is None:
            self._descriptor = open_descriptor(
                self._path, os.O_RDWR | os.O_CREAT, mode=PRIVATE_FILE
            )
        if os.name != "nt" and try_lock(self._descriptor, shared=shared) is False:
            self.release()
            return False
        with contextlib.suppress(OSError):
            os.utime(self._path)  # records the last use
        return True

    def release(self) -> None:
        """Release it."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def stores_folder() -> Path:
    """The folder of the stores, which is created.

    Raises:
        StorageError: if it cannot be created, or is another user's or writable by others.
    """
    try:
        folder = cache_folder() / "stores"
        make_private_folder(folder)
        why = not_private(folder, above=False)
    except (OSError, RuntimeError) as error:
        raise StorageError(f"cannot write to the cache: {error}; {_REMEDY}") from None
    if why is not None:
        raise StorageError(f"{why}: {_REMEDY}")
    return folder


def _key(sources: Sequence[TextSource], options: StoreOptions, tokenizer: str | Tokenizer) -> str:
    """The store's name."""
    places = [
        [os.fsencode(os.path.realpath(source.name)).hex(), source.size, source.modified_ns]
        for source in sources
    ]
    how: Any = tokenizer if isinstance(tokenizer, str) else tokenizer.to_state()
    facts = [_VERSION, version("tokenizers"), places, options.encoding, how]
    facts += ["split"] * bool(options.split_documents)
    kinds = [source.kind for source in sources]
    facts += [] if set(kinds) == {"text"} else [options.records.field_name, kinds]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _opened(path: Path) -> TokenStore | None:
    """The store at `path`; None if there is none, or if it is unfinished or damaged."""
    with contextlib.suppress(CheckpointError, OSError):
        return TokenStore.open(path)
    return None


def _expected_bytes(source: TextSource) -> int:
    """The estimated size of a source's tokens on disk."""
    compressed = bool(source.compression) or source.kind == "table"
    return max(source.num_bytes, source.size * (_EXPANSION if compressed else 1)) * _BYTES_PER_TOKEN


def _free_space(folder: Path, path: Path, size: int) -> None:
    """Remove the least recently used stores that are not in use until `size` bytes fit.

    Raises:
        StorageError: if they do not fit even then.
    """
    kept = []
    for place in filter(is_digest, folder.iterdir()):
        with contextlib.suppress(OSError):  # another process may be removing stores too
            if place != path and not place.is_symlink():
                used = folder.joinpath(f"{place.name}.lock").stat().st_mtime_ns
                size_kept = sum(file.lstat().st_size for file in place.rglob("*"))
                kept.append((used, size_kept, place))
    total = size + sum(length for _, length, _ in kept)
    for _, length, place in sorted(kept):
        disk = shutil.disk_usage(folder)
        if total <= MOST_BYTES and disk.free - size >= DISK_KEPT * disk.total:
            break
        lock = _StoreLock(folder / f"{place.name}.lock")
        if lock.acquire(shared=False):
            shutil.rmtree(place, ignore_errors=True)
            total -= length
        lock.release()
    free = shutil.disk_usage(folder).free
    if free < size:
        raise StorageError(
            f"{folder} has {free:,} bytes free, and the text's tokens may take {size:,}: free disk "
            f"space; {_REMEDY}"
        )


def _built(
    path: Path,
    sources: Sequence[TextSource],
    options: StoreOptions,
    progress: Callable[[StoreProgress], None] | None,
) -> TokenStore:
    """Build the store at `path`, or complete an unfinished one there; a damaged one is replaced."""
    files = [os.path.realpath(source.name) for source in sources]
    try:
        if _is_resumable(path):
            with contextlib.suppress(CheckpointError):  # it is damaged
                return building.build_store(files, path, options, progress=progress)
        shutil.rmtree(path, ignore_errors=True)
        make_private_folder(path)
        return building.build_store(files, path, options, progress=progress)
    except StorageError as error:
        raise StorageError(f"{error}; {_REMEDY}") from None


def _is_resumable(path: Path) -> bool:
    with contextlib.suppress(CheckpointError):
        return not Index.read(path).finished
    return False
