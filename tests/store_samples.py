"""Texts, tokenizers and helpers for the tests of token stores."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mygpt.data import TokenStore, encode_documents
from mygpt.data.building import Listener, build_store
from mygpt.data.store_request import StoreOptions
from mygpt.text import Document
from mygpt.tokenization import (
    BPETokenizer,
    ByteTokenizer,
    CharTokenizer,
    ForeignTokenizer,
    Tokenizer,
)

CHANCE = random.Random(1)
WORDS = ["".join(CHANCE.choices("abcdefghié", k=CHANCE.randint(1, 8))) for _ in range(300)]
TEXTS = [" ".join(CHANCE.choices(WORDS, k=k)) + ".\n\nEnd 日本語 12!" for k in (3, 900, 1, 40, 700)]
OURS = BPETokenizer.train(TEXTS, 400)


def gpt2_like(kind: str = "foreign") -> Tokenizer:
    """A tokenizer with GPT-2's rule for words, applied by the library."""
    from tokenizers import Tokenizer as Library
    from tokenizers import decoders, models, pre_tokenizers, trainers

    library = Library(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        show_progress=False,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    library.train_from_iterator(TEXTS, trainer)
    description = json.loads(library.to_str())
    if kind == "bpe":
        return BPETokenizer(description)
    return ForeignTokenizer(description, end_of_text=0)


def unigram() -> Tokenizer:
    """One that needs complete documents, and begins each with a token."""
    pieces = [["<unk>", 0.0], ["<s>", 0.0], ["▁", -3.0]]
    pieces += [[char, -4.0] for char in sorted(set("".join(TEXTS)) - {" "})]
    description: dict[str, Any] = {
        "version": "1.0",
        "added_tokens": [
            {"id": 1, "content": "<s>", "special": True, "normalized": False}
            | dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
        ],
        "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first"},
        "decoder": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first"},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [
                {"SpecialToken": {"id": "<s>", "type_id": 0}},
                {"Sequence": {"id": "A", "type_id": 0}},
            ],
            "pair": [],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        },
        "model": {"type": "Unigram", "unk_id": 0, "vocab": pieces, "byte_fallback": False},
    }
    return ForeignTokenizer(description)


TOKENIZERS: dict[str, Callable[[], Tokenizer]] = {
    "ours": lambda: OURS,
    "char": lambda: CharTokenizer(sorted(set("".join(TEXTS))), end_of_text=True),
    "char without an end": lambda: CharTokenizer(sorted(set("".join(TEXTS)))),
    "byte": ByteTokenizer,
    "gpt-2's rule": gpt2_like,
    "gpt-2's rule, ours to hold": lambda: gpt2_like("bpe"),
    "unigram": unigram,
}


def build_with(
    files: Sequence[str | Path],
    out: Path,
    *,
    overwrite: bool = False,
    progress: Listener | None = None,
    **options: Any,
) -> TokenStore:
    """`build_store`, in this process if no `workers` are given."""
    options = {"workers": 0, **options}
    return build_store(files, out, StoreOptions(**options), overwrite=overwrite, progress=progress)


def lines_of(path: Path, texts: list[str] = TEXTS) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def reference_ids(tokenizer: Tokenizer, texts: list[str] = TEXTS) -> np.ndarray[Any, Any]:
    return encode_documents([Document("", text) for text in texts], tokenizer)


def bytes_of(store: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(store)): path.read_bytes()
        for path in store.rglob("*")
        if path.is_file() and path.name != ".lock"
    }
