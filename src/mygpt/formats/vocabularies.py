"""The tokenizers of models that `torch.save` wrote: in the file itself, or in its folder.

Each function gives the tokenizer for a model of `vocab_size` ids, and a note for the user or None.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from mygpt.errors import InputError
from mygpt.formats.torch_files import read_plain_pickle
from mygpt.json_objects import STATE, parse_object
from mygpt.tokenization import (
    CharTokenizer,
    Tokenizer,
    WordTokenizer,
    from_state,
    load_tokenizer,
)
from mygpt.tokenization.base import read_json

_ENTRIES = ("vocab", "words", "chars", "tokenizer_chars", "itos", "tokenizer")
_GPT2_SIZES = (50257, 50304)  # the second is padded to a multiple of 64


def in_file(
    path: Path, content: Mapping[str, Any], vocab_size: int
) -> tuple[Tokenizer, str | None]:
    """The tokenizer in the entries of a file, or else in a JSON file in its folder."""
    for name in _ENTRIES:
        kept = content.get(name)
        if isinstance(kept, Mapping) and "kind" in kept:
            return from_state(_json_of(path, kept)), None
        if isinstance(kept, Mapping):  # words by id, or ids by word
            by_word = all(type(value) is int for value in kept.values())
            words = {v: k for k, v in kept.items()} if by_word else dict(kept)
            complete = all(n in words for n in range(len(words)))
            kept = [words[n] for n in range(len(words))] if complete else None
        if isinstance(kept, (str, list, tuple)) and len(kept) == vocab_size:
            return _of_words(path, [str(word) for word in kept]), None
    return _in_folder(path, vocab_size)


def _json_of(path: Path, state: Mapping[str, Any]) -> dict[str, Any]:
    """A tokenizer's state as JSON values; `InputError` if it has others, such as tensors."""
    try:
        return parse_object(json.dumps(dict(state)), STATE)
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(
            f"{path}: the tokenizer in it is not JSON ({error!s:.80}): give --tokenizer PATH"
        ) from None


def _of_words(path: Path, words: list[str]) -> Tokenizer:
    """A tokenizer of characters if all words are single ones, else of words."""
    if all(len(word) == 1 for word in words):
        return _of_characters(path, words)
    try:
        return WordTokenizer(words)
    except InputError as error:
        raise InputError(f"{path}: {error}: give --tokenizer PATH") from None


def _of_characters(path: Path, chars: Any) -> CharTokenizer:
    try:
        return CharTokenizer(chars)
    except InputError as error:
        raise InputError(f"{path}: {error}: give --tokenizer PATH") from None


def _in_folder(path: Path, vocab_size: int) -> tuple[Tokenizer, str]:
    """The tokenizer's JSON file in the folder of a state dict; the tutorial's words have none."""
    stem = path.stem.removesuffix("_gpt")
    named = [f"{stem}_tokenizer.json", f"{path.stem}_tokenizer.json", f"{path.stem}.json"]
    found = [path.with_name(name) for name in named if path.with_name(name).is_file()][:1]
    found = found or sorted(path.parent.glob("*tokenizer*.json"))
    if len(found) > 1:
        raise InputError(
            f"the folder of {path} has several tokenizers "
            f"({', '.join(f.name for f in found[:5])}): give the model's own with --tokenizer PATH"
        )
    if found:
        if {"merges", "chars"} <= read_json(found[0]).keys():
            raise _unsupported(found[0], "bpe")
        return load_tokenizer(found[0]), f"the tokenizer is {found[0].name} in the same folder"
    from mygpt.core.tutorial import VOCAB

    if vocab_size == len(VOCAB):
        return WordTokenizer(VOCAB), (
            "the file and its folder have no vocabulary, so the tutorial's words before its "
            f"chapter on tokenizers are used: {' '.join(VOCAB)} (--tokenizer gives another one)"
        )
    raise InputError(
        f"the folder of {path} has no tokenizer: copy the tutorial's {named[0]} there, or give "
        "--tokenizer PATH"
    )


def of_bundle(path: Path, content: Mapping[str, Any], vocab_size: int) -> tuple[Tokenizer, None]:
    """The tokenizer of a tutorial's bundle; without `tokenizer_kind` it is of characters."""
    kind = content.get("tokenizer_kind", content["config"].get("tokenizer_kind", "char"))
    if kind != "char":
        raise _unsupported(path, kind)
    state = content.get("tokenizer_state")
    chars = state.get("chars") if isinstance(state, Mapping) else None
    chars = content.get("tokenizer_chars") if chars is None else chars
    if not isinstance(chars, (list, tuple, str)):
        raise InputError(
            f"{path} has no tokenizer_chars (a list of characters): give --tokenizer PATH"
        )
    return _of_characters(path, chars), None


def _unsupported(path: Path, kind: Any) -> InputError:
    return InputError(
        f"{path}: its tokenizer is {kind!r:.40}, and only one of characters ('char') can be "
        "imported (the tutorial's 'bpe' merges characters, and mygpt's merges bytes): import "
        "another model, or train a new one with --tokenizer bpe"
    )


def of_nanogpt(path: Path, content: Mapping[str, Any], vocab_size: int) -> tuple[Tokenizer, str]:
    """The characters in the `meta.pkl` that belongs to a checkpoint of nanoGPT.

    It is in the folder of the checkpoint, or in `data/<dataset>/`.
    """
    places = [path.with_name("meta.pkl")]
    settings = content.get("config")
    dataset = settings.get("dataset") if isinstance(settings, Mapping) else None
    if isinstance(dataset, str) and _stays_below(dataset):
        inside = Path("data", dataset, "meta.pkl")
        places += [path.parent / inside, path.parent.parent / inside, inside]
    found = next((place for place in places if place.is_file()), None)
    if found is not None:
        return _of_meta(found), f"the vocabulary was read from {found}"
    if vocab_size in _GPT2_SIZES:
        raise InputError(
            f"{path}: it has {vocab_size} ids, as GPT-2's BPE, which is not in the file: give "
            "GPT-2's tokenizer.json with --tokenizer PATH"
        )
    raise InputError(
        f"{path} has no vocabulary: copy the meta.pkl of its dataset "
        f"({str(dataset)[:60]!r}) into its folder, or give --tokenizer PATH"
    )


def _stays_below(dataset: str) -> bool:
    """Whether a path from the file is relative and stays below its folder."""
    parts = PurePosixPath(dataset.replace("\\", "/")).parts
    return bool(parts) and not any(p in ("..", "/") or ":" in p or "\0" in p for p in parts)


def _of_meta(path: Path) -> CharTokenizer:
    """The tokenizer of a `meta.pkl`, whose `itos` (characters by id) and `stoi` must agree."""
    meta = read_plain_pickle(path)
    itos = meta.get("itos") if isinstance(meta, dict) else None
    if isinstance(itos, (list, tuple)):
        itos = dict(enumerate(itos))
    if not isinstance(itos, dict) or not itos:
        raise InputError(f"{path} has no itos (characters by id): give --tokenizer PATH")
    if any(type(i) is not int for i in itos) or sorted(itos) != list(range(len(itos))):
        raise InputError(
            f"{path}: the ids of itos are not 0 to {len(itos) - 1}: give --tokenizer PATH"
        )
    chars = [itos[i] for i in range(len(itos))]
    if any(not isinstance(char, str) or len(char) != 1 for char in chars):
        raise InputError(
            f"{path}: its tokens are not single characters: give their tokenizer with "
            "--tokenizer PATH"
        )
    wanted = {"stoi": {char: i for i, char in enumerate(chars)}, "vocab_size": len(chars)}
    for name, value in wanted.items():
        if meta.get(name) not in (None, value):
            raise InputError(
                f"{path}: its {name} and itos do not agree: run the dataset's prepare.py again"
            )
    return _of_characters(path, chars)
