"""What a run learns from where its text is not in memory: a token store."""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mygpt.core.data import split_point
from mygpt.data import cached_tokens, encode_documents, first_part, predicted_size, unknown_in
from mygpt.data.token_store import StoredTokens, Tokens, TokenStore, is_store
from mygpt.errors import InputError
from mygpt.text import READING_VERSION, Corpus, Document, RecordOptions, read_corpus
from mygpt.text.overlap import validation_seen_note
from mygpt.text.reading import shown
from mygpt.text.sizes import TextSize
from mygpt.tokenization import Tokenizer, is_lossless
from mygpt.tokenization.unknown import UnknownText

# Of a store so many tokens are counted: a pass over all of it would take longer than it is worth.
MOST_COUNTED = 2**24
MOST_DECODED = 2**21  # tokens of a store: the text of more of them is not looked at
_NEAR = 0.01  # of the tokens: a document that begins so near to where they are cut is not cut
_PROBED = 2**12  # tokens or characters of a text to validate on that are searched for
_LEAST_PROBED = 32  # tokens: fewer may be there by chance
_UNSURE = 16  # tokens at a cut, which may be others where the text goes on
_SHORTEST = 2  # tokens: one to read and one to predict


@dataclass(frozen=True)
class Judged:
    """What a model is validated on.

    Attributes:
        tokens: its ids; of many the first ones.
        documents: the text of these tokens.
        size: the text that is predicted, of all the ids.
    """

    tokens: NDArray[np.integer]
    documents: list[Document]
    size: TextSize


@dataclass(frozen=True)
class StoredSource:
    """A store and its two parts, of which nothing is in memory.

    Attributes:
        store: tokens to learn from, and to validate on where there is no other text for that.
        cut: the first token that is held back.
        validation: another store or a text to validate on; None is what the store holds back.
        notes: one line each for people.
    """

    store: TokenStore
    cut: int
    validation: TokenStore | Corpus | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        """What a run on it is called."""
        return self.store.name

    @property
    def num_documents(self) -> int:
        """How many documents there are, those to validate on apart where they were named."""
        return self.store.num_documents

    @property
    def num_bytes(self) -> int:
        """Of the same documents, in UTF-8."""
        return self.store.num_bytes

    @property
    def sha256(self) -> str:
        """Of everything, what is validated on included."""
        if self.validation is None:
            return self.store.sha256
        return f"{self.store.sha256}+{self.validation.sha256}"

    @property
    def learned(self) -> list[Document]:
        """No document: what samples were copied from is only known of a text in memory."""
        return []

    @property
    def held(self) -> list[Document]:
        """Documents to validate on where they are in memory, else none."""
        return self.validation.documents if isinstance(self.validation, Corpus) else []

    def encode(self, tokenizer: Tokenizer) -> tuple[Tokens, Tokens]:
        """Tokens to learn from and tokens to validate on; `tokenizer` is the store's."""
        tokens = self.store.tokens
        learned = tokens.part(0, self.cut)
        if self.validation is None:
            return learned, tokens.part(self.cut, len(tokens))
        if isinstance(self.validation, TokenStore):
            return learned, self.validation.tokens
        return learned, cached_tokens(self.validation.documents, tokenizer)

    def judged(self, tokens: Tokens, held_tokens: Tokens, tokenizer: Tokenizer) -> Judged:
        """What is validated on: `tokens`, which are all of the held ones or the first of them."""
        if isinstance(self.validation, Corpus) and len(tokens) == len(held_tokens):
            size = predicted_size(self.validation.documents, tokens, tokenizer)
            return Judged(tokens[:], self.validation.documents, size)
        some = tokens[:MOST_DECODED]
        documents = [self.text_of(some, tokenizer)]
        if is_lossless(tokenizer):
            whole = documents if len(some) == len(tokens) else None
            return Judged(some, documents, predicted_size(whole, tokens, tokenizer))
        if isinstance(self.validation, Corpus):
            documents = first_part(
                self.validation.documents, tokenizer, len(some), len(held_tokens)
            )
            return Judged(some, documents, predicted_size(documents, some, tokenizer))
        store, begin = (self.store, self.cut) if self.validation is None else (self.validation, 0)
        return Judged(some, documents, store.size_of(begin + 1, begin + len(tokens)))

    def unknown(
        self, tokenizer: Tokenizer, train_tokens: Tokens, val_tokens: Tokens
    ) -> dict[str, UnknownText]:
        """What the tokenizer does not know: of a store its ids alone say that."""
        learned, judged = UnknownText(tokenizer), UnknownText(tokenizer)
        if learned.counts:
            learned.add(None, counted(train_tokens))
            if self.held:
                judged = unknown_in(self.held, counted(val_tokens), tokenizer)
            else:
                judged.add(None, counted(val_tokens))
        return {self.name: learned, f"{self.name}, validation": judged}

    def text_of(self, tokens: NDArray[np.integer], tokenizer: Tokenizer) -> Document:
        """The text that some of its tokens stand for; single bytes that are none stay bytes."""
        ids = spoken(tokens, tokenizer)
        if tokenizer.kind != "byte":
            return Document(self.name, tokenizer.decode(ids.tolist()))
        whole = ids.astype(np.uint8).tobytes()
        try:
            return Document(self.name, whole.decode("utf-8"))
        except UnicodeDecodeError:
            return Document(self.name, whole)

    def text_before(self, num_bytes: int, tokenizer: Tokenizer) -> list[Document]:
        """The end of the text that is learned from, about so many bytes."""
        share = len(self.store.tokens) / max(1, self.num_bytes)
        tokens = self.store.tokens[max(0, self.cut - 1 - int(num_bytes * share)) : self.cut]
        return [self.text_of(tokens, tokenizer)]


def open_stored(settings: Mapping[str, Any], val_fraction: float) -> StoredSource:
    """The store that a run's settings name, and what to validate on.

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


def source_of(store: TokenStore, settings: Mapping[str, Any], val_fraction: float) -> StoredSource:
    """A store to learn from, and what `settings` say to validate on; raises as `open_stored`."""
    length = len(store.tokens)
    if length < _SHORTEST:
        raise InputError(
            f"{store.path} holds {length} token: too short to learn from, give at least "
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
    if validation is not None and _is_learned(store, validation):
        notes.append(validation_seen_note(shown(str(settings["val_file"]))))
    cut = length if validation is not None else _cut(store, val_fraction)
    return StoredSource(store, cut, validation, notes)


def _validation(store: TokenStore, settings: Mapping[str, Any]) -> TokenStore | Corpus | None:
    """The text that was named to validate on."""
    name = settings["val_file"]
    if name is None:
        return None
    if not is_store(name):
        bytes_do = store.tokenizer.kind == "byte"
        return read_corpus(
            [name],
            encoding=settings["encoding"],
            allow_bytes=bytes_do,
            split=splits(settings),
            legacy=reads_as_named(settings),
            records=records_of(settings, refuse_unused=False),
        )
    other = TokenStore.open(name)
    if other.tokenizer.to_state() != store.tokenizer.to_state():
        raise InputError(
            f"{name} was tokenized in another way than {store.path}: tokenize it again with "
            f"--tokenizer {shlex.quote(str(store.path))}"
        )
    return other


def _is_learned(store: TokenStore, validation: TokenStore | Corpus) -> bool:
    """Whether a text to validate on begins as some of the store's tokens go on.

    The first tokens of it are searched for among the first of the store.
    """
    tokenizer, ids = store.tokenizer, np.zeros(0, store.tokens.dtype)
    if isinstance(validation, TokenStore):
        ids = validation.tokens[:_PROBED]
    else:
        start = next(validation.documents[0].pieces())[:_PROBED]
        with contextlib.suppress(InputError):  # it is said where all of it is encoded
            ids = encode_documents([Document("start", start)], tokenizer)
            ids = ids[: len(ids) - _UNSURE * (len(start) == _PROBED)]
    ids = ids[np.cumsum(tokenizer.byte_lengths()[ids]) > 0]  # without what begins every text
    ids = ids[_UNSURE:] if len(ids) >= _LEAST_PROBED + _UNSURE else ids  # it may begin in a word
    return len(ids) >= _LEAST_PROBED and _contains(store.tokens[:MOST_COUNTED], ids)


def _contains(tokens: NDArray[np.integer], some: NDArray[np.integer]) -> bool:
    whole, part = tokens.tobytes(), some.astype(tokens.dtype).tobytes()
    place = whole.find(part)
    while place > 0 and place % tokens.itemsize:  # between two tokens
        place = whole.find(part, place + 1)
    return place >= 0


def splits(settings: Mapping[str, Any]) -> bool:
    """Whether a run's text is split at `SEPARATOR`; runs from before that could be do not say."""
    return bool(settings.get("split_documents", False))


def reads_as_named(settings: Mapping[str, Any]) -> bool:
    """Whether a run's files are read by their names alone, as mygpt 0.1 read them."""
    return int(settings.get("reading", 1)) < READING_VERSION


def records_of(settings: Mapping[str, Any], *, refuse_unused: bool = True) -> RecordOptions | None:
    """How a run's files of records are read; None where they are plain text to it."""
    field = settings.get("field")
    return (
        None
        if field is None
        else RecordOptions(field or None, lines_may_be_plain=True, refuse_unused=refuse_unused)
    )


def _cut(store: TokenStore, val_fraction: float) -> int:
    """Where the held tokens begin: with a document, if one begins near."""
    length = len(store.tokens)
    cut = split_point(length, val_fraction)
    reach = int(length * _NEAR)
    if cut == length:
        return cut
    starts = store.document_starts(max(1, cut - reach), min(length, cut + reach + 1))
    return cut if not len(starts) else int(starts[np.abs(starts - cut).argmin()])


def require_as_stored(
    store: str,
    tokenizer: str,
    encoding: str | None,
    data_order: str,
    known: Tokenizer | None,
    split_documents: bool | None,
    field: str | None,
) -> None:
    """Raise `InputError` for what a store has decided already, or cannot do.

    Args:
        store: its folder, whose name the message shows.
        tokenizer: as it was asked for.
        encoding: likewise.
        data_order: of the run.
        known: the tokenizer of the model that the run begins from, if there is one.
        split_documents: as it was asked for; None is not at all.
        field: likewise.
    """
    asked = ["--tokenizer"] * (tokenizer != "auto") + ["--encoding"] * (encoding is not None)
    asked += ["--[no-]split-documents"] * (split_documents is not None)
    asked += ["--field"] * (field is not None)
    if asked:
        raise InputError(
            f"{store} is a token store, its text is read: leave out {', '.join(asked)}"
        )
    if data_order == "tutorial":
        raise InputError(
            f"{store} is a token store, and the tutorial's order of data needs all tokens in "
            "memory: choose another preset, --preset nano say, or name the text itself"
        )
    if known is not None and known.to_state() != TokenStore.open(store).tokenizer.to_state():
        raise InputError(
            f"{store} was tokenized in another way than the model that --from names: tokenize "
            "the text with that model's tokenizer (mygpt tokenize FILES --tokenizer RUN --out ...)"
        )


def counted(tokens: Tokens) -> NDArray[np.integer]:
    """The tokens that statistics are taken of: all that are in memory, a store's first ones."""
    return tokens[:MOST_COUNTED] if isinstance(tokens, StoredTokens) else tokens


def spoken(tokens: NDArray[np.integer], tokenizer: Tokenizer) -> NDArray[np.integer]:
    """Tokens without those that stand for no text: what separates documents."""
    found: NDArray[np.integer] = tokens[tokenizer.byte_lengths()[tokens] > 0]
    return found


def stores_among(names: Sequence[str]) -> list[str]:
    """Those of the names that are token stores."""
    return [name for name in names if is_store(name)]
