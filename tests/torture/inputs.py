"""`mygpt train` on every odd text: its message, its training text, its files and its memory.

Each case runs in a forked child. Checked are the exit code, the one line of the error, the digest
of the training text, the peak memory, and that a refused text leaves no file.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import threading
import tomllib
import traceback
from dataclasses import dataclass
from pathlib import Path

import torch

from mygpt import cli
from torture import Tally
from torture.odd_texts import MB, TEXT, Case, in_background, odd_texts
from torture.runs import warm

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
    base_bytes = _run(Case("a small text", data=TEXT), folder / "small").peak_bytes
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
    tally.note = f"at most {highest / MB:,.0f} MB more memory than for a small text"
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
