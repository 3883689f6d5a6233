"""Messages of the package, which name the command's flags, for Python: they name arguments.

The packages below write one message for both. A flag of `mygpt train`, `mygpt generate` or
`mygpt serve` that is an argument in Python gets the argument's name here. A complete command, as
in "mygpt tokenize FILES --out STORE", stays: it is for a terminal.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, get_type_hints

from mygpt.decode.choice import ENGINES
from mygpt.errors import MygptError

_NAMES = {"from": "init_from", "checkpoint": "path"}  # flags whose argument has another name
# A path as `shlex.quote` writes it.
_PATH = r"('[^']*'|[\w@%+=:,./-]*[\w/])"
_CALLS = [
    (re.compile(rf"`?mygpt train --resume {_PATH}`?"), "mygpt.resume({})"),
    (re.compile(rf"`?mygpt generate --checkpoint {_PATH}`?"), "mygpt.load({}).generate()"),
    (re.compile(rf"`?mygpt report {_PATH}`?"), "mygpt.load({}).report()"),
    (re.compile(rf"resume it with --resume {_PATH}"), "resume it with mygpt.resume({})"),
]
# A command up to the end of its clause, or a flag with the word after it.
_COMMAND_OR_FLAG = re.compile(
    r"mygpt [a-z]+ [^`;)\n]*|(?<![\w-])--(no-|\[no-\])?([a-z]+(?:-[a-z]+)*)( [a-z]\w*)?"
)


def in_python(message: str) -> str:
    """The message with arguments in place of flags: "a lower --lr" becomes "a lower lr"."""
    for command, call in _CALLS:
        while found := command.search(message):
            message = (
                message[: found.start()] + call.format(_literal(found[1])) + message[found.end() :]
            )
    return _COMMAND_OR_FLAG.sub(_argument, message)


def _literal(path: str) -> str:
    """A path in a shell's quotes as a Python string."""
    return repr(path[1:-1] if path.startswith("'") else path)


def _argument(found: re.Match[str]) -> str:
    if found[2] is None:  # a command
        return found[0]
    name = _NAMES.get(found[2], found[2].replace("-", "_"))
    if name not in _types():
        return found[0]
    after = found[3] or ""
    if _types()[name] in (bool, bool | None) and found[1] != "[no-]":
        return f"{name}={found[1] is None}{after}"
    if name == "engine" and after[1:] in ENGINES:
        return f"{name}={after[1:]!r}"
    return name + after


@cache
def _types() -> dict[str, Any]:
    """The arguments that have flags, and their types."""
    from mygpt.api.options import TrainOptions
    from mygpt.decode.options import LoadOptions

    return {"path": str, **get_type_hints(LoadOptions), **get_type_hints(TrainOptions)}


@contextmanager
def arguments_named() -> Iterator[None]:
    """Errors of the package raised inside name arguments."""
    try:
        yield
    except MygptError as error:
        error.args = (in_python(str(error)), *error.args[1:])
        raise
