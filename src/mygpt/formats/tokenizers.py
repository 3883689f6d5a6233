"""The tokenizer of a Hugging Face folder, and ours written as one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mygpt.errors import InputError
from mygpt.formats.tokenizer_export import describe_tokenizer, own_tokenizer, write_tokenizer
from mygpt.formats.tokenizer_files import read_description
from mygpt.json_objects import TOKENIZER_SETTINGS, read_object
from mygpt.tokenization import END_OF_TEXT, BPETokenizer, Tokenizer, load_tokenizer
from mygpt.tokenization.foreign import ForeignTokenizer
from mygpt.tokenization.foreign_json import Parts, parts_of, special_ids, stands_for_character

__all__ = ["fit_tokenizer", "named_tokenizer", "read_tokenizer", "write_tokenizer"]


_PADDING = 64  # rows, a multiple of which many models have


def read_tokenizer(folder: Path, vocab_size: int | None) -> tuple[Tokenizer, list[str]]:
    """The tokenizer of a model's folder.

    From `tokenizer.json`, else from `vocab.json` and `merges.txt`, with what is beside them
    (`tokenizer_files.py`). It is a
    `CharTokenizer` or `ByteTokenizer` where we wrote it as one, a `BPETokenizer` where that holds
    it to the letter, and a `ForeignTokenizer` otherwise. `tokenizer.json` decides, where a class
    of transformers that `tokenizer_config.json` names would build other rules around its words.

    Args:
        folder: the model's.
        vocab_size: V, the model's; more than the tokenizer has is fine, and noted. None is what
            the tokenizer has.

    Returns:
        The tokenizer, and lines that the user should read.

    Raises:
        InputError: where there is none, it cannot be read, or it has more ids than the model.
    """
    description, roles, left_out = read_description(folder, vocab_size)
    parts = parts_of(description)
    vocab_size = max(parts.names) + 1 if vocab_size is None else vocab_size
    ours = own_tokenizer(description)
    if ours is not None and ours.vocab_size == vocab_size:
        return ours, []
    end, notes = _end_of_text(folder, parts, special_ids(description), roles.get("eos"))
    notes = left_out + notes
    notes += _padding_notes(max(parts.names) + 1, vocab_size)
    foreign = ForeignTokenizer(description, end_of_text=end, vocab_size=vocab_size)
    try:
        bpe = BPETokenizer(description)
        same = bpe.vocab_size == vocab_size and bpe.end_of_text == end
        if same and not foreign.beginning:
            return bpe, notes
    except InputError:  # it is something else
        pass
    return foreign, notes


def named_tokenizer(path: str) -> Tokenizer:
    """The tokenizer that a path means: a JSON file's, or a store's, run's or other folder's.

    Raises:
        InputError: where there is none.
    """
    from mygpt.data import TokenStore, is_store

    if is_store(path):
        return TokenStore.open(path).tokenizer
    folder = Path(path)
    files = ("tokenizer.json", "vocab.json")
    if folder.is_dir() and any((folder / name).is_file() for name in files):
        return read_tokenizer(folder, None)[0]
    if folder.is_dir() or path.endswith(".safetensors"):
        from mygpt.checkpoint import read_checkpoint, resolve

        return read_checkpoint(resolve(path)).tokenizer
    return load_tokenizer(path)


def fit_tokenizer(tokenizer: Tokenizer, vocab_size: int) -> tuple[Tokenizer, list[str]]:
    """A tokenizer that was given for a model of so many rows, and what the user should know.

    Raises:
        InputError: where the two do not belong together.
    """
    found = tokenizer.vocab_size
    if found == vocab_size:
        return tokenizer, []
    if found < vocab_size <= found + max(_PADDING, found // 8):
        foreign = ForeignTokenizer(
            describe_tokenizer(tokenizer),
            end_of_text=tokenizer.end_of_text,
            vocab_size=vocab_size,
        )
        return foreign, _padding_notes(found, vocab_size)
    raise InputError(
        f"the tokenizer has {found:,} ids and the model {vocab_size:,} rows: give the one that it "
        "was trained with"
    )


def _end_of_text(
    folder: Path, parts: Parts, special: set[int], implied: str | None
) -> tuple[int | None, list[str]]:
    """The id that ends a text, by the first of the folder's files that names a usable one.

    Where none does, it is the token that the tokenizer's class implies, or `<|endoftext|>`.
    """
    notes: list[str] = []
    ids = {name: number for number, name in parts.names.items()}
    for file in ("tokenizer_config.json", "special_tokens_map.json"):
        token = _optional(folder / file).get("eos_token")
        name = token.get("content") if isinstance(token, dict) else token
        if not isinstance(name, str):
            continue
        if name in ids and (ids[name] in special or not stands_for_character(name)):
            return ids[name], notes
        what = "a character of text" if name in ids else "no token"
        notes.append(f"{file} ends texts with {name!r:.40}, which is {what}: not used")
    for file in ("generation_config.json", "config.json"):
        found = _optional(folder / file).get("eos_token_id")
        listed = found if isinstance(found, list) else [] if found is None else [found]
        usable = [number for number in listed if type(number) is int and number in special]
        if usable:
            more = f", not with {usable[1:]}" if usable[1:] else ""
            name = parts.names[usable[0]]
            notes.append(f"texts end with {name!r:.40}, id {usable[0]}, of {file}{more}")
            return usable[0], notes
        if listed:
            notes.append(f"{file} ends texts with {listed!r:.60}, no special token: not used")
    for name in (implied, END_OF_TEXT):
        if name in ids and ids[name] in special:
            return ids[name], notes
    return None, [*notes, "no token ends a text: the model writes until it is stopped"]


def _optional(path: Path) -> dict[str, Any]:
    return read_object(path, TOKENIZER_SETTINGS) if path.is_file() else {}


def _padding_notes(found: int, vocab_size: int) -> list[str]:
    if vocab_size <= found:
        return []
    return [
        f"the model has {vocab_size:,} rows and the tokenizer {found:,} ids: the rows past those "
        "are padding, and decode to nothing"
    ]
