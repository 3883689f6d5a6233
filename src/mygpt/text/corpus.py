"""What was named to documents: files, folders, patterns, standard input; the built-in corpus."""

from __future__ import annotations

import glob
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from mygpt.errors import InputError
from mygpt.text.compression import without_compression_suffix
from mygpt.text.decoding import NotDecodedError, check_encoding, decode, remarks, text_bytes
from mygpt.text.documents import SEPARATOR, Corpus, Document, parts_between_separators, split_note
from mygpt.text.file_types import FIRST_BYTES, why_not_text
from mygpt.text.folder import FileGroup, list_folder
from mygpt.text.reading import Reader, out_of_memory, require_sensible_ratio, shown
from mygpt.text.records import kind_of
from mygpt.text.streams import (
    RecordOptions,
    TextSource,
    pieces,
    plain_text_note,
    require_field_used,
    source_of,
)

BUILTIN = "python-reference"


def read_corpus(
    paths: Sequence[str] = (),
    *,
    encoding: str | None = None,
    allow_bytes: bool = False,
    split: bool = False,
    legacy: bool = False,
    records: RecordOptions | None = None,
) -> Corpus:
    """Read files, folders, glob patterns and "-" (standard input); nothing is the built-in corpus.

    A folder gives every file below it that is text, in the order of their names, without hidden
    ones and without runs of ours; the rest is passed over with a note. What is packed with gzip
    or zstd is decompressed. A file counts as it was read: one that changes meanwhile gets a note.

    Args:
        paths: what to read.
        encoding: None is UTF-8, or what a byte-order mark says.
        allow_bytes: take a file that is not text as bytes instead of refusing it.
        split: whether `SEPARATOR` separates documents of a file; else it is text as any other.
        legacy: read files as mygpt 0.1 did, for runs that began with it: *.gz alone is
            decompressed, and nothing but an encoding that does not fit is refused.
        records: how files of records are read, a document each; None takes them for plain text.

    Raises:
        InputError: for what is missing, empty, a device, or not text in that encoding.
        OutOfMemoryError: for more text than there is memory to learn from it.
    """
    if isinstance(paths, (str, Path)):
        paths = [str(paths)]
    check_encoding(encoding)
    if not paths:
        return Corpus(BUILTIN, list(builtin_documents()))
    reader = Reader(legacy=legacy)
    places = [_find(path, reader, encoding, records) for path in paths]
    names = [name for place in places for name in place.names]
    if records is not None:
        require_field_used(records, [records.kind(name) for name in names])
    reader.expect(names)
    documents: list[Document] = []
    for place in places:
        texts: list[Document] = []
        for name in place.names:
            source = None if records is None else _records_in(name, reader, encoding, records)
            if records is not None and source is not None:
                texts += _read_records(source, reader, encoding, records.field_name)
            elif place.folder is None:
                texts.append(_named(name, reader, encoding, allow_bytes))
            else:
                texts += _in_folder(name, place, reader, encoding)
        if not texts and place.folder is not None:
            raise place.none_found(encoding)
        documents += texts
    notes = [note for place in places for note in place.notes(encoding)]
    if split:
        documents, told = _split(documents)
        notes += told
    return Corpus(name_of(paths), documents, notes + reader.notes)


def _split(files: Sequence[Document]) -> tuple[list[Document], list[str]]:
    """The files' documents, and a note where there are several in one."""
    parts = [parts_between_separators(file) for file in files]
    documents = [document for inside in parts for document in inside]
    if not documents:
        raise InputError(f"{shown(files[0].name)} holds no text, only {SEPARATOR}")
    split = [inside for inside, file in zip(parts, files, strict=True) if inside != [file]]
    if not split:
        return documents, []
    return documents, [split_note(len(split), sum(map(len, split)))]


def require_existing(paths: Sequence[str]) -> None:
    """Refuse, as `read_corpus` would, names of what is not there; nothing is read.

    Raises:
        InputError: naming the first of them.
    """
    for path in paths:
        if path != "-" and not os.path.exists(path):
            reader = Reader()
            for name in _find(path, reader, None, None).names:
                reader.start_of(name)


def builtin_documents() -> Iterable[Document]:
    """The Python language reference that every CPython carries, one document a topic."""
    from pydoc_data.topics import topics

    return (Document(name, topics[name]) for name in sorted(topics))


def read_text(name: str, *, encoding: str | None = None) -> tuple[str, list[str]]:
    """The text of one file, or of standard input ("-"), which may be empty; and notes.

    It is read as `read_corpus` reads it.

    Raises:
        InputError: for what is missing, no file of text, or not text in that encoding.
        OutOfMemoryError: for more text than there is memory for.
    """
    check_encoding(encoding)
    if not name:
        raise InputError("a file name is empty: name a text file, or - for standard input")
    reader = Reader()
    document = _read(name, reader, encoding, allow_bytes=False)
    if not len(document):
        _require_writer(name)
    return str(document.whole), reader.notes


def _find(
    path: str, reader: Reader, encoding: str | None, records: RecordOptions | None
) -> FileGroup:
    if not path:
        raise InputError("a file name is empty: name a text file, or - for standard input")
    if path == "-":
        return FileGroup([path])
    if os.path.isdir(path):
        tables = records is not None
        return list_folder(
            Path(path), reader, encoding, is_table=lambda name: tables and kind_of(name) == "table"
        )
    if os.path.exists(path) or not glob.has_magic(path):
        return FileGroup([path])
    found = sorted(name for name in glob.glob(path, recursive=True) if os.path.isfile(name))
    if not found:
        raise InputError(f"no file matches {path!r}")
    return FileGroup(found)


def _named(name: str, reader: Reader, encoding: str | None, allow_bytes: bool) -> Document:
    document = _read(name, reader, encoding, allow_bytes=allow_bytes)
    if not len(document):
        _require_writer(name)
        raise InputError(f"{shown(name)} is empty: there is no text in it")
    return document


def _require_writer(name: str) -> None:
    """Refuse a pipe that gave nothing."""
    if name != "-" and Path(name).is_fifo():
        raise InputError(f"nobody wrote to the pipe {shown(name)}: start its writer first")


def _in_folder(name: str, place: FileGroup, reader: Reader, encoding: str | None) -> list[Document]:
    """A file's text; what proves to be none joins its place's passed over."""
    try:
        document = _read(name, reader, encoding, allow_bytes=False)
    except NotDecodedError as error:
        place.skip(Path(name), error.start)
        return []
    except InputError:
        document = Document(name, "")
    if not len(document) or "\0" in str(document.whole):
        place.skipped.append(Path(name))
        return []
    return [document]


def _records_in(
    name: str, reader: Reader, encoding: str | None, records: RecordOptions
) -> TextSource | None:
    """A file of records; None for one that is plain text."""
    if records.kind(name) == "text":
        return None
    source = source_of(name, records)
    why = records.why_plain(source, encoding)
    if why is None:
        return source
    reader.say(plain_text_note(why))
    return None


def _read_records(
    source: TextSource, reader: Reader, encoding: str | None, field: str
) -> list[Document]:
    """The texts of a file's records; an empty one is none."""
    documents: list[Document] = []
    num_bytes = in_memory = 0
    with reader.noting_change(source.name):
        for number, piece in enumerate(pieces(source, field=field, encoding=encoding), start=1):
            if piece.text:
                documents.append(Document(f"{source.name}, record {number:,}", piece.text))
                num_bytes += len(piece.text.encode("utf-8"))
                in_memory += sys.getsizeof(piece.text) + sys.getsizeof(documents[-1])
                reader.check_text(source.name, num_bytes, in_memory)
                if source.compression:
                    require_sensible_ratio(source.name, num_bytes, source.size)
    if not documents:
        raise InputError(f"{shown(source.name)} has no text in the field {field!r} of any record")
    reader.keep(num_bytes, in_memory)
    reader.remark(source.name, [f"of each record the field {field!r} is read (--field)"])
    return documents


def _read(name: str, reader: Reader, encoding: str | None, *, allow_bytes: bool) -> Document:
    """One file's text, or its bytes; either only where there is memory for it."""
    data = reader.read(name)
    reader.check_text(name, len(data), text_bytes(data, encoding))
    options: dict[str, bool] = {"allow_bytes": allow_bytes, "legacy": reader.legacy}
    try:
        text = decode(data, shown(name), encoding, **options)
    except MemoryError:
        raise out_of_memory(name) from None
    reader.keep(len(data), sys.getsizeof(text))
    start = data[:FIRST_BYTES]
    if isinstance(text, str):
        reader.remark(name, remarks(start, encoding))
    elif (why := why_not_text(start, encoding)) is not None:
        reader.remark(name, [f"its bytes are read as they are, though it {why}"])
    return Document(name, text)


def name_of(paths: Sequence[str]) -> str:
    """What a run on these is called: the first one's name, without .txt, .gz and .zst.

    Any other ending stays in it, so that chat.txt and chat.csv are not called the same.
    """
    if not paths:
        return BUILTIN
    if paths[0] == "-":
        return "stdin"
    path = Path(os.path.realpath(paths[0]))
    name = without_compression_suffix(path.name)
    ending = "" if path.is_dir() else Path(name).suffix
    stem = name.removesuffix(ending) + ending.lower().replace(".txt", "").replace(".", "-")
    cleaned = "".join(c if c.isalnum() or c in "-_." else "-" for c in stem).strip("-.")
    return cleaned or "text"
