"""Stores of texts too large for memory, kept in the user's cache: each is tokenized once.

They lie in `stores/` of MYGPT_CACHE, else of `mygpt/` in the user's cache folder. A store's name
is a digest of what it follows from: the files (paths, sizes, times of the last change), their
encoding and the tokenizer. Before one is made, those that were not used for longest go, until
the disk keeps a tenth of itself free and all take 64 GiB at most. Whoever uses a store holds a
shared lock on the file beside it until the process ends; whoever makes or removes it, all of it.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mygpt.data.shared_lock import SharedLock
from mygpt.data.store_builder.index import Index
from mygpt.data.token_cache import cache_folder, is_named_by_us
from mygpt.data.token_store import TokenStore
from mygpt.errors import CheckpointError, InputError, StorageError
from mygpt.file_access import is_private, make_private_folder, not_private
from mygpt.machine import free_memory_bytes
from mygpt.text import RecordOptions, TextSource, find_sources, pieces
from mygpt.text.compression import compression_by_name
from mygpt.text.decoding import NotDecodedError, begins_as_text
from mygpt.text.file_stream import blocks_of
from mygpt.text.reading import Reader, require_sensible_ratio
from mygpt.tokenization import ByteTokenizer, CharTokenizer, Tokenizer, load_tokenizer

if TYPE_CHECKING:
    from mygpt.data.store_builder.build import StoreProgress

MOST_BYTES = 2**36  # of all stores together
DISK_KEPT = 0.1  # of the disk, which is left to others
ABOVE = 2**28  # bytes of files; more go through a store
_OF_MEMORY = 8  # or more than this part of what is free
MOST_CHARACTERS = 512  # distinct ones that make a vocabulary; where there are more, bytes do
_UNPACKED = 4  # times its size a packed file may well have
_BYTES_PER_TOKEN = 2  # on disk; and no token is less than a byte of text
_POLL_S = 0.1
_VERSION = 1
_REMEDY = "MYGPT_CACHE=FOLDER moves the cache, MYGPT_STORE_ABOVE=off does without"
NAMES = ("auto", "bpe", "char", "byte")
_PLAIN = RecordOptions(legacy_names=True)
_in_use: dict[Path, SharedLock] = {}  # by this process, until it ends


def in_memory_limit() -> float:
    """Bytes of files above which a text goes through a store: MYGPT_STORE_ABOVE, or the rule.

    Raises:
        InputError: where the variable is no number.
    """
    chosen = os.environ.get("MYGPT_STORE_ABOVE", "")
    if chosen == "off" or os.environ.get("MYGPT_TOKEN_CACHE") == "off":
        return float("inf")
    if chosen and not (chosen.isascii() and chosen.isdigit() and len(chosen) < 20):
        raise InputError(
            f"MYGPT_STORE_ABOVE={chosen!r}: give bytes, as in {ABOVE}, or off for never"
        )
    if chosen:
        return int(chosen)
    free = free_memory_bytes()
    return ABOVE if free is None else min(ABOVE, free // _OF_MEMORY)


def large_sources(
    names: Sequence[str], encoding: str | None, records: RecordOptions | None = None
) -> list[TextSource]:
    """The files that names mean, where together they go through a store; none where they do not.

    A packed file counts as what it unpacks to. Standard input cannot be read twice. What begins as
    no text is read as ever, and so are files of records where they are plain text.

    Raises:
        InputError: for what is missing or empty, for what unpacks to too much, and for a
            MYGPT_STORE_ABOVE that is no number.
    """
    most = in_memory_limit()
    if not names or "-" in names or most == math.inf:
        return []
    below = list(_files_below(names))
    if sum(map(_size_of, below)) <= most and not any(map(compression_by_name, below)):
        return []
    try:
        sources, _ = find_sources(names, encoding=encoding, records=records or _PLAIN)
    except NotDecodedError:  # their bytes may be what is asked for
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
    as_text = (begins_as_text(Reader().start_of(source.name), encoding) for source in texts)
    return measured if all(as_text) else []


def _measured(source: TextSource, most: float) -> TextSource:
    """A packed file with the length of what is in it, as far as that matters."""
    length = 0
    with contextlib.closing(blocks_of(source.name)) as blocks:
        for block, read in blocks:
            length += len(block)
            require_sensible_ratio(source.name, length, min(read, source.size))
            if length > most:
                break
    return replace(source, uncompressed_bytes=length)


def _size_of(path: str) -> int:
    with contextlib.suppress(OSError, ValueError):
        return os.path.getsize(path)
    return 0


def _files_below(names: Sequence[str]) -> Iterator[str]:
    """Every file that names may mean: of a folder all below it."""
    for name in names:
        for place in [name] if os.path.exists(name) else glob.iglob(name, recursive=True):
            if not os.path.isdir(place):
                yield place
                continue
            for at, _, files in os.walk(place):
                yield from (os.path.join(at, file) for file in files)


@dataclass(frozen=True)
class CachedStore:
    """A store in the cache.

    Attributes:
        store: open, and kept from being removed until this process ends.
        built_s: seconds that making it took; 0 where it was there already.
    """

    store: TokenStore
    built_s: float


def cached_store(
    sources: Sequence[TextSource],
    tokenizer: str | Tokenizer,
    *,
    encoding: str | None = None,
    records: RecordOptions = _PLAIN,
    split_documents: bool = False,
    unknown: str = "error",
    progress: Callable[[StoreProgress], None] | None = None,
) -> CachedStore:
    """The store of some files, found in the cache or made there.

    Args:
        sources: plain files.
        tokenizer: "auto" (characters where there are at most 512 distinct ones, else bytes), a
            name that `build_store` takes, a tokenizer's JSON file, or one that is there already.
        encoding: of the files; None is UTF-8, or what a byte-order mark says.
        records: how files of records are read.
        split_documents: whether `<|endoftext|>` separates documents of a file.
        unknown: as `build_store` takes it.
        progress: is told how far it is.

    Raises:
        InputError: as reading and tokenizing do.
        StorageError: where there is no room.
    """
    folder = stores_folder()
    if isinstance(tokenizer, str) and tokenizer.removeprefix("bpe:") == tokenizer:
        tokenizer = tokenizer if tokenizer in NAMES else load_tokenizer(tokenizer)
    path = folder / _key(sources, tokenizer, encoding, records, split=split_documents)
    lock = _in_use.setdefault(path, SharedLock(folder / f"{path.name}.lock"))
    while True:
        lock.acquire_shared()  # waits while another process makes it
        if (found := opened(path)) is not None:
            lock.touch()
            return CachedStore(found, 0.0)
        if lock.try_exclusive():
            break
        time.sleep(_POLL_S)
    from mygpt.data.store_builder.build import build_store

    began = time.monotonic()
    try:
        if (found := opened(path)) is None:
            _make_room(folder, path, sum(map(_expected_bytes, sources)))
            how = partial(
                build_store,
                encoding=encoding,
                records=records,
                split_documents=split_documents,
                unknown=unknown,
            )
            chosen = tokenizer
            if tokenizer == "auto":
                chosen = _by_characters(
                    sources, encoding, records.field_name, split=split_documents
                )
            found = _built(path, sources, partial(how, tokenizer=chosen, progress=progress))
    except BaseException:
        lock.release()
        raise
    lock.acquire_shared()
    lock.touch()
    return CachedStore(found, time.monotonic() - began)


def _by_characters(
    sources: Sequence[TextSource], encoding: str | None, field: str, *, split: bool
) -> Tokenizer:
    """Characters where few are distinct, else bytes; all of the text is read for that."""
    found: set[str] = set()
    for source in sources:
        for piece in pieces(source, field=field, encoding=encoding, split=split):
            found.update(piece.text)
            if len(found) > MOST_CHARACTERS:
                return ByteTokenizer()
    return CharTokenizer(sorted(found), end_of_text=True)


def stores_folder() -> Path:
    """Where the stores lie.

    Raises:
        StorageError: where it cannot be made, or another user's folder is there.
    """
    try:
        folder = cache_folder() / "stores"
        make_private_folder(folder)
        why = not_private(folder, above=False)
    except (OSError, RuntimeError) as error:
        raise StorageError(f"the cache cannot be written: {error}; {_REMEDY}") from None
    if why is not None:
        raise StorageError(f"{why}: {_REMEDY}")
    return folder


def _key(
    sources: Sequence[TextSource],
    tokenizer: str | Tokenizer,
    encoding: str | None,
    records: RecordOptions,
    *,
    split: bool,
) -> str:
    """The store's name."""
    places = [
        [os.fsencode(os.path.realpath(source.name)).hex(), source.size, source.modified_ns]
        for source in sources
    ]
    how: Any = tokenizer if isinstance(tokenizer, str) else tokenizer.to_state()
    facts = [_VERSION, version("tokenizers"), places, encoding, how, *["split"] * split]
    kinds = [source.kind for source in sources]
    facts += [] if set(kinds) == {"text"} else [records.field_name, kinds]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def opened(path: Path) -> TokenStore | None:
    """The store there; None where there is none, or none that is finished and whole."""
    with contextlib.suppress(CheckpointError, OSError):
        if not path.is_symlink() and is_private(path.lstat()):
            return TokenStore.open(path)
    return None


def _expected_bytes(source: TextSource) -> int:
    packed = bool(source.compression) or source.kind == "table"
    return max(source.num_bytes, source.size * (_UNPACKED if packed else 1)) * _BYTES_PER_TOKEN


def _make_room(folder: Path, path: Path, size: int) -> None:
    """Remove what was used longest ago and is not in use, until `size` bytes fit."""
    kept = []
    for place in filter(is_named_by_us, folder.iterdir()):
        with contextlib.suppress(OSError):  # another process may be at the same work
            if place != path and not place.is_symlink():
                used = folder.joinpath(f"{place.name}.lock").stat().st_mtime_ns
                kept.append((used, sum(map(_size_of, _files_below([str(place)]))), place))
    total = size + sum(length for _, length, _ in kept)
    for _, length, place in sorted(kept):
        disk = shutil.disk_usage(folder)
        if total <= MOST_BYTES and disk.free - size >= DISK_KEPT * disk.total:
            break
        lock = SharedLock(folder / f"{place.name}.lock")
        if lock.try_exclusive():
            shutil.rmtree(place, ignore_errors=True)
            total -= length
        lock.release()
    free = shutil.disk_usage(folder).free
    if free < size:
        raise StorageError(
            f"{folder} has {free:,} bytes free, and the text's tokens may take {size:,}: make "
            f"room; {_REMEDY}"
        )


def _built(
    path: Path, sources: Sequence[TextSource], build: Callable[..., TokenStore]
) -> TokenStore:
    """The store made at `path`, or a half-done one brought to its end."""
    _keep_half_done(path)
    make_private_folder(path)
    files = [os.path.realpath(source.name) for source in sources]
    try:
        try:
            return build(files, path)
        except CheckpointError:  # what was begun there is damaged
            shutil.rmtree(path, ignore_errors=True)
            make_private_folder(path)
            return build(files, path)
    except StorageError as error:
        raise StorageError(f"{error}; {_REMEDY}") from None


def _keep_half_done(path: Path) -> None:
    """Remove what lies where a store is to be made, unless it is one on its way."""
    with contextlib.suppress(CheckpointError, FileNotFoundError):
        if is_private(path.lstat()) and not Index.read(path).finished:
            return
    if path.is_symlink():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)
