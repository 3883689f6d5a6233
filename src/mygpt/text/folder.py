"""Find the text files in a folder."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from mygpt.errors import InputError
from mygpt.text.decoding import begins_as_text
from mygpt.text.file_types import may_be_encoded, unmarked_encoding
from mygpt.text.reading import Reader, shown

_RUN = "last.state.safetensors"  # a folder with this file is a run directory


@dataclass
class FileGroup:
    """The files that one path, glob pattern or folder stands for.

    Attributes:
        names: the files to read, in order; of a folder, those whose first bytes may be text.
        folder: the folder that was named; None if files were named.
        skipped: files of the folder that are not text.
        encoded: skipped files that may be text in another encoding, with that encoding if known.
    """

    names: list[str]
    folder: Path | None = None
    skipped: list[Path] = field(default_factory=list)
    encoded: dict[Path, str | None] = field(default_factory=dict)

    def skip(self, path: Path, start: bytes | bytearray) -> None:
        """Skip a file with these first bytes."""
        self.skipped.append(path)
        if may_be_encoded(start):
            self.encoded[path] = unmarked_encoding(start)

    def notes(self, encoding: str | None = None) -> list[str]:
        """A note on skipped files, if there are any, and one on files in other encodings."""
        if self.folder is None or not self.skipped:
            return []
        where = shown(str(self.folder))
        found = [
            f"skipped {len(self.skipped)} files in {where} that are not text: "
            f"{self._listed(self.skipped)}"
        ]
        return found + ([self.hint(encoding)] if self.encoded else [])

    def hint(self, encoding: str | None) -> str:
        """The note on files that may be text in another encoding, with the remedy."""
        many = len(self.encoded) > 1
        known = {found for found in self.encoded.values() if found is not None}
        guess = f" ({known.pop()}, it seems)" if len(known) == 1 else ""
        return (
            f"{len(self.encoded)} file{'s' * many} of {shown(str(self.folder))} "
            f"{'are' if many else 'is'} not {encoding or 'UTF-8'}: {self._listed(self.encoded)}; "
            f"name {'their' if many else 'its'} encoding with --encoding{guess}, or convert "
            f"{'them' if many else 'it'} to UTF-8"
        )

    def none_found(self, encoding: str | None) -> InputError:
        """The error for a folder without a readable text file."""
        assert self.folder is not None
        remedy = f"; {self.hint(encoding)}" if self.encoded else ""
        if any(self.folder.glob("*.safetensors")):
            remedy = (
                "; it contains a model: name a text file, and give the model with --from to train "
                "it on that text, or continue a run with --resume"
            )
        return InputError(
            f"folder {shown(str(self.folder))} contains no text file (hidden files are skipped)"
            f"{remedy}"
        )

    def _listed(self, paths: Iterable[Path]) -> str:
        assert self.folder is not None
        inside = [shown(str(path.relative_to(self.folder))) for path in sorted(paths)]
        return ", ".join(inside[:3]) + (", ..." if len(inside) > 3 else "")


def list_folder(
    folder: Path, reader: Reader, encoding: str | None, is_table: Callable[[str], bool]
) -> FileGroup:
    """The text files below a folder, sorted by name, and those that are skipped.

    Whether a file may be text is decided by its first bytes, so that large binary files are not
    read; *.parquet tables are recognised by name. Hidden files, run directories, token stores,
    pipes, sockets, devices and broken links are ignored.
    """
    place = FileGroup([], folder)
    for path in sorted(files_below(folder)):
        start = bytearray()
        try:
            start = bytearray() if is_table(str(path)) else reader.start_of(str(path))
            may_be_text = begins_as_text(start, encoding)
        except InputError:  # it cannot be read
            may_be_text = False
        if may_be_text:
            place.names.append(str(path))
        else:
            place.skip(path, start)
    return place


def files_below(folder: Path) -> list[Path]:
    """All files below a folder, unsorted, without hidden files, run directories and stores."""
    files: list[Path] = []
    waiting = [folder]
    while waiting:
        here = waiting.pop()
        try:
            with os.scandir(here) as listing:
                entries = {entry.name: entry for entry in listing if entry.name[0] != "."}
        except OSError:  # no permission to list it
            continue
        if _RUN in entries or ("index.json" in entries and "shards" in entries):
            continue
        for name, entry in entries.items():
            if entry.is_dir(follow_symlinks=False):
                waiting.append(here / name)
            elif os.path.isfile(entry):
                files.append(here / name)
    return files
