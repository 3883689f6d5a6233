"""Calls of the `tokenizers` library, whose exceptions and panics become one-line errors."""

from __future__ import annotations

import os
import re
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from functools import cache
from typing import TYPE_CHECKING

from mygpt.errors import InputError

if TYPE_CHECKING:
    import tokenizers

_CANNOT_ENCODE = "the tokenizers library could not encode this text"
_BRIEF = 2**16  # characters: standard error is redirected only for shorter texts (see `refusals`)
_LONG = 4096  # characters: the library needs a few ms for them


def encode(library: tokenizers.Tokenizer, texts: list[str]) -> list[list[int]]:
    """The ids of each text, without the post-processor's tokens; `InputError` if that fails.

    Long texts are encoded as a batch: for a batch the library releases Python's global lock, and
    `encode_batch_fast` does not compute offsets.
    """
    if sum(map(len, texts)) < _LONG:
        return [encoding(library, text).ids for text in texts]
    quiet = sum(map(len, texts)) < _BRIEF
    with refusals(_CANNOT_ENCODE, quiet=quiet):
        found = library.encode_batch_fast(texts, add_special_tokens=False)
    return [each.ids for each in found]


def encoding(library: tokenizers.Tokenizer, text: str) -> tokenizers.Encoding:
    """A text's encoding with offsets, without the post-processor's tokens."""
    with refusals(_CANNOT_ENCODE, quiet=len(text) < _BRIEF):
        return library.encode(text, add_special_tokens=False)


@contextmanager
def refusals(what: str, *, quiet: bool = True) -> Iterator[None]:
    """Turn the library's exceptions and panics into an `InputError`.

    Args:
        what: the beginning of the error message.
        quiet: suppress the message that a panic writes to standard error. This redirects the
            process's standard error, so it applies in the main thread only.
    """
    quiet = quiet and threading.current_thread() is threading.main_thread()
    try:
        with _without_panics() if quiet else nullcontext():
            yield
    except BaseException as error:
        # A panic in Rust arrives as a BaseException that is not an Exception.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        lines = str(error).splitlines() or [type(error).__name__]
        raise InputError(f"{what}: {lines[0][:120]}") from None


_PANIC = re.compile(rb"\n?thread '.*", re.DOTALL)  # the lines that a panic writes


@contextmanager
def _without_panics() -> Iterator[None]:
    """Suppress panic messages on standard error; other output is written afterwards.

    A panic in Rust writes to file descriptor 2 directly, not through `sys.stderr`, and does so
    before the exception reaches Python.
    """
    try:
        kept = os.dup(2)
    except OSError:  # it is closed
        yield
        return
    sink = _sink()
    os.dup2(sink, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        if length := os.fstat(sink).st_size:
            os.lseek(sink, 0, os.SEEK_SET)
            written = _PANIC.sub(b"", os.read(sink, length))
            os.lseek(sink, 0, os.SEEK_SET)
            os.ftruncate(sink, 0)
            with suppress(OSError):
                os.write(2, written)


@cache
def _sink() -> int:
    """The descriptor of an anonymous file that collects standard error."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("mygpt-stderr")
    with tempfile.TemporaryFile(buffering=0) as file:
        return os.dup(file.fileno())
