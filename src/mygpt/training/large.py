"""Texts too large for memory: plain files are tokenized into a store in the cache."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from mygpt.data.store_cache import cached_store, large_sources
from mygpt.formats.tokenizers import named_tokenizer
from mygpt.text import RecordOptions, find_sources, name_of, split_note
from mygpt.tokenization import Tokenizer
from mygpt.training.events import Listener, Note
from mygpt.training.stored import StoredSource, records_of, source_of, splits

if TYPE_CHECKING:
    from mygpt.data.store_builder.build import StoreProgress

OF_THE_MODEL = ""  # in "stored_as": the tokenizer of the initial model
_REPORT_EVERY_S = 15.0


def stored_as(
    settings: Mapping[str, Any],
    names: Sequence[str],
    tokenizer: str,
    known: Tokenizer | None,
    suitable: Callable[[int], str],
) -> str | None:
    """The tokenizer's name if the text is so large that it is put into a store; else None.

    Args:
        settings: as `read_source` takes them.
        names: of files, folders and patterns.
        tokenizer: the user's choice.
        known: the initial model's tokenizer, if there is one.
        suitable: the default tokenizer for a number of characters.

    Raises:
        InputError: as `large_sources` does.
    """
    sources = large_sources(names, settings["encoding"], records_of(settings))
    if not sources:
        return None
    if known is not None:
        return OF_THE_MODEL
    if tokenizer == "auto":
        return suitable(sum(source.num_bytes for source in sources))
    return os.path.realpath(tokenizer) if os.path.exists(tokenizer) else tokenizer


def open_cached(
    settings: Mapping[str, Any],
    val_fraction: float,
    *,
    known: Tokenizer | None,
    notify: Listener | None = None,
) -> StoredSource:
    """The store of the text that a run's settings name, from the cache or built now.

    Args:
        settings: as `read_source` takes them, with the tokenizer's name in "stored_as".
        val_fraction: fraction kept for validation if there is no "val_file".
        known: the model's tokenizer, if there is a model already.
        notify: called from time to time with the progress.

    Raises:
        InputError: as reading and tokenizing do.
        StorageError: if there is no space for the cache.
    """
    files, encoding = settings["files"], settings["encoding"]
    tokenizer = settings["stored_as"] if settings["stored_as"] != OF_THE_MODEL else known
    assert tokenizer is not None
    if isinstance(tokenizer, str) and os.path.isabs(tokenizer):  # a path from `stored_as`
        # A resumed run uses its own: the file may have changed since.
        tokenizer = named_tokenizer(tokenizer) if known is None else known
    records = records_of(settings) or RecordOptions(legacy_names=True)
    sources, notes = find_sources(files, encoding=encoding, records=records)
    name, size = name_of(files), sum(source.size for source in sources)
    cached = cached_store(
        sources,
        tokenizer,
        encoding=encoding,
        records=records,
        split_documents=splits(settings),
        unknown=settings.get("unknown", "error"),
        progress=None if notify is None else _progress_notes(notify, name),
    )
    source = source_of(replace(cached.store, name=name), settings, val_fraction)
    documents = cached.store.num_documents
    took = f", in {cached.built_s:.0f} s that --minutes does not count" if cached.built_s else ""
    packed = " when packed" * any(source.compression for source in sources)
    note = (
        f"{name} has {size:,} bytes{packed}, so it is not read into memory: tokenized once into "
        f"{cached.store.path}{took} (MYGPT_CACHE moves it)"
    )
    split = [split_note(len(sources), documents)] if documents > len(sources) else []
    return replace(source, notes=[*notes, note, *split, *source.notes])


def _progress_notes(notify: Listener, name: str) -> Callable[[StoreProgress], None]:
    """A callback that reports a store's progress every 15 seconds."""
    reported = time.monotonic()

    def progress(so_far: StoreProgress) -> None:
        nonlocal reported
        if time.monotonic() - reported >= _REPORT_EVERY_S:
            reported = time.monotonic()
            done = so_far.read / max(1, so_far.size)
            notify(Note(f"tokenizing {name} once: {done:.0%}, {so_far.tokens:,} tokens"))

    return progress
