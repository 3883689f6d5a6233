"""Encode text of any length into a token store, in parallel, resumable after any interruption.

A shard's files are durable before the index lists them, and the same write of the index records
the position reached in each source. Work after the last such write is repeated with identical
results, because shards and jobs end at positions that depend on the text only, not on the number
or speed of processes.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from mygpt.checkpoint.durable import write_durably
from mygpt.checkpoint.locks import RunLock
from mygpt.data.store_builder.chunking import Chunker
from mygpt.data.store_builder.index import (
    DTYPES,
    TOKENIZER,
    Index,
    Shard,
    SourceState,
    shard_paths,
)
from mygpt.data.store_builder.jobs import jobs_of
from mygpt.data.store_builder.pool import Answer, Job, Workers
from mygpt.data.store_builder.request import (
    existing_index,
    index_to_continue,
    locked,
    new_index,
    require_store_folder,
    state_of,
)
from mygpt.data.store_builder.tokenizer import make_tokenizer
from mygpt.data.token_store import START_DTYPE, TokenStore, read_tokenizer
from mygpt.data.tokens import dtype_of
from mygpt.errors import InputError, StorageError
from mygpt.file_access import PRIVATE_FILE, file_mode, make_private_folder
from mygpt.json_objects import STATE, check_size
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
_SHORT = 2**20  # bytes: encoding a shorter text takes less time than starting a process
_JOB = 2**18  # characters that a process encodes at a time


@dataclass(frozen=True)
class StoreProgress:
    """The progress of building a store.

    Attributes:
        documents: number of documents begun.
        tokens: number of ids encoded.
        bytes: of their text in UTF-8.
        read: number of bytes read of the files.
        size: of all files in bytes; 0 if unknown.
        committed: number of ids in shards that the index lists, which survive an interruption.
        separators: number of `<|endoftext|>` found within files, lines or rows.
        unknown: counts of unknown text in what this call has encoded.
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
    """Encode files into a store. An unfinished store in `out` is continued, a finished one opened.

    Args:
        files: paths, folders, glob patterns, or "-" for standard input, which cannot be continued.
        out: the store's folder.
        tokenizer: a tokenizer, or the kind to train: "bpe", "bpe:SIZE", "char" or "byte".
        field: the field of a record (JSON, CSV, Parquet) that contains the text. None is "text";
            a *.csv, *.tsv or *.json without that field is then plain text.
        records: all options for reading records; overrides `field`.
        encoding: None is UTF-8, or the encoding that a byte-order mark names.
        split_documents: whether `<|endoftext|>` separates documents within a file, line or row.
            None is the setting of an existing store, else true.
        unknown: "error" refuses, before the first shard is written, a text of which more than a
            tenth is unknown to the tokenizer; "keep" accepts it.
        shard_tokens: a shard ends as soon as it has this number of ids.
        workers: number of encoding processes; 0 encodes in this process; None is one per core.
        overwrite: replace an existing store.
        progress: called several times per second.

    Raises:
        InputError: if a file is not text, with the position, or if `out` is a store of other text.
        StorageError: if the disk is full or the folder not writable.
        OutOfMemoryError: if the system killed a worker process.
    """
    check_policy(unknown, CORPUS_POLICIES)
    out = Path(out)
    names = [os.fspath(name) for name in files]
    began = None if overwrite else existing_index(out)
    reading = READING_VERSION if began is None else began.reading
    if records is None:
        records = RecordOptions(field, legacy_names=reading < READING_VERSION)
    sources, _ = find_sources(names, encoding=encoding, records=records)
    if not sources:
        raise InputError("no file is named: name text files, folders, or - for standard input")
    if split_documents is None:
        split_documents = True if began is None else began.split_documents
    index = new_index(
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
        raise InputError(
            f"workers={workers} must be at least 0: remove the option for one process per core"
        )
    require_store_folder(out)
    with locked(out) as lock:
        index = index_to_continue(out, index, overwrite=overwrite)
        if not index.finished:
            building = _Building(out, index, sources, progress, unknown, lock)
            building.run(tokenizer, _number_of_workers(sources, workers))
    return TokenStore.open(out)


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
    """Builds one store."""

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
        self._begun: dict[str, Iterator[Piece]] = {}  # sources that can be read only once,
        self._taken: dict[str, list[Piece]] = {}  # and their pieces that were read for training
        self._ids: list[bytes] = []  # a list, since growing one array would need twice the memory
        self._num_bytes = 0
        self._starts: list[np.ndarray] = []
        self._documents = self._bytes = self._characters = self._separators = 0
        self._states = list(index.sources)
        sizes = [source.size for source in sources]
        self._size = sum(sizes) if min(sizes) >= 0 else 0
        self._read = sum(s.size for s in index.sources if s.done)  # of files that are done
        self._policy = policy  # for text that is unknown to the tokenizer

    def run(self, tokenizer: Tokenizer | str, workers: int) -> None:
        """Encode everything that is not encoded yet, and finish the store."""
        encoding = self._tokenizer(tokenizer)
        self._unknown = UnknownText(encoding)
        cutter = Chunker(encoding, max(1, min(_JOB, self.index.shard_tokens)))
        jobs = jobs_of(self.sources, self.index.sources, cutter, self._pieces)
        with Workers(encoding, workers) as processes:
            for job, answer in processes.encoded(jobs):
                self._add(job, answer)
                if self._num_tokens >= self.index.shard_tokens:
                    self._commit()
                self._report_progress(job)
        if not self._num_bytes and not self.index.shards:
            raise InputError("there is no text in these files: name files with text")
        self._commit(finished=True)

    def _tokenizer(self, asked: Tokenizer | str) -> Tokenizer:
        """The store's tokenizer; it is trained and stored if there is none yet."""
        if self.index.tokenizer is not None:
            return read_tokenizer(self.out, self.index.tokenizer)
        tokenizer = asked if not isinstance(asked, str) else self._make_tokenizer(asked)
        state = state_of(tokenizer)
        try:
            check_size(state, STATE)
        except ValueError as error:
            raise InputError(f"the tokenizer is too large for a store: {error}") from None
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
        """Start reading a source that can be read only once, keeping the pieces for later."""
        found = self._pieces_of(source)
        self._begun[source.name] = found
        taken = self._taken.setdefault(source.name, [])
        for piece in found:
            taken.append(piece)
            yield piece

    def _pieces(self, source: TextSource, state: SourceState) -> Iterator[Piece]:
        """The pieces of a source that are not encoded yet."""
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

    def _add(self, job: Job, answer: Answer) -> None:
        """Add an encoded job's ids to the current shard."""
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
        """Write the shard durably, and then the index that lists it."""
        self._unknown.notes(self.index.name, self._policy)
        if (moved := self._lock.moved_to()) is not None:
            raise StorageError(
                f"{self.out} was renamed to {moved} while it was being written: its finished "
                "shards are there; the same command with that --out continues"
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

    def _report_progress(self, job: Job) -> None:
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
