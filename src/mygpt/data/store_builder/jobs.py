"""Split sources into jobs: chunks of documents that a worker process encodes at once.

Where a job ends depends only on the text from its beginning on, so that a resumed build makes the
same jobs.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from mygpt.data.store_builder.chunking import Chunker
from mygpt.data.store_builder.index import SourceState
from mygpt.data.store_builder.pool import Job
from mygpt.errors import InputError
from mygpt.text import Piece, TextSource

Pieces = Callable[[TextSource, SourceState], Iterator[Piece]]


class _Chunk(NamedTuple):
    """A chunk of a document, and the position after it in its source, as in `SourceState`."""

    text: str
    begins: bool
    source: int
    rows: int
    characters: int
    done: bool
    read: int


def jobs_of(
    sources: Sequence[TextSource], states: Sequence[SourceState], chunker: Chunker, read: Pieces
) -> Iterator[Job]:
    """The jobs for everything that is not encoded yet, in order.

    Args:
        sources: the files.
        states: the position reached in each source.
        chunker: finds where documents can be split; a job has about one chunk's characters.
        read: returns a source's pieces from a position on.

    Raises:
        InputError: if a source cannot be read, or changes while it is read.
    """
    gathered: list[_Chunk] = []
    length = 0
    for number, (source, state) in enumerate(zip(sources, states, strict=True)):
        if state.done:
            continue
        for chunk in _chunks(number, state, chunker, read(source, state)):
            gathered.append(chunk)
            length += len(chunk.text)
            if length >= chunker.length:
                yield _job(gathered, sources)
                gathered, length = [], 0
        _require_unchanged(source)
    if gathered:
        yield _job(gathered, sources)


def _chunks(
    number: int, state: SourceState, chunker: Chunker, found: Iterator[Piece]
) -> Iterator[_Chunk]:
    """The chunks of a source's documents; an empty last one marks the source as done."""
    rows, reached, read = state.rows, state.characters, 0
    waiting, seen = "", 0
    for text, ends, read in found:
        waiting += text
        begin = 0
        while (end := chunker.find(waiting, begin, seen)) is not None:
            before, reached = reached, reached + end - begin
            yield _Chunk(waiting[begin:end], before == 0, number, rows, reached, False, read)
            begin = end
        waiting = waiting[begin:]
        seen = len(waiting)
        if ends:
            rows += 1
            if waiting:
                yield _Chunk(waiting, reached == 0, number, rows, 0, False, read)
            waiting, seen, reached = "", 0, 0
    yield _Chunk("", False, number, rows, 0, True, read)


def _job(chunks: Sequence[_Chunk], sources: Sequence[TextSource]) -> Job:
    name = sources[chunks[0].source].name
    return Job(
        [chunk.text.encode("utf-8") for chunk in chunks],
        [chunk.begins for chunk in chunks],
        {chunk.source: (chunk.rows, chunk.characters, chunk.done) for chunk in chunks},
        chunks[-1].read,
        "standard input" if name == "-" else name,
        sum(len(chunk.text) for chunk in chunks),
    )


def _require_unchanged(source: TextSource) -> None:
    if not source.is_lasting:
        return
    try:
        status = os.stat(source.name)
        now = status.st_size, status.st_mtime_ns
    except OSError:  # it was removed
        now = (-1, -1)
    if now != (source.size, source.modified_ns):
        raise InputError(
            f"{source.name!r} changed while it was read: start over with --overwrite once it is "
            "complete"
        )
