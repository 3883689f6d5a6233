"""Hugging Face folders for tests: exported tiny models, changed and as pickles."""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch

from mygpt import CharTokenizer, GPTConfig
from mygpt.checkpoint.model_file import Checkpoint, model_arrays
from mygpt.formats.hugging_face import read_hugging_face
from refusals import refusal
from shapes import build

PROVENANCE = {
    "step": 1234,
    "loss": 1.23456,
    "val_loss": 1.5,
    "val_bits_per_byte": 2.125,
    "command": "mygpt train poems.txt",
    "imported": {"from": "their/model"},
    "corpus": {"name": "poems.txt", "bytes": 98765, "sha256": "ab" * 32},
}


def characters(vocab_size: int, *, end_of_text: bool = False) -> CharTokenizer:
    chars = [chr(0x100 + n) for n in range(vocab_size - end_of_text)]
    return CharTokenizer(chars, end_of_text=end_of_text)


def checkpoint_of(config: GPTConfig, *, seed: int = 0, end_of_text: bool = False) -> Checkpoint:
    tokenizer = characters(config.vocab_size, end_of_text=end_of_text)
    arrays = model_arrays(build(config, seed))
    return Checkpoint(Path("a.safetensors"), config, tokenizer, arrays, dict(PROVENANCE))


def edit(path: Path, **changes) -> None:
    """Change a JSON file's entries; `...` takes one out."""
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in values.items() if v is not ...}))


def as_pickles(folder: Path, shards: int = 1) -> None:
    """The same weights in the format of transformers before safetensors."""
    from safetensors.torch import load_file

    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    if shards == 1:
        torch.save(state, folder / "pytorch_model.bin")
        return
    places = {
        name: f"pytorch_model-{n % shards + 1:05}-of-{shards:05}.bin"
        for n, name in enumerate(state)
    }
    for file in set(places.values()):
        torch.save({n: state[n].clone() for n in state if places[n] == file}, folder / file)
    index = {"metadata": {"total_size": 1}, "weight_map": places}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


def refused(path: Path, match: str) -> str:
    """The message of an import that is refused, which changes no file."""
    before = sorted(path.rglob("*"))
    message = refusal(read_hugging_face, path)
    assert re.search(match, message), message
    assert sorted(path.rglob("*")) == before
    return message
