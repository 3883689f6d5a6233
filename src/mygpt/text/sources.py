"""Find the files that paths, folders, glob patterns and "-" stand for."""

from __future__ import annotations

import contextlib
import glob
import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from mygpt.errors import InputError
from mygpt.text.file_types import may_be_encoded, unmarked_encoding, why_not_text
from mygpt.text.reading import (
    NotTextError,
    begins_as_text,
    check_encoding,
    compression_by_name,
    compression_of_file,
    file_errors,
    remarks,
    shown,
    start_of,
)
from mygpt.text.streams import RecordOptions, TextSource

_RUN = "last.state.safetensors"  # a folder with this file is a run directory
_NAMED = 3  # files that a note names
_ANY = RecordOptions()


def find_sources(
    paths: Sequence[str], *, encoding: str | None = None, records: RecordOptions = _ANY
) -> tuple[list[TextSource], list[str]]:
    """The files that paths, folders, glob patterns and "-" stand for, in order, and notes.

    A folder stands for every text file below it, sorted by name. Hidden files, run directories and
    token stores in it are skipped silently, other files that are not text with a note. Only the
    first bytes of files are read, and the first record of files of records.

    Raises:
        NotTextError: if a file is not text.
        InputError: if a path is missing, empty or a device, or if a field is named and no file
            contains records.
    """
    finder = Finder(encoding, records)
    groups = finder.groups(paths)
    return [source for group in groups for source in group.sources], finder.notes(groups)


@dataclass
class FileGroup:
    """The sources that one path, glob pattern or folder stands for.

    Attributes:
        sources: in order; of a folder, those whose first bytes may be text.
        folder: the folder that was named; None if files were named.
        skipped: files of the folder that are not text.
        encoded: skipped files that may be text in another encoding, with that encoding if known.
    """

    sources: list[TextSource]
    folder: Path | None = None
    skipped: list[Path] = field(default_factory=list)
    encoded: dict[Path, str | None] = field(default_factory=dict)

    def skip(self, path: Path) -> None:
        """Skip a file."""
        self.skipped.append(path)
        with contextlib.suppress(InputError):
            start = start_of(str(path))
            if may_be_encoded(start):
                self.encoded[path] = unmarked_encoding(start)

    def notes(self, encoding: str | None) -> list[str]:
        """A note on skipped files, if there are any, and one on files in other encodings."""
        if not self.skipped:
            return []
        found = [
            f"skipped {len(self.skipped)} files in {shown(str(self.folder))} that are not text: "
            f"{self._listed(self.skipped)}"
        ]
        return found + ([self._hint(encoding)] if self.encoded else [])

    def none_found(self, encoding: str | None) -> InputError:
        """The error for a folder without a readable text file."""
        assert self.folder is not None
        remedy = f"; {self._hint(encoding)}" if self.encoded else ""
        if any(self.folder.glob("*.safetensors")):
            remedy = (
                "; it contains a model: name a text file, and give the model with --from to train "
                "it on that text, or continue a run with --resume"
            )
        return InputError(
            f"folder {shown(str(self.folder))} contains no text file (hidden files are skipped)"
            f"{remedy}"
        )

    def _hint(self, encoding: str | None) -> str:
        """The note on files that may be text in another encoding, with the remedy."""
        known = {found for found in self.encoded.values() if found is not None}
        guess = f" ({known.pop()}, it seems)" if len(known) == 1 else ""
        return (
            f"in {shown(str(self.folder))}, text that is not {encoding or 'UTF-8'}: "
            f"{self._listed(self.encoded)}; name its encoding with --encoding{guess}, or convert it"
        )

    def _listed(self, paths: Iterable[Path]) -> str:
        assert self.folder is not None
        inside = [shown(str(path.relative_to(self.folder))) for path in sorted(paths)]
        return ", ".join(inside[:_NAMED]) + (", ..." if len(inside) > _NAMED else "")


class Finder:
    """Finds the sources that paths stand for, and collects notes on them.

    Args:
        encoding: None is UTF-8, or the encoding that a byte-order mark names.
        records: how files of records are read; None reads them as plain text.
        allow_bytes: accept a named file that is not text.
    """

    def __init__(
        self,
        encoding: str | None,
        records: RecordOptions | None,
        *,
        allow_bytes: bool = False,
    ) -> None:
        check_encoding(encoding)
        self.encoding, self.records, self.allow_bytes = encoding, records, allow_bytes
        self._remarks: dict[str, list[str]] = {}
        self._plain: list[str] = []

    def groups(self, paths: Sequence[str]) -> list[FileGroup]:
        """The sources of each path; raises as `find_sources`."""
        if paths.count("-") > 1:
            raise InputError(
                "standard input (-) is named twice, but can be read only once: name it once"
            )
        found = [
            self._in_folder(Path(path))
            if os.path.isdir(path)
            else FileGroup([self.source(name) for name in matches(path)])
            for path in paths
        ]
        kinds = {source.kind for group in found for source in group.sources}
        how = self.records
        if how is not None and how.field is not None and how.refuse_unused and kinds == {"text"}:
            raise InputError(
                f"--field {how.field} applies to *.jsonl, *.ndjson, *.json, *.csv, *.tsv and "
                "*.parquet, and only plain text is named: remove the option"
            )
        return found

    def source(
        self, name: str, *, in_folder: bool = False, may_be_empty: bool = False
    ) -> TextSource:
        """The source for a file or standard input ("-"); raises as `find_sources`."""
        source = self._by_name(name)
        if not source.is_lasting or source.kind == "table":
            return source
        start = start_of(name)
        if not start and not may_be_empty:
            raise InputError(f"{shown(name)} is empty: name a file with text")
        if in_folder and not begins_as_text(start, self.encoding):
            raise NotTextError(f"{shown(name)} is not text")
        self.check_start(name, start)
        if source.compression != compression_by_name(name):
            self.remark(name, [f"this is a {source.compression} file; it is decompressed"])
        if self.records is None or (why := self.records.why_plain(source, self.encoding)) is None:
            return source
        self._plain.append(f"{why}; the whole file is read as plain text")
        return replace(source, kind="text")

    def check_start(self, name: str, start: bytes) -> None:
        """Check the first bytes of a file, and add remarks on them.

        Raises:
            NotTextError: if it is not text.
        """
        why = why_not_text(start, self.encoding)
        if why is not None and not self.allow_bytes:
            raise NotTextError(f"{shown(name)} {why}")
        odd = [f"it is read as bytes although it {why}"]
        self.remark(name, remarks(start, self.encoding) if why is None else odd)

    def remark(self, name: str, found: Iterable[str]) -> None:
        """Add remarks on a file; files with the same remark share one note."""
        for remark in found:
            self._remarks.setdefault(remark, []).append(shown(name))

    def notes(self, groups: Iterable[FileGroup]) -> list[str]:
        """All notes, one line each."""
        found = [note for group in groups for note in group.notes(self.encoding)] + self._plain
        for remark, names in self._remarks.items():
            more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
            found.append(f"{', '.join(names[:_NAMED])}{more}: {remark}")
        return found

    def _by_name(self, name: str) -> TextSource:
        with file_errors(name):
            status = None if name == "-" else os.stat(name)
        kind = "text" if self.records is None else self.records.kind(name)
        if status is None or not stat.S_ISREG(status.st_mode):
            if kind == "table":
                raise InputError(
                    f"{shown(name)} is not a regular file: *.parquet cannot be read from a pipe"
                )
            return TextSource(name, -1, -1, kind, compression_by_name(name))
        compression = "" if kind == "table" else compression_of_file(name)
        return TextSource(name, status.st_size, status.st_mtime_ns, kind, compression)

    def _in_folder(self, folder: Path) -> FileGroup:
        """Its sources. Their type is decided by their first bytes, so that few are read."""
        group = FileGroup([], folder)
        for path in sorted(_files_below(folder)):
            try:
                group.sources.append(self.source(str(path), in_folder=True))
            except InputError:  # it is not text, empty, or cannot be read
                group.skip(path)
        if not group.sources:
            raise group.none_found(self.encoding)
        return group


def matches(path: str) -> list[str]:
    """The files that a path or glob pattern stands for, sorted; they need not exist."""
    if not path:
        raise InputError("a file name is empty: name a text file, or - for standard input")
    if path == "-" or os.path.exists(path) or not glob.has_magic(path):
        return [path]
    found = sorted(name for name in glob.glob(path, recursive=True) if os.path.isfile(name))
    if not found:
        raise InputError(f"no file matches {path!r}: check the pattern and its folder")
    return found


def _files_below(folder: Path) -> Iterator[Path]:
    """All files below a folder, unsorted, without hidden files, run directories and stores."""
    for here, folders, files in os.walk(folder):
        names = {*folders, *files}
        if _RUN in names or {"index.json", "shards"} <= names:
            folders.clear()
            continue
        folders[:] = [name for name in folders if name[0] != "."]
        paths = (Path(here, name) for name in files if name[0] != ".")
        yield from (path for path in paths if os.path.isfile(path))
