"""The text of a run that is not in memory: a token store, named by the user or in the cache."""

from __future__ import annotations

import contextlib
import os
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mygpt.core.data import split_point
from mygpt.data import cached_tokens, encode_documents, first_part, predicted_size, unknown_in
from mygpt.data.store_cache import cached_store
from mygpt.data.store_request import StoreOptions
from mygpt.data.token_store import StoredTokens, Tokens, TokenStore, is_store
from mygpt.errors import InputError
from mygpt.formats.tokenizers import named_tokenizer
from mygpt.text import (
    READING_VERSION,
    Corpus,
    Document,
    RecordOptions,
    find_sources,
    name_of,
    read_corpus,
    split_note,
)
from mygpt.text.documents import TextSize, validation_seen_note
from mygpt.text.reading import shown
from mygpt.tokenization import Tokenizer
from mygpt.tokenization.unknown import UnknownText
from mygpt.training.events import Listener, Note

if TYPE_CHECKING:
    from mygpt.data.building import StoreProgress

# Frequencies are counted over so many tokens of a store: all of them would take too long.
MOST_COUNTED = 2**24
MOST_DECODED = 2**21  # tokens of a store: more of them are never decoded at once
_NEAR = 0.01  # of the tokens: the split moves to a document that begins this near
_PROBED = 2**12  # tokens or characters of the validation text that are searched for
_LEAST_PROBED = 32  # tokens: fewer can be there by coincidence
_UNSURE = 16  # tokens at a cut, which are others if the text continues
_SHORTEST = 2  # tokens: one as input and one to predict
OF_THE_MODEL = ""  # in "stored_as": the tokenizer of the initial model
_REPORT_EVERY_S = 15.0


@dataclass(frozen=True)
class ValidatedText:
    """The text that a model is validated on.

    Attributes:
        tokens: its ids; of a long text the first ones.
        documents: the text of these tokens.
        size: of the text that all ids but the first stand for.
    """

    tokens: NDArray[np.integer]
    documents: list[Document]
    size: TextSize


@dataclass(frozen=True)
class StoredSource:
    """A store and its two parts, none of it in memory.

    Attributes:
        store: tokens to train on, and to validate on if no other text is named for that.
        cut: where the store's validation tokens begin.
        validation: another store or a text to validate on; None is the store's own part.
        notes: one line each for the user.
    """

    store: TokenStore
    cut: int
    validation: TokenStore | Corpus | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The default name of a run on it."""
        return self.store.name

    @property
    def num_documents(self) -> int:
        """The number of documents in the store."""
        return self.store.num_documents

    @property
    def num_bytes(self) -> int:
        """The size of these documents in UTF-8."""
        return self.store.num_bytes

    @property
    def sha256(self) -> str:
        """Of everything, including the validation text."""
        if self.validation is None:
            return self.store.sha256
        return f"{self.store.sha256}+{self.validation.sha256}"

    @property
    def train_documents(self) -> list[Document]:
        """None: samples are compared with the training text only if that is in memory."""
        return []

    @property
    def val_documents(self) -> list[Document]:
        """Documents to validate on, if they are in memory."""
        return self.validation.documents if isinstance(self.validation, Corpus) else []

    def encode(self, tokenizer: Tokenizer) -> tuple[Tokens, Tokens]:
        """The tokens to train on and those to validate on; `tokenizer` is the store's."""
        tokens = self.store.tokens
        train = tokens.part(0, self.cut)
        if self.validation is None:
            return train, tokens.part(self.cut, len(tokens))
        if isinstance(self.validation, TokenStore):
            return train, self.validation.tokens
        return train, cached_tokens(self.validation.documents, tokenizer)

    def validated_text(
        self, tokens: Tokens, all_val_tokens: Tokens, tokenizer: Tokenizer
    ) -> ValidatedText:
        """The text of `tokens`, which are all validation tokens or the first of them."""
        if isinstance(self.validation, Corpus) and len(tokens) == len(all_val_tokens):
            size = predicted_size(self.validation.documents, tokens, tokenizer)
            return ValidatedText(tokens[:], self.validation.documents, size)
        some = tokens[:MOST_DECODED]
        documents = [self.text_of(some, tokenizer)]
        if tokenizer.is_lossless:
            whole = documents if len(some) == len(tokens) else None
            return ValidatedText(some, documents, predicted_size(whole, tokens, tokenizer))
        if isinstance(self.validation, Corpus):
            documents = first_part(
                self.validation.documents, tokenizer, len(some), len(all_val_tokens)
            )
            return ValidatedText(some, documents, predicted_size(documents, some, tokenizer))
        store, begin = (self.store, self.cut) if self.validation is None else (self.validation, 0)
        return ValidatedText(some, documents, store.size_of(begin + 1, begin + len(tokens)))

    def unknown(
        self, tokenizer: Tokenizer, train_tokens: Tokens, val_tokens: Tokens
    ) -> dict[str, UnknownText]:
        """What the tokenizer does not know, by text; in a store, from its ids alone."""
        trained, validated = UnknownText(tokenizer), UnknownText(tokenizer)
        if trained.counts:
            trained.add(None, counted(train_tokens))
            if self.val_documents:
                validated = unknown_in(self.val_documents, counted(val_tokens), tokenizer)
            else:
                validated.add(None, counted(val_tokens))
        return {self.name: trained, f"{self.name}, validation": validated}

    def text_of(self, tokens: NDArray[np.integer], tokenizer: Tokenizer) -> Document:
        """The text that some tokens decode to; bytes that are not UTF-8 stay bytes."""
        ids = text_tokens(tokens, tokenizer)
        if tokenizer.kind != "byte":
            return Document(self.name, tokenizer.decode(ids.tolist()))
        whole = ids.astype(np.uint8).tobytes()
        try:
            return Document(self.name, whole.decode("utf-8"))
        except UnicodeDecodeError:
            return Document(self.name, whole)

    def text_before(self, num_bytes: int, tokenizer: Tokenizer) -> list[Document]:
        """The end of the training text, about so many bytes."""
        per_byte = len(self.store.tokens) / max(1, self.num_bytes)
        tokens = self.store.tokens[max(0, self.cut - 1 - int(num_bytes * per_byte)) : self.cut]
        return [self.text_of(tokens, tokenizer)]


def open_stored(settings: Mapping[str, Any], val_fraction: float) -> StoredSource:
    """The store that a run's settings name, and the text to validate on.

    Raises:
        InputError: for a store among other files, or tokenizers that differ.
        CheckpointError: for a store that is damaged or not finished.
    """
    files = settings["files"]
    if len(files) > 1:
        store = next(name for name in files if is_store(name))
        raise InputError(
            f"{store} is a token store and {len(files) - 1} more was named: train on a store "
            "alone, or tokenize all texts into one (mygpt tokenize FILES --out STORE)"
        )
    return source_of(TokenStore.open(files[0]), settings, val_fraction)


def open_cached(
    settings: Mapping[str, Any],
    val_fraction: float,
    *,
    known: Tokenizer | None,
    notify: Listener | None = None,
) -> StoredSource:
    """The store of the text that a run's settings name, from the cache or built now.
    The arguments are those of `read_source`; the tokenizer's name is in "stored_as".
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
        StoreOptions(
            records=records,
            encoding=encoding,
            split_documents=splits(settings),
            unknown=settings.get("unknown", "error"),
        ),
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


def source_of(store: TokenStore, settings: Mapping[str, Any], val_fraction: float) -> StoredSource:
    """A store to train on, and the validation text of `settings`; raises as `open_stored`."""
    length = len(store.tokens)
    if length < _SHORTEST:
        raise InputError(
            f"{store.path} holds {length} token: too short to train on, give at least "
            f"{_SHORTEST} (some thousands make sense)"
        )
    notes = []
    if length > MOST_COUNTED:
        notes.append(
            f"the frequencies of tokens are those of the first {MOST_COUNTED:,} of {length:,}"
        )
    validation = _validation(store, settings)
    if isinstance(validation, Corpus):
        notes += validation.notes
    if validation is not None and _overlaps(store, validation):
        notes.append(validation_seen_note(shown(str(settings["val_file"]))))
    cut = length if validation is not None else _cut(store, val_fraction)
    return StoredSource(store, cut, validation, notes)


def _validation(store: TokenStore, settings: Mapping[str, Any]) -> TokenStore | Corpus | None:
    """The text that was named for validation."""
    name = settings["val_file"]
    if name is None:
        return None
    if not is_store(name):
        bytes_do = store.tokenizer.kind == "byte"
        return read_as_set([name], settings, allow_bytes=bytes_do, refuse_unused=False)
    other = TokenStore.open(name)
    if other.tokenizer.to_state() != store.tokenizer.to_state():
        raise InputError(
            f"{name} was tokenized in another way than {store.path}: tokenize it again with "
            f"--tokenizer {shlex.quote(str(store.path))}"
        )
    return other


def _overlaps(store: TokenStore, validation: TokenStore | Corpus) -> bool:
    """Whether the beginning of a validation text is also in the store.

    Its first tokens are searched for among the first tokens of the store.
    """
    tokenizer, ids = store.tokenizer, np.zeros(0, store.tokens.dtype)
    if isinstance(validation, TokenStore):
        ids = validation.tokens[:_PROBED]
    else:
        start = next(validation.documents[0].pieces())[:_PROBED]
        with contextlib.suppress(InputError):  # reported where all of it is encoded
            ids = encode_documents([Document("start", start)], tokenizer)
            ids = ids[: len(ids) - _UNSURE * (len(start) == _PROBED)]
    ids = ids[
        np.cumsum(tokenizer.byte_lengths()[ids]) > 0
    ]  # without the token that begins every text
    ids = ids[_UNSURE:] if len(ids) >= _LEAST_PROBED + _UNSURE else ids  # it may begin in a word
    return len(ids) >= _LEAST_PROBED and _contains(store.tokens[:MOST_COUNTED], ids)


def _contains(tokens: NDArray[np.integer], some: NDArray[np.integer]) -> bool:
    whole, part = tokens.tobytes(), some.astype(tokens.dtype).tobytes()
    place = whole.find(part)
    while place > 0 and place % tokens.itemsize:  # between two tokens
        place = whole.find(part, place + 1)
    return place >= 0


def read_as_set(
    names: Sequence[str],
    settings: Mapping[str, Any],
    *,
    allow_bytes: bool,
    refuse_unused: bool = True,
) -> Corpus:
    """Read files into memory in the way that a run's settings say; arguments as `read_corpus`."""
    return read_corpus(
        names,
        encoding=settings["encoding"],
        allow_bytes=allow_bytes,
        split=splits(settings),
        # mygpt 0.1 read files by their names alone.
        legacy=int(settings.get("reading", 1)) < READING_VERSION,
        records=records_of(settings, refuse_unused=refuse_unused),
    )


def splits(settings: Mapping[str, Any]) -> bool:
    """Whether a run's text is split at `SEPARATOR`; the states of older runs do not say."""
    return bool(settings.get("split_documents", False))


def records_of(settings: Mapping[str, Any], *, refuse_unused: bool = True) -> RecordOptions | None:
    """How a run's files of records are read; None where they are plain text to it."""
    field = settings.get("field")
    return (
        None
        if field is None
        else RecordOptions(field or None, lines_may_be_plain=True, refuse_unused=refuse_unused)
    )


def _cut(store: TokenStore, val_fraction: float) -> int:
    """Where the validation tokens begin: with a document, if one begins near."""
    length = len(store.tokens)
    cut = split_point(length, val_fraction)
    reach = int(length * _NEAR)
    if cut == length:
        return cut
    starts = store.document_starts(max(1, cut - reach), min(length, cut + reach + 1))
    return cut if not len(starts) else int(starts[np.abs(starts - cut).argmin()])


def counted(tokens: Tokens) -> NDArray[np.integer]:
    """The tokens that frequencies are counted over: all in memory, or a store's first ones."""
    return tokens[:MOST_COUNTED] if isinstance(tokens, StoredTokens) else tokens


def text_tokens(tokens: NDArray[np.integer], tokenizer: Tokenizer) -> NDArray[np.integer]:
    """Tokens without those that stand for no text, such as document separators."""
    found: NDArray[np.integer] = tokens[tokenizer.byte_lengths()[tokens] > 0]
    return found


def stores_among(names: Sequence[str]) -> list[str]:
    """Those of the names that are token stores."""
    return [name for name in names if is_store(name)]
