"""Where a prompt comes from, the same for every command that takes one."""

from __future__ import annotations

import contextlib
import io
import os
import select
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from mygpt.cli.terminal import say
from mygpt.errors import InputError

if TYPE_CHECKING:
    from mygpt.tokenization import Tokenizer

# A program that writes into a pipe has begun by then, since Python itself took longer to start. A
# pipe that nobody writes to (of a scheduler, say) must not be waited for without end.
_PIPE_WAIT_S = 0.5
_PAUSE_S = 10.0  # of a writer that has begun
_BLOCK = 2**16  # bytes

PROMPT_FILE: Any = typer.Option(
    help="Read the prompt from a file, as texts to train on are read.", show_default=False
)
ENCODING: Any = typer.Option(
    help="Of --prompt-file or standard input; without it UTF-8, or what a BOM says.",
    show_default=False,
)
UNKNOWN: Any = typer.Option(
    help="What becomes of characters of the prompt that the model does not know: error, or drop "
    "(they are left out, with a note)."
)


def read_prompt(prompt: str | None, prompt_file: Path | None, encoding: str | None) -> str | None:
    """The prompt as text; None where none was given.

    Standard input is read where it is asked for ("-"), and without any prompt also where a file
    or a pipe that has been written to stands behind it.

    Raises:
        InputError: for what cannot be read or is no text, and for two prompts.
    """
    if prompt is not None and prompt_file is not None:
        raise InputError("--prompt and --prompt-file exclude each other")
    name = None if prompt_file is None else str(prompt_file)
    if name is None and prompt != "-":
        if prompt is not None:
            if encoding is not None:
                raise InputError("--encoding is for --prompt-file and standard input: leave it out")
            return prompt
        with _ready_input() as ready:
            return _text_of("-", encoding) if ready else None
    return _text_of("-" if name is None else name, encoding)


def _text_of(name: str, encoding: str | None) -> str:
    from mygpt.text import read_text

    text, notes = read_text(name, encoding=encoding)
    for note in notes:
        _note(note)
    return text


@contextlib.contextmanager
def _ready_input() -> Iterator[bool]:
    """Whether standard input has text that was not asked for; reading it does not wait for ever.

    A file that somebody has read from already is not ours: a shell's loop reads its lines.
    """
    buffer = getattr(sys.stdin, "buffer", None)
    if isinstance(buffer, io.BytesIO):
        yield True
        return
    try:
        descriptor = sys.stdin.fileno()
        kind = os.fstat(descriptor).st_mode
    except (OSError, ValueError, AttributeError):  # closed, or none
        yield False
        return
    if stat.S_ISREG(kind):
        yield os.lseek(descriptor, 0, os.SEEK_CUR) == 0 and os.fstat(descriptor).st_size > 0
        return
    if not (stat.S_ISFIFO(kind) or stat.S_ISSOCK(kind)) or os.name != "posix":
        yield False
        return
    data = _gathered(descriptor)
    if not data:
        yield False
        return
    _note("the prompt is what came through standard input (-p - waits for all of it)")
    stdin, sys.stdin = sys.stdin, io.TextIOWrapper(io.BytesIO(data))
    try:
        yield True
    finally:
        sys.stdin = stdin


def _gathered(descriptor: int) -> bytes:
    """What a pipe's writer has written, up to its end or a long pause."""
    data = bytearray()
    while select.select([descriptor], [], [], _PAUSE_S if data else _PIPE_WAIT_S)[0]:
        block = os.read(descriptor, _BLOCK)
        if not block:
            return bytes(data)
        data += block
    if not data:
        _note("nothing came through standard input: there is no prompt (-p - waits for one)")
    return bytes(data)


def known_prompt(tokenizer: Tokenizer, text: str, unknown: str) -> str:
    """A prompt of which the tokenizer knows all; what it does not know is left out, or an error.

    Where a tokenizer reads its unknown token instead, that is said.

    Raises:
        UnknownTokenError: for characters that it does not take, unless these are dropped.
    """
    from mygpt.tokenization.unknown import adding_remedy, dropped_note, without_unknown

    known, left = without_unknown(tokenizer, text)
    if unknown == "drop":
        if left:
            _note(dropped_note(left))
        return known
    with adding_remedy("--unknown drop leaves them out"):
        tokenizer.encode_array(text)
    if left:
        read = "it reads the unknown token for them, or nothing (--unknown drop leaves them out)"
        _note(dropped_note(left, kept=read))
    return text


def check_unknown(unknown: str) -> None:
    """Raise `InputError` for another word than error and drop."""
    from mygpt.tokenization.unknown import PROMPT_POLICIES, check_policy

    check_policy(unknown, PROMPT_POLICIES)


def _note(text: str) -> None:
    say(f"note: {text}", file=sys.stderr)
