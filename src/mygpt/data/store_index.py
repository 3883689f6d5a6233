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
from dataclasses import MISSING, asdict, dataclass, fields, replace
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
_LEAST = {"size": -1, "modified_ns": -_MOST, "shard_tokens": 1, "tokens": 1, "reading": 1}
_TYPES: dict[str, tuple[type, str]] = {
    "int": (int, "an integer"),
    "str": (str, "a string"),
    "bool": (bool, "true or false"),
}
_DIGEST, _DIGESTS = re.compile("[0-9a-f]{64}"), ("sha256", "documents_sha256", "tokenizer")


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
    rows: int
    characters: int
    done: bool


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
    shards: tuple[Shard, ...]
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
        sources = tuple(replace(s, rows=0, characters=0, done=False) for s in self.sources)
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
        if not os.path.lexists(path):
            raise CheckpointError(f"{store} is not a token store: `mygpt tokenize` creates one")
        data = read_regular(path, _LIMITS.most_bytes)
        try:
            content = parse_object(data, _LIMITS)
        except ValueError as error:
            raise DamagedError(
                f"{path} is damaged, or not a token store's index: {error}; {RETOKENIZE}"
            ) from None
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
            index: Index = _parsed(cls, content)
            index.require_consistent(content)
        except (KeyError, ValueError) as error:
            what = f"no {error}" if isinstance(error, KeyError) else str(error)
            raise DamagedError(f"{path} is damaged: {what:.120}; {RETOKENIZE}") from None
        return index

    def require_consistent(self, content: Mapping[str, Any]) -> None:
        """Raise `ValueError` if attributes, or the totals in the file's content, contradict."""
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype={self.dtype!r:.20} is neither uint16 nor int32")
        if (self.shards or self.finished) and self.tokenizer is None:
            raise ValueError("it has shards and no tokenizer")
        if self.finished and not self.shards:
            raise ValueError("it is finished and has no shards")
        for total in ("tokens", "documents", "bytes"):
            if content[total] != getattr(self, total):
                raise ValueError(f"its {total} are not the sum of its shards'")


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


def _parsed(kind: Any, content: Any) -> Any:
    """An object of a dataclass from its attributes in JSON, whose types and ranges are checked.

    Attributes with a default did not exist in older versions.
    """
    values = {}
    for field in fields(kind):
        name, expected = field.name, str(field.type)
        if name not in content and field.default is not MISSING:
            continue
        value = content[name]
        if name in _PARTS:
            if not isinstance(value, list) or not all(isinstance(part, dict) for part in value):
                raise ValueError(f"{name} must be a list of objects")
            value = tuple(_parsed(_PARTS[name], part) for part in value)
        elif value is not None or not expected.endswith(" | None"):
            _check(name, value, expected.removesuffix(" | None"))
        values[name] = value
    return kind(**values)


def _check(name: str, value: Any, expected: str) -> None:
    """Raise `ValueError` for an attribute of another type or outside its range."""
    kind, what = _TYPES[expected]
    if type(value) is not kind:
        raise ValueError(f"{name}={value!r:.40} must be {what}")
    if isinstance(value, int) and not _LEAST.get(name, 0) <= value < _MOST:
        raise ValueError(f"{name}={value!r:.40} must be at least {_LEAST.get(name, 0)}")
    if name in _DIGESTS and not _DIGEST.fullmatch(str(value)):
        raise ValueError(f"{name}={value!r:.40} must be a SHA-256")


_PARTS = {"sources": SourceState, "shards": Shard}
