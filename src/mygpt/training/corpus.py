"""The text of a run: read, split for training and validation, with its tokenizer and tokens."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from mygpt.data import cached_bpe, cached_tokens, first_part, predicted_size, unknown_in
from mygpt.data.store_tokenizer import BPE_SIZES
from mygpt.data.token_store import Tokens
from mygpt.errors import InputError
from mygpt.formats.tokenizers import named_tokenizer
from mygpt.text import Corpus, Document, split_documents
from mygpt.text.documents import overlap_note
from mygpt.text.file_types import FIRST_BYTES, why_not_text
from mygpt.text.reading import shown
from mygpt.tokenization import ByteTokenizer, CharTokenizer, Tokenizer
from mygpt.tokenization.unknown import UnknownText
from mygpt.training.config import TrainConfig
from mygpt.training.events import Listener
from mygpt.training.stored import (
    StoredSource,
    ValidatedText,
    open_cached,
    open_stored,
    read_as_set,
    stores_among,
    text_tokens,
)

# With more distinct characters than this (Chinese, say) bytes are the better vocabulary.
MOST_CHARACTERS = 512
_SHORTEST = 2  # characters: one as input and one to predict


@dataclass(frozen=True)
class ReadSource:
    """A text in memory and its two parts.

    Attributes:
        corpus: all that was named, without the validation file.
        train_documents: documents to train on.
        val_documents: documents to validate on; may be empty.
        sha256: of everything, including the validation file.
    """

    corpus: Corpus
    train_documents: list[Document]
    val_documents: list[Document]
    sha256: str

    @property
    def name(self) -> str:
        """The default name of a run on it."""
        return self.corpus.name

    @property
    def notes(self) -> list[str]:
        """One line about each thing that was not read."""
        return self.corpus.notes

    @property
    def num_documents(self) -> int:
        """The number of documents named, without those of the validation file."""
        return len(self.corpus.documents)

    @property
    def num_bytes(self) -> int:
        """The size of these documents in UTF-8."""
        return self.corpus.num_bytes

    @property
    def documents(self) -> list[Document]:
        """Documents of both parts."""
        return [*self.train_documents, *self.val_documents]

    @property
    def is_text(self) -> bool:
        """Whether all documents are text, not bytes."""
        return not any(isinstance(document.whole, bytes) for document in self.documents)

    def encode(self, tokenizer: Tokenizer) -> tuple[NDArray[np.integer], NDArray[np.integer]]:
        """The tokens to train on and those to validate on, both 1-D ids."""
        return (
            cached_tokens(self.train_documents, tokenizer),
            cached_tokens(self.val_documents, tokenizer, continued=self.continued),
        )

    @property
    def continued(self) -> bool:
        """Whether the validation text directly follows the training text."""
        return self.train_documents != self.corpus.documents

    def validated_text(
        self, tokens: Tokens, all_val_tokens: Tokens, tokenizer: Tokenizer
    ) -> ValidatedText:
        """The text of `tokens`, which are all validation tokens or the first of them."""
        documents, continued = self.val_documents, self.continued
        if len(tokens) < len(all_val_tokens) and tokenizer.is_lossless:
            documents = [self.text_of(tokens[:], tokenizer)]
        elif len(tokens) < len(all_val_tokens):
            documents = first_part(
                documents, tokenizer, len(tokens), len(all_val_tokens), continued=continued
            )
        size = predicted_size(documents, tokens[:], tokenizer, continued=continued)
        return ValidatedText(tokens[:], documents, size)

    def unknown(
        self, tokenizer: Tokenizer, train_tokens: Tokens, val_tokens: Tokens
    ) -> dict[str, UnknownText]:
        """What the tokenizer does not know, by text: the training text, and a validation file."""
        trained = unknown_in(self.train_documents, train_tokens[:], tokenizer)
        if self.continued:  # one text, cut in two
            return {self.name: unknown_in(self.val_documents, val_tokens[:], tokenizer, trained)}
        validated = unknown_in(self.val_documents, val_tokens[:], tokenizer)
        return {self.name: trained, f"{self.name}, validation": validated}

    def text_of(self, tokens: NDArray[np.integer], tokenizer: Tokenizer) -> Document:
        """The text that some tokens decode to."""
        ids = text_tokens(tokens, tokenizer)
        if not self.is_text:
            return Document("validation", bytes(ids.tolist()))
        return Document("validation", tokenizer.decode(ids.tolist()))

    def text_before(self, num_bytes: int, tokenizer: Tokenizer) -> list[Document]:
        """The end of the training text: of a text in memory all of it."""
        return self.train_documents


# The text of a run: in memory, or in a store on disk.
Source: TypeAlias = ReadSource | StoredSource


@dataclass(frozen=True)
class TrainingText:
    """A run's text in tokens.

    Attributes:
        source: the text.
        tokenizer: the model's own.
        train_tokens: 1-D ids to train on, in memory or in a store.
        val_tokens: 1-D ids to validate on; empty for none.
    """

    source: Source
    tokenizer: Tokenizer
    train_tokens: Tokens
    val_tokens: Tokens

    @classmethod
    def encoded(cls, source: Source, tokenizer: Tokenizer) -> TrainingText:
        """A text in the tokens of `tokenizer`."""
        return cls(source, tokenizer, *source.encode(tokenizer))

    @property
    def unknown(self) -> dict[str, UnknownText]:
        """What the tokenizer does not know, by text."""
        return self.source.unknown(self.tokenizer, self.train_tokens, self.val_tokens)


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
        settings: "files", "val_file", "encoding", "reading", "field" and "split_documents", as the
            state keeps them; and "stored_as", the tokenizer's name, where the text goes through a
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
        return open_stored(settings, val_fraction)
    if settings.get("stored_as") is not None:
        return open_cached(settings, val_fraction, known=known, notify=notify)
    return _read_text(settings, val_fraction, allow_bytes=allow_bytes)


def _read_text(
    settings: Mapping[str, Any], val_fraction: float, *, allow_bytes: bool
) -> ReadSource:
    """The text in memory."""
    val_file = settings["val_file"]
    corpus = read_as_set(settings["files"], settings, allow_bytes=allow_bytes)
    length = sum(map(len, corpus.documents))
    if length < _SHORTEST:
        raise InputError(
            f"{corpus.name} has {length} character: too short to train on, give at least "
            f"{_SHORTEST} (some thousands make sense)"
        )
    if val_file is None:
        parts = split_documents(corpus.documents, val_fraction)
        return ReadSource(corpus, *parts, corpus.sha256)
    if stores_among([val_file]):
        raise InputError(
            f"{val_file} is a token store and {corpus.name} is not: name text to validate on, or "
            "train on a store too (mygpt tokenize FILES --out STORE)"
        )
    kept = read_as_set([val_file], settings, allow_bytes=allow_bytes, refuse_unused=False)
    seen = overlap_note(corpus.documents, kept.documents, shown(str(val_file)))
    corpus = replace(corpus, notes=[*corpus.notes, *kept.notes, *seen])
    return ReadSource(corpus, corpus.documents, kept.documents, f"{corpus.sha256}+{kept.sha256}")


def choose_tokenizer(name: str, source: ReadSource, *, end_of_text: bool) -> Tokenizer:
    """The tokenizer called `name` for this text.

    "auto" is characters if the text has at most 512 distinct ones, else bytes. "bpe" and
    "bpe:SIZE" learn merges from the training text alone, never from the validation text.
    Anything else is a path, as for `named_tokenizer`.

    Raises:
        InputError: for a tokenizer that does not exist or does not fit the text.
    """
    if name == "bpe" or name.startswith("bpe:"):
        return cached_bpe(
            source.train_documents, _bpe_size(name, sum(map(len, source.train_documents)))
        )
    documents = source.documents
    if name == "byte" or not source.is_text:
        return ByteTokenizer()
    characters: set[str] = set()
    for document in documents:
        for piece in document.pieces():
            characters.update(str(piece))
    if name == "auto" and len(characters) > MOST_CHARACTERS:
        return ByteTokenizer()
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
        return tokenizer.kind == "bpe" and tokenizer.vocab_size == _bpe_size(name, 0)
    return os.path.exists(name) and named_tokenizer(name).to_state() == tokenizer.to_state()


def _bpe_size(name: str, length: int) -> int:
    """The size in the name, or one that suits a text of so many characters."""
    size = name.removeprefix("bpe").removeprefix(":")
    if not size:  # each token should occur some hundreds of times
        return next((n for n in BPE_SIZES if n >= length / 250), BPE_SIZES[-1])
    if not (size.isascii() and size.isdigit() and len(size) < 20):
        raise InputError(f"tokenizer={name!r}: SIZE is a whole number, as in bpe:{BPE_SIZES[-1]}")
    return int(size)


def undecoded(source: ReadSource, encoding: str | None) -> list[str]:
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
