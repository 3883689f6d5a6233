"""Full disks."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mygpt.errors import StorageError
from mygpt.training.run import RunFolder
from torture import Tally
from torture.runs import differs, fresh, in_child, resume, text_file, train

_FULL = 3  # the exit code of a full disk


@contextmanager
def _small_disk(folder: Path, size: int) -> Iterator[bool]:
    """A file system of that many bytes at `folder`; False where mounting is not allowed."""
    folder.mkdir(exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    mounted = shutil.which("mount") is not None and os.name == "posix"
    mounted = mounted and subprocess.run(command, capture_output=True, check=False).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(folder)], check=True)


def full_disk(count: int, folder: Path) -> Tally:
    """A disk that is full at `count` points of a run: exit code 3, and nothing is lost.

    Then the disk has space again, and the run is resumed to the same end.
    """
    tally = Tally("disk full: code 3, the previous state intact, resumed bitwise the same")
    reference, disk = fresh(folder, "reference"), folder / "disk"
    assert in_child(lambda: train(reference)) == 0
    text_file(folder)
    needed = sum(path.stat().st_size for path in reference.iterdir())
    for trial in range(count):
        free = 4096 * (8 + (needed * 2 // 4096 - 8) * trial // max(1, count - 1))
        with _small_disk(disk, 16 * needed) as mounted:
            if not mounted:
                tally.note = "not run: mounting is not allowed here"
                return tally
            text_file(disk)
            filler = disk / "filler"
            filler.write_bytes(b"\0" * (_free(disk) - free))
            run = disk / "run"
            code = in_child(lambda run=run: _until_full(run))  # type: ignore[misc]
            kept = ""
            if (run / "last.state.safetensors").exists():
                kept = f"kept step {RunFolder(run).load_state()[0].progress.step}"
            left = [path.name for path in run.glob(".mygpt-*")] if run.exists() else []
            filler.unlink()
            if kept:
                after = in_child(lambda run=run: resume(run))  # type: ignore[misc]
            else:  # not even the first state fitted: there was nothing to lose
                shutil.rmtree(run, ignore_errors=True)
                after = in_child(lambda run=run: train(run))  # type: ignore[misc]
            problem = differs(run, reference) if after == 0 else f"resuming ended with {after}"
            ok = code in (0, _FULL) and not left and not problem
            tally.count(ok, f"{free:,} bytes free: code {code}, {kept}, {left}, {problem}")
            tally.note = _count_full(tally.note, code)
    return tally


def _count_full(note: str, code: int) -> str:
    full = int(note.split()[0]) if note else 0
    return f"{full + (code == _FULL)} runs filled the disk"


def _free(folder: Path) -> int:
    return shutil.disk_usage(folder).free


def _until_full(run: Path) -> None:
    """As the command: a `StorageError` is exit code 3."""
    try:
        train(run)
    except StorageError as error:
        expected = all(part in str(error) for part in ("No space left", "free there"))
        os._exit(error.exit_code if expected else 98)
