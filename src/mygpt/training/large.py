"""Texts too large for memory: a run on plain files goes through a store in the cache."""

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

THE_MODELS = ""  # stands for the tokenizer of the model that a run begins from
_TOLD_EVERY_S = 15.0


def stored_as(
    settings: Mapping[str, Any],
    names: Sequence[str],
    tokenizer: str,
    known: Tokenizer | None,
    suitable: Callable[[int], str],
) -> str | None:
    """The tokenizer's name, where a text is so large that it goes through a store; else None.

    Args:
        settings: as `read_source` takes them.
        names: of files, folders and patterns.
        tokenizer: as it was asked for.
        known: the tokenizer of the model that the run begins from, if there is one.
        suitable: the rule's choice for so many characters.

    Raises:
        InputError: as `large_sources` does.
    """
    sources = large_sources(names, settings["encoding"], records_of(settings))
    if not sources:
        return None
    if known is not None:
        return THE_MODELS
    if tokenizer == "auto":
        return suitable(sum(source.num_bytes for source in sources))
    return os.path.realpath(tokenizer) if os.path.exists(tokenizer) else tokenizer


def open_cached(
    settings: Mapping[str, Any],
    val_fraction: float,
    *,
    known: Tokenizer | None,
    tell: Listener | None = None,
) -> StoredSource:
    """The store of the text that a run's settings name, from the cache or made now.

    Args:
        settings: as `read_source` takes them, with the tokenizer's name in "stored_as".
        val_fraction: share to hold back for validation where there is no "val_file".
        known: the model's tokenizer, where there is a model already.
        tell: hears from time to time how far it is.

    Raises:
        InputError: as reading and tokenizing do.
        StorageError: where the cache has no room.
    """
    files, encoding = settings["files"], settings["encoding"]
    tokenizer = settings["stored_as"] if settings["stored_as"] != THE_MODELS else known
    assert tokenizer is not None
    if isinstance(tokenizer, str) and os.path.isabs(tokenizer):  # as `stored_as` has a path
        # Of a run that is there its own: the file may have changed, or be read otherwise now.
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
        progress=None if tell is None else _telling(tell, name),
    )
    source = source_of(replace(cached.store, name=name), settings, val_fraction)
    documents = cached.store.num_documents
    took = f", in {cached.built_s:.0f} s that no minutes count" if cached.built_s else ""
    packed = " when packed" * any(source.compression for source in sources)
    note = (
        f"{name} has {size:,} bytes{packed}, so it is not read into memory: tokenized once into "
        f"{cached.store.path}{took} (MYGPT_CACHE moves it)"
    )
    split = [split_note(len(sources), documents)] if documents > len(sources) else []
    return replace(source, notes=[*notes, note, *split, *source.notes])


def _telling(tell: Listener, name: str) -> Callable[[StoreProgress], None]:
    """What tells of a store's progress now and then."""
    told = time.monotonic()

    def progress(so_far: StoreProgress) -> None:
        nonlocal told
        if time.monotonic() - told >= _TOLD_EVERY_S:
            told = time.monotonic()
            share = so_far.read / max(1, so_far.size)
            tell(Note(f"tokenizing {name} once: {share:.0%}, {so_far.tokens:,} tokens"))

    return progress
