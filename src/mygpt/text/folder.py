"""Which files below a folder may be text."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from mygpt.errors import InputError
from mygpt.text.decoding import begins_as_text
from mygpt.text.reading import Reader, shown

_RUN = "last.state.safetensors"  # what training writes beside this is no text to learn from


@dataclass
class Place:
    """Files that were named together.

    Attributes:
        names: to be read, in order; in a folder, after a first look at each.
        folder: where they lie; None where they were named themselves.
        passed_over: files of the folder that are not text.
    """

    names: list[str]
    folder: Path | None = None
    passed_over: list[Path] = field(default_factory=list)

    def notes(self) -> list[str]:
        """One line about what was passed over, if anything."""
        if self.folder is None or not self.passed_over:
            return []
        inside = [shown(str(path.relative_to(self.folder))) for path in sorted(self.passed_over)]
        listed = ", ".join(inside[:3]) + (", ..." if len(inside) > 3 else "")
        where = shown(str(self.folder))
        return [f"passed over {len(inside)} files in {where} without text: {listed}"]


def look_into(folder: Path, reader: Reader, encoding: str | None) -> Place:
    """Files below a folder, in the order of their names, without hidden ones, runs and stores.

    A look at its first bytes decides whether a file may be text: a large one that is none is
    not read. Pipes, sockets, devices and broken links are no files.
    """
    place = Place([], folder)
    for path in sorted(files_below(folder)):
        try:
            may_be_text = begins_as_text(reader.start_of(str(path)), encoding)
        except InputError:  # it cannot be read
            may_be_text = False
        if may_be_text:
            place.names.append(str(path))
        else:
            place.passed_over.append(path)
    return place


def files_below(folder: Path) -> list[Path]:
    """All files below a folder, in no order; without hidden ones, runs and stores of ours."""
    files: list[Path] = []
    waiting = [folder]
    while waiting:
        here = waiting.pop()
        try:
            with os.scandir(here) as listing:
                entries = {entry.name: entry for entry in listing if entry.name[0] != "."}
        except OSError:  # no permission to look into it
            continue
        if _RUN in entries or ("index.json" in entries and "shards" in entries):
            continue
        for name, entry in entries.items():
            if entry.is_dir(follow_symlinks=False):
                waiting.append(here / name)
            elif os.path.isfile(entry):
                files.append(here / name)
    return files
