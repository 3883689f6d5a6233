"""Sources to jobs: parts of documents, so many that a process is busy with them for a moment.

Where a job ends follows from the text from its beginning on, and so does all after it.
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


class _Part(NamedTuple):
    """A part of a document, and how far its source is done with it."""

    text: str
    begins: bool
    source: int
    rows: int
    characters: int
    done: bool
    read: int


def jobs_of(
    sources: Sequence[TextSource], states: Sequence[SourceState], cutter: Chunker, read: Pieces
) -> Iterator[Job]:
    """What is not done yet of all sources, in order.

    Args:
        sources: the files.
        states: how far each is done.
        cutter: says where a document may be cut; a job has about one part's characters.
        read: gives a source's pieces from its state on.

    Raises:
        InputError: for a source that cannot be read, or changes meanwhile.
    """
    gathered: list[_Part] = []
    length = 0
    for number, (source, state) in enumerate(zip(sources, states, strict=True)):
        if state.done:
            continue
        for part in _parts(number, state, cutter, read(source, state)):
            gathered.append(part)
            length += len(part.text)
            if length >= cutter.length:
                yield _job(gathered, sources)
                gathered, length = [], 0
        _require_unchanged(source)
    if gathered:
        yield _job(gathered, sources)


def _parts(
    number: int, state: SourceState, cutter: Chunker, found: Iterator[Piece]
) -> Iterator[_Part]:
    """The parts of a source's documents; the last one is empty, and says that all is done."""
    rows, reached, read = state.rows, state.characters, 0
    waiting, seen = "", 0
    for text, ends, read in found:
        waiting += text
        begin = 0
        while (end := cutter.find(waiting, begin, seen)) is not None:
            before, reached = reached, reached + end - begin
            yield _Part(waiting[begin:end], before == 0, number, rows, reached, False, read)
            begin = end
        waiting = waiting[begin:]
        seen = len(waiting)
        if ends:
            rows += 1
            if waiting:
                yield _Part(waiting, reached == 0, number, rows, 0, False, read)
            waiting, seen, reached = "", 0, 0
    yield _Part("", False, number, rows, 0, True, read)


def _job(parts: Sequence[_Part], sources: Sequence[TextSource]) -> Job:
    first = parts[0]
    place = sources[first.source].name
    return Job(
        [part.text.encode("utf-8") for part in parts],
        [part.begins for part in parts],
        {part.source: (part.rows, part.characters, part.done) for part in parts},
        parts[-1].read,
        "standard input" if place == "-" else place,
        sum(len(part.text) for part in parts),
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
            f"{source.name!r} changed while it was read: start anew with --overwrite once it is "
            "complete"
        )
