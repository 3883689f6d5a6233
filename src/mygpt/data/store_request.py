"""The request of a build, and the store in the output folder that it continues.

A store is continued only by the same request: the same files, unchanged, and the same options.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from mygpt.checkpoint.durable import remove, temporary_files
from mygpt.data.store_index import SHARDS, Index, SourceState
from mygpt.data.store_tokenizer import check_name
from mygpt.data.token_store import is_store
from mygpt.errors import InputError
from mygpt.file_access import require_folder
from mygpt.text import READING_VERSION, RecordOptions, TextSource, find_sources, name_of
from mygpt.tokenization import Tokenizer
from mygpt.tokenization.unknown import CORPUS_POLICIES, check_policy

SHARD_TOKENS = 2**24


@dataclass(frozen=True)
class StoreOptions:
    """How a store is built.

    Attributes:
        tokenizer: a tokenizer, or the kind to train: "bpe", "bpe:SIZE", "char" or "byte".
        records: how files of records are read.
        encoding: None is UTF-8, or the encoding that a byte-order mark names.
        split_documents: whether `<|endoftext|>` separates documents within a file, line or row.
            None is the setting of an existing store, else true.
        unknown: "error" refuses, before the first shard is written, a text of which more than a
            tenth is unknown to the tokenizer; "keep" accepts it.
        shard_tokens: a shard ends as soon as it has this number of ids.
        workers: number of encoding processes; 0 encodes in this process; None is one per core.
    """

    tokenizer: Tokenizer | str = "bpe"
    records: RecordOptions = field(default_factory=RecordOptions)
    encoding: str | None = None
    split_documents: bool | None = None
    unknown: str = "error"
    shard_tokens: int = SHARD_TOKENS
    workers: int | None = None

    def __post_init__(self) -> None:
        check_policy(self.unknown, CORPUS_POLICIES)
        if isinstance(self.tokenizer, str):
            check_name(self.tokenizer)
        if self.shard_tokens < 1:
            raise InputError(f"shard_tokens={self.shard_tokens} must be at least 1")
        if self.workers is not None and self.workers < 0:
            raise InputError(
                f"workers={self.workers} must be at least 0: remove the option for one process per "
                "core"
            )


def requested(
    names: Sequence[str], options: StoreOptions, began: Index | None
) -> tuple[Index, list[TextSource]]:
    """The index of a store with this request, without progress, and its sources.

    What the options leave open is as in `began`, the existing store, if there is one.
    """
    reading = READING_VERSION if began is None else began.reading
    legacy = options.records.legacy_names or reading < READING_VERSION
    records = replace(options.records, legacy_names=legacy)
    sources, _ = find_sources(names, encoding=options.encoding, records=records)
    if not sources:
        raise InputError("no file is named: name text files, folders, or - for standard input")
    split = options.split_documents
    if split is None:
        split = began is None or began.split_documents
    asked = options.tokenizer
    if not isinstance(asked, str):
        asked = f"sha256:{hashlib.sha256(state_of(asked)).hexdigest()}"
    index = Index(
        name=name_of(names), finished=False, asked=asked, tokenizer=None, dtype="uint16",
        shard_tokens=options.shard_tokens, field=records.field_name, encoding=options.encoding,
        sources=tuple(SourceState(s.name, s.size, s.modified_ns, 0, 0, False) for s in sources),
        shards=(), split_documents=split, reading=reading,
    )  # fmt: skip
    return index, sources


def state_of(tokenizer: Tokenizer) -> bytes:
    """The content of a store's `tokenizer.json`."""
    return json.dumps(tokenizer.to_state()).encode() + b"\n"


def require_store_folder(out: Path) -> None:
    """Raise `InputError` if `out` contains files that are not a store's."""
    try:
        there = sorted(os.listdir(out))
    except FileNotFoundError:
        return
    except OSError as error:
        raise InputError(f"{out} cannot be a store: {error.strerror}: give another --out") from None
    ours = all(name == ".lock" or name.startswith(".mygpt-") for name in there)
    if not ours and not is_store(out):
        raise InputError(
            f"{out} contains other files ({there[0]!r:.60}) and is not a token store: give another "
            "--out"
        )


def index_to_continue(out: Path, wanted: Index, *, overwrite: bool) -> Index:
    """The index to continue with: that of an existing store, or the new request.

    Raises:
        InputError: if the existing store has another request.
    """
    require_folder(out / SHARDS)
    remove(*temporary_files(out), *temporary_files(out / SHARDS))
    there = Index.read(out) if is_store(out) and not overwrite else None
    lasting = all(source.size >= 0 for source in wanted.sources)
    if there is not None and (there.finished or (there.shards and lasting)):
        _require_same_request(there, wanted, out)
        if not lasting:
            raise InputError(
                f"{out} is finished, and text from a pipe cannot be compared with its text: give "
                "another --out, or --overwrite to replace it"
            )
        index = there
    elif there is not None and there.without_progress() == wanted and lasting:
        index = there
    else:
        index = wanted
        index.write(out)
    for path in (out / SHARDS).glob("*"):  # of an earlier store, or not in the index
        if path.suffix in (".tokens", ".documents") and not path.is_dir():
            number = path.stem
            if not (number.isdigit() and int(number) < len(index.shards)):
                remove(path)
    return index


def _require_same_request(there: Index, wanted: Index, store: Path) -> None:
    """Check that an existing store was begun with the same sources and settings.

    Raises:
        InputError: naming the first difference.
    """
    remedy = f"give another --out, or --overwrite to replace {store}"
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
