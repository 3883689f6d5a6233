"""`mygpt tokenize`: any amount of text into a token store, which training reads piece by piece."""

from __future__ import annotations

import contextlib
import os
import shlex
import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mygpt.cli.terminal import new_console, say
from mygpt.errors import InputError
from mygpt.signals import ExitAction

if TYPE_CHECKING:
    from mygpt.data import TokenStore
    from mygpt.data.store_builder.build import StoreProgress
    from mygpt.tokenization import Tokenizer
    from mygpt.tokenization.unknown import UnknownText

_LINE_S = 10.0  # between plain lines


def tokenize(
    files: Annotated[
        list[str],
        typer.Argument(
            help="Text files, folders, patterns, or - for standard input; *.gz and *.zst are "
            "unpacked; *.jsonl has a document a line, *.csv, *.tsv and *.parquet one a row, *.json "
            "one an object.",
            show_default=False,
        ),
    ],
    out: Annotated[str, typer.Option(help="The store's folder.", show_default=False)],
    tokenizer: Annotated[
        str,
        typer.Option(
            help="bpe or bpe:SIZE (learned from the files), char, byte, a tokenizer's JSON file, "
            "or a run, checkpoint, store or Hugging Face folder whose tokenizer is taken."
        ),
    ] = "bpe",
    field: Annotated[
        str | None,
        typer.Option(
            help="Of an object, or the column, that holds the text (text).", show_default=False
        ),
    ] = None,
    encoding: Annotated[
        str | None,
        typer.Option(
            help="Of the files; without it UTF-8, or what a BOM says.", show_default=False
        ),
    ] = None,
    split_documents: Annotated[
        bool | None,
        typer.Option(
            "--split-documents/--no-split-documents",
            help="Whether <|endoftext|> in a file, line or row separates documents (it does), or "
            "is text.",
            show_default=False,
        ),
    ] = None,
    unknown: Annotated[
        str,
        typer.Option(
            help="What becomes of a text of which the tokenizer does not know more than a tenth: "
            "error (it is refused) or keep."
        ),
    ] = "error",
    shard_tokens: Annotated[
        int | None,
        typer.Option(help="Tokens of a shard (16,777,216).", show_default=False),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(help="Processes that encode; without it one a core.", show_default=False),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a store that is there.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")] = False,
) -> int:
    """Turn any amount of text into a store of tokens on disk.

    It takes the same memory however long the text is. Whatever ends it, the same command goes on
    from the last shard.

    Example: mygpt tokenize corpus/*.jsonl.zst --out corpus.store && mygpt train corpus.store
    """
    from mygpt.data.store_builder.build import SHARD_TOKENS, build_store
    from mygpt.text import SEPARATOR, RecordOptions, find_sources
    from mygpt.tokenization import end_notes

    if not out:  # a variable that is not set, in a script
        raise InputError("--out is empty: name the store's folder")
    if not quiet:
        for note in find_sources(files, encoding=encoding, records=RecordOptions(field))[1]:
            say(note, file=sys.stderr)
    chosen = _tokenizer(tokenizer)
    for note in [] if quiet or isinstance(chosen, str) else end_notes(chosen):
        say(note, file=sys.stderr)
    began = time.monotonic()
    with _Display(quiet=quiet) as display:
        try:
            with ExitAction(lambda: _say_how_to_resume(out, display)):
                store = build_store(
                    files,
                    out,
                    tokenizer=chosen,
                    field=field,
                    encoding=encoding,
                    split_documents=split_documents,
                    unknown=unknown,
                    shard_tokens=SHARD_TOKENS if shard_tokens is None else shard_tokens,
                    workers=workers,
                    overwrite=overwrite,
                    progress=display,
                )
        except KeyboardInterrupt:
            return 130
    if display.separators and not quiet:
        times = "once" if display.separators == 1 else f"{display.separators:,} times"
        say(
            f"{SEPARATOR} was found {times}, and separates documents (--no-split-documents "
            "leaves it in the text)",
            file=sys.stderr,
        )
    if display.unknown is not None and not quiet:
        for note in display.unknown.notes("note", "keep"):
            say(note, file=sys.stderr)
    if not quiet:
        say(_summary(store, display.encoded, time.monotonic() - began))
    return 0


def _tokenizer(name: str) -> Tokenizer | str:
    """What is asked for by name stays a name; what lies in a file is read."""
    if name in ("bpe", "char", "byte") or name.startswith("bpe:"):
        return name
    if not os.path.exists(name):
        raise InputError(
            f"tokenizer={name!r} is not known: choose bpe, bpe:SIZE, char, byte, or a file, run "
            "or folder that has one"
        )
    from mygpt.formats.tokenizers import named_tokenizer

    return named_tokenizer(name)


def _summary(store: TokenStore, encoded: int, seconds: float) -> str:
    what = (
        f"{store.num_documents:,} document{'s' * (store.num_documents != 1)}, "
        f"{len(store.tokens):,} tokens of "
        f"{store.num_bytes:,} bytes"
    )
    if not encoded:
        return f"{store.path} is there already: {what}"
    speed = f"{encoded / max(seconds, 1e-9):,.0f} tokens/s"
    return f"{store.path}: {what}, {speed}\nnext: mygpt train {shlex.quote(str(store.path))}"


def _say_how_to_resume(out: str, display: _Display) -> None:
    display.stop()
    committed = display.committed
    with contextlib.suppress(OSError):
        kept = f"{committed:,} tokens are kept in {out}" if committed else "no shard is done yet"
        say(f"stopped; {kept}: the same command goes on from there", file=sys.stderr)


class _Display:
    """How far it is: a bar on a terminal, a line now and then elsewhere, or nothing.

    Attributes:
        committed: tokens that are safe.
        encoded: tokens that were encoded in this sitting.
        unknown: what the tokenizer does not know of what was encoded; None before the first text.
        separators: of documents within a file, a line or a row, that were read.
    """

    def __init__(self, *, quiet: bool) -> None:
        self.committed = self.encoded = self.separators = 0
        self.unknown: UnknownText | None = None
        self._quiet = quiet
        self._first: int | None = None
        self._began = self._told = time.monotonic()
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> _Display:
        if not self._quiet and sys.stdout.isatty():
            from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

            self._bar = Progress(
                BarColumn(bar_width=20),
                TextColumn("{task.fields[told]}", markup=False),
                TimeRemainingColumn(),
                console=new_console(highlight=False, soft_wrap=True, emoji=False),
                refresh_per_second=4,
                transient=True,
            )
            self._task = self._bar.add_task("", total=None, told="reading")
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Leave the line empty."""
        if self._bar is not None:
            with contextlib.suppress(OSError):
                self._bar.stop()
            self._bar = None

    def __call__(self, progress: StoreProgress) -> None:
        """Show how far it is."""
        self.committed, self.separators = progress.committed, progress.separators
        self.unknown = progress.unknown
        if self._first is None:
            self._first = progress.committed
        self.encoded = progress.tokens - self._first
        now = time.monotonic()
        told = (
            f"{progress.documents:,} documents, {progress.tokens:,} tokens, "
            f"{self.encoded / max(now - self._began, 1e-9):,.0f} tokens/s"
        )
        try:
            if self._bar is not None:
                total = progress.size or None
                self._bar.update(self._task, completed=progress.read, total=total, told=told)
            elif not self._quiet and now - self._told >= _LINE_S:
                self._told = now
                share = f"{100 * progress.read / progress.size:.0f} %: " if progress.size else ""
                say(f"{share}{told}", flush=True)
        except OSError:  # whoever read our lines has left
            self._quiet = True
