"""Reading and writing the tokenizer of a Hugging Face folder, and fitting one to a model.

The written files load in transformers' AutoTokenizer without remote code. One difference cannot be
expressed in a file: transformers encodes the text `<|endoftext|>` as the control token (in mygpt it
stays text; in transformers with `split_special_tokens=True`). A character that a character
tokenizer does not have is an error in both.
"""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from mygpt.checkpoint.durable import write_durably
from mygpt.errors import InputError
from mygpt.formats.tokenizer_files import read_description
from mygpt.tokenization import (
    END_OF_TEXT,
    ByteTokenizer,
    CharTokenizer,
    ForeignTokenizer,
    Tokenizer,
    WordTokenizer,
    from_tokenizer_json,
    load_tokenizer,
)
from mygpt.tokenization.tokenizer_json import TokenizerFile

_PADDING = 64  # many models pad their rows to a multiple of this
_STAGES = ("normalizer", "pre_tokenizer", "decoder", "model")


def read_tokenizer(folder: Path, vocab_size: int | None) -> tuple[Tokenizer, list[str]]:
    """Read the tokenizer of a model's folder.

    It is read from `tokenizer.json`, or else from `vocab.json` and `merges.txt`, with the folder's
    other files (`tokenizer_files.py`). The result is a `CharTokenizer`, `ByteTokenizer` or
    `WordTokenizer` if it is an export of one, a `BPETokenizer` if that gives the same ids for all
    texts, and otherwise a `ForeignTokenizer`. `tokenizer.json` takes precedence over the class
    that `tokenizer_config.json` names.

    Args:
        folder: the model's folder.
        vocab_size: V of the model; it may be larger than the tokenizer's, which is noted. None is
            the tokenizer's.

    Returns:
        The tokenizer, and notes for the user.

    Raises:
        InputError: if there is none, it cannot be read, or it has more ids than the model.
    """
    description, end, dropped = read_description(folder, vocab_size)
    file = TokenizerFile(description)
    vocab_size = file.size if vocab_size is None else vocab_size
    ours = own_tokenizer(file)
    if ours is not None and ours.vocab_size == vocab_size:
        return ours, []
    tokenizer, notes = from_tokenizer_json(file, folder, vocab_size=vocab_size, implied_end=end)
    return tokenizer, dropped + notes + _padding_notes(file.size, vocab_size)


def own_tokenizer(file: TokenizerFile) -> Tokenizer | None:
    """The character, byte or word tokenizer whose export a `tokenizer.json` is; else None.

    Also after transformers saved the file again.
    """
    by_id = [file.names[number] for number in sorted(file.names)]
    end = by_id[-1] == END_OF_TEXT
    candidates: list[Tokenizer] = [ByteTokenizer()]
    with suppress(InputError):  # not characters
        candidates.append(CharTokenizer(by_id[: len(by_id) - end], end_of_text=end))
    with suppress(InputError):  # not words
        candidates.append(WordTokenizer(by_id))
    wanted = _essence(file)
    return next((t for t in candidates if _essence(TokenizerFile(t.to_json())) == wanted), None)


def _essence(file: TokenizerFile) -> list[Any]:
    """The parts of a `tokenizer.json` that determine ids and text."""
    added = [(token["id"], token["content"], token["special"]) for token in file.added]
    return [*map(file.description.get, _STAGES), added]


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
    if not found < vocab_size <= found + max(_PADDING, found // 8):
        raise InputError(
            f"the tokenizer has {found:,} ids and the model {vocab_size:,} rows: give the "
            "tokenizer that the model was trained with"
        )
    foreign = ForeignTokenizer(
        tokenizer.to_json(),
        end_of_text=tokenizer.end_of_text,
        other_ends=tokenizer.other_ends,
        vocab_size=vocab_size,
    )
    return foreign, _padding_notes(found, vocab_size)


def _padding_notes(found: int, vocab_size: int) -> list[str]:
    if vocab_size <= found:
        return []
    return [
        f"the model has {vocab_size:,} rows and the tokenizer {found:,} ids: the other rows are "
        "padding, and decode to an empty text"
    ]


def write_tokenizer(tokenizer: Tokenizer, folder: Path, max_seq_len: int) -> None:
    """Write `tokenizer.json`, `tokenizer_config.json` and `special_tokens_map.json`.

    A tokenizer without an end-of-text token gets no special tokens.

    Args:
        tokenizer: of the model.
        folder: the folder; it is created if it does not exist.
        max_seq_len: L, the model's window in tokens.

    Raises:
        StorageError: if there is no space, or the folder cannot be written to.
    """
    special = {}
    first, end = tokenizer.beginning[:1], tokenizer.end_of_text
    if not first and tokenizer.kind != "foreign" and end is not None:
        first = (end,)  # an imported tokenizer may have another first token
    if first:
        special["bos_token"] = tokenizer.token_text(first[0])
    if end is not None:
        special["eos_token"] = tokenizer.token_text(end)
    config = {
        # This class uses tokenizer.json unchanged; others add rules of their own.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_seq_len,
        "clean_up_tokenization_spaces": False,
        **special,
    }
    files = {
        "tokenizer.json": tokenizer.to_json(),
        "tokenizer_config.json": config,
        "special_tokens_map.json": special,
    }
    for name, content in files.items():
        text = json.dumps(content, ensure_ascii=False, indent=1)
        write_durably(folder / name, [f"{text}\n".encode()])
