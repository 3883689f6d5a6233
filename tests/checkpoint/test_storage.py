"""Durable writes, the checkpoint format, and the lock of a run."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from mygpt.checkpoint import durable as storage
from mygpt.checkpoint.container import read_arrays, write_arrays
from mygpt.checkpoint.durable import append, sync_length, temporary_files, truncate, write_durably
from mygpt.checkpoint.locks import RunLock, holder
from mygpt.errors import CheckpointError, InputError, OutOfMemoryError, StorageError
from mygpt.file_access import read_inside

ARRAYS = {
    "b": np.arange(6, dtype=np.float32).reshape(2, 3),
    "a": np.arange(3, dtype=np.uint8),
    "scalar": np.array(7, np.int64),
    "none": np.empty((0, 4), np.float64),
    "yes": np.array([True, False]),
}


# --- the container -------------------------------------------------------------------------


def test_arrays_and_parts_round_trip(tmp_path: Path) -> None:
    """The safetensors library reads the arrays, too."""
    from safetensors.numpy import load_file

    write_arrays(tmp_path / "x", ARRAYS, {"part": {"text": 'é"\\', "n": [1, None]}})
    arrays, parts = read_arrays(tmp_path / "x")
    assert parts["part"] == {"text": 'é"\\', "n": [1, None]}
    for found in (arrays, load_file(tmp_path / "x")):
        assert found.keys() == ARRAYS.keys()
        for name, array in ARRAYS.items():
            assert found[name].dtype == array.dtype
            assert found[name].shape == array.shape
            np.testing.assert_array_equal(found[name], array)
            assert found[name].flags.aligned


def test_the_same_content_gives_the_same_bytes(tmp_path: Path) -> None:
    """The safetensors library writes the metadata in random order."""
    for name in "ab":
        backwards = dict(reversed(ARRAYS.items())) if name == "b" else ARRAYS
        write_arrays(tmp_path / name, backwards, {"one": {"n": 1}, "two": {"n": 2}})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_file_that_reads_back_differently_does_not_replace_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If a disk flips a bit of the new file, the old file stays."""
    path = tmp_path / "x"
    write_arrays(path, ARRAYS, {})
    before = path.read_bytes()
    real = os.write

    def flipping(descriptor: int, data: memoryview) -> int:
        changed = bytearray(data)
        changed[-1] ^= 1
        return real(descriptor, changed)

    monkeypatch.setattr(os, "write", flipping)
    with pytest.raises(StorageError, match="bytes read back are not those that were written"):
        write_arrays(path, {"b": ARRAYS["b"] + 1}, {})
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["x"]


def test_a_file_larger_than_the_free_memory_is_refused_before_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_arrays(tmp_path / "x", ARRAYS, {})
    monkeypatch.setattr("mygpt.machine.free_memory_bytes", lambda: 10)
    with pytest.raises(OutOfMemoryError, match="10 bytes of memory are free"):
        read_arrays(tmp_path / "x")


def test_a_huge_sparse_file_is_refused_at_once(tmp_path: Path) -> None:
    """A sparse terabyte, of which only the header is read."""
    with open(tmp_path / "x", "wb") as file:
        file.truncate(2**40)
    began = time.monotonic()
    with pytest.raises(CheckpointError, match="not a mygpt checkpoint"):
        read_arrays(tmp_path / "x")
    assert time.monotonic() - began < 1.0


@pytest.mark.processes
def test_saving_takes_no_second_copy(tmp_path: Path) -> None:
    """64 MiB are saved by a process that may allocate 16 MiB more."""
    resource = pytest.importorskip("resource")
    code = (
        "import resource, sys\n"
        "import numpy as np\n"
        "from mygpt.checkpoint.container import write_arrays\n"
        "arrays = {'a': np.ones(2**24, np.float32)}\n"
        "write_arrays(sys.argv[1], {'a': arrays['a'][:10]}, {})\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "write_arrays(sys.argv[1], arrays, {})\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "x")]
    more = int(subprocess.run(command, capture_output=True, check=True).stdout)
    assert more * (1 if sys.platform == "darwin" else 1024) < 2**24
    assert resource


# --- writing -------------------------------------------------------------------------------


@pytest.mark.parametrize("links", [True, False])
def test_the_old_file_is_kept_under_its_second_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, links: bool
) -> None:
    """Without hard links, as on a memory card, it is renamed."""

    def none(*_: object) -> None:
        raise OSError(1, "Operation not permitted")

    if not links:
        monkeypatch.setattr(os, "link", none)
    path, kept = tmp_path / "x", tmp_path / "before"
    for text in (b"one", b"two", b"three"):
        write_durably(path, [text], keep_as=kept)
    assert path.read_bytes() == b"three"
    assert kept.read_bytes() == b"two"
    assert sorted(os.listdir(tmp_path)) == ["before", "x"]


def test_keeping_a_file_twice_leaves_no_temporary_file(tmp_path: Path) -> None:
    """After a crash between linking and renaming, both names are one file."""
    path, kept = tmp_path / "x", tmp_path / "before"
    path.write_bytes(b"one")
    os.link(path, kept)
    write_durably(path, [b"two"], keep_as=kept)
    assert (path.read_bytes(), kept.read_bytes()) == (b"two", b"one")
    assert sorted(os.listdir(tmp_path)) == ["before", "x"]


def test_a_failed_verification_changes_no_file(tmp_path: Path) -> None:
    path, kept = tmp_path / "x", tmp_path / "before"
    path.write_bytes(b"one")

    def refuse(written: Path) -> None:
        assert written.read_bytes() == b"two"
        raise StorageError("no")

    with pytest.raises(StorageError, match="no"):
        write_durably(path, [b"two"], verify=refuse, keep_as=kept)
    assert path.read_bytes() == b"one"
    assert os.listdir(tmp_path) == ["x"]


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: real(descriptor, data[:3]))
    write_durably(tmp_path / "x", [b"hello, ", bytearray(b"world")])
    append(tmp_path / "x", b" again")
    assert (tmp_path / "x").read_bytes() == b"hello, world again"


def test_a_log_is_appended_to_and_truncated(tmp_path: Path) -> None:
    path = tmp_path / "log"
    truncate(path, 3)
    assert not path.exists()
    append(path, b"one\n")
    assert sync_length(path) == 4
    append(path, b"two")
    truncate(path, 100)
    assert path.read_bytes() == b"one\ntwo"
    truncate(path, 4)
    assert path.read_bytes() == b"one\n"


def test_temporary_files_are_matched_to_their_file(tmp_path: Path) -> None:
    """Another process may be writing another file in the folder of `ckpt.pt`."""
    marks = {}
    for name in ("a", "b"):
        marks[name] = storage.temporary_name(tmp_path / name)
        marks[name].write_bytes(b"half")
    (tmp_path / "mine.tmp").write_bytes(b"")
    assert temporary_files(tmp_path, "a") == [marks["a"]]
    assert temporary_files(tmp_path) == sorted(marks.values())


# --- the lock ------------------------------------------------------------------------------

HOLD = """
import sys, time
from pathlib import Path
from mygpt.file_access import read_inside
from mygpt.checkpoint.locks import RunLock
with RunLock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_writer_is_refused_and_the_lock_ends_with_its_process(tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(run)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"held\n"
    began = time.monotonic()
    with pytest.raises(InputError, match=rf"run is in use by process {process.pid} on"):
        RunLock(run).__enter__()
    assert time.monotonic() - began < 5.0
    assert f"process {process.pid}" in (holder(run) or "")
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert holder(run) is None
    with RunLock(run) as lock:
        assert lock.works
        assert f"process {os.getpid()}" in (holder(run) or "")
    assert holder(run) is None


def test_one_process_cannot_hold_it_twice(tmp_path: Path) -> None:
    """Two trainings in two threads of a notebook."""
    with RunLock(tmp_path), pytest.raises(InputError, match="is in use"):
        RunLock(tmp_path).__enter__()


def test_on_a_file_system_without_locks_nothing_is_locked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fcntl = pytest.importorskip("fcntl")

    def unsupported(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with RunLock(tmp_path) as lock:
        assert not lock.works


def test_a_folder_that_cannot_be_created_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageError, match="cannot write to"):
        RunLock(tmp_path / "file" / "run").__enter__()


# --- files that somebody else has placed ---------------------------------------------------

PIPES = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names")


def test_a_link_inside_a_folder_is_refused_and_its_target_does_not_change(tmp_path: Path) -> None:
    """A run's folder out of an archive had links in it to the user's own files."""
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    link = tmp_path / "link"
    for target in ("victim", "nowhere"):
        link.symlink_to(target)
        for action in (
            lambda: write_durably(link, [b"x"], inside=True),
            lambda: append(link, b"x"),
            lambda: truncate(link, 1),
            lambda: sync_length(link),
            lambda: read_inside(link),
        ):
            with pytest.raises(CheckpointError, match="link is a symbolic link"):
                action()
        link.unlink()
    assert victim.read_bytes() == b"precious"
    assert os.listdir(tmp_path) == ["victim"]


@PIPES
@pytest.mark.parametrize("inside", [True, False])
def test_a_pipe_is_neither_replaced_nor_opened(tmp_path: Path, *, inside: bool) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    for action in (
        lambda: write_durably(path, [b"x"], inside=inside),
        lambda: append(path, b"x"),
        lambda: read_inside(path),
        lambda: read_arrays(path),
        lambda: read_arrays(Path("/dev/zero")),
    ):
        with pytest.raises(CheckpointError, match="is a device or a pipe, and a file is expected"):
            action()
    assert path.is_fifo()
    assert os.listdir(tmp_path) == ["pipe"]


@pytest.mark.skipif(not hasattr(os, "mknod") or os.geteuid(), reason="only root makes devices")
def test_a_device_behind_a_link_is_not_replaced(tmp_path: Path) -> None:
    """The rename of a privileged user took the place of the device itself."""
    device, link = tmp_path / "null", tmp_path / "page.html"
    try:
        os.mknod(device, 0o666 | stat.S_IFCHR, os.makedev(1, 3))
    except PermissionError:
        pytest.skip("no devices in this container")
    link.symlink_to(device)
    for path in (link, device):
        with pytest.raises(CheckpointError, match="is a device or a pipe, and a file is expected"):
            write_durably(path, [b"x"])
    assert stat.S_ISCHR(device.lstat().st_mode)


def test_a_log_with_a_second_hard_link_is_copied_before_it_is_written(tmp_path: Path) -> None:
    """A hard link can be another file of the user."""
    victim, log = tmp_path / "victim", tmp_path / "log"
    victim.write_bytes(b"precious\n")
    for action in (lambda: append(log, b"x\n"), lambda: truncate(log, 3)):
        os.link(victim, log)
        action()
        assert log.read_bytes() != b"precious\n"
        assert victim.read_bytes() == b"precious\n"
        log.unlink()


def test_the_lock_does_not_write_through_links(tmp_path: Path) -> None:
    """The lock's file was emptied, through a link as well."""
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    run = tmp_path / "run"
    run.mkdir()
    (run / ".lock").symlink_to(victim)
    with pytest.raises(CheckpointError, match=r"\.lock is a symbolic link"), RunLock(run):
        pass
    (run / ".lock").unlink()
    os.link(victim, run / ".lock")
    with RunLock(run):
        assert holder(run) == "another process"
    assert victim.read_bytes() == b"precious"


def test_the_next_write_removes_files_of_killed_writers_and_keeps_those_of_running_ones(
    tmp_path: Path,
) -> None:
    path = tmp_path / "x"
    dead, living = storage.temporary_name(path), storage.temporary_name(path)
    other = storage.temporary_name(tmp_path / "y")
    for stray in (dead, living, other):
        stray.write_bytes(b"half")
    with storage.in_use(living):
        write_durably(path, [b"whole"])
    assert sorted(tmp_path.iterdir()) == sorted([path, living, other])
