"""A token store's `index.json`: its shards, and the position reached in each source.

Only shards listed in the index are part of the store. The index is replaced atomically, after the
files that it lists are durable.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from mygpt.checkpoint.durable import write_durably
from mygpt.errors import CheckpointError, DamagedError, InputError
from mygpt.file_access import file_mode, open_regular
from mygpt.json_objects import Limits, check_size, parse_object

INDEX, TOKENIZER, SHARDS = "index.json", "tokenizer.json", "shards"
FORMAT, VERSION = "mygpt token store", 1
RETOKENIZE = "tokenize the text again, with --overwrite"
DTYPES: dict[str, np.dtype[Any]] = {"uint16": np.dtype("<u2"), "int32": np.dtype("<i4")}
_LIMITS = Limits(2**28, 2**23)  # an index of a million shards
_MOST = 2**62  # upper limit of every count
_DIGEST = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True)
class Shard:
    """Two files of a store: ids, and the positions where documents begin among them.

    Attributes:
        tokens: number of ids; at least one.
        documents: number of documents that begin in the shard.
        bytes: of the text in UTF-8.
        sha256: of the file of ids.
        documents_sha256: of the file of positions.
        characters: of the text; None in stores written before mygpt counted them.
    """

    tokens: int
    documents: int
    bytes: int
    sha256: str
    documents_sha256: str
    characters: int | None = None


@dataclass(frozen=True)
class SourceState:
    """A source, and the position reached in it.

    Attributes:
        name: path, as the user named it.
        size: of the file in bytes; -1 for standard input.
        modified_ns: time of the file's last change in ns; -1 for standard input.
        rows: number of documents encoded, including empty ones.
        characters: number of characters encoded of the next document.
        done: whether all of the source is encoded.
    """

    name: str
    size: int
    modified_ns: int
    rows: int = 0
    characters: int = 0
    done: bool = False


@dataclass(frozen=True)
class Index:
    """The contents of an index. The attributes are the keys in the file.

    Attributes:
        name: of a run on the store.
        finished: whether every source is done.
        asked: the requested tokenizer: a name, or a digest of its state.
        tokenizer: SHA-256 of the tokenizer's file; None if it is not written yet.
        dtype: uint16 or int32.
        shard_tokens: a shard ends as soon as it has this number of ids.
        field: the field of a record that contains the text.
        encoding: of the text; None is UTF-8, or the encoding that a byte-order mark names.
        sources: in order.
        shards: in order.
        split_documents: whether `SEPARATOR` separates documents within a file.
        reading: the `READING_VERSION` of the mygpt that began the store. With 1, only *.jsonl and
            *.parquet are files of records.
    """

    name: str
    finished: bool
    asked: str
    tokenizer: str | None
    dtype: str
    shard_tokens: int
    field: str
    encoding: str | None
    sources: tuple[SourceState, ...]
    shards: tuple[Shard, ...] = ()
    split_documents: bool = False
    reading: int = 1

    @property
    def tokens(self) -> int:
        """The number of ids in all shards."""
        return sum(shard.tokens for shard in self.shards)

    @property
    def documents(self) -> int:
        """The number of documents in all shards."""
        return sum(shard.documents for shard in self.shards)

    @property
    def bytes(self) -> int:
        """UTF-8 bytes of the text in all shards."""
        return sum(shard.bytes for shard in self.shards)

    @property
    def sha256(self) -> str:
        """SHA-256 of the store's content: the ids, the documents' starts, the tokenizer."""
        shards = [[s.tokens, s.documents, s.sha256, s.documents_sha256] for s in self.shards]
        facts = json.dumps([VERSION, self.tokenizer, self.dtype, shards])
        return hashlib.sha256(facts.encode()).hexdigest()

    def without_progress(self) -> Index:
        """The same request, with nothing encoded."""
        sources = tuple(SourceState(s.name, s.size, s.modified_ns) for s in self.sources)
        return replace(self, finished=False, tokenizer=None, sources=sources, shards=())

    def write(self, store: Path) -> None:
        """Write the index of a store atomically.

        Raises:
            StorageError: if it cannot be written.
            InputError: if it is larger than what `read` accepts.
        """
        totals = {"tokens": self.tokens, "documents": self.documents, "bytes": self.bytes}
        content = {"format": FORMAT, "version": VERSION, **totals, **asdict(self)}
        data = json.dumps(content, indent=1).encode() + b"\n"
        try:
            check_size(data, _LIMITS)
        except ValueError as error:
            raise InputError(
                f"{store / INDEX} cannot be written: {error}; use larger shards (--shard-tokens) "
                "or fewer files"
            ) from None
        write_durably(store / INDEX, [data], inside=True, mode=file_mode(store))

    @classmethod
    def read(cls, store: Path) -> Index:
        """Read and validate the index of a store.

        Raises:
            DamagedError: if it is damaged.
            CheckpointError: if there is none, or it was written by a newer mygpt.
        """
        path = store / INDEX
        content = _object(path)
        if content.get("format") != FORMAT:
            raise CheckpointError(
                f"{path} is not a token store's index: `mygpt tokenize` creates a token store"
            )
        if content.get("version") != VERSION:
            raise CheckpointError(
                f"{path} has format version {content.get('version')!r:.20}, but this mygpt reads "
                f"version {VERSION}: upgrade mygpt"
            )
        try:
            return _checked(content)
        except (KeyError, TypeError, ValueError) as error:
            what = f"no {error}" if isinstance(error, KeyError) else str(error)
            raise DamagedError(f"{path} is damaged: {what:.120}; {RETOKENIZE}") from None


def shard_paths(store: Path, number: int) -> tuple[Path, Path]:
    """The paths of a shard's two files: ids, and the documents' starts."""
    folder = store / SHARDS
    return folder / f"{number:06d}.tokens", folder / f"{number:06d}.documents"


def read_regular(path: Path, most_bytes: int) -> bytes:
    """Read a regular file.

    Raises:
        DamagedError: if it does not exist, or has more than `most_bytes` bytes.
        CheckpointError: if it is a link, a pipe or a device.
    """
    try:
        with open_regular(path) as file:
            data: bytes = file.read(most_bytes + 1)
    except FileNotFoundError:
        raise DamagedError(f"{path} does not exist: {RETOKENIZE}") from None
    except OSError as error:
        raise DamagedError(f"{path} cannot be read: {error.strerror}") from None
    if len(data) > most_bytes:
        raise DamagedError(
            f"{path} is damaged: it is longer than {most_bytes:,} bytes; {RETOKENIZE}"
        )
    return data


def _object(path: Path) -> dict[str, Any]:
    if not os.path.lexists(path):
        raise CheckpointError(f"{path.parent} is not a token store: `mygpt tokenize` creates one")
    try:
        return parse_object(read_regular(path, _LIMITS.most_bytes), _LIMITS)
    except DamagedError:
        raise
    except ValueError as error:
        raise DamagedError(
            f"{path} is damaged, or not a token store's index: {error}; {RETOKENIZE}"
        ) from None


def _checked(content: Mapping[str, Any]) -> Index:
    sources = tuple(_source(entry) for entry in _list(content, "sources"))
    shards = tuple(_shard(entry) for entry in _list(content, "shards"))
    tokenizer, encoding = content["tokenizer"], content["encoding"]
    index = Index(
        name=_text(content, "name"),
        finished=_boolean(content, "finished"),
        asked=_text(content, "asked"),
        tokenizer=None if tokenizer is None else _digest(content, "tokenizer"),
        dtype=_text(content, "dtype"),
        shard_tokens=_number(content, "shard_tokens", 1),
        field=_text(content, "field"),
        encoding=None if encoding is None else _text(content, "encoding"),
        sources=sources,
        shards=shards,
        # Stores written before these keys existed were built with these values.
        split_documents=_boolean({"split_documents": False, **content}, "split_documents"),
        reading=_number({"reading": 1, **content}, "reading", 1),
    )
    if index.dtype not in DTYPES:
        raise ValueError(f"dtype={index.dtype!r:.20} is neither uint16 nor int32")
    if (index.shards or index.finished) and index.tokenizer is None:
        raise ValueError("it has shards and no tokenizer")
    if index.finished and not index.shards:
        raise ValueError("it is finished and has no shards")
    for total in ("tokens", "documents", "bytes"):
        if _number(content, total) != getattr(index, total):
            raise ValueError(f"its {total} are not the sum of its shards'")
    return index


def _source(entry: Mapping[str, Any]) -> SourceState:
    return SourceState(
        _text(entry, "name"),
        _number(entry, "size", -1),
        _number(entry, "modified_ns", -_MOST),
        _number(entry, "rows"),
        _number(entry, "characters"),
        _boolean(entry, "done"),
    )


def _shard(entry: Mapping[str, Any]) -> Shard:
    return Shard(
        _number(entry, "tokens", 1),
        _number(entry, "documents"),
        _number(entry, "bytes"),
        _digest(entry, "sha256"),
        _digest(entry, "documents_sha256"),
        None if entry.get("characters") is None else _number(entry, "characters"),
    )


def _list(content: Mapping[str, Any], name: str) -> list[Any]:
    if not isinstance(content[name], list) or not all(isinstance(e, dict) for e in content[name]):
        raise ValueError(f"{name} must be a list of objects")
    return content[name]


def _text(content: Mapping[str, Any], name: str) -> str:
    if not isinstance(content[name], str):
        raise ValueError(f"{name}={content[name]!r:.40} must be a string")
    return content[name]


def _boolean(content: Mapping[str, Any], name: str) -> bool:
    if not isinstance(content[name], bool):
        raise ValueError(f"{name}={content[name]!r:.40} must be true or false")
    return content[name]


def _number(content: Mapping[str, Any], name: str, least: int = 0) -> int:
    if type(content[name]) is not int or not least <= content[name] < _MOST:
        raise ValueError(f"{name}={content[name]!r:.40} must be an integer of at least {least}")
    return content[name]


def _digest(content: Mapping[str, Any], name: str) -> str:
    if not isinstance(content[name], str) or not _DIGEST.fullmatch(content[name]):
        raise ValueError(f"{name}={content[name]!r:.40} must be a SHA-256")
    return content[name]
