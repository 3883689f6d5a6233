"""The request of a build, and the store in the output folder that it continues.

A store is continued only by the same request: the same files, unchanged, and the same settings.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from mygpt.checkpoint.durable import remove, temporary_files
from mygpt.checkpoint.locks import RunLock, holder
from mygpt.data.store_builder.index import SHARDS, Index, SourceState
from mygpt.data.store_builder.tokenizer import check_name
from mygpt.data.token_store import is_store
from mygpt.errors import CheckpointError, InputError
from mygpt.file_access import require_folder
from mygpt.text import TextSource
from mygpt.tokenization import Tokenizer


def new_index(
    name: str,
    sources: Sequence[TextSource],
    tokenizer: Tokenizer | str,
    *,
    field: str,
    encoding: str | None,
    split_documents: bool,
    reading: int,
    shard_tokens: int,
) -> Index:
    """The index of a store with this request, without progress."""
    if isinstance(tokenizer, str):
        check_name(tokenizer)
        asked = tokenizer
    else:
        asked = f"sha256:{hashlib.sha256(state_of(tokenizer)).hexdigest()}"
    if shard_tokens < 1:
        raise InputError(f"shard_tokens={shard_tokens} must be at least 1")
    states = tuple(SourceState(s.name, s.size, s.modified_ns) for s in sources)
    return Index(
        name, False, asked, None, "uint16", shard_tokens, field, encoding, states,
        split_documents=split_documents, reading=reading,
    )  # fmt: skip


def existing_index(out: Path) -> Index | None:
    """The index of an existing store; None if there is none or it is damaged."""
    with contextlib.suppress(CheckpointError):  # which `index_to_continue` reports
        return Index.read(out) if is_store(out) else None
    return None


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


@contextlib.contextmanager
def locked(out: Path) -> Iterator[RunLock]:
    """Hold the lock of a store's folder; `InputError` if another process holds it."""
    lock = RunLock(out, "give another --out")
    try:
        lock.__enter__()
    except CheckpointError:  # the lock file is a link or a pipe, which does not show a writer
        raise
    except InputError:
        raise InputError(
            f"{out} is being written by {holder(out) or 'another process'}: wait until it ends, "
            "stop it, or give another --out"
        ) from None
    try:
        yield lock
    finally:
        lock.__exit__(None, None, None)


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
