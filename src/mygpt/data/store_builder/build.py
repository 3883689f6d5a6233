"""Token stores are made here: any amount of text into shards, in parallel, however often stopped.

A shard's files are durable before the index names them, and with them it says how far each source
is done: what dies in between is done again, the same to the bit. Where shards and jobs end follows
from the text alone, not from the number of processes or from how fast they are.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from mygpt.data.store_builder.chunking import Chunker
from mygpt.data.store_builder.index import (
    DTYPES,
    SHARDS,
    TOKENIZER,
    Index,
    Shard,
    SourceState,
    require_request,
    shard_paths,
)
from mygpt.data.store_builder.jobs import jobs_of
from mygpt.data.store_builder.pool import Answer, Job, Workers
from mygpt.data.store_builder.tokenizer import check_name, make_tokenizer
from mygpt.data.token_store import START_DTYPE, TokenStore, is_store, read_tokenizer
from mygpt.data.tokens import dtype_of
from mygpt.errors import CheckpointError, InputError, StorageError
from mygpt.file_access import PRIVATE_FILE, file_mode, make_private_folder, require_folder
from mygpt.json_objects import STATE, check_size
from mygpt.locks import RunLock, holder
from mygpt.storage import remove, temporary_files, write_durably
from mygpt.text import (
    READING_VERSION,
    Piece,
    RecordOptions,
    TextSource,
    find_sources,
    name_of,
    pieces,
)
from mygpt.tokenization import Tokenizer
from mygpt.tokenization.unknown import CORPUS_POLICIES, UnknownText, check_policy

SHARD_TOKENS = 2**24
_SHORT = 2**20  # bytes: a shorter text is encoded before a process has started
_JOB = 2**18  # characters that are encoded together


@dataclass(frozen=True)
class StoreProgress:
    """How far a store is.

    Attributes:
        documents: begun.
        tokens: encoded.
        bytes: of their text, in UTF-8.
        read: bytes of the files that have been read.
        size: bytes of all files; 0 where that is not known.
        committed: tokens that are safe.
        separators: that were read, of documents within a file, a line or a row.
        unknown: what the tokenizer does not know of what this call has encoded.
    """

    documents: int
    tokens: int
    bytes: int
    read: int
    size: int
    committed: int
    separators: int = 0
    unknown: UnknownText | None = None


Listener = Callable[[StoreProgress], None]


def build_store(
    files: Sequence[str | Path],
    out: str | Path,
    *,
    tokenizer: Tokenizer | str = "bpe",
    field: str | None = None,
    encoding: str | None = None,
    split_documents: bool | None = None,
    records: RecordOptions | None = None,
    unknown: str = "error",
    shard_tokens: int = SHARD_TOKENS,
    workers: int | None = None,
    overwrite: bool = False,
    progress: Listener | None = None,
) -> TokenStore:
    """Encode files into a store, or go on with one that was begun; one that is there is opened.

    Args:
        files: names, folders, patterns, or "-" for standard input, which begins anew every time.
        out: the store's folder.
        tokenizer: one, or what is to be learned: "bpe", "bpe:SIZE", "char"; "byte".
        field: of a record (of JSON, CSV, Parquet) that holds the text; None is "text", and a
            *.csv, *.tsv or *.json that has no such field is plain text.
        records: the same with all that can be said of it; overrides `field`.
        encoding: None is UTF-8, or what a byte-order mark says.
        split_documents: whether `<|endoftext|>` in a file, a line or a row separates documents;
            None is as the store that is there was begun, else true.
        unknown: "error" refuses a text of which the tokenizer does not know more than a tenth,
            before a shard of it is written; "keep" takes it all the same.
        shard_tokens: a shard ends as soon as it has so many.
        workers: processes that encode; 0 is this one; None is one a core.
        overwrite: replace a store that is there.
        progress: is told how far it is, some times a second.

    Raises:
        InputError: for what is no text, with its place; for a store of other text.
        StorageError: when there is no space, or the place cannot be written to.
        OutOfMemoryError: for a worker that the system has killed.
    """
    check_policy(unknown, CORPUS_POLICIES)
    out = Path(out)
    names = [os.fspath(name) for name in files]
    began = None if overwrite else _begun(out)
    reading = READING_VERSION if began is None else began.reading
    if records is None:
        records = RecordOptions(field, legacy_names=reading < READING_VERSION)
    sources, _ = find_sources(names, encoding=encoding, records=records)
    if not sources:
        raise InputError("no file is named: name text files, folders, or - for standard input")
    if split_documents is None:
        split_documents = True if began is None else began.split_documents
    index = _request(
        name_of(names),
        sources,
        tokenizer,
        field=records.field_name,
        encoding=encoding,
        split_documents=split_documents,
        reading=reading,
        shard_tokens=shard_tokens,
    )
    if workers is not None and workers < 0:
        raise InputError(f"workers={workers} must be at least 0: leave it out for one a core")
    _require_place(out)
    with _locked(out) as lock:
        index = _at_hand(out, index, overwrite=overwrite)
        if not index.finished:
            building = _Building(out, index, sources, progress, unknown, lock)
            building.run(tokenizer, _number_of_workers(sources, workers))
    return TokenStore.open(out)


def _request(
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
    """The index of a store of which nothing is done."""
    if isinstance(tokenizer, str):
        check_name(tokenizer)
        asked = tokenizer
    else:
        asked = f"sha256:{hashlib.sha256(_state_of(tokenizer)).hexdigest()}"
    if shard_tokens < 1:
        raise InputError(f"shard_tokens={shard_tokens} must be at least 1")
    states = tuple(SourceState(s.name, s.size, s.modified_ns) for s in sources)
    return Index(
        name, False, asked, None, "uint16", shard_tokens, field, encoding, states,
        split_documents=split_documents, reading=reading,
    )  # fmt: skip


def _begun(out: Path) -> Index | None:
    """How the store there was begun, if there is one."""
    with contextlib.suppress(CheckpointError):  # which is said later
        return Index.read(out) if is_store(out) else None
    return None


def _state_of(tokenizer: Tokenizer) -> bytes:
    return json.dumps(tokenizer.to_state()).encode() + b"\n"


def _require_place(out: Path) -> None:
    """Refuse to write over what is no store."""
    try:
        there = sorted(os.listdir(out))
    except FileNotFoundError:
        return
    except OSError as error:
        raise InputError(f"{out} cannot be a store: {error.strerror}: give another --out") from None
    ours = all(name == ".lock" or name.startswith(".mygpt-") for name in there)
    if not ours and not is_store(out):
        raise InputError(
            f"{out} holds other files ({there[0]!r:.60}), and no token store: give another --out"
        )


@contextlib.contextmanager
def _locked(out: Path) -> Iterator[RunLock]:
    lock = RunLock(out, "give another --out")
    try:
        lock.__enter__()
    except CheckpointError:  # the lock is a link or a pipe: nobody may be writing
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


def _at_hand(out: Path, wanted: Index, *, overwrite: bool) -> Index:
    """The index to go on with: what is there, or the request."""
    require_folder(out / SHARDS)
    remove(*temporary_files(out), *temporary_files(out / SHARDS))
    there = Index.read(out) if is_store(out) and not overwrite else None
    lasting = all(source.size >= 0 for source in wanted.sources)
    if there is not None and (there.finished or (there.shards and lasting)):
        require_request(there, wanted, out)
        if not lasting:
            raise InputError(
                f"{out} is finished, and whether what comes through a pipe is its text cannot be "
                "known: give another --out, or --overwrite"
            )
        index = there
    elif there is not None and there.without_progress() == wanted and lasting:
        index = there
    else:
        index = wanted
        index.write(out)
    for path in (out / SHARDS).glob("*"):  # of a store before, or not committed
        if path.suffix in (".tokens", ".documents") and not path.is_dir():
            number = path.stem
            if not (number.isdigit() and int(number) < len(index.shards)):
                remove(path)
    return index


def _number_of_workers(sources: Sequence[TextSource], workers: int | None) -> int:
    if workers is not None:
        return workers
    if all(source.is_lasting for source in sources) and sum(s.size for s in sources) < _SHORT:
        return 0
    cores = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count() or 1))
    return len(cores(0))


def _digest(pieces: Sequence[bytes]) -> str:
    sha256 = hashlib.sha256()
    for piece in pieces:
        sha256.update(piece)
    return sha256.hexdigest()


class _Building:
    """A store on its way."""

    def __init__(
        self,
        out: Path,
        index: Index,
        sources: Sequence[TextSource],
        progress: Listener | None,
        policy: str,
        lock: RunLock,
    ) -> None:
        self._lock = lock
        self.out = out
        self.index = index
        self.sources = sources
        self._listener = progress
        self._begun: dict[str, Iterator[Piece]] = {}  # sources that can be read only once
        self._taken: dict[str, list[Piece]] = {}  # and what was taken of them
        self._ids: list[bytes] = []  # in pieces: one that grows is copied, and is there twice
        self._num_bytes = 0
        self._starts: list[np.ndarray] = []
        self._documents = self._bytes = self._characters = self._separators = 0
        self._states = list(index.sources)
        sizes = [source.size for source in sources]
        self._size = sum(sizes) if min(sizes) >= 0 else 0
        self._read = sum(s.size for s in index.sources if s.done)  # of files that are done
        self._policy = policy  # for text that the tokenizer does not know

    def run(self, tokenizer: Tokenizer | str, workers: int) -> None:
        """Encode what is not done yet."""
        encoding = self._tokenizer(tokenizer)
        self._unknown = UnknownText(encoding)
        cutter = Chunker(encoding, max(1, min(_JOB, self.index.shard_tokens)))
        jobs = jobs_of(self.sources, self.index.sources, cutter, self._pieces)
        with Workers(encoding, workers) as processes:
            for job, answer in processes.encoded(jobs):
                self._take(job, answer)
                if self._num_tokens >= self.index.shard_tokens:
                    self._commit()
                self._tell(job)
        if not self._num_bytes and not self.index.shards:
            raise InputError("there is no text in these files: nothing to tokenize")
        self._commit(finished=True)

    def _tokenizer(self, asked: Tokenizer | str) -> Tokenizer:
        """The store's tokenizer, made and kept where there is none yet."""
        if self.index.tokenizer is not None:
            return read_tokenizer(self.out, self.index.tokenizer)
        tokenizer = asked if not isinstance(asked, str) else self._make_tokenizer(asked)
        state = _state_of(tokenizer)
        try:
            check_size(state, STATE)
        except ValueError as error:
            raise InputError(f"the tokenizer cannot be kept in a store: {error}") from None
        write_durably(self.out / TOKENIZER, [state], inside=True, mode=file_mode(self.out))
        dtype = np.dtype(dtype_of(tokenizer)).name
        digest = hashlib.sha256(state).hexdigest()
        self.index = replace(self.index, tokenizer=digest, dtype=dtype)
        self.index.write(self.out)
        return tokenizer

    def _make_tokenizer(self, name: str) -> Tokenizer:
        return make_tokenizer(
            name,
            self.sources,
            field=self.index.field,
            encoding=self.index.encoding,
            split=self.index.split_documents,
            read=self._begin,
        )

    def _begin(self, source: TextSource) -> Iterator[Piece]:
        """A source that can be read only once; what is taken of it here comes again later."""
        found = self._pieces_of(source)
        self._begun[source.name] = found
        taken = self._taken.setdefault(source.name, [])
        for piece in found:
            taken.append(piece)
            yield piece

    def _pieces(self, source: TextSource, state: SourceState) -> Iterator[Piece]:
        """What is not done yet of a source."""
        if source.name in self._begun:
            taken = self._taken.pop(source.name)
            while taken:
                yield taken.pop(0)
            yield from self._begun.pop(source.name)
            return
        yield from self._pieces_of(source, state.rows, state.characters)

    def _pieces_of(self, source: TextSource, rows: int = 0, characters: int = 0) -> Iterator[Piece]:
        return pieces(
            source,
            field=self.index.field,
            encoding=self.index.encoding,
            split=self.index.split_documents,
            skip_rows=rows,
            skip_characters=characters,
            on_separators=self._count_separators,
        )

    def _count_separators(self, more: int) -> None:
        self._separators += more

    @property
    def _num_tokens(self) -> int:
        return self._num_bytes // DTYPES[self.index.dtype].itemsize

    def _take(self, job: Job, answer: Answer) -> None:
        counts, ids = answer
        if self._unknown.counts:
            self._unknown.add(job.texts, np.frombuffer(ids, DTYPES[self.index.dtype]))
        places = self._num_tokens + np.concatenate([[0], np.cumsum(counts)])[:-1]
        starts = places[np.array(job.begins, bool)]
        self._starts.append(starts.astype(START_DTYPE))
        self._documents += len(starts)
        self._bytes += sum(map(len, job.texts))
        self._characters += job.characters
        self._ids.append(ids)
        self._num_bytes += len(ids)
        for number, (rows, characters, done) in job.states.items():
            self._read += self.sources[number].size if done else 0
            self._states[number] = replace(
                self._states[number], rows=rows, characters=characters, done=done
            )

    def _commit(self, *, finished: bool = False) -> None:
        """Make the shard durable, and then the index that names it."""
        self._unknown.notes(self.index.name, self._policy)
        if (moved := self._lock.moved_to()) is not None:
            raise StorageError(
                f"{self.out} was renamed to {moved} while it was being written: what is finished "
                "is there; the same command with that --out continues it"
            )
        shards = self.index.shards
        if self._num_bytes:
            starts = [np.concatenate(self._starts).tobytes()]
            digests = _digest(self._ids), _digest(starts)
            tokens, documents = shard_paths(self.out, len(shards))
            mode = file_mode(self.out)
            if mode == PRIVATE_FILE:
                make_private_folder(tokens.parent)
            write_durably(tokens, self._ids, inside=True, mode=mode)
            write_durably(documents, starts, inside=True, mode=mode)
            shard = Shard(
                self._num_tokens, self._documents, self._bytes, *digests, self._characters
            )
            shards = (*shards, shard)
        self.index = replace(
            self.index, shards=shards, sources=tuple(self._states), finished=finished
        )
        self.index.write(self.out)
        self._ids, self._starts = [], []
        self._num_bytes = self._documents = self._bytes = self._characters = 0

    def _tell(self, job: Job) -> None:
        if self._listener is None:
            return
        current = max(job.states, default=0)
        read = self._read + (0 if self._states[current].done else job.read)
        self._listener(
            StoreProgress(
                self.index.documents + self._documents,
                self.index.tokens + self._num_tokens,
                self.index.bytes + self._bytes,
                read,
                self._size,
                self.index.tokens,
                self._separators,
                self._unknown,
            )
        )
