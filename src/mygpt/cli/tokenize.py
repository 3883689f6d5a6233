"""`mygpt tokenize`: convert text of any size into a token store on disk, to train on."""

from __future__ import annotations

import contextlib
import os
import shlex
import sys
import time
from typing import TYPE_CHECKING, Annotated

import typer

from mygpt.cli import options
from mygpt.cli.bar import StatusBar
from mygpt.cli.terminal import say
from mygpt.errors import InputError
from mygpt.signals import ExitAction

if TYPE_CHECKING:
    from mygpt.data import TokenStore
    from mygpt.data.building import StoreProgress
    from mygpt.tokenization import Tokenizer
    from mygpt.tokenization.unknown import UnknownText

_LINE_S = 10.0  # seconds between progress lines if there is no terminal


def tokenize(
    files: Annotated[
        list[str],
        typer.Argument(
            help="Text files, folders, patterns, or - for standard input. *.gz and *.zst are "
            "decompressed. Each line of *.jsonl, row of *.csv, *.tsv and *.parquet, and object of "
            "*.json is a document.",
            show_default=False,
        ),
    ],
    out: Annotated[
        str, typer.Option(help="The store's folder.", metavar="PATH", show_default=False)
    ],
    tokenizer: Annotated[
        str,
        options.choice(
            "bpe or bpe:SIZE (trained on the files), char, byte, a tokenizer's JSON file, "
            "or a run, checkpoint, store or Hugging Face folder whose tokenizer is used."
        ),
    ] = "bpe",
    field: Annotated[
        str | None,
        options.option(
            "The field or column that contains the text. Default: text.", metavar="NAME"
        ),
    ] = None,
    encoding: Annotated[
        str | None,
        options.option(
            "The files' encoding. Default: by their byte-order marks, else UTF-8.", metavar="NAME"
        ),
    ] = None,
    split_documents: Annotated[
        bool | None,
        options.option(
            "Whether <|endoftext|> in a file, line or row separates documents or is ordinary "
            "text. Default: it separates.",
            "--split-documents/--no-split-documents",
        ),
    ] = None,
    unknown: Annotated[
        str,
        options.choice(
            "If the tokenizer does not know more than a tenth of the text: error refuses the "
            "text, keep accepts it."
        ),
    ] = "error",
    shard_tokens: Annotated[
        int | None, options.option("Tokens in each shard. Default: 16,777,216.")
    ] = None,
    workers: Annotated[
        int | None, options.option("Processes that encode. Default: one for each core.")
    ] = None,
    overwrite: Annotated[bool, options.overwrite("an existing store")] = False,
    quiet: Annotated[bool, options.option("Print only errors.", "--quiet", "-q")] = False,
) -> int:
    """Convert text of any size into a token store on disk.

    Memory use does not depend on the text's size. If the command is interrupted, the same command
    continues after the last complete shard.

    Example: mygpt tokenize corpus/*.jsonl.zst --out corpus.store && mygpt train corpus.store
    """
    from mygpt.data.building import build_store
    from mygpt.data.store_request import SHARD_TOKENS, StoreOptions
    from mygpt.text import SEPARATOR, RecordOptions, find_sources
    from mygpt.tokenization import end_notes

    if not out:  # an unset variable in a script
        raise InputError("--out is empty: name the store's folder")
    records = RecordOptions(field)
    if not quiet:
        for note in find_sources(files, encoding=encoding, records=records)[1]:
            say(note, file=sys.stderr)
    chosen = _tokenizer(tokenizer)
    how = StoreOptions(
        tokenizer=chosen,
        records=records,
        encoding=encoding,
        split_documents=split_documents,
        unknown=unknown,
        shard_tokens=SHARD_TOKENS if shard_tokens is None else shard_tokens,
        workers=workers,
    )
    for note in [] if quiet or isinstance(chosen, str) else end_notes(chosen):
        say(note, file=sys.stderr)
    began = time.monotonic()
    with _Display(quiet=quiet) as display:
        try:
            with ExitAction(lambda: _say_how_to_resume(out, display)):
                store = build_store(files, out, how, overwrite=overwrite, progress=display)
        except KeyboardInterrupt:
            return 130
    if display.separators and not quiet:
        times = "once" if display.separators == 1 else f"{display.separators:,} times"
        say(
            f"{SEPARATOR} was found {times}; it separates documents (with --no-split-documents it "
            "is text)",
            file=sys.stderr,
        )
    if display.unknown is not None and not quiet:
        for note in display.unknown.notes("note", "keep"):
            say(note, file=sys.stderr)
    if not quiet:
        say(_summary(store, display.encoded, time.monotonic() - began))
    return 0


def _tokenizer(name: str) -> Tokenizer | str:
    """A tokenizer type's name as it is, or the tokenizer that a file or folder contains."""
    if name in ("bpe", "char", "byte") or name.startswith("bpe:"):
        return name
    if not os.path.exists(name):
        raise InputError(
            f"tokenizer={name!r} is not known: choose bpe, bpe:SIZE, char, byte, or a file, run "
            "or folder that contains a tokenizer"
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
        return f"{store.path} exists already: {what}"
    speed = f"{encoded / max(seconds, 1e-9):,.0f} tokens/s"
    return f"{store.path}: {what}, {speed}\nnext: mygpt train {shlex.quote(str(store.path))}"


def _say_how_to_resume(out: str, display: _Display) -> None:
    display.stop()
    committed = display.committed
    with contextlib.suppress(OSError):
        kept = f"{committed:,} tokens are in {out}" if committed else "no shard is complete yet"
        say(f"stopped; {kept}: the same command continues from there", file=sys.stderr)


class _Display:
    """Shows progress: a bar on a terminal, a line at intervals otherwise, or nothing.

    Attributes:
        committed: tokens in complete shards.
        encoded: tokens encoded by this command.
        unknown: counts of characters that the tokenizer does not know; None before the first text.
        separators: the number of document separators read within files, lines or rows.
    """

    def __init__(self, *, quiet: bool) -> None:
        self.committed = self.encoded = self.separators = 0
        self.unknown: UnknownText | None = None
        self._quiet = quiet
        # Tokens that were in complete shards, and bytes read for them.
        self._before: tuple[int, int] | None = None
        self._began = self._printed = time.monotonic()
        self._bar: StatusBar | None = None

    def __enter__(self) -> _Display:
        if not self._quiet and sys.stdout.isatty():
            self._bar = StatusBar()
            self._bar.start("reading")
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Remove the bar."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def __call__(self, progress: StoreProgress) -> None:
        """Show the progress."""
        self.committed, self.separators = progress.committed, progress.separators
        self.unknown = progress.unknown
        if self._before is None:
            self._before = progress.committed, progress.read
        self.encoded = progress.tokens - self._before[0]
        now = time.monotonic()
        status = (
            f"{progress.documents:,} documents, {progress.tokens:,} tokens, "
            f"{self.encoded / max(now - self._began, 1e-9):,.0f} tokens/s"
        )
        try:
            if self._bar is not None:
                size, read, left_s = progress.size or None, progress.read, None
                if size and read > self._before[1]:
                    left_s = (now - self._began) * (size - read) / (read - self._before[1])
                self._bar.update(status, completed=read, total=size, remaining_s=left_s)
            elif not self._quiet and now - self._printed >= _LINE_S:
                self._printed = now
                done = f"{100 * progress.read / progress.size:.0f} %: " if progress.size else ""
                say(f"{done}{status}", flush=True)
        except OSError:  # the reader of the output is gone
            self._quiet = True
