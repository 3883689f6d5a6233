"""Read files, folders, glob patterns, standard input or the built-in corpus into documents."""

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
    """Read files, folders, glob patterns and "-" (standard input); no path is the built-in corpus.

    A folder stands for every text file below it, sorted by name. Hidden files, run directories and
    token stores in it are skipped silently, other files that are not text with a note. gzip and
    zstd files are decompressed. A file that changes while it is read gets a note.

    Args:
        paths: what to read.
        encoding: None is UTF-8, or the encoding that a byte-order mark names.
        allow_bytes: read a file that is not text as bytes instead of refusing it.
        split: whether `SEPARATOR` separates the documents of a file; else it is ordinary text.
        legacy: read files as mygpt 0.1 did, to resume its runs: only *.gz is decompressed, and
            only bytes that are invalid in the encoding are refused.
        records: how files of records are read, one document per record; None reads them as plain
            text.

    Raises:
        InputError: if a path is missing, empty, a device, or not text in that encoding.
        OutOfMemoryError: if training on the text would need more memory than is free.
    """
    if isinstance(paths, (str, Path)):
        paths = [str(paths)]
    check_encoding(encoding)
    if not paths:
        return Corpus(BUILTIN, list(builtin_documents()))
    reader = Reader(legacy=legacy)
    groups = [_find(path, reader, encoding, records) for path in paths]
    names = [name for group in groups for name in group.names]
    if records is not None:
        require_field_used(records, [records.kind(name) for name in names])
    reader.check_sizes(names)
    documents: list[Document] = []
    for group in groups:
        texts: list[Document] = []
        for name in group.names:
            source = None if records is None else _records_in(name, reader, encoding, records)
            if records is not None and source is not None:
                texts += _read_records(source, reader, encoding, records.field_name)
            elif group.folder is None:
                texts.append(_named(name, reader, encoding, allow_bytes))
            else:
                texts += _in_folder(name, group, reader, encoding)
        if not texts and group.folder is not None:
            raise group.none_found(encoding)
        documents += texts
    notes = [note for group in groups for note in group.notes(encoding)]
    if split:
        documents, split_notes = _split(documents)
        notes += split_notes
    return Corpus(name_of(paths), documents, notes + reader.notes)


def _split(files: Sequence[Document]) -> tuple[list[Document], list[str]]:
    """The documents in the files, and a note if a file contains several."""
    parts = [parts_between_separators(file) for file in files]
    documents = [document for inside in parts for document in inside]
    if not documents:
        raise InputError(
            f"{shown(files[0].name)} contains only {SEPARATOR} and no text: name a file with text"
        )
    split = [inside for inside, file in zip(parts, files, strict=True) if inside != [file]]
    if not split:
        return documents, []
    return documents, [split_note(len(split), sum(map(len, split)))]


def require_existing(paths: Sequence[str]) -> None:
    """Check that every path exists, without reading the files.

    Raises:
        InputError: for the first path that does not exist, with `read_corpus`'s message.
    """
    for path in paths:
        if path != "-" and not os.path.exists(path):
            reader = Reader()
            for name in _find(path, reader, None, None).names:
                reader.start_of(name)


def builtin_documents() -> Iterable[Document]:
    """The Python language reference that CPython contains, one document per topic."""
    from pydoc_data.topics import topics

    return (Document(name, topics[name]) for name in sorted(topics))


def read_text(name: str, *, encoding: str | None = None) -> tuple[str, list[str]]:
    """The text of one file or of standard input ("-"), and notes for the user.

    Unlike in `read_corpus`, the text may be empty.

    Raises:
        InputError: if the file is missing, not a text file, or not text in that encoding.
        OutOfMemoryError: if the text does not fit into memory.
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
        raise InputError(f"no file matches {path!r}: check the pattern and its folder")
    return FileGroup(found)


def _named(name: str, reader: Reader, encoding: str | None, allow_bytes: bool) -> Document:
    document = _read(name, reader, encoding, allow_bytes=allow_bytes)
    if not len(document):
        _require_writer(name)
        raise InputError(f"{shown(name)} is empty: name a file with text")
    return document


def _require_writer(name: str) -> None:
    """Raise `InputError` if the empty file `name` is a pipe: no process has written to it."""
    if name != "-" and Path(name).is_fifo():
        raise InputError(
            f"no process wrote to the pipe {shown(name)}: start the writing process first"
        )


def _in_folder(name: str, group: FileGroup, reader: Reader, encoding: str | None) -> list[Document]:
    """The text of a file in a folder; a file that is not text is added to `group.skipped`."""
    try:
        document = _read(name, reader, encoding, allow_bytes=False)
    except NotDecodedError as error:
        group.skip(Path(name), error.start)
        return []
    except InputError:
        document = Document(name, "")
    if not len(document) or "\0" in str(document.whole):
        group.skipped.append(Path(name))
        return []
    return [document]


def _records_in(
    name: str, reader: Reader, encoding: str | None, records: RecordOptions
) -> TextSource | None:
    """The source for a file of records; None if the file is read as plain text."""
    if records.kind(name) == "text":
        return None
    source = source_of(name, records)
    why = records.why_plain(source, encoding)
    if why is None:
        return source
    reader.add_note(plain_text_note(why))
    return None


def _read_records(
    source: TextSource, reader: Reader, encoding: str | None, field: str
) -> list[Document]:
    """The texts of a file's records; empty ones are skipped."""
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
        raise InputError(
            f"{shown(source.name)}: the field {field!r} is empty in every record; name another "
            "with --field"
        )
    reader.count_in_memory(num_bytes, in_memory)
    reader.remark(source.name, [f"the field {field!r} of each record is read (--field)"])
    return documents


def _read(name: str, reader: Reader, encoding: str | None, *, allow_bytes: bool) -> Document:
    """One file's text, or its bytes where `allow_bytes` is true and it is not text.

    Raises:
        OutOfMemoryError: if it does not fit into memory.
    """
    data = reader.read(name)
    reader.check_text(name, len(data), text_bytes(data, encoding))
    options: dict[str, bool] = {"allow_bytes": allow_bytes, "legacy": reader.legacy}
    try:
        text = decode(data, shown(name), encoding, **options)
    except MemoryError:
        raise out_of_memory(name) from None
    reader.count_in_memory(len(data), sys.getsizeof(text))
    start = data[:FIRST_BYTES]
    if isinstance(text, str):
        reader.remark(name, remarks(start, encoding))
    elif (why := why_not_text(start, encoding)) is not None:
        reader.remark(name, [f"it is read as bytes although it {why}"])
    return Document(name, text)


def name_of(paths: Sequence[str]) -> str:
    """The name of a run on these paths: the first one's file name without .txt, .gz and .zst.

    Any other suffix is kept, so that chat.txt and chat.csv give different names.
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
