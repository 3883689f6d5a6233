"""Export of mygpt's tokenizers as files that transformers' AutoTokenizer loads without remote code.

One difference cannot be expressed in a file: transformers encodes the text `<|endoftext|>` as the
control token (in mygpt it stays text; in transformers with `split_special_tokens=True`). A
character that a character tokenizer does not have is an error in both: the exported vocabulary has
no unknown token, so that the `tokenizers` library raises "WordLevel error: Missing [UNK] token from
the vocabulary". (BPE without an unknown token would drop the character without an error.)
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mygpt.checkpoint.durable import write_durably
from mygpt.errors import InputError
from mygpt.tokenization import END_OF_TEXT, BPETokenizer, ByteTokenizer, CharTokenizer, Tokenizer
from mygpt.tokenization.foreign import ForeignTokenizer
from mygpt.tokenization.tokenizer_json import SYMBOLS

_NO_SUCH_TOKEN = "<unknown>"  # WordLevel requires a name; no vocabulary has this one


def write_tokenizer(tokenizer: Tokenizer, folder: Path, max_seq_len: int) -> None:
    """Write `tokenizer.json`, `tokenizer_config.json` and `special_tokens_map.json`.

    A tokenizer without an end-of-text token gets no special tokens.

    Args:
        tokenizer: one of this package's tokenizers.
        folder: the folder; it is created if it does not exist.
        max_seq_len: L, the model's window in tokens.

    Raises:
        InputError: for a tokenizer of another kind.
        StorageError: if there is no space, or the folder cannot be written to.
    """
    description = describe_tokenizer(tokenizer)
    end = tokenizer.end_of_text
    special = {} if end is None else dict.fromkeys(_ROLES, tokenizer.token_text(end))
    if not isinstance(tokenizer, (CharTokenizer, ByteTokenizer, BPETokenizer)):
        special.pop("bos_token", None)  # imported tokenizers may have another first token
        for first in tokenizer.beginning[:1]:
            special["bos_token"] = tokenizer.token_text(first)
    config = {
        # This class uses tokenizer.json unchanged; others add rules of their own.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_seq_len,
        "clean_up_tokenization_spaces": False,
        **special,
    }
    _write(folder / "tokenizer.json", description)
    _write(folder / "tokenizer_config.json", config)
    _write(folder / "special_tokens_map.json", special)


_ROLES = ("bos_token", "eos_token")


def describe_tokenizer(tokenizer: Tokenizer) -> dict[str, Any]:
    """The content of `tokenizer.json` for a tokenizer."""
    if isinstance(tokenizer, CharTokenizer):
        return _of_characters(tokenizer.chars, end_of_text=tokenizer.end_of_text is not None)
    if isinstance(tokenizer, ByteTokenizer):
        return _of_bytes()
    if isinstance(tokenizer, (BPETokenizer, ForeignTokenizer)):
        description: dict[str, Any] = tokenizer.to_state()["tokenizer"]
        return description
    raise InputError(
        f"a tokenizer of kind {tokenizer.kind!r:.40} cannot be exported: only char, byte, bpe and "
        "imported ones can"
    )


def own_tokenizer(description: dict[str, Any]) -> CharTokenizer | ByteTokenizer | None:
    """The inverse of `describe_tokenizer`, also after transformers saved the file again.

    Args:
        description: a `tokenizer.json` that the tokenizers library loads.

    Returns:
        The character or byte tokenizer, or None if it is not the export of one.
    """
    if _essence(description) == _essence(_of_bytes()):
        return ByteTokenizer()
    try:
        vocab = description["model"]["vocab"]
        by_id = sorted(vocab, key=vocab.__getitem__)
        end = by_id[-1] == END_OF_TEXT
        found = CharTokenizer(by_id[: len(by_id) - end], end_of_text=end)
    except (InputError, KeyError, TypeError, AttributeError, IndexError):
        return None
    return found if _essence(description) == _essence(describe_tokenizer(found)) else None


def _essence(description: dict[str, Any]) -> tuple[Any, ...]:
    """The parts of a `tokenizer.json` that determine ids and text."""
    stages = [description.get(name) for name in ("normalizer", "pre_tokenizer", "decoder", "model")]
    added = description.get("added_tokens") or []
    return *stages, [(t.get("id"), t.get("content"), t.get("special")) for t in added]


def _of_characters(chars: Sequence[str], *, end_of_text: bool) -> dict[str, Any]:
    tokens = [*chars, END_OF_TEXT] if end_of_text else chars
    return {
        **_frame(len(chars) if end_of_text else None),
        "pre_tokenizer": {
            "type": "Split",
            # Every single character, including newlines, which a dot does not match.
            "pattern": {"Regex": r"[\s\S]"},
            "behavior": "Isolated",
            "invert": False,
        },
        "decoder": {"type": "Fuse"},
        "model": {
            "type": "WordLevel",
            "vocab": {token: number for number, token in enumerate(tokens)},
            "unk_token": _NO_SUCH_TOKEN,
        },
    }


def _of_bytes() -> dict[str, Any]:
    bytes_alone = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False}
    bytes_alone["use_regex"] = False
    return {
        **_frame(256),
        "pre_tokenizer": bytes_alone,
        "decoder": bytes_alone,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: number for number, token in enumerate([*SYMBOLS, END_OF_TEXT])},
            "merges": [],
        },
    }


def _frame(end_of_text: int | None) -> dict[str, Any]:
    """The common fields, in the library's order: no normalization, and one control token."""
    end = {
        "id": end_of_text,
        "content": END_OF_TEXT,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": True,
    }
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [] if end_of_text is None else [end],
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": None,
        "model": None,
    }


def _write(path: Path, content: dict[str, Any]) -> None:
    text = json.dumps(content, ensure_ascii=False, indent=1)
    write_durably(path, [f"{text}\n".encode()])
