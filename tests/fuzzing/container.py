"""Checkpoints: the container of `checkpoint/container.py`, and the model that is in it."""

from __future__ import annotations

import contextlib
import json
import random
from pathlib import Path
from typing import Any

import numpy as np

from fuzzing import Mutate, Refused, folder, refusals
from mutations import forged, mutated_json, noise, replaced, with_offsets
from mygpt.checkpoint.model_file import read_checkpoint, write_checkpoint
from mygpt.checkpoint.parameter_shapes import parameter_shapes
from mygpt.checkpoint.safetensors import METADATA
from mygpt.core.config import GPTConfig
from mygpt.tokenization import ByteTokenizer, CharTokenizer, Tokenizer, WordTokenizer

SHAPE = {"embed_dim": 4, "num_heads": 1, "num_layers": 1, "max_seq_len": 4}
PROVENANCE = {
    "mygpt": "0.1.0",
    "step": 3,
    "trained_length": 4,
    "corpus": {"name": "ab", "bytes": 4, "sha256": "0" * 64},
    "training": {"seed": 1},
}


def accepts(data: bytes) -> bool:
    """Read a checkpoint, check it, and use its tokenizer."""
    path = folder("container") / "model.safetensors"
    path.write_bytes(data)
    try:
        with refusals():
            checkpoint = read_checkpoint(path)
            checkpoint.check()
            assert checkpoint.trained_length is None or checkpoint.trained_length > 0
            used(checkpoint.tokenizer)
    except Refused:
        return False
    return True


def used(tokenizer: Tokenizer, text: str = "ab a\n \u00e9\u4e00\U0001f600 Hello, 12 it's") -> None:
    """Encode, decode and describe; each may be refused, for instance unknown text."""
    size = tokenizer.vocab_size
    shown = range(min(size, 300))

    def push() -> None:
        decoder = tokenizer.decoder(after=[0])
        for number in shown:
            decoder.push(number)
        decoder.finish()

    for call in (
        lambda: tokenizer.decode(shown),
        lambda: [tokenizer.token_text(number) for number in shown],
        push,
        lambda: tokenizer.unknown_spans(text),
        lambda: tokenizer.encode_array(text),
        tokenizer.to_json,
    ):
        with contextlib.suppress(Refused), refusals():
            call()
    with refusals():
        assert len(tokenizer.byte_lengths()) == size


def model(tokenizer: Tokenizer, **shape: Any) -> tuple[GPTConfig, dict[str, np.ndarray]]:
    """The configuration and random weights of a tiny model."""
    config, rng = GPTConfig(tokenizer.vocab_size, **(SHAPE | shape)), np.random.default_rng(0)
    shapes = parameter_shapes(config).items()
    return config, {name: rng.random(size, np.float32) for name, size in shapes}


def written(path: Path, tokenizer: Tokenizer, **shape: Any) -> bytes:
    """A checkpoint of a tiny model."""
    config, arrays = model(tokenizer, **shape)
    write_checkpoint(path, arrays, config, tokenizer, PROVENANCE)
    return path.read_bytes()


def seeds() -> dict[str, bytes]:
    """Checkpoints of several tokenizers and blocks."""
    path = folder("container") / "seed.safetensors"
    modern = {"norm": "rms", "position": "rotary", "mlp": "swiglu", "mlp_dim": 4, "tied": False}
    characters = CharTokenizer("ab \n")
    return {
        "characters": written(path, characters),
        "end-of-text": written(path, CharTokenizer("ab", end_of_text=True)),
        "modern": written(path, characters, mlp_bias=False, **modern),
        "bytes": written(path, ByteTokenizer(), embed_dim=1),
        "words": written(path, WordTokenizer(["to", "be", "or"])),
    }


def mutated(data: bytes, rng: random.Random, mutate: Mutate) -> bytes:
    """Mostly with corrected length and digest, so that what is behind them is reached."""
    end = 8 + int.from_bytes(data[:8], "little")
    if rng.random() < 0.1 or end > len(data):
        return mutate(data)
    header, body, way = data[8:end], data[end:], rng.random()
    if way < 0.15:
        return forged(header, mutate(body))
    if way < 0.35:
        return forged(mutate(header), body)
    if way < 0.4:
        return forged(noise(header or b"{}", rng), body)
    try:
        values = json.loads(header)
    except (ValueError, RecursionError):
        return forged(mutate(header), body)
    for _ in range(rng.randrange(1, 4)):
        values = _changed(values, rng)
    if rng.random() < 0.3 and isinstance(values, dict):
        return forged(*with_offsets(values, body))
    return forged(json.dumps(values, separators=(",", ":")).encode(), body)


def _changed(header: Any, rng: random.Random) -> Any:
    """The header with one change, often in a part, which is JSON in JSON."""
    parts = header.get(METADATA) if isinstance(header, dict) else None
    if rng.random() < 0.6 and isinstance(parts, dict) and parts:
        name = rng.choice(list(parts))
        with contextlib.suppress(ValueError, TypeError):
            text = json.dumps(replaced(json.loads(parts[name]), rng), separators=(",", ":"))
            return {**header, METADATA: {**parts, name: text}}
    return rng.choice((mutated_json, replaced))(header, rng)
