"""A token store's `index.json`: what is in it, and how far each source is done.

The index is the store's one truth: a shard that it does not name is not there. It is replaced
whole, once what it names is durable.
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

from mygpt.errors import CheckpointError, DamagedError, InputError
from mygpt.file_access import file_mode, open_regular
from mygpt.json_objects import Limits, check_size, parse_object
from mygpt.storage import write_durably

INDEX, TOKENIZER, SHARDS = "index.json", "tokenizer.json", "shards"
FORMAT, VERSION = "mygpt token store", 1
DTYPES: dict[str, np.dtype[Any]] = {"uint16": np.dtype("<u2"), "int32": np.dtype("<i4")}
_LIMITS = Limits(2**28, 2**23)  # an index of a million shards
_MOST = 2**62  # of anything that is counted
_DIGEST = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True)
class Shard:
    """Two files of a store: ids, and where documents begin among them.

    Attributes:
        tokens: how many ids; at least one.
        documents: how many documents begin here.
        bytes: of the text, in UTF-8.
        sha256: of the ids' file.
        documents_sha256: of the other.
        characters: of the text; None in stores of before these were counted.
    """

    tokens: int
    documents: int
    bytes: int
    sha256: str
    documents_sha256: str
    characters: int | None = None


@dataclass(frozen=True)
class SourceState:
    """A source, and how far it is done.

    Attributes:
        name: as it was named.
        size: bytes of the file; -1 for standard input.
        modified_ns: when the file was last changed; -1 for standard input.
        rows: documents, or rows that were empty, that are done.
        characters: of the next document that are done.
        done: whether all of it is.
    """

    name: str
    size: int
    modified_ns: int
    rows: int = 0
    characters: int = 0
    done: bool = False


@dataclass(frozen=True)
class Index:
    """All of an index.

    Attributes:
        name: what a run on the store is called.
        finished: whether every source is done.
        asked: the tokenizer as it was asked for: a name, or a digest.
        tokenizer: SHA-256 of the tokenizer's file; None while there is none yet.
        dtype: uint16 or int32.
        shard_tokens: a shard ends as soon as it has so many.
        field: of an object or a table that holds the text.
        encoding: of the text; None is UTF-8, or what a byte-order mark says.
        sources: in order.
        shards: in order.
        split_documents: whether `SEPARATOR` separates documents of a file.
        reading: 1 took *.jsonl and *.parquet alone for files of records; 2 is `READING_VERSION`.
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
        """Ids in all shards."""
        return sum(shard.tokens for shard in self.shards)

    @property
    def documents(self) -> int:
        """Documents that begin in all shards."""
        return sum(shard.documents for shard in self.shards)

    @property
    def bytes(self) -> int:
        """UTF-8 bytes of the text in all shards."""
        return sum(shard.bytes for shard in self.shards)

    @property
    def sha256(self) -> str:
        """What the store holds: the ids, where documents begin, the tokenizer."""
        shards = [[s.tokens, s.documents, s.sha256, s.documents_sha256] for s in self.shards]
        facts = json.dumps([VERSION, self.tokenizer, self.dtype, shards])
        return hashlib.sha256(facts.encode()).hexdigest()

    def without_progress(self) -> Index:
        """The same request, of which nothing is done."""
        sources = tuple(SourceState(s.name, s.size, s.modified_ns) for s in self.sources)
        return replace(self, finished=False, tokenizer=None, sources=sources, shards=())

    def write(self, store: Path) -> None:
        """Replace a store's index; `StorageError` where that cannot be done."""
        totals = {"tokens": self.tokens, "documents": self.documents, "bytes": self.bytes}
        content = {"format": FORMAT, "version": VERSION, **totals, **asdict(self)}
        data = json.dumps(content, indent=1).encode() + b"\n"
        try:
            check_size(data, _LIMITS)
        except ValueError as error:
            raise InputError(
                f"{store / INDEX} cannot be written: {error}; take larger shards, or fewer files"
            ) from None
        write_durably(store / INDEX, [data], inside=True, mode=file_mode(store))

    @classmethod
    def read(cls, store: Path) -> Index:
        """A store's index, each field checked.

        Raises:
            DamagedError: where it is one, and not whole.
            CheckpointError: where it is none, or newer than this program.
        """
        path = store / INDEX
        content = _object(path)
        if content.get("format") != FORMAT:
            raise CheckpointError(f"{path} is no token store's: `mygpt tokenize` makes one")
        if content.get("version") != VERSION:
            raise CheckpointError(
                f"{path} has version {content.get('version')!r:.20} and this mygpt reads "
                f"{VERSION}: upgrade mygpt"
            )
        try:
            return _checked(content)
        except (KeyError, TypeError, ValueError) as error:
            what = f"no {error}" if isinstance(error, KeyError) else str(error)
            raise DamagedError(f"{path} is damaged: {what:.120}") from None


def shard_paths(store: Path, number: int) -> tuple[Path, Path]:
    """The files of a shard: ids, and the starts of documents."""
    folder = store / SHARDS
    return folder / f"{number:06d}.tokens", folder / f"{number:06d}.documents"


def read_regular(path: Path, most_bytes: int) -> bytes:
    """A file's bytes.

    Raises:
        DamagedError: where it is not there, or longer than that.
        CheckpointError: for a link, a pipe or a device.
    """
    try:
        with open_regular(path) as file:
            data: bytes = file.read(most_bytes + 1)
    except FileNotFoundError:
        raise DamagedError(f"{path} does not exist") from None
    except OSError as error:
        raise DamagedError(f"{path} cannot be read: {error.strerror}") from None
    if len(data) > most_bytes:
        raise DamagedError(f"{path} is damaged: it is longer than {most_bytes:,} bytes")
    return data


def _object(path: Path) -> dict[str, Any]:
    if not os.path.lexists(path):
        raise CheckpointError(f"{path.parent} is no token store: `mygpt tokenize` makes one")
    try:
        return parse_object(read_regular(path, _LIMITS.most_bytes), _LIMITS)
    except DamagedError:
        raise
    except ValueError as error:
        raise DamagedError(f"{path} is damaged, or no token store's: {error}") from None


def _checked(content: Mapping[str, Any]) -> Index:
    sources = tuple(_source(entry) for entry in _list(content, "sources"))
    shards = tuple(_shard(entry) for entry in _list(content, "shards"))
    tokenizer, encoding = content["tokenizer"], content["encoding"]
    index = Index(
        name=_text(content, "name"),
        finished=_truth(content, "finished"),
        asked=_text(content, "asked"),
        tokenizer=None if tokenizer is None else _digest(content, "tokenizer"),
        dtype=_text(content, "dtype"),
        shard_tokens=_number(content, "shard_tokens", 1),
        field=_text(content, "field"),
        encoding=None if encoding is None else _text(content, "encoding"),
        sources=sources,
        shards=shards,
        # As before it could be chosen, where it is not said.
        split_documents=_truth({"split_documents": False, **content}, "split_documents"),
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
        _truth(entry, "done"),
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
        raise ValueError(f"{name} is no list of objects")
    return content[name]


def _text(content: Mapping[str, Any], name: str) -> str:
    if not isinstance(content[name], str):
        raise ValueError(f"{name}={content[name]!r:.40} is no text")
    return content[name]


def _truth(content: Mapping[str, Any], name: str) -> bool:
    if not isinstance(content[name], bool):
        raise ValueError(f"{name}={content[name]!r:.40} is neither true nor false")
    return content[name]


def _number(content: Mapping[str, Any], name: str, least: int = 0) -> int:
    if type(content[name]) is not int or not least <= content[name] < _MOST:
        raise ValueError(f"{name}={content[name]!r:.40} is no count")
    return content[name]


def _digest(content: Mapping[str, Any], name: str) -> str:
    if not isinstance(content[name], str) or not _DIGEST.fullmatch(content[name]):
        raise ValueError(f"{name}={content[name]!r:.40} is no SHA-256")
    return content[name]


def require_request(there: Index, wanted: Index, store: Path) -> None:
    """Refuse to go on with a store that was begun with other sources or another tokenizer.

    Raises:
        InputError: naming what differs.
    """
    remedy = f"give another --out, or start anew with --overwrite ({store} is then replaced)"
    for what in ("asked", "field", "encoding", "shard_tokens", "split_documents"):
        old, new = getattr(there, what), getattr(wanted, what)
        if old != new:
            name = "tokenizer" if what == "asked" else what
            raise InputError(
                f"{store} was begun with {name} {old!s:.80}, not {new!s:.80}: {remedy}"
            )
    old_names, new_names = ([s.name for s in i.sources] for i in (there, wanted))
    if old_names != new_names:
        raise InputError(
            f"{store} was begun with other sources ({len(old_names)}, from "
            f"{old_names[0] if old_names else 'none'!r:.80}): {remedy}"
        )
    for old, new in zip(there.sources, wanted.sources, strict=True):
        if (old.size, old.modified_ns) != (new.size, new.modified_ns):
            raise InputError(f"{new.name!r} has changed since {store} was begun: {remedy}")
