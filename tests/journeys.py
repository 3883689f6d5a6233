"""Count what runs between a command's function and another function: files and call chains.

    python tests/journeys.py START STOP -- generate -c run -p Hello

START and STOP are functions such as cli/generate.py:generate. It prints JSON: `files`, the files
of the package of which a function ran from START until STOP was called; `deepest`, the longest
chain of calls in that time; `chain`, the one to STOP. Module and class bodies, which run when
they are imported, and comprehensions do not count.
"""

from __future__ import annotations

import json
import os
import sys
import threading
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


if __name__ == "__main__":
    from mygpt.cli import main

    _, start, stop, _, *arguments = sys.argv
    tracer = Tracer(start, stop)
    threading.setprofile(tracer)
    sys.setprofile(tracer)
    main(arguments)
