"""Atomic creation of folders, and the removal of what killed writers left."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from mygpt.checkpoint.durable import atomic_folder, in_use, temporary_name
from mygpt.errors import InputError

OURS = frozenset({"a", "b"})


class Killed(BaseException):
    """The process dies here."""


def kill(monkeypatch: pytest.MonkeyPatch, target: Path, *, at: str, overwrite: bool) -> None:
    """Write a folder like a process that is killed, without its cleaning up."""
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda *_, **__: None)
        rename = Path.rename

        def dying(self: Path, to: Path) -> Path:
            if at == "rename" and to == target:
                raise Killed
            return rename(self, to)

        patch.setattr(Path, "rename", dying)
        with pytest.raises(Killed):
            export(target, at, overwrite=overwrite)


def export(target: Path, at: str, *, overwrite: bool) -> None:
    with atomic_folder(target, OURS, overwrite=overwrite) as place:
        (place / "a").write_text("half")
        if at == "writing":
            raise Killed


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_next_export_removes_what_a_killed_one_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Folders named .mygpt-*.tmp stayed for ever; those of running processes must stay."""
    target = tmp_path / "out"
    kill(monkeypatch, target, at="writing", overwrite=False)
    assert len(names(tmp_path)) == 1
    living, other = temporary_name(target), temporary_name(tmp_path / "another")
    for folder in (living, other):
        folder.mkdir()
    with in_use(living), atomic_folder(target, OURS, overwrite=False) as place:
        (place / "b").write_text("whole")
    assert names(tmp_path) == sorted([living.name, other.name, "out"])
    assert names(target) == ["b"]


def test_an_export_that_was_being_replaced_is_restored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a crash between the two renames, the old one had only a temporary name."""
    target = tmp_path / "out"
    target.mkdir()
    (target / "a").write_text("old")
    kill(monkeypatch, target, at="rename", overwrite=True)
    assert not target.exists()
    with (
        pytest.raises(InputError, match="exists already"),
        atomic_folder(target, OURS, overwrite=False),
    ):
        pass
    assert (target / "a").read_text() == "old"


def test_a_link_named_like_a_temporary_folder_is_not_followed(tmp_path: Path) -> None:
    target, victim = tmp_path / "out", tmp_path / "victim"
    victim.mkdir()
    (victim / "a").write_text("precious")
    os.symlink(victim, temporary_name(target))
    os.symlink(victim, temporary_name(target, ".old.tmp"))
    with atomic_folder(target, OURS, overwrite=False) as place:
        (place / "b").write_text("whole")
    assert names(victim) == ["a"]
    assert names(target) == ["b"]
