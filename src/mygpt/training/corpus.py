"""The text of a run, in memory or in a token store: read, split for validation, and tokenized."""

from __future__ import annotations

import contextlib
import os
import shlex
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mygpt.core.data import split_point
from mygpt.data import (
    cached_bpe,
    cached_tokens,
    encode_documents,
    first_part,
    predicted_size,
    unknown_in,
)
from mygpt.data.store_cache import MERGES, MOST_CHARACTERS, cached_store
from mygpt.data.store_request import StoreOptions
from mygpt.data.store_tokenizer import bpe_size
from mygpt.data.token_store import StoredTokens, Tokens, TokenStore, is_store
from mygpt.errors import InputError
from mygpt.formats.tokenizers import named_tokenizer
from mygpt.text import (
    Corpus,
    Document,
    RecordOptions,
    find_sources,
    name_of,
    split_documents,
    split_note,
)
from mygpt.text.documents import TextSize, overlap_note, validation_seen_note
from mygpt.text.file_types import FIRST_BYTES, why_not_text
from mygpt.text.reading import shown
from mygpt.tokenization import ByteTokenizer, CharTokenizer, Tokenizer
from mygpt.tokenization.unknown import UnknownText
from mygpt.training.config import TrainConfig
from mygpt.training.events import Listener, Note
from mygpt.training.recorded_files import read_as_set, records_of, splits, stores_among

if TYPE_CHECKING:
    from mygpt.data.building import StoreProgress

# Frequencies are counted over so many tokens of a store: all of them would take too long.
MOST_COUNTED = 2**24
MOST_DECODED = 2**21  # tokens of a store: more of them are never decoded at once
_NEAR = 0.01  # of the tokens: the split moves to a document that begins this near
_PROBED = 2**12  # tokens or characters of the validation text that are searched for
_LEAST_PROBED = 32  # tokens: fewer can be there by coincidence
_UNSURE = 16  # tokens at a cut, which are others if the text continues
_SHORTEST = 2  # characters or tokens: one as input and one to predict
OF_THE_MODEL = ""  # in "stored_as": the tokenizer of the initial model
_REPORT_EVERY_S = 15.0
_LEAST_FOR_MERGES = 200_000  # characters of a text with too many distinct ones for a vocabulary


@dataclass(frozen=True)
class Source:
    """The text of a run and its two parts: in memory, or in a token store on disk."""

    name: str  # the default name of a run on it
    num_documents: int  # how many there are, without those of a validation file
    num_bytes: int  # their size in UTF-8
    sha256: str  # of everything, including the validation text
    notes: list[str] = field(default_factory=list)  # one line each for the user
    train_documents: list[Document] = field(default_factory=list)  # to train on; empty for a store
    # To validate on; empty for none, and for a store.
    val_documents: list[Document] = field(default_factory=list)
    continued: bool = False  # whether the validation text directly follows the training text
    store: TokenStore | None = None  # has the training tokens; None for a text in memory
    cut: int = 0  # the number of these tokens, which are the store's first ones
    # Has the validation tokens: the rest of `store`, or another one; None for a text in memory.
    val_store: TokenStore | None = None

    @property
    def documents(self) -> list[Document]:
        """Documents of both parts."""
        return [*self.train_documents, *self.val_documents]

    @property
    def is_text(self) -> bool:
        """Whether all of it is text in memory, not bytes or a store."""
        is_bytes = any(isinstance(document.whole, bytes) for document in self.documents)
        return self.store is None and not is_bytes

    @property
    def val_begin(self) -> int:
        """Where the validation tokens begin in `val_store`."""
        return self.cut if self.val_store is self.store else 0

    def encode(self, tokenizer: Tokenizer) -> tuple[Tokens, Tokens]:
        """The tokens to train on and those to validate on; `tokenizer` is that of a store."""
        train: Tokens
        if self.store is None:
            train = cached_tokens(self.train_documents, tokenizer)
        else:
            train = self.store.tokens.part(0, self.cut)
        if self.val_store is not None:
            tokens = self.val_store.tokens
            return train, tokens.part(self.val_begin, len(tokens))
        return train, cached_tokens(self.val_documents, tokenizer, continued=self.continued)

    def text_of(self, tokens: NDArray[np.integer], tokenizer: Tokenizer) -> Document:
        """The text that some tokens decode to, without those that stand for no text."""
        ids = tokens[tokenizer.byte_lengths()[tokens] > 0]
        if self.is_text or tokenizer.kind != "byte":
            return Document(self.name, tokenizer.decode(ids.tolist()))
        whole = ids.astype(np.uint8).tobytes()
        try:
            return Document(self.name, whole.decode("utf-8"))
        except UnicodeDecodeError:
            return Document(self.name, whole)

    def text_before(self, num_bytes: int, tokenizer: Tokenizer) -> list[Document]:
        """The end of the training text, about so many bytes: of a text in memory all of it."""
        if self.store is None:
            return self.train_documents
        per_byte = len(self.store.tokens) / max(1, self.num_bytes)
        tokens = self.store.tokens[max(0, self.cut - 1 - int(num_bytes * per_byte)) : self.cut]
        return [self.text_of(tokens, tokenizer)]


@dataclass(frozen=True)
class ValidatedText:
    """The text that a model is validated on."""

    tokens: NDArray[np.integer]  # its ids; of a long text the first ones
    documents: list[Document]  # the text of these tokens
    size: TextSize  # of the text that all ids but the first stand for


@dataclass(frozen=True)
class TrainingText:
    """A run's text in tokens."""

    source: Source  # the text
    tokenizer: Tokenizer  # the model's own
    train_tokens: Tokens  # 1-D ids to train on, in memory or in a store
    val_tokens: Tokens  # 1-D ids to validate on; empty for none

    @classmethod
    def encoded(cls, source: Source, tokenizer: Tokenizer) -> TrainingText:
        """A text in the tokens of `tokenizer`."""
        return cls(source, tokenizer, *source.encode(tokenizer))

    @property
    def unknown(self) -> dict[str, UnknownText]:
        """What the tokenizer does not know, by text; in a store, from its ids alone."""
        source, tokenizer = self.source, self.tokenizer
        trained = unknown_in(source.train_documents, counted(self.train_tokens), tokenizer)
        before = trained if source.continued else None  # one text, cut in two
        val_tokens = counted(self.val_tokens)
        validated = unknown_in(source.val_documents, val_tokens, tokenizer, before)
        if source.continued:
            return {source.name: validated}
        return {source.name: trained, f"{source.name}, validation": validated}

    def validated(self, tokens: Tokens) -> ValidatedText:
        """The text of `tokens`, which are all validation tokens or the first of them."""
        source, tokenizer = self.source, self.tokenizer
        continued, total = source.continued, len(self.val_tokens)
        documents = source.val_documents
        some = tokens[:] if source.store is None else tokens[:MOST_DECODED]
        if source.val_store is None and len(tokens) == total:
            size = predicted_size(documents, tokens, tokenizer, continued=continued)
            return ValidatedText(tokens[:], documents, size)
        if source.val_store is None and not tokenizer.is_lossless:
            documents = first_part(documents, tokenizer, len(some), total, continued=continued)
            size = predicted_size(documents, some, tokenizer, continued=continued)
            return ValidatedText(some, documents, size)
        documents = [source.text_of(some, tokenizer)]
        if source.val_store is None or tokenizer.is_lossless:
            whole = documents if len(some) == len(tokens) else None
            return ValidatedText(some, documents, predicted_size(whole, tokens, tokenizer))
        begin = source.val_begin
        size = source.val_store.size_of(begin + 1, begin + len(tokens))
        return ValidatedText(some, documents, size)


def read_again(
    settings: Mapping[str, Any],
    config: TrainConfig,
    tokenizer: Tokenizer,
    *,
    sha256: str,
    problem: str,
) -> TrainingText:
    """The text that a run was begun with.

    Raises:
        InputError: naming the text and its `problem` if it has another digest.
    """
    bytes_do = tokenizer.kind == "byte"
    source = read_source(settings, config.val_fraction, allow_bytes=bytes_do, known=tokenizer)
    if source.sha256 != sha256:
        raise InputError(f"{source.name} {problem}")
    return TrainingText.encoded(source, tokenizer)


def read_source(
    settings: Mapping[str, Any],
    val_fraction: float,
    *,
    allow_bytes: bool,
    known: Tokenizer | None = None,
    notify: Listener | None = None,
) -> Source:
    """Read the text that a run's settings name, or open its store.

    Args:
        settings: "files", "val_file", "encoding", "field" and "split_documents", as the state
            keeps them; and "stored_as", the tokenizer's name, where the text goes through a
            store in the cache.
        val_fraction: fraction kept for validation if there is no "val_file".
        allow_bytes: read files that are not text as bytes.
        known: the model's tokenizer, if there is a model already.
        notify: called with the progress of tokenizing a large text.

    Raises:
        InputError: for wrong input.
        CheckpointError: for a damaged store.
    """
    if stores_among(settings["files"]):
        return _open_stored(settings, val_fraction)
    if settings.get("stored_as") is not None:
        return _open_cached(settings, val_fraction, known=known, notify=notify)
    return _read_text(settings, val_fraction, allow_bytes=allow_bytes)


def _read_text(settings: Mapping[str, Any], val_fraction: float, *, allow_bytes: bool) -> Source:
    """The text in memory."""
    val_file = settings["val_file"]
    corpus = read_as_set(settings["files"], settings, allow_bytes=allow_bytes)
    length = sum(map(len, corpus.documents))
    _require_length(corpus.name, length, "character")
    notes, sha256 = corpus.notes, corpus.sha256
    if val_file is None:
        train, validation = split_documents(corpus.documents, val_fraction)
    elif stores_among([val_file]):
        raise InputError(
            f"{val_file} is a token store and {corpus.name} is not: name text to validate on, or "
            "train on a store too (mygpt tokenize FILES --out STORE)"
        )
    else:
        kept = read_as_set([val_file], settings, allow_bytes=allow_bytes, refuse_unused=False)
        train, validation = corpus.documents, kept.documents
        seen = overlap_note(train, validation, shown(str(val_file)))
        notes, sha256 = [*notes, *kept.notes, *seen], f"{sha256}+{kept.sha256}"
    return Source(
        corpus.name, len(corpus.documents), corpus.num_bytes, sha256, notes, train, validation,
        continued=train != corpus.documents,
    )  # fmt: skip


def _require_length(name: object, length: int, unit: str) -> None:
    if length < _SHORTEST:
        raise InputError(
            f"{name} has {length} {unit}{'s' * (length != 1)}: too short to train on, give at "
            f"least {_SHORTEST} (a useful model needs thousands)"
        )


def _open_stored(settings: Mapping[str, Any], val_fraction: float) -> Source:
    """The store that a run's settings name, and the text to validate on.

    Raises:
        InputError: for a store among other files, or tokenizers that differ.
        CheckpointError: for a store that is damaged or not finished.
    """
    files = settings["files"]
    if len(files) > 1:
        raise InputError(
            f"{stores_among(files)[0]} is a token store and {len(files) - 1} more was named: train "
            "on a store alone, or tokenize all texts into one (mygpt tokenize FILES --out STORE)"
        )
    return _source_in(TokenStore.open(files[0]), settings, val_fraction)


def _open_cached(
    settings: Mapping[str, Any],
    val_fraction: float,
    *,
    known: Tokenizer | None,
    notify: Listener | None = None,
) -> Source:
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
    source = _source_in(replace(cached.store, name=name), settings, val_fraction)
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


def _source_in(store: TokenStore, settings: Mapping[str, Any], val_fraction: float) -> Source:
    """A store to train on, and the validation text of `settings`; raises as `_open_stored`."""
    length = len(store.tokens)
    _require_length(store.path, length, "token")
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
    found = Source(
        store.name, store.num_documents, store.num_bytes, store.sha256, notes, store=store,
        cut=_cut(store, val_fraction), val_store=store,
    )  # fmt: skip
    if validation is None:
        return found
    found = replace(found, cut=length, sha256=f"{store.sha256}+{validation.sha256}")
    if isinstance(validation, Corpus):
        return replace(found, val_documents=validation.documents, val_store=None)
    return replace(found, val_store=validation)


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


def choose_tokenizer(name: str, source: Source, *, end_of_text: bool) -> Tokenizer:
    """The tokenizer called `name` for this text.

    "auto" is characters if the text has at most 512 distinct ones; else BPE, or bytes if the text
    is too short for merges. "bpe" and "bpe:SIZE" learn merges from the training text alone, never
    from the validation text. Anything else is a path, as for `named_tokenizer`.

    Raises:
        InputError: for a tokenizer that does not exist or does not fit the text.
    """
    if name == "bpe" or name.startswith("bpe:"):
        return cached_bpe(
            source.train_documents, bpe_size(name, sum(map(len, source.train_documents)))
        )
    documents = source.documents
    if name == "byte" or not source.is_text:
        return ByteTokenizer()
    characters: set[str] = set()
    for document in documents:
        for piece in document.pieces():
            characters.update(str(piece))
    if name == "auto" and len(characters) > MOST_CHARACTERS:
        if sum(map(len, source.train_documents)) < _LEAST_FOR_MERGES:
            return ByteTokenizer()
        return cached_bpe(source.train_documents, bpe_size(MERGES, 0))
    if name in ("auto", "char"):
        return CharTokenizer(sorted(characters), end_of_text=end_of_text)
    if not os.path.exists(name):
        raise InputError(
            f"tokenizer={name!r} is not known: choose auto, char, byte, bpe, bpe:SIZE, or a file, "
            "run or folder that has one"
        )
    return named_tokenizer(name)


def is_named(tokenizer: Tokenizer, name: str) -> bool:
    """Whether `choose_tokenizer` may have given this tokenizer for `name`."""
    if name in ("auto", tokenizer.kind):
        return True
    if name.startswith("bpe:"):
        return tokenizer.kind == "bpe" and tokenizer.vocab_size == bpe_size(name, 0)
    return os.path.exists(name) and named_tokenizer(name).to_state() == tokenizer.to_state()


def undecoded(source: Source, encoding: str | None) -> list[str]:
    """A note if files that should be text are bytes.

    Raises:
        InputError: for bytes of a known kind of file, such as an archive.
    """
    found = [doc for doc in source.documents if isinstance(doc.whole, bytes)]
    for document in found:
        assert isinstance(document.whole, bytes)
        if (why := why_not_text(document.whole[:FIRST_BYTES], encoding)) is not None:
            raise InputError(f"{shown(document.name)} {why}; --tokenizer byte trains on its bytes")
    names = [document.name for document in found]
    return [
        f"{name} is not text in UTF-8, so training is on its bytes "
        "(name its encoding with --encoding, latin-1 perhaps, to train on characters)"
        for name in names[:1]
    ]
