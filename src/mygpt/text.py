"""Reading text: files, folders, globs, standard input, gzip; or the built-in corpus.

Text is taken as it is: line ends stay what they are. A corpus is a list of documents.
"""

from __future__ import annotations

import codecs
import glob
import gzip
import hashlib
import os
import sys
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mygpt.errors import InputError

BUILTIN = "python-reference"
_BOMS = (  # the longer first: UTF-32's begins with UTF-16's
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)


@dataclass(frozen=True)
class Document:
    """One text with its name; bytes where it could not be decoded and bytes were asked for."""

    name: str
    text: str | bytes


@dataclass(frozen=True)
class Corpus:
    """Documents in order, and what was passed over while reading them.

    Attributes:
        name: what a run on it is called.
        documents: at least one, none of them empty.
        notes: one line each about what was left out.
    """

    name: str
    documents: list[Document]
    notes: list[str] = field(default_factory=list)

    @property
    def sha256(self) -> str:
        """One document's SHA-256 as a file's; of several, that of their digests in a row."""
        digests = [hashlib.sha256(as_bytes(document.text)) for document in self.documents]
        if len(digests) == 1:
            return digests[0].hexdigest()
        return hashlib.sha256(b"".join(digest.digest() for digest in digests)).hexdigest()

    @property
    def num_bytes(self) -> int:
        """Length of all documents in UTF-8 bytes."""
        return sum(len(as_bytes(document.text)) for document in self.documents)


def as_bytes(text: str | bytes) -> bytes:
    """Text as UTF-8; bytes as they are."""
    return text if isinstance(text, bytes) else text.encode("utf-8")


def read_corpus(
    paths: Sequence[str] = (), *, encoding: str | None = None, allow_bytes: bool = False
) -> Corpus:
    """Read files, folders, glob patterns and "-" (standard input); nothing is the built-in corpus.

    A folder gives every file below it that is text, in the order of their names, without hidden
    ones and without runs of ours; the rest is passed over with a note. A *.gz is unpacked.

    Args:
        paths: what to read.
        encoding: None is UTF-8, or what a byte-order mark says.
        allow_bytes: take a file that is not text as bytes instead of refusing it.

    Raises:
        InputError: for what is missing, empty, or not text in that encoding.
    """
    if isinstance(paths, (str, Path)):
        paths = [str(paths)]
    _check_encoding(encoding)
    if not paths:
        return Corpus(BUILTIN, list(builtin_documents()))
    documents: list[Document] = []
    notes: list[str] = []
    for path in paths:
        if not path:
            raise InputError("a file name is empty: name a text file, or - for standard input")
        if path != "-" and os.path.isdir(path):
            found, passed_over = _read_folder(Path(path), encoding)
            documents += found
            notes += passed_over
            continue
        for name in _expand(path):
            text = _decode(_read_bytes(name), name, encoding, allow_bytes)
            if not text:
                raise InputError(f"{_shown(name)} is empty: there is no text to learn from")
            documents.append(Document(name, text))
    return Corpus(_name(paths), documents, notes)


def builtin_documents() -> Iterable[Document]:
    """The Python language reference that every CPython carries, one document a topic."""
    from pydoc_data.topics import topics

    return (Document(name, topics[name]) for name in sorted(topics))


def _check_encoding(encoding: str | None) -> None:
    try:
        "".encode(encoding or "utf-8")  # a codec from bytes to bytes is a LookupError here
    except LookupError:
        raise InputError(
            f"encoding={encoding!r} is not known: try utf-8, utf-16, latin-1 or cp1252"
        ) from None


def _expand(path: str) -> list[str]:
    if path == "-" or os.path.exists(path) or not glob.has_magic(path):
        return [path]
    found = sorted(p for p in glob.glob(path, recursive=True) if Path(p).is_file())
    if not found:
        raise InputError(f"no file matches {path!r}")
    return found


def _name(paths: Sequence[str]) -> str:
    """What a run on these is called: the first one's name without its endings."""
    if paths[0] == "-":
        return "stdin"
    path = Path(paths[0]).resolve()
    name = path.name.removesuffix(".gz")
    stem = name if path.is_dir() else Path(name).stem
    cleaned = "".join(c if c.isalnum() or c in "-_." else "-" for c in stem).strip("-.")
    return cleaned or "text"


def _shown(name: str) -> str:
    return "standard input" if name == "-" else name


def _read_bytes(name: str) -> bytes:
    try:
        data = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
    except FileNotFoundError:
        raise InputError(
            f"{name} does not exist: name a text file, a folder or a pattern, or - for "
            "standard input"
        ) from None
    except OSError as error:
        raise InputError(f"{_shown(name)} cannot be read: {error.strerror or error}") from None
    if name.endswith(".gz"):
        try:
            return gzip.decompress(data)
        except (OSError, EOFError, zlib.error) as error:
            raise InputError(f"{name} is not a whole gzip file: {error}") from None
    return data


def _decode(data: bytes, name: str, encoding: str | None, allow_bytes: bool) -> str | bytes:
    start = 0
    if encoding is None:
        start, encoding = next(
            ((len(bom), codec) for bom, codec in _BOMS if data.startswith(bom)), (0, "utf-8")
        )
    try:
        text = data[start:].decode(encoding)
        text.encode("utf-8")  # some codecs let lone surrogates through
        return text
    except UnicodeDecodeError as error:
        if allow_bytes:
            return data
        raise InputError(
            f"{_shown(name)} is not {encoding}: byte 0x{data[start + error.start]:02x} at position "
            f"{start + error.start}; name its encoding (--encoding latin-1?), or take its bytes "
            "with --tokenizer byte"
        ) from None
    except UnicodeError as error:
        if allow_bytes:
            return data
        raise InputError(f"{_shown(name)} is not {encoding}: {error}") from None


def _read_folder(folder: Path, encoding: str | None) -> tuple[list[Document], list[str]]:
    documents: list[Document] = []
    passed_over: list[str] = []
    runs = {state.parent for state in folder.rglob("last.state.safetensors")}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        inside = path.relative_to(folder)
        if any(part.startswith(".") for part in inside.parts) or runs & set(path.parents):
            continue  # what training writes is no text to learn from
        try:
            text = _decode(_read_bytes(str(path)), str(path), encoding, allow_bytes=False)
        except InputError:
            text = ""
        if not text or "\0" in str(text):
            passed_over.append(str(inside))
        else:
            documents.append(Document(str(path), text))
    if not documents:
        raise InputError(f"folder {folder} holds no text file (hidden ones are passed over)")
    if not passed_over:
        return documents, []
    shown = ", ".join(passed_over[:3]) + (", ..." if len(passed_over) > 3 else "")
    return documents, [f"passed over {len(passed_over)} files in {folder} without text: {shown}"]


def split_documents(
    documents: Sequence[Document], fraction: float
) -> tuple[list[Document], list[Document]]:
    """Cut off the last `fraction` of the text, counted in characters, inside a document if need be.

    Returns the documents before the cut and those after it; either may be empty.
    """
    total = sum(len(document.text) for document in documents)
    left = int(total * (1.0 - fraction))
    before: list[Document] = []
    after: list[Document] = []
    for document in documents:
        here = min(left, len(document.text))
        left -= here
        if here:
            before.append(Document(document.name, document.text[:here]))
        if here < len(document.text):
            after.append(Document(document.name, document.text[here:]))
    return before, after
