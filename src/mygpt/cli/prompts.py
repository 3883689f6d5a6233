"""Read a prompt from an option, a file or standard input, for all commands that take one."""

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

from mygpt.cli.terminal import VisiblePieces, at_words, say
from mygpt.errors import InputError

if TYPE_CHECKING:
    from mygpt.core.config import SamplingConfig
    from mygpt.decode.writer import Writer
    from mygpt.tokenization import Tokenizer

# How long to wait for the first byte of a pipe. A program that writes to it has started by then,
# since Python itself took longer to start. Some pipes, of schedulers for example, never get data.
_PIPE_WAIT_S = 0.5
_PAUSE_S = 10.0  # how long to wait for more bytes after the first ones
_BLOCK = 2**16  # bytes


def read_prompt(
    prompt: str | None, prompt_file: Path | None, encoding: str | None, unknown: str = "error"
) -> str | None:
    """Return the prompt as text, or None if there is none.

    Standard input is read if the prompt is "-". If no prompt is given, it is also read if it is a
    file, or a pipe that contains data.

    Raises:
        InputError: if the input cannot be read or is not text, if two prompts are given, or if
            `unknown` is not error or drop (see `known_prompt`).
    """
    from mygpt.tokenization.unknown import PROMPT_POLICIES, check_policy

    check_policy(unknown, PROMPT_POLICIES)
    if prompt is not None and prompt_file is not None:
        raise InputError("--prompt and --prompt-file exclude each other")
    if prompt_file is not None or prompt == "-":
        return _text_of(str(prompt_file or "-"), encoding)
    if prompt is None:
        with _ready_input() as ready:
            return _text_of("-", encoding) if ready else None
    if encoding is not None:
        raise InputError("--encoding is for --prompt-file and standard input: omit it")
    return prompt


def _text_of(name: str, encoding: str | None) -> str:
    from mygpt.text import read_text

    text, notes = read_text(name, encoding=encoding)
    for note in notes:
        _note(note)
    return text


@contextlib.contextmanager
def _ready_input() -> Iterator[bool]:
    """Whether standard input contains text although `--prompt -` was not given.

    Reading never blocks forever. A file that was read from already does not count: it may be the
    input of a shell loop around this command.
    """
    buffer = getattr(sys.stdin, "buffer", None)
    if isinstance(buffer, io.BytesIO):
        yield True
        return
    try:
        descriptor = sys.stdin.fileno()
        kind = os.fstat(descriptor).st_mode
    except (OSError, ValueError, AttributeError):  # standard input is closed
        yield False
        return
    if stat.S_ISREG(kind):
        yield os.lseek(descriptor, 0, os.SEEK_CUR) == 0 and os.fstat(descriptor).st_size > 0
        return
    if not (stat.S_ISFIFO(kind) or stat.S_ISSOCK(kind)) or os.name != "posix":
        yield False
        return
    data = _read_available(descriptor)
    if not data:
        yield False
        return
    _note("the prompt was read from standard input (-p - waits for its end)")
    stdin, sys.stdin = sys.stdin, io.TextIOWrapper(io.BytesIO(data))
    try:
        yield True
    finally:
        sys.stdin = stdin


def _read_available(descriptor: int) -> bytes:
    """Read a pipe up to its end or a long pause."""
    data = bytearray()
    while select.select([descriptor], [], [], _PAUSE_S if data else _PIPE_WAIT_S)[0]:
        block = os.read(descriptor, _BLOCK)
        if not block:
            return bytes(data)
        data += block
    if not data:
        _note("standard input is empty, so there is no prompt (-p - waits for one)")
    return bytes(data)


def known_prompt(tokenizer: Tokenizer, text: str, unknown: str) -> str:
    """Return the prompt, without unknown characters if `unknown` is "drop".

    If the tokenizer encodes unknown characters as its unknown token, a note is printed.

    Raises:
        UnknownTokenError: for characters that the tokenizer cannot encode, unless `unknown` is
            "drop".
    """
    from mygpt.tokenization.unknown import adding_remedy, dropped_note, without_unknown

    known, left = without_unknown(tokenizer, text)
    if unknown == "drop":
        if left:
            _note(dropped_note(left))
        return known
    with adding_remedy("--unknown drop removes them"):
        tokenizer.encode_array(text)
    if left:
        read = "they become its unknown token, or nothing (--unknown drop removes them)"
        _note(dropped_note(left, kept=read))
    return text


def seed_to_use(seed: int | None, sampling: SamplingConfig) -> int:
    """The seed that was given, or a random one, which is printed if it matters.

    Raises:
        InputError: for a seed out of range.
    """
    from mygpt.core.random import check_seed
    from mygpt.engine import fresh_seed

    if seed is None:
        seed = fresh_seed()
        if not sampling.greedy:
            say(f"seed {seed}", file=sys.stderr)
    check_seed(seed)
    return seed


def note_crop(writer: Writer, text: str, overflow: str) -> None:
    """Print a note if a prompt is longer than the context window and is cropped to it."""
    tokens, window = len(writer.prompt_ids(text)), writer.config.max_seq_len
    if tokens > window and overflow != "stop":
        say(f"the prompt has {tokens} tokens: the model reads the last {window}", file=sys.stderr)


def print_stream(writer: Writer, text: str, how: dict[str, Any]) -> None:
    """Print a prompt and its continuation, token by token; `how`: arguments of `Writer.stream`."""
    shown = VisiblePieces(sys.stdout)
    pieces = writer.stream(text, **how)  # wrong values are refused before anything is printed
    say(shown(text), end="", flush=True)
    for text in pieces:
        say(shown(text), end="", flush=True)
    if not text.endswith("\n"):
        say()


def _note(text: str) -> None:
    say(at_words(f"note: {text}", sys.stderr), file=sys.stderr)
