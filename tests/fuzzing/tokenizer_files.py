"""`tokenizer.json` and other tokenizer files, alone and in a folder."""

from __future__ import annotations

import json
import random

from fuzzing import Mutate, Refused, folder, refusals
from fuzzing.container import used
from mutations import mutated_json, replaced
from mygpt.formats.tokenizers import read_tokenizer
from mygpt.tokenization import (
    ByteTokenizer,
    CharTokenizer,
    Tokenizer,
    WordTokenizer,
    from_state,
    load_tokenizer,
)

_LETTERS = {"<unk>": 0, "\u2581": 1, "a": 2, "b": 3, "ab": 4, "\u2581a": 5, "<0x0A>": 6, "##b": 7}


def accepts(data: bytes) -> bool:
    """Read a tokenizer as `--tokenizer` and as `import` do, and use it."""
    path = folder("tokenizer_files") / "tokenizer.json"
    path.write_bytes(data)
    read = False
    for each in (lambda: load_tokenizer(path), lambda: read_tokenizer(path.parent, None)[0]):
        try:
            with refusals():
                tokenizer: Tokenizer = each()
                used(from_state(tokenizer.to_state()))
            read = True
        except Refused:
            continue
    return read


def seeds() -> dict[str, bytes]:
    """Our own, and a small file of each kind that others write."""
    space = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "always"}
    steps = [
        {"type": "Prepend", "prepend": "\u2581"},
        {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"},
    ]
    bpe = {"type": "BPE", "vocab": _LETTERS, "merges": [["a", "b"]], "byte_fallback": True}
    pieces = {"type": "WordPiece", "vocab": _LETTERS, "unk_token": "<unk>"}
    pieces |= {"continuing_subword_prefix": "##", "max_input_chars_per_word": 100}
    unigram = {"type": "Unigram", "unk_id": 0, "vocab": [[t, -1.0] for t in _LETTERS]}
    found = {
        "characters": CharTokenizer("ab é\n", end_of_text=True).to_json(),
        "bytes": ByteTokenizer().to_json(),
        "words": WordTokenizer(["to", "be", "or"]).to_json(),
        "list-of-characters": {"chars": ["a", "b", " "]},
        "llama": _file(bpe | {"unk_token": "<unk>"}, {"type": "Sequence", "normalizers": steps}),
        "wordpiece": _file(pieces, {"type": "Lowercase"}, space),
        "unigram": _file(unigram, {"type": "NFKC"}, space),
    }
    found["llama"]["decoder"] = {"type": "Sequence", "decoders": [
        {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "},
        {"type": "ByteFallback"}, {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0},
    ]}  # fmt: skip
    return {name: json.dumps(values).encode() for name, values in found.items()}


def _file(model: dict, normalizer: dict, splitter: dict | None = None) -> dict:
    end = {"id": 8, "content": "</s>", "special": True, "single_word": False, "lstrip": False}
    end |= {"rstrip": False, "normalized": False}
    around = [
        {"SpecialToken": {"id": "</s>", "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}},
    ]
    return {
        "version": "1.0",
        "added_tokens": [end],
        "normalizer": normalizer,
        "pre_tokenizer": splitter,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": around,
            "pair": around,
            "special_tokens": {"</s>": {"id": "</s>", "ids": [8], "tokens": ["</s>"]}},
        },
        "decoder": splitter,
        "model": model,
    }


def mutated(data: bytes, rng: random.Random, mutate: Mutate) -> bytes:
    """Mostly JSON again."""
    try:
        values = json.loads(data)
    except (ValueError, RecursionError):
        return mutate(data)
    if rng.random() < 0.3:
        return mutate(data)
    for _ in range(rng.randrange(1, 4)):
        values = rng.choice((mutated_json, replaced))(values, rng)
    return json.dumps(values).encode()
