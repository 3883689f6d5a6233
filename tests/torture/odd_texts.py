"""`mygpt train` on inputs that are no text, too long, or change while they are read.

Each `Case` runs in a forked child. Checked are the exit code, the one line of the error, the digest
of the training text, the peak memory, and that a refused text leaves no file.
"""

from __future__ import annotations

import codecs
import contextlib
import gzip
import hashlib
import math
import os
import resource
import shutil
import signal
import socket
import sys
import threading
import time
import tomllib
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from mygpt import cli
from mygpt.machine import free_memory_bytes
from mygpt.text import corpus, reading
from torture import Tally
from torture.runs import warm

MB = 10**6
TEXT = b"the quick brown fox jumps over the lazy dog\n" * 50
LONGER = TEXT * 1000  # 2.2 MB, three blocks
CHARACTERS = ("text", "--tokenizer", "char")
PACKED = ("text.gz",)
STDIN = ("-",)


@dataclass(frozen=True)
class Case:
    """One call of `mygpt train` in a folder of its own.

    Attributes:
        name: what is odd about the text.
        says: a part of its output.
        code: its exit code.
        data: content of the file `text`; None: there is no such file.
        digest: SHA-256 of the training text that the run must record.
        args: its arguments after `train`.
        prepare: makes the other files of the folder.
        inside: called in the child, before the command.
        stdin: a file's path; "pipe", which `feed` is written to; or "closed".
        feed: blocks for that pipe.
        holds: bytes of memory that it may use beyond a run on `LONGER`, of which the comparisons
            with other models after the training take most.
    """

    name: str
    says: str = ""
    code: int = 0
    data: bytes | None = None
    digest: str = ""
    args: tuple[str, ...] = ("text",)
    prepare: Callable[[Path], object] = lambda folder: None
    inside: Callable[[], object] = lambda: None
    stdin: str = os.devnull
    feed: Callable[[], Iterator[bytes]] = lambda: iter(())
    holds: float = 0


def odd_texts() -> list[Case]:
    """All cases, the quick ones first."""
    return [*_refused(), *_accepted(), *_changing(), *_too_long(), *_long()]


def _refused() -> Iterator[Case]:
    refused = partial(Case, code=2)
    yield refused("an empty file", "text is empty", data=b"")
    yield refused("one byte", "has 1 character: too short", data=b"a")
    yield refused("a byte order mark alone", "text is empty", data=codecs.BOM_UTF8)
    yield refused("no file", "text does not exist")
    yield refused("a broken link", "text does not exist", prepare=_link("nowhere"))
    yield refused("a link to itself", "text cannot be read", prepare=_link("text"))
    yield refused("a name of two lines", r"'one\ntwo' does not exist", args=("one\ntwo",))
    yield refused("a long name", "nnn cannot be read", args=("n" * 300,))
    yield refused("no name", "file name is empty", args=("",))
    yield refused("no match", "no file matches", args=("*.txt",))
    yield refused("an empty folder", "contains no text", prepare=lambda f: (f / "text").mkdir())
    yield refused("a folder of oddities", "contains no text", prepare=_oddities)
    yield refused("a socket", "cannot be read", args=("text/socket",), prepare=_oddities)
    yield refused("endless zeros", "is a device", args=("/dev/zero",))
    yield refused("endless noise", "is a device", args=("/dev/urandom",))
    yield refused("nothing at all", "null is empty", args=(os.devnull,))
    yield refused("nothing on stdin", "standard input is empty", args=STDIN)
    yield refused("zeros on stdin", "is a device", args=STDIN, stdin="/dev/zero")
    yield refused("no stdin", "standard input is closed", args=STDIN, stdin="closed")
    yield refused("not UTF-8", "byte 0xff at position 3", data=b"abc\xff", args=CHARACTERS)
    half = TEXT + b"\xe2\x82"
    yield refused("half a character", f"at position {len(TEXT)}", data=half, args=CHARACTERS)
    utf_7 = (*CHARACTERS, "--encoding", "utf-7")
    yield refused("a surrogate", "character 2 is the lone", data=b"ab+2AA-c", args=utf_7)
    for name in ("idna", "punycode", "rot13", "base64", "zlib", "undefined", "", "a/b", "\u20ac"):
        args = ("text", "--encoding", name)
        yield refused(f"encoding {name!r}", "is not known", data=TEXT, args=args)
    packed = gzip.compress(TEXT)
    for data in (TEXT, packed[:-9], packed + b"rest", packed[:30] + b"\xff" + packed[31:]):
        bad = partial(_put, name="text.gz", data=data)
        yield refused("a bad gzip", "is not a complete gzip", args=PACKED, prepare=bad)
    zeros = _packed(bytes(10 * MB), times=1000)
    yield refused(
        "10 GB, packed", "more than 100 times", args=PACKED, prepare=zeros, holds=100 * MB
    )
    yield refused("a silent pipe", "no process wrote", prepare=_pipe(None), inside=_wait_less)
    if os.geteuid():
        locked = {"data": TEXT, "prepare": lambda f: (f / "text").chmod(0)}
        yield refused("a locked file", "cannot be read", **locked)


def _accepted() -> Iterator[Case]:
    unchanged = {
        "shorter than a window": b"short text",
        "NUL bytes": b"one\0two\0" * 100,
        "ends of lines": b"one\r\ntwo\rthree\n" * 50,
        "not UTF-8, as bytes": TEXT + b"\xff",
    }
    for name, data in unchanged.items():
        yield Case(name, data=data, digest=_sha(data))
    word = "na\u00efve \U0001f642 " * 50
    for mark, codec in (
        (codecs.BOM_UTF8, "utf-8"),
        (codecs.BOM_UTF16_LE, "utf-16-le"),
        (codecs.BOM_UTF32_BE, "utf-32-be"),
    ):
        yield Case(
            f"a {codec} byte order mark", data=mark + word.encode(codec), digest=_sha(word.encode())
        )
    accepted = partial(Case, digest=_sha(TEXT))
    for codec in ("utf-7", "utf-16", "utf-32", "unicode_escape", "cp1252", "shift_jis", "hz"):
        data = TEXT.decode().encode(codec)
        yield accepted(f"encoding {codec}", data=data, args=("text", "--encoding", codec))
    for name in ("-", "/dev/stdin", "/dev/fd/0"):
        yield accepted(f"a pipe as {name}", args=(name,), stdin="pipe", feed=_haltingly)
    yield accepted("a named pipe", prepare=_pipe(_haltingly), inside=_wait_less)
    yield accepted("a folder", "skipped 2 files", prepare=_text_and_oddities)
    yield accepted("two parts", args=PACKED, prepare=_packed(TEXT[:9], TEXT[9:]))
    odd = partial(_put, name="a\nb", data=TEXT)
    yield accepted("a name of two lines", args=("a\nb",), prepare=odd)


def _changing() -> Iterator[Case]:
    changing = partial(Case, says="changed while it was read", data=LONGER, holds=4 * len(LONGER))
    shrunk = LONGER[: 3 * len(LONGER) // 5]
    shrink = _after_each_block(lambda: os.truncate("text", len(shrunk)))
    yield changing("it shrinks", digest=_sha(shrunk), inside=shrink)
    vanish = _after_each_block(lambda: Path("text").unlink(missing_ok=True))
    yield changing("it vanishes", digest=_sha(LONGER), inside=vanish)
    once = _after_each_block(lambda: _append(TEXT, up_to=len(LONGER + TEXT)))
    yield changing("it grows", digest=_sha(LONGER + TEXT), inside=once)


def _too_long() -> Iterator[Case]:
    long = partial(Case, code=4)
    size = max(10_000 * MB, free_memory_bytes() or 0)
    yield long("10 GB", "GB are free", prepare=partial(_sparse, size=size))
    free = _free(6 * len(LONGER))
    second = partial(_put, name="b", data=LONGER)
    yield long("two", "in 2 files", data=LONGER, args=("text", "b"), prepare=second, inside=free)
    wide = LONGER + "\U0001f642".encode()
    yield long("wide characters", "2.2 MB", data=wide, inside=free, holds=3 * len(wide))
    grow = _after_each_block(lambda: _append(LONGER))
    small, some = _free(200 * MB), _free(500 * MB)
    grows = partial(long, "it grows without end", "text is more than", data=LONGER)
    yield grows(inside=lambda: (small(), grow()), holds=200 * MB)
    endless = partial(long, "a pipe without end", "is more than", args=STDIN, stdin="pipe")
    yield endless(feed=lambda: iter(bytes, None), inside=some, holds=500 * MB)
    most = partial(long, "few addresses", "out of memory", inside=_limit(150 * MB))
    yield most(prepare=partial(_sparse, size=300 * MB), holds=150 * MB)


def _long() -> Iterator[Case]:
    """A line of 100 MB, in memory with one byte per character, and with four."""
    for start, width in ((b"", 1), ("\U0001f642".encode(), 4)):
        holds = corpus._HEADROOM * (corpus._PER_BYTE + width) * 100 * MB
        digest = hashlib.sha256()
        for piece in _line(start):
            digest.update(piece)
        write = partial(_write_line, start=start)
        yield Case("100 MB", digest=digest.hexdigest(), prepare=write, holds=holds)


# What the cases need


def _sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _line(start: bytes) -> Iterator[bytes]:
    yield start
    piece = TEXT.replace(b"\n", b" ") * 500
    yield from (piece for _ in range(100 * MB // len(piece)))


def _write_line(folder: Path, start: bytes) -> None:
    with open(folder / "text", "wb") as file:
        file.writelines(_line(start))


def _put(folder: Path, name: str, data: bytes) -> None:
    (folder / name).write_bytes(data)


def _packed(*parts: bytes, times: int = 1) -> Callable[[Path], None]:
    data = b"".join(map(gzip.compress, parts))
    return lambda folder: _put(folder, "text.gz", data * times)


def _sparse(folder: Path, size: int, name: str = "text") -> None:
    (folder / name).touch()
    os.truncate(folder / name, size)


def _link(target: str) -> Callable[[Path], None]:
    return lambda folder: (folder / "text").symlink_to(target)


def _oddities(folder: Path) -> None:
    """A folder that holds everything but text; two of these are files."""
    place = folder / "text"
    place.mkdir()
    os.mkfifo(place / "pipe")
    for name, target in (("broken", "nowhere"), ("zeros", "/dev/zero"), ("above", "..")):
        (place / name).symlink_to(target)
    _put(place, "noise.bin", b"\x89\xff\xfe")
    _sparse(place, 10_000 * MB, "sparse.bin")
    directory = os.open(place, os.O_RDONLY)  # a socket's path must be short
    with socket.socket(socket.AF_UNIX) as unix:
        unix.bind(f"/proc/self/fd/{directory}/socket")
    os.close(directory)


def _text_and_oddities(folder: Path) -> None:
    _oddities(folder)
    _put(folder / "text", "words", TEXT)


def _haltingly() -> Iterator[bytes]:
    """A text whose writer pauses, for longer than a reader waits for a first writer."""
    yield TEXT[:100]
    time.sleep(0.5)
    yield TEXT[100:]


def _pipe(feed: Callable[[], Iterator[bytes]] | None) -> Callable[[Path], None]:
    def prepare(folder: Path) -> None:
        os.mkfifo(folder / "text")
        if feed is not None:
            in_background(lambda: os.open(folder / "text", os.O_WRONLY), feed)

    return prepare


def in_background(opened: Callable[[], int], feed: Callable[[], Iterator[bytes]]) -> None:
    """Write the blocks of `feed` to the pipe that `opened` opens, until its reader closes it."""

    def write() -> None:
        with contextlib.suppress(BrokenPipeError), open(opened(), "wb", buffering=0) as pipe:
            for data in feed():
                pipe.write(data or bytes(65536))

    threading.Thread(target=write, daemon=True).start()


def _wait_less() -> None:
    reading._WRITER_WAIT_S = 0.2


def _append(data: bytes, up_to: float = math.inf) -> None:
    if os.path.getsize("text") < up_to:
        with open("text", "ab") as file:
            file.write(data)


def _after_each_block(action: Callable[[], object]) -> Callable[[], None]:
    """Call `action` after each block that is read."""

    def watched(name, **options):
        for block in reading.blocks_of(name, **options):
            yield block
            action()

    def inside() -> None:
        corpus.blocks_of = watched

    return inside


def _free(num_bytes: int) -> Callable[[], None]:
    """Report `num_bytes` as the free memory."""

    def inside() -> None:
        corpus.free_memory_bytes = lambda: num_bytes

    return inside


def _limit(more: int) -> Callable[[], None]:
    """Limit the address space to its size now and `more` bytes."""

    def inside() -> None:
        now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now + more, now + more))

    return inside


# Running them

OPTIONS = [
    *("--preset", "nano", "--embed-dim", "8", "--num-heads", "2", "--num-layers", "1"),
    *("--batch-size", "2", "--steps", "3", "--sample-tokens", "0", "--device", "cpu"),
    *("--output", "run"),
]
_SLACK = 64 * MB  # for pieces of a text, and for memory that the allocator keeps
_LIMIT_S = 600


def text_inputs(count: int, folder: Path) -> Tally:
    """Train on the first `count` of `odd_texts()`, the quick ones first."""
    tally = Tally("odd texts, refused in one line or trained on as documented")
    warm()
    base_bytes = _run(Case("an ordinary text", data=LONGER), folder / "ordinary").peak_bytes
    highest = 0.0
    for number, case in enumerate(odd_texts()[:count]):
        place = folder / f"{number}"
        outcome = _run(case, place)
        taken, allowed = outcome.peak_bytes - base_bytes, case.holds + _SLACK
        wrong = outcome.wrong(case, place)
        if taken > allowed:
            wrong += f" {taken / MB:,.0f} MB of memory, more than {allowed / MB:,.0f}"
        tally.count(not wrong, f"{case.name}: {wrong}")
        highest = max(highest, taken)
        shutil.rmtree(place)
    tally.note = f"at most {highest / MB:,.0f} MB more memory than for a text of 2.2 MB"
    return tally


@dataclass(frozen=True)
class Outcome:
    """How a command ended, and what was in its folder before and after."""

    code: int
    out: str
    error: str
    peak_bytes: int
    before: set[str]
    after: set[str]

    def wrong(self, case: Case, folder: Path) -> str:
        """What differs from the case's expectation; empty if nothing does."""
        output = self.out + self.error
        if self.code != case.code or case.says not in output or "Traceback" in output:
            return f"ended with {self.code}, printed {output[-300:]!r}"
        if case.code == 0:
            trained_on = tomllib.loads((folder / "run/config.toml").read_text())["corpus_sha256"]
            return "" if case.digest in ("", trained_on) else "trained on another text"
        if self.error.count("\n") != 1 or not self.error.startswith("mygpt: ") or self.out:
            return f"printed {self.out!r} and {self.error!r}"
        left = self.after - self.before
        return f"left {left}" if left else ""


def _run(case: Case, folder: Path) -> Outcome:
    folder.mkdir()
    if case.data is not None:
        (folder / "text").write_bytes(case.data)
    case.prepare(folder)
    before = set(map(str, folder.rglob("*")))
    outside = folder.with_suffix(".out"), folder.with_suffix(".err")
    reading_end, writing_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(writing_end)
        _call(case, folder, outside, reading_end)
    os.close(reading_end)
    if case.stdin == "pipe":
        in_background(lambda: writing_end, case.feed)
    else:
        os.close(writing_end)
    clock = threading.Timer(_LIMIT_S, os.kill, (pid, signal.SIGKILL))
    clock.start()
    _, status, usage = os.wait4(pid, 0)
    clock.cancel()
    out, error = (path.read_text(errors="replace") for path in outside)
    after = set(map(str, folder.rglob("*")))
    code = os.waitstatus_to_exitcode(status)
    return Outcome(code, out, error, usage.ru_maxrss * 1024, before, after)


def _call(case: Case, folder: Path, outside: tuple[Path, Path], pipe: int) -> None:
    """The command, in the child; does not return."""
    code: object = 99
    try:
        os.chdir(folder)
        for number, path in zip((1, 2), outside, strict=True):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT, 0o644), number)
        os.dup2(pipe if case.stdin in ("pipe", "closed") else os.open(case.stdin, os.O_RDONLY), 0)
        sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w")  # noqa: SIM115
        if case.stdin == "closed":
            sys.stdin = None
        torch.set_num_threads(1)
        case.inside()
        cli.main(["train", *case.args, *OPTIONS])
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 0)
