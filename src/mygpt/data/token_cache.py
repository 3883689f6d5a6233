"""A cache of tokens and BPE tokenizers on disk, so that a second run on a text starts at once.

Only results that take time are cached: BPE of a long text. A file's name is a SHA-256 digest of
everything that its content depends on: the documents (and so how they were split), the tokenizer,
and the version of the `tokenizers` library. A file's digest is verified when it is read; a damaged
file, or one that belongs to another user, is ignored. Errors of the cache are never reported: the
result is then computed.

The files are in `tokens/` in the folder MYGPT_CACHE, or in `mygpt/tokens/` in the user's cache
folder. They take at most 2 GiB; the least recently used are removed. MYGPT_TOKEN_CACHE=off disables
the cache.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import mmap
import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mygpt.checkpoint.durable import temporary_files, write_durably
from mygpt.data.tokens import dtype_of, encode_documents
from mygpt.errors import CheckpointError, InputError, StorageError
from mygpt.file_access import (
    PRIVATE_FILE,
    cache_folder,
    is_private,
    make_private_folder,
    not_private,
    open_descriptor,
)
from mygpt.text import Document, as_bytes
from mygpt.tokenization import BPETokenizer, Tokenizer
from mygpt.tokenization.words import LIBRARY_PATTERN

MOST_BYTES = 2**31  # of all files together
SHORTEST = 2**18  # characters; encoding a shorter text takes no noticeable time
_SPARE_BYTES = 2**30  # of the disk that must stay free
_STRAY_S = 3600.0  # an older temporary file was left by a process that died
_NAME_LENGTH = 64  # SHA-256 in hexadecimal
_VERSION = 2
_DIGEST = 32  # bytes at a file's beginning: SHA-256 of its name and its content


def cached_tokens(
    documents: Sequence[Document], tokenizer: Tokenizer, *, continued: bool = False
) -> NDArray[np.integer]:
    """The result of `encode_documents`, from the cache if it is a long text's and BPE's.

    Returns:
        1-D, read-only, uint16 or int32.

    Raises:
        InputError: as the tokenizer does.
    """
    path = None
    if tokenizer.kind in ("bpe", "foreign"):
        state = json.dumps(tokenizer.to_state(), sort_keys=True).encode()
        facts = [b"tokens", b"continued" if continued else b"", hashlib.sha256(state).digest()]
        path = _cache_file(documents, facts)
    kept = None if path is None else _read(path)
    tokens = None if kept is None else _tokens_in(kept, tokenizer)
    if tokens is not None:
        return tokens
    tokens = encode_documents(documents, tokenizer, continued=continued)
    tokens.flags.writeable = False  # as tokens from the cache are
    if path is not None:
        _write(path, tokens.view(np.uint8).data)
    return tokens


def _tokens_in(content: memoryview, tokenizer: Tokenizer) -> NDArray[np.integer] | None:
    dtype = np.dtype(dtype_of(tokenizer))
    if not content or len(content) % dtype.itemsize:
        return None
    tokens: NDArray[np.integer] = np.frombuffer(content, dtype)
    inside = tokens.min() >= 0 and tokens.max() < tokenizer.vocab_size
    return tokens if inside else None


def cached_bpe(documents: Sequence[Document], vocab_size: int) -> BPETokenizer:
    """The result of `BPETokenizer.train` on documents, for a long text from the cache.

    Raises:
        InputError: as `BPETokenizer.train` does.
    """
    path = _cache_file(documents, [b"bpe", str(vocab_size).encode(), LIBRARY_PATTERN.encode()])
    content = None if path is None else _read(path)
    if content is not None:
        with contextlib.suppress(InputError, ValueError, RecursionError):
            return BPETokenizer(json.loads(bytes(content)))
    pieces = (piece for document in documents for piece in document.pieces())
    tokenizer = BPETokenizer.train(pieces, vocab_size)
    if path is not None:
        _write(path, memoryview(json.dumps(tokenizer.to_state()["tokenizer"]).encode()))
    return tokenizer


def _cache_file(documents: Sequence[Document], facts: list[bytes]) -> Path | None:
    """The cache file for `documents` and `facts`; None if the result is not cached."""
    if sum(map(len, documents)) < SHORTEST or os.environ.get("MYGPT_TOKEN_CACHE") == "off":
        return None
    from importlib.metadata import version

    key = hashlib.sha256()
    try:
        folder = cache_folder() / "tokens"
        for fact in (str(_VERSION).encode(), version("tokenizers").encode(), *facts):
            key.update(hashlib.sha256(fact).digest())
        for document in documents:
            here = hashlib.sha256()
            for piece in document.pieces():
                here.update(as_bytes(piece))
            key.update(here.digest())
    except (UnicodeEncodeError, RuntimeError):  # a lone surrogate; a user without home directory
        return None
    return folder / key.hexdigest()


def is_digest(path: Path) -> bool:
    """Whether a file name is a SHA-256 digest, as those of cached files and stores are."""
    return len(path.name) == _NAME_LENGTH and set(path.name) <= set("0123456789abcdef")


def _read(path: Path) -> memoryview | None:
    """The content of a cached file, memory-mapped; None if missing, damaged or not private."""
    try:
        descriptor = open_descriptor(path, os.O_RDONLY)
        try:
            status = os.fstat(descriptor)
            if not is_private(status) or not_private(path.parent, above=False) is not None:
                return None
            mapped = mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ)
        finally:
            os.close(descriptor)
    except (OSError, ValueError):  # it is missing, a link, a pipe or empty
        return None
    content = memoryview(mapped)[_DIGEST:]
    if mapped[:_DIGEST] != _digest(path, content):
        return None
    with contextlib.suppress(OSError):
        os.utime(path)  # record the last use
    return content


def _digest(path: Path, content: memoryview) -> bytes:
    digest = hashlib.sha256(path.name.encode())
    digest.update(content)
    return digest.digest()


def _write(path: Path, content: memoryview) -> None:
    """Write a file to the cache, if there is enough space."""
    size = _DIGEST + len(content)
    try:
        make_private_folder(path.parent)
        if not_private(path.parent, above=False) is not None:
            return
        if size > MOST_BYTES or shutil.disk_usage(path.parent).free < size + _SPARE_BYTES:
            return
        _free_space(path.parent, size)
        if path.is_symlink():  # writing would follow it
            path.unlink()
        write_durably(path, [_digest(path, content), content], inside=True, mode=PRIVATE_FILE)
    except (OSError, StorageError, CheckpointError):
        return


def _free_space(folder: Path, size: int) -> None:
    """Remove old temporary files and the least recently used files until `size` bytes fit."""
    for stray in temporary_files(folder):
        with contextlib.suppress(OSError):
            if time.time() - stray.lstat().st_mtime > _STRAY_S:
                stray.unlink()
    kept = []
    for path in filter(is_digest, folder.iterdir()):
        with contextlib.suppress(OSError):  # another process may be removing files too
            status = path.lstat()
            kept.append((status.st_mtime_ns, status.st_size, path))
    total = size + sum(length for _, length, _ in kept)
    for _, length, path in sorted(kept):
        if total <= MOST_BYTES:
            break
        with contextlib.suppress(OSError):
            path.unlink()
            total -= length
