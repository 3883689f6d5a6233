"""Reading the tokenizer of a Hugging Face folder, and fitting one to a model."""

from __future__ import annotations

from pathlib import Path

from mygpt.errors import InputError
from mygpt.formats.tokenizer_export import describe_tokenizer, own_tokenizer, write_tokenizer
from mygpt.formats.tokenizer_files import read_description
from mygpt.tokenization import BPETokenizer, Tokenizer, load_tokenizer
from mygpt.tokenization.ends import find_ends
from mygpt.tokenization.foreign import ForeignTokenizer
from mygpt.tokenization.foreign_json import parts_of

__all__ = ["fit_tokenizer", "named_tokenizer", "read_tokenizer", "write_tokenizer"]


_PADDING = 64  # many models pad their rows to a multiple of this


def read_tokenizer(folder: Path, vocab_size: int | None) -> tuple[Tokenizer, list[str]]:
    """Read the tokenizer of a model's folder.

    It is read from `tokenizer.json`, or else from `vocab.json` and `merges.txt`, with the folder's
    other files (`tokenizer_files.py`). The result is a `CharTokenizer` or `ByteTokenizer` if it is
    an export of one, a `BPETokenizer` if that gives the same ids for all texts, and otherwise a
    `ForeignTokenizer`. `tokenizer.json` takes precedence over the class that
    `tokenizer_config.json` names.

    Args:
        folder: the model's folder.
        vocab_size: V of the model; it may be larger than the tokenizer's, which is noted. None is
            the tokenizer's.

    Returns:
        The tokenizer, and notes for the user.

    Raises:
        InputError: if there is none, it cannot be read, or it has more ids than the model.
    """
    description, roles, dropped = read_description(folder, vocab_size)
    parts = parts_of(description)
    vocab_size = max(parts.names) + 1 if vocab_size is None else vocab_size
    ours = own_tokenizer(description)
    if ours is not None and ours.vocab_size == vocab_size:
        return ours, []
    end, others, notes = find_ends(
        description, parts, folder, vocab_size=vocab_size, implied=roles.get("eos")
    )
    notes = dropped + notes
    notes += _padding_notes(max(parts.names) + 1, vocab_size)
    foreign = ForeignTokenizer(
        description, end_of_text=end, other_ends=others, vocab_size=vocab_size
    )
    try:
        bpe = BPETokenizer(description)
        same = bpe.vocab_size == vocab_size and bpe.end_of_text == end
        if same and not foreign.beginning and not others:
            return bpe, notes
    except InputError:  # its rules are not those of `BPETokenizer`
        pass
    return foreign, notes


def named_tokenizer(path: str) -> Tokenizer:
    """The tokenizer of a JSON file, token store, checkpoint, run, or folder with a tokenizer.

    Raises:
        InputError: if there is none at `path`.
    """
    from mygpt.data import TokenStore, is_store

    if is_store(path):
        return TokenStore.open(path).tokenizer
    folder = Path(path)
    files = ("tokenizer.json", "vocab.json")
    if folder.is_dir() and any((folder / name).is_file() for name in files):
        return read_tokenizer(folder, None)[0]
    if folder.is_dir() or path.endswith(".safetensors"):
        from mygpt.checkpoint.model_file import read_checkpoint, resolve

        return read_checkpoint(resolve(path)).tokenizer
    return load_tokenizer(path)


def fit_tokenizer(tokenizer: Tokenizer, vocab_size: int) -> tuple[Tokenizer, list[str]]:
    """The user's tokenizer for a model of `vocab_size` rows, padded if it has fewer; and notes.

    Raises:
        InputError: if the numbers of ids and rows are too different.
    """
    found = tokenizer.vocab_size
    if found == vocab_size:
        return tokenizer, []
    if found < vocab_size <= found + max(_PADDING, found // 8):
        foreign = ForeignTokenizer(
            describe_tokenizer(tokenizer),
            end_of_text=tokenizer.end_of_text,
            other_ends=tokenizer.other_ends,
            vocab_size=vocab_size,
        )
        return foreign, _padding_notes(found, vocab_size)
    raise InputError(
        f"the tokenizer has {found:,} ids and the model {vocab_size:,} rows: give the tokenizer "
        "that the model was trained with"
    )


def _padding_notes(found: int, vocab_size: int) -> list[str]:
    if vocab_size <= found:
        return []
    return [
        f"the model has {vocab_size:,} rows and the tokenizer {found:,} ids: the other rows are "
        "padding, and decode to an empty text"
    ]
