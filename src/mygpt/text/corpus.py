"""Read files, folders, glob patterns, standard input or the built-in corpus into memory."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from mygpt.errors import InputError, OutOfMemoryError
from mygpt.machine import bytes_text, free_memory_bytes
from mygpt.text.documents import SEPARATOR, Corpus, Document, parts_between_separators, split_note
from mygpt.text.file_types import FIRST_BYTES
from mygpt.text.reading import (
    NotTextError,
    blocks_of,
    file_errors,
    require_sensible_ratio,
    shown,
    texts_of,
    without_compression_suffix,
)
from mygpt.text.sources import FileGroup, Finder, matches
from mygpt.text.streams import RecordOptions, TextSource, pieces

BUILTIN = "python-reference"
# The name of a file of texts that a program has passed to `train`; see `mygpt.training.texts`.
KEPT_TEXTS = re.compile(r"texts-[0-9a-f]{16}\.jsonl")

# The memory that training on a text needs apart from the model: the Python string, and 2 bytes for
# each byte of the file (first the blocks and pieces that it is joined from, later the token ids).
# Measured up to the first step, in bytes for each byte of a 200 MB file: 3.4 for ASCII, 6.3 for
# ASCII with one emoji (each character is then 4 bytes wide), 2.5 to 3.5 for Cyrillic.
_PER_BYTE = 2
_HEADROOM = 1.25


def read_corpus(
    paths: Sequence[str] = (),
    *,
    encoding: str | None = None,
    allow_bytes: bool = False,
    split: bool = False,
    records: RecordOptions | None = None,
) -> Corpus:
    """Read files, folders, glob patterns and "-" (standard input); no path is the built-in corpus.

    The files are those of `find_sources`. A file that changes while it is read gets a note.

    Args:
        paths: what to read.
        encoding: None is UTF-8, or the encoding that a byte-order mark names.
        allow_bytes: read a file that is not text as bytes instead of refusing it.
        split: whether `SEPARATOR` separates the documents of a file; else it is ordinary text.
        records: how files of records are read, one document per record; None reads them as plain
            text.

    Raises:
        InputError: if a path is missing, empty, a device, or not text in that encoding.
        OutOfMemoryError: if training on the text would need more memory than is free.
    """
    if isinstance(paths, (str, Path)):
        paths = [str(paths)]
    finder = Finder(encoding, records, allow_bytes=allow_bytes)
    if not paths:
        return Corpus(BUILTIN, list(builtin_documents()))
    groups = finder.groups(paths)
    reader = _Reader(finder)
    reader.check_sizes([source for group in groups for source in group.sources])
    documents: list[Document] = []
    for group in groups:
        texts = [document for source in group.sources for document in reader.read(source, group)]
        if not texts:
            raise group.none_found(encoding)
        documents += texts
    notes = finder.notes(groups)
    if split:
        documents, split_notes = _split(documents)
        notes += split_notes
    return Corpus(name_of(paths), documents, notes)


def _split(files: Sequence[Document]) -> tuple[list[Document], list[str]]:
    """The documents in the files, and a note if a file contains several."""
    parts = [parts_between_separators(file) for file in files]
    documents = [document for inside in parts for document in inside]
    if not documents:
        raise InputError(
            f"{shown(files[0].name)} contains only {SEPARATOR} and no text: name a file with text"
        )
    split = [inside for inside, file in zip(parts, files, strict=True) if inside != [file]]
    return documents, [split_note(len(split), sum(map(len, split)))] * bool(split)


def read_text(name: str, *, encoding: str | None = None) -> tuple[str, list[str]]:
    """The text of one file or of standard input ("-"), and notes for the user.

    Unlike in `read_corpus`, the text may be empty.

    Raises:
        InputError: if the file is missing, not a text file, or not text in that encoding.
        OutOfMemoryError: if the text does not fit into memory.
    """
    finder = Finder(encoding, None)
    if not name:
        matches(name)
    text = _Reader(finder).text(finder.source(name, may_be_empty=True))
    return str(text), finder.notes([])


class _Reader:
    """Reads sources into memory, up to the amount that was free when it was created."""

    def __init__(self, finder: Finder) -> None:
        self._finder = finder
        self._free = free_memory_bytes()
        self._needed = 0.0  # by the texts so far

    def check_sizes(self, sources: Sequence[TextSource]) -> None:
        """Check by their sizes that files fit, before any of them is read."""
        sizes = [source.size for source in sources if source.is_lasting]
        one = len(sources) == 1
        what = shown(sources[0].name) if one else f"the text in {len(sources)} files"
        self._check(f"{what} is", sum(sizes), sum(sizes))

    def read(self, source: TextSource, group: FileGroup) -> list[Document]:
        """The documents of a source; a file of a folder that is not text is skipped."""
        if source.kind != "text":
            return self._records(source)
        try:
            text = self.text(source)
            if text and not (group.folder and "\0" in str(text)):
                return [Document(source.name, text)]
        except InputError:
            if group.folder is None:
                raise
        if group.folder is None:
            raise InputError(f"{shown(source.name)} is empty: name a file with text")
        group.skip(Path(source.name))
        return []

    def text(self, source: TextSource) -> str | bytes:
        """A file's text, or its bytes where `allow_bytes` is true and it is not text.

        Raises:
            OutOfMemoryError: as soon as more has been read than fits.
        """
        name, finder = source.name, self._finder
        blocks: Iterable[tuple[bytes, int]] = self._blocks(source)
        try:
            if finder.allow_bytes:
                blocks = list(blocks)
            text: str | bytes = self._decoded(blocks, name)
        except NotTextError:
            if not finder.allow_bytes:
                raise
            text = b"".join(block for block, _ in blocks)
        except OutOfMemoryError:
            raise
        except MemoryError:
            raise OutOfMemoryError(
                f"out of memory while reading {shown(name)}: train on a part of it"
            ) from None
        self._note_change(source)
        if not text and name != "-" and Path(name).is_fifo():
            raise InputError(
                f"no process wrote to the pipe {shown(name)}: start the writing process first"
            )
        return text

    def _decoded(self, blocks: Iterable[tuple[bytes, int]], name: str) -> str:
        """The text of blocks that come with the number of bytes so far."""
        finder = self._finder
        texts: list[str] = []
        length = width = num_bytes = 0
        for text, num_bytes in texts_of(blocks, name, finder.encoding):
            texts.append(text)
            length += len(text)
            # CPython stores every character of a string in the width of its widest one.
            stored = sys.getsizeof(text + text) - sys.getsizeof(text)
            width = max(width, stored // max(1, len(text)))
            self._check(f"{shown(name)} is more than", num_bytes, length * width)
        self._needed += _need(num_bytes, length * width)
        return "".join(texts)

    def _blocks(self, source: TextSource) -> Iterator[tuple[bytes, int]]:
        """A file's blocks, each with the number of uncompressed bytes so far."""
        num_bytes = 0
        for block, _ in blocks_of(source.name):
            if not num_bytes and not source.is_lasting:
                self._finder.check_start(source.name, block[:FIRST_BYTES])
            num_bytes += len(block)
            self._check(f"{shown(source.name)} is more than", num_bytes, num_bytes)
            if source.compression and source.is_lasting:
                require_sensible_ratio(source.name, num_bytes, source.size)
            yield block, num_bytes

    def _records(self, source: TextSource) -> list[Document]:
        """The texts of a file's records; empty ones are skipped."""
        assert self._finder.records is not None
        field = self._finder.records.field_name
        documents: list[Document] = []
        num_bytes = in_memory = 0
        found = pieces(source, field=field, encoding=self._finder.encoding)
        for number, piece in enumerate(found, start=1):
            if piece.text:
                documents.append(Document(f"{source.name}, record {number:,}", piece.text))
                num_bytes += len(piece.text.encode("utf-8"))
                in_memory += sys.getsizeof(piece.text) + sys.getsizeof(documents[-1])
                self._check(f"{shown(source.name)} is", num_bytes, in_memory)
                if source.compression and source.is_lasting:
                    require_sensible_ratio(source.name, num_bytes, source.size)
        if not documents:
            raise InputError(
                f"{shown(source.name)}: the field {field!r} is empty in every record; name another "
                "with --field"
            )
        self._needed += _need(num_bytes, in_memory)
        self._note_change(source)
        if not KEPT_TEXTS.fullmatch(Path(source.name).name):  # the user has no such file
            remark = f"the field {field!r} of each record is read (--field)"
            self._finder.remark(source.name, [remark])
        return documents

    def _note_change(self, source: TextSource) -> None:
        if source.has_changed:
            self._finder.remark(
                source.name, ["it changed while it was read: --resume may read different text"]
            )

    def _check(self, what: str, num_bytes: int, text_bytes: int) -> None:
        """Raise `OutOfMemoryError` unless a text fits, of these bytes in its file and in memory."""
        need = self._needed + _need(num_bytes, text_bytes)
        if self._free is None or need <= self._free:
            return
        fits = num_bytes * max(0.0, self._free - self._needed) / (need - self._needed)
        it = "it and the text read before" if self._needed else "it"
        raise OutOfMemoryError(
            f"{what} {bytes_text(num_bytes)}: training on {it} needs {bytes_text(need)} of memory, "
            f"and {bytes_text(self._free)} are free; train on a part of it, {bytes_text(fits)} at "
            "most"
        )


def _need(num_bytes: int, text_bytes: int) -> float:
    return _HEADROOM * (text_bytes + _PER_BYTE * num_bytes)


def require_existing(paths: Sequence[str]) -> None:
    """Raise `InputError` for the first path that does not exist, without reading the files."""
    for name in (name for path in paths for name in matches(path) if name != "-"):
        with file_errors(name):
            os.stat(name)


def builtin_documents() -> Iterable[Document]:
    """The Python language reference that CPython contains, one document per topic."""
    from pydoc_data.topics import topics

    return (Document(name, topics[name]) for name in sorted(topics))


def name_of(paths: Sequence[str]) -> str:
    """The name of a run on these paths: the first one's file name without .txt, .gz and .zst.

    Any other suffix is kept, so that chat.txt and chat.csv give different names.
    """
    if not paths:
        return BUILTIN
    if paths[0] == "-":
        return "stdin"
    path = Path(os.path.realpath(paths[0]))
    if KEPT_TEXTS.fullmatch(path.name):
        return "texts"
    name = without_compression_suffix(path.name)
    ending = "" if path.is_dir() else Path(name).suffix
    stem = name.removesuffix(ending) + ending.lower().replace(".txt", "").replace(".", "-")
    cleaned = "".join(c if c.isalnum() or c in "-_." else "-" for c in stem).strip("-.")
    return cleaned or "text"
