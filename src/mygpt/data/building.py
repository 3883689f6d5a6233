"""Encode text of any length into a token store, in parallel, resumable after any interruption.

A shard's files are durable before the index lists them, and the same write of the index records
the position reached in each source. Work after the last such write is repeated with identical
results, because shards and jobs end at positions that depend on the text only, not on the number
or speed of processes.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import tee
from pathlib import Path
from typing import Any

import numpy as np

from mygpt.checkpoint.durable import write_durably
from mygpt.checkpoint.locks import RunLock
from mygpt.data.encoding import Answer, Chunker, Job, Workers
from mygpt.data.store_index import DTYPES, TOKENIZER, Index, Shard, SourceState, shard_paths
from mygpt.data.store_request import (
    StoreOptions,
    index_to_continue,
    requested,
    require_store_folder,
    state_of,
)
from mygpt.data.store_tokenizer import make_tokenizer
from mygpt.data.token_store import START_DTYPE, TokenStore, is_store, read_tokenizer
from mygpt.data.tokens import dtype_of
from mygpt.errors import CheckpointError, InputError, StorageError
from mygpt.file_access import PRIVATE_FILE, file_mode, make_private_folder
from mygpt.json_objects import STATE, check_size
from mygpt.machine import available_cores
from mygpt.text import Piece, TextSource, pieces, shown
from mygpt.tokenization import Tokenizer
from mygpt.tokenization.unknown import UnknownText

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
    options: StoreOptions | None = None,
    *,
    overwrite: bool = False,
    progress: Listener | None = None,
) -> TokenStore:
    """Encode files into a store. An unfinished store in `out` is continued, a finished one opened.

    Args:
        files: paths, folders, glob patterns, or "-" for standard input, which cannot be continued.
        out: the store's folder.
        options: how it is built.
        overwrite: replace an existing store.
        progress: called several times per second.

    Raises:
        InputError: if a file is not text, with the position, or if `out` is a store of other text.
        StorageError: if the disk is full or the folder not writable.
        OutOfMemoryError: if the system killed a worker process.
    """
    out, options = Path(out), options or StoreOptions()
    began = None
    with contextlib.suppress(CheckpointError):  # which `index_to_continue` reports
        began = Index.read(out) if is_store(out) and not overwrite else None
    index, sources = requested([os.fspath(name) for name in files], options, began)
    require_store_folder(out)
    with RunLock(out, "give another --out") as lock:
        index = index_to_continue(out, index, overwrite=overwrite)
        if not index.finished:
            _Building(out, index, sources, options, lock, progress).run()
    return TokenStore.open(out)


# --- jobs ----------------------------------------------------------------------------------


def _jobs(
    sources: Sequence[TextSource],
    states: Sequence[SourceState],
    chunker: Chunker,
    read: Callable[[TextSource, SourceState], Iterator[Piece]],
) -> Iterator[Job]:
    """The jobs for everything that is not encoded yet, in order.

    Where a job ends depends only on the text from its beginning on, so that a resumed build makes
    the same jobs.

    Args:
        sources: the files.
        states: the position reached in each source.
        chunker: finds where documents can be split; a job has about one chunk's characters.
        read: returns a source's pieces from a position on.

    Raises:
        InputError: if a source cannot be read, or changes while it is read.
    """
    job = Job()
    for number, (source, state) in enumerate(zip(sources, states, strict=True)):
        if state.done:
            continue
        for text, begins, position, so_far in _chunks(state, chunker, read(source, state)):
            job.place = job.place or shown(source.name)
            job.texts.append(text.encode("utf-8"))
            job.begins.append(begins)
            job.states[number] = position
            job.characters += len(text)
            job.read = so_far
            if job.characters >= chunker.length:
                yield job
                job = Job()
        if source.has_changed:
            raise InputError(
                f"{source.name!r} changed while it was read: start over with --overwrite once it "
                "is complete"
            )
    if job.texts:
        yield job


def _chunks(
    state: SourceState, chunker: Chunker, found: Iterator[Piece]
) -> Iterator[tuple[str, bool, tuple[int, int, bool], int]]:
    """The chunks of a source's documents; an empty last one marks the source as done.

    Each comes with whether it begins a document, the position after it in the source as in
    `Job.states`, and the number of bytes read.
    """
    rows, reached, read = state.rows, state.characters, 0
    waiting, seen = "", 0
    for text, ends, read in found:
        waiting += text
        begin = 0
        while (end := chunker.find(waiting, begin, seen)) is not None:
            before, reached = reached, reached + end - begin
            yield waiting[begin:end], before == 0, (rows, reached, False), read
            begin = end
        waiting = waiting[begin:]
        seen = len(waiting)
        if ends:
            rows += 1
            if waiting:
                yield waiting, reached == 0, (rows, 0, False), read
            waiting, seen, reached = "", 0, 0
    yield "", False, (rows, 0, True), read


# --- building ------------------------------------------------------------------------------


class _Building:
    """Builds one store."""

    def __init__(
        self,
        out: Path,
        index: Index,
        sources: Sequence[TextSource],
        options: StoreOptions,
        lock: RunLock,
        progress: Listener | None,
    ) -> None:
        self.out, self.index, self.sources = out, index, sources
        self._options, self._lock, self._listener = options, lock, progress
        self._how: dict[str, Any] = {
            "field": index.field, "encoding": index.encoding, "split": index.split_documents
        }  # fmt: skip
        self._begun: dict[str, Iterator[Piece]] = {}  # pipes that were read for the tokenizer
        self._ids: list[bytes] = []  # a list, since growing one array would need twice the memory
        self._num_bytes = 0
        self._starts: list[np.ndarray] = []
        self._documents = self._bytes = self._characters = self._separators = 0
        self._states = list(index.sources)
        sizes = [source.size for source in sources]
        self._size = sum(sizes) if min(sizes) >= 0 else 0
        self._read = sum(s.size for s in index.sources if s.done)  # of files that are done

    def run(self) -> None:
        """Encode everything that is not encoded yet, and finish the store."""
        tokenizer = self._tokenizer()
        self._unknown = UnknownText(tokenizer)
        chunker = Chunker(tokenizer, max(1, min(_JOB, self.index.shard_tokens)))
        jobs = _jobs(self.sources, self.index.sources, chunker, self._pieces)
        with Workers(tokenizer, self._number_of_workers()) as workers:
            for job, answer in workers.encoded(jobs):
                self._add(job, answer)
                if self._num_tokens >= self.index.shard_tokens:
                    self._commit()
                self._report_progress(job)
        if not self._num_bytes and not self.index.shards:
            raise InputError("there is no text in these files: name files with text")
        self._commit(finished=True)

    def _number_of_workers(self) -> int:
        if self._options.workers is not None:
            return self._options.workers
        if 0 < self._size < _SHORT:
            return 0
        return available_cores()

    def _tokenizer(self) -> Tokenizer:
        """The store's tokenizer; it is trained and stored if there is none yet."""
        if self.index.tokenizer is not None:
            return read_tokenizer(self.out, self.index.tokenizer)
        tokenizer = self._options.tokenizer
        if isinstance(tokenizer, str):
            tokenizer = make_tokenizer(tokenizer, self.sources, self.index, self._begin)
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

    def _begin(self, source: TextSource) -> Iterator[Piece]:
        """Start reading a source for the tokenizer; what was read of a pipe is kept for later."""
        if source.is_lasting:
            return pieces(source, **self._how)
        found = pieces(source, **self._how, on_separators=self._count_separators)
        found, self._begun[source.name] = tee(found)
        return found

    def _pieces(self, source: TextSource, state: SourceState) -> Iterator[Piece]:
        """The pieces of a source that are not encoded yet."""
        if source.name in self._begun:
            return self._begun.pop(source.name)
        return pieces(
            source,
            **self._how,
            skip_rows=state.rows,
            skip_characters=state.characters,
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
        self._unknown.notes(self.index.name, self._options.unknown)
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


def _digest(pieces: Sequence[bytes]) -> str:
    sha256 = hashlib.sha256()
    for piece in pieces:
        sha256.update(piece)
    return sha256.hexdigest()
