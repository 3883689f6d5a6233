"""Count what runs between a command's function and another function: files and call chains.

    python tests/journeys.py START STOP -- generate -c run -p Hello

START and STOP are functions such as cli/generate.py:generate. It prints JSON: `files`, the files
of the package of which a function ran from START until STOP was called; `deepest`, the longest
chain of calls in that time; `chain`, the one to STOP. Module and class bodies, which run when
they are imported, and comprehensions do not count.

More commands may follow, each after "+". A command without START and STOP is run to its end.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import traceback
from types import FrameType
from typing import Any

import mygpt

ROOT = os.path.dirname(mygpt.__file__) + os.sep
NOT_CALLS = ("<listcomp>", "<dictcomp>", "<setcomp>", "<lambda>")


class Tracer:
    """Follows calls in all threads.

    Args:
        start: where counting begins, as "file.py:qualified.name".
        stop: where it ends; the report is printed then, and the process exits.
    """

    def __init__(self, start: str, stop: str) -> None:
        self.start, self.stop = start, stop
        self.active = False
        self.files: list[str] = []
        self.deepest: list[str] = []

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        """One event, as `sys.setprofile` reports it."""
        if event != "call" or not frame.f_code.co_filename.startswith(ROOT):
            return
        name = name_of(frame)
        self.active |= name == self.start
        if not self.active:
            return
        chain = self.chain(frame)
        if chain is None:
            return
        file = name.partition(":")[0]
        if file not in self.files:
            self.files.append(file)
        if len(chain) > len(self.deepest):
            self.deepest = chain
        if name == self.stop:
            found = {"files": self.files, "deepest": self.deepest, "chain": chain}
            sys.__stdout__.write(f"\n{json.dumps(found)}\n")  # type: ignore[union-attr]
            sys.__stdout__.flush()  # type: ignore[union-attr]
            os._exit(0)

    def chain(self, frame: FrameType | None) -> list[str] | None:
        """The package's calls up to this one; None where it is part of an import."""
        calls: list[str] = []
        while frame is not None:
            code = frame.f_code
            if code.co_name == "<module>" or "importlib" in code.co_filename:
                return None
            if code.co_filename.startswith(ROOT) and code.co_name not in NOT_CALLS:
                calls.append(name_of(frame))
                if calls[-1] == self.start:
                    break
            frame = frame.f_back
        return calls[::-1]


def name_of(frame: FrameType) -> str:
    """A function as "file.py:qualified.name"."""
    file = frame.f_code.co_filename[len(ROOT) :].replace(os.sep, "/")
    return f"{file}:{frame.f_code.co_qualname}"


def run(words: list[str]) -> None:
    """Run one command in a process of its own: START STOP -- ARGUMENTS, or -- ARGUMENTS."""
    end = words.index("--")
    pid = os.fork()
    if pid:
        os.waitpid(pid, 0)
        return
    if end:
        tracer = Tracer(*words[:end])
        threading.setprofile(tracer)
        sys.setprofile(tracer)
    code: object = 1
    try:
        main(words[end + 1 :])
    except SystemExit as left:
        code = left.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code if isinstance(code, int) else 1)


if __name__ == "__main__":
    import torch._dynamo  # once for all commands, and not while calls are followed  # noqa: F401

    from mygpt.cli import main

    commands: list[list[str]] = [[]]
    for word in sys.argv[1:]:
        if word == "+":
            commands.append([])
        else:
            commands[-1].append(word)
    for command in commands:
        run(command)
