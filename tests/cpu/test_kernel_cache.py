"""The cache of machine code: where it is, when it is used, damage, and several processes.

The compiler is replaced by a function that returns the machine code of this process at once;
tests/conftest.py compiles it with the real one.
"""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import llvmlite.binding as llvm
import numpy as np
import pytest

from decoding import assert_runs
from mygpt.compat import numba_functions_apart, numba_modules
from mygpt.cpu.common import build
from mygpt.cpu.common.build import TRAINING
from mygpt.cpu.common.simd import INT64, kernel
from mygpt.file_access import cache_folder

pytestmark = pytest.mark.kernels

LINKED: list[list] = []  # the linker's objects own machine code and must not be collected


@pytest.fixture
def compilations(monkeypatch, tmp_path):
    """An empty cache in a process that has linked nothing; one entry for each compilation."""
    code, calls = build._object_path().read_bytes()[build._DIGEST_BYTES :], []

    def compile_at_once(library: build.KernelLibrary) -> bytes:
        assert library == build.DECODING
        calls.append("compiled")
        return code

    LINKED.append([])
    monkeypatch.setattr(build, "_alive", LINKED[-1])
    monkeypatch.setattr(build, "_linked", set())
    monkeypatch.setattr(build, "_compile", compile_at_once)
    choose_cache(monkeypatch, tmp_path / "a" / "cache")
    yield calls
    build._object_path.cache_clear()


def choose_cache(monkeypatch, folder: Path) -> None:
    monkeypatch.setenv("MYGPT_CACHE", str(folder))
    build._object_path.cache_clear()


def load() -> dict[str, build.Kernel]:
    """Load the kernels as a new process does, without the cached result."""
    return build.load_library.__wrapped__(build.DECODING)


def digest(kernels: dict[str, build.Kernel]) -> int:
    """The result of some machine code: a digest of ten numbers."""
    data = np.arange(10, dtype=np.int32)
    table = np.array([data.ctypes.data, 10], np.int64)
    return kernels["digest"](table.ctypes.data, 1)


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_cache_folder_is_the_chosen_one_or_the_users(monkeypatch):
    monkeypatch.setenv("MYGPT_CACHE", "/somewhere/else")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cache_folder() == Path("/somewhere/else")
    monkeypatch.setenv("MYGPT_CACHE", "")
    assert cache_folder() == Path("/xdg/mygpt")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/someone")
    assert cache_folder() == Path("/home/someone/.cache/mygpt")


def test_machine_code_is_compiled_once_and_stored(compilations, tmp_path, caplog):
    """One line is logged before the seconds of compiling."""
    assert not build.has_machine_code()
    with caplog.at_level(logging.WARNING, logger="mygpt"):
        first = digest(load())
    assert [record.getMessage() for record in caplog.records] == [
        "compiling the decoding loop, once: about 15 seconds"
    ]
    assert files(tmp_path / "a" / "cache") == [build._object_path().name]
    assert build.has_machine_code()
    caplog.clear()
    assert digest(load()) == first
    assert compilations == ["compiled"]
    assert caplog.records == []


def test_compiling_in_advance_is_done_once(compilations):
    build.compile_now()
    assert build.has_machine_code()
    build.compile_now()
    load()
    assert compilations == ["compiled"]


def test_a_process_that_has_the_code_needs_no_file(compilations, tmp_path):
    load()
    shutil.rmtree(tmp_path / "a")
    assert build.has_machine_code()


def test_other_sources_or_another_processor_have_other_machine_code(monkeypatch, tmp_path):
    """Any kernel's source, and the random numbers', of which a kernel has a constant."""
    import llvmlite.binding as llvm

    package = tmp_path / "mygpt"
    shutil.copytree(Path(build.__file__).parents[2], package)
    monkeypatch.setattr(build, "__file__", str(package / "cpu" / "common" / "build.py"))
    name = build._object_path.__wrapped__
    assert name() == build._object_path(), "the same sources elsewhere"
    names = {name()}
    for source in ("cpu/decode/sample.py", "cpu/common/layout.py", "core/random.py"):
        with (package / source).open("a") as file:
            file.write("# changed\n")
        names.add(name())
    monkeypatch.setattr(llvm, "get_host_cpu_name", lambda: "another")
    names.add(name())
    monkeypatch.setattr(build, "version", lambda package: "99")
    names.add(name())
    assert len(names) == 6


@pytest.mark.parametrize("place", ["file", "file/below", "full"])
def test_a_cache_that_cannot_be_written_is_no_error(compilations, monkeypatch, tmp_path, place):
    """A file where the folder should be, or no space left: the code is compiled and runs."""
    (tmp_path / "file").write_text("not a folder")
    choose_cache(monkeypatch, tmp_path / place)
    if place == "full":

        def write_half(descriptor, data, write=os.write):
            write(descriptor, data[: len(data) // 2])
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("mygpt.checkpoint.durable.os.write", write_half)
    assert not build.has_machine_code()
    digest(load())
    assert compilations == ["compiled"]
    if place == "full":
        assert files(tmp_path / "full") == [], "no partly written file"


PROGRAM = """
import sys, time
from pathlib import Path
from mygpt.cpu.common import build
code = Path(sys.argv[1]).read_bytes()[build._DIGEST_BYTES :]

def compile_slowly(library):
    print("compiled", flush=True)
    time.sleep(float(sys.argv[2]))
    return code

build._compile = compile_slowly
"""


def start(program: str, cache: Path, seconds: float = 0.0) -> subprocess.Popen:
    """Start a process whose compiler returns this process's machine code, with its own cache."""
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM + program, str(build._object_path()), str(seconds)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "MYGPT_CACHE": str(cache)},
    )


@pytest.mark.parametrize("damage", ["cut off", "overwritten"])
def test_damaged_machine_code_is_compiled_again(tmp_path, damage):
    """A file cut off by a full disk or a lost write made LLVM's linker abort every process.

    In another process, since the linker would end this one.
    """
    damages = {
        "cut off": "b'', code[:10], code[:64], code[:1000], code[:size // 2], code[:-1]",
        "overwritten": "bytes(size), b'x' * size, code[:size // 2] + bytes(size - size // 2)",
    }
    program = f"""
size, path = len(code), build._object_path()
path.parent.mkdir(parents=True)
for number, damaged in enumerate([{damages[damage]}]):
    path.write_bytes(damaged)
    build.load_library.cache_clear()
    build.load_library()
    assert path.read_bytes()[build._DIGEST_BYTES :] == code, number
    print("intact again")
"""
    process = start(program, tmp_path / "cache")
    out, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert out.count("intact again") == damages[damage].count(",") + 1
    assert out.count("compiled") == out.count("intact again")


def test_two_processes_may_compile_at_once(tmp_path):
    """Both find no file, both write one; one intact file is left."""
    program = """
build.load_library()
print("loaded")
"""
    both = [start(program, tmp_path / "cache", seconds=0.7) for _ in range(2)]
    for process in both:
        out, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
        assert out == "compiled\nloaded\n"
    assert files(tmp_path / "cache") == [build._object_path().name]
    found = (tmp_path / "cache" / build._object_path().name).read_bytes()
    assert found == build._object_path().read_bytes()


def test_functions_that_are_translated_apart_have_code_once_each():
    with numba_functions_apart():

        @kernel(INT64, returns=INT64)
        def squared(x):
            return x * x

        @kernel(INT64, returns=INT64)
        def cubed(x):
            return x * squared(x)

        @kernel(INT64, returns=INT64)
        def both(x):
            return squared(x) + cubed(x)

    (result,) = both.overloads.values()
    codes = numba_modules([result.library])
    module = llvm.parse_assembly("")
    for code in codes:
        module.link_in(llvm.parse_assembly(code))  # fails where a function is defined twice
    defined = " ".join(f.name for f in module.functions if not f.is_declaration)
    assert all(defined.count(name) == 1 for name in ("squared", "cubed", "both"))

    @kernel(INT64, returns=INT64)
    def doubled(x):
        return x + x

    (result,) = doubled.overloads.values()
    assert result.library.get_pointer_to_function(result.fndesc.llvm_func_name), "as before"


@pytest.mark.skipif(sys.platform != "linux", reason="the addresses are chosen as Linux does")
def test_machine_code_finds_its_constants_where_memory_is_in_pieces():
    """Free memory in small pieces, then 3 GiB that are taken, then as much as is wanted."""
    program = """
import mmap
import numpy as np
from decoding import CpuEngine, SamplingConfig, counting_model, request

taken = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000, "prot": 0}  # MAP_NORESERVE
small = [mmap.mmap(-1, 2**16, **taken) for _ in range(8192)]
wide = mmap.mmap(-1, 3 * 2**30, **taken)
for one in small[::2]:
    one.close()
asked = request(np.array([1]), 8, SamplingConfig(temperature=0.0))
print(CpuEngine(*counting_model(9), threads=1).start([asked]).advance(8))
"""
    assert assert_runs(program) == "[[2, 3, 4, 5, 6, 7, 8, 0]]\n"


@pytest.mark.parametrize(
    ("library", "package"),
    [
        (build.DECODING, "mygpt.cpu.decode"),
        (build.DECODING, "mygpt.cpu.common"),
        (TRAINING, "mygpt.cpu.train"),
    ],
    ids=["decoding", "common", "training"],
)
def test_the_digest_covers_every_file_with_kernels(library, package):
    """After an edit of a file that the digest does not cover the old machine code would run."""
    folder = Path(build.__file__).parents[2].joinpath(*package.split(".")[1:])
    kernels = {
        f"{package}.{path.stem}" for path in folder.glob("*.py") if "@kernel(" in path.read_text()
    }
    assert kernels
    assert kernels <= set(library.sources)
    assert {"mygpt.cpu.common.layout", "mygpt.cpu.common.simd"} <= set(library.sources)
    assert TRAINING.sources.count("mygpt.cpu.train.layout") == 1


# --- a cache that another user can write to ------------------------------------------------


@pytest.mark.parametrize("mask", [0o000, 0o002, 0o077])
def test_the_cache_is_private_whatever_the_umask(compilations, tmp_path, mask):
    """Under umask 000 another user rewrote the machine code, and this one ran it."""
    before = os.umask(mask)
    try:
        load()
    finally:
        os.umask(before)
    for folder in (tmp_path / "a", tmp_path / "a/cache"):
        assert folder.stat().st_mode & 0o777 == 0o700
    assert build._object_path().stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("mode", [0o777, 0o775, 0o1777])
def test_a_folder_that_others_can_write_to_is_neither_used_nor_written(
    compilations, tmp_path, caplog, mode
):
    load()
    path = build._object_path()
    stored = path.read_bytes()
    path.parent.chmod(mode)
    build._linked.clear()
    assert not build.has_machine_code()
    path.write_bytes(stored[:-1])
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="mygpt"):
        digest(load())
    assert compilations == ["compiled"] * 2
    (note,) = [record.getMessage() for record in caplog.records]
    assert f"other users can write to {path.parent} (mode {mode:o}; run chmod go-w on it)" in note
    assert "MYGPT_CACHE" in note
    assert path.read_bytes() == stored[:-1], "nothing is written there"


def test_a_file_that_others_can_write_to_is_replaced_by_a_private_one(compilations):
    load()
    path = build._object_path()
    path.chmod(0o666)
    load()
    load()
    assert compilations == ["compiled"] * 2
    assert path.stat().st_mode & 0o777 == 0o600


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="needs root")
@pytest.mark.parametrize("whose", ["file", "folder", "above"])
def test_machine_code_that_another_user_owns_is_not_run(compilations, tmp_path, whose):
    load()
    path = build._object_path()
    place = {"file": path, "folder": path.parent, "above": tmp_path / "a"}[whose]
    os.chown(place, 65534, 65534)
    load()
    assert compilations == ["compiled"] * 2


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_link_in_the_cache_is_not_followed(compilations, monkeypatch, tmp_path, kind):
    """A link to a file that this user owns was taken for this user's machine code."""
    load()
    path = build._object_path()
    if kind == "file":
        other = tmp_path / "other"
        path.rename(other)
        path.symlink_to(other)
    else:
        (tmp_path / "link").symlink_to(path.parent)
        choose_cache(monkeypatch, tmp_path / "link")
    load()
    assert compilations == ["compiled"] * 2
    if kind == "file":
        assert not path.is_symlink()
        load()
        assert compilations == ["compiled"] * 2
