"""Coverage-guided fuzzing of the parsers of untrusted input, with atheris.

Each parser has a module here with three functions:

    accepts(data)                  parse the bytes of a file or of a connection and use the result;
                                   False if they are refused. Any other exception is a fault.
    seeds()                        small valid inputs by name, from mygpt's own writers
    mutated(data, rng, mutate)     a changed input that reaches the parser: `mutate` changes bytes
                                   at random; digests and lengths are corrected afterwards

`make fuzz` runs each for a minute (`__main__.py`, `instrumented.py`). The seeds are in `corpus/`,
written by `python -m fuzzing.seeds`. An input that causes a fault is stored in `found/`, and
`test_fuzzing.py` repeats both in `make test`, without atheris.
"""

from __future__ import annotations

import importlib
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, Protocol

from mygpt.errors import InputError

NAMES = ("container", "safetensors_files", "tokenizer_files", "torch_files", "requests")
HERE = Path(__file__).resolve().parent
CORPUS, FOUND = HERE / "corpus", HERE / "found"
HANG_S = 5
MOST_BYTES = 2**30  # resident
LONGEST = 2**14  # bytes of an input

Mutate = Callable[[bytes], bytes]


class Target(Protocol):
    """A module of this package that fuzzes one parser."""

    def accepts(self, data: bytes) -> bool: ...

    def seeds(self) -> dict[str, bytes]: ...

    def mutated(self, data: bytes, rng: Any, mutate: Mutate) -> bytes: ...


def target(name: str) -> Target:
    """The module of this name."""
    module: Any = importlib.import_module(f"fuzzing.{name}")
    return module


@cache
def _folder() -> Any:
    return tempfile.TemporaryDirectory(prefix="mygpt-fuzz-")


def folder(name: str) -> Path:
    """A folder of a target's own, for the time of this process."""
    path = Path(_folder().name) / name
    path.mkdir(exist_ok=True)
    return path


class Refused(Exception):
    """The input is refused, as it should be."""


@contextmanager
def refusals() -> Iterator[None]:
    """Turn the documented error of a reader into `Refused`.

    An `OutOfMemoryError` is a fault here: no input has more than a few kilobytes.
    """
    try:
        yield
    except InputError as error:
        message = str(error)
        if "\n" in message or not message:
            raise AssertionError(f"the message is not one line: {message!r}") from error
        raise Refused from None


def inputs(folder: Path) -> list[Path]:
    """The stored inputs of all targets, each in a folder named after its target."""
    return sorted(path for name in NAMES for path in (folder / name).glob("*"))
