"""safetensors files of other programs: the tensors of a file, and a Hugging Face folder with it."""

from __future__ import annotations

import contextlib
import json
import math
import random
from functools import cache
from pathlib import Path

from fuzzing import Mutate, Refused, folder, refusals
from fuzzing.container import model
from mutations import mutated_json, noise, replaced, with_offsets
from mygpt.checkpoint.model_file import Checkpoint
from mygpt.checkpoint.safetensors import METADATA, make_header
from mygpt.formats.hugging_face import find_tensors, read_hugging_face, write_hugging_face
from mygpt.tokenization import CharTokenizer

_TOKENIZER = CharTokenizer("ab \n")
_FILE = "model.safetensors"


def accepts(data: bytes) -> bool:
    """Read every tensor of a file, and the model of an exported folder whose weights it is."""
    path = _exported() / _FILE
    path.write_bytes(data)
    try:
        with refusals():
            found, _ = find_tensors(path.parent)
        for tensor in found.values():
            with contextlib.suppress(Refused), refusals():
                assert tensor.read().shape == tensor.shape
        with refusals():
            read_hugging_face(path.parent, tokenizer=_TOKENIZER)
    except Refused:
        return False
    return True


@cache
def _exported() -> Path:
    """A tiny model's folder."""
    place = folder("safetensors_files") / "exported"
    _export(place)
    return place


def _export(place: Path) -> None:
    config, arrays = model(_TOKENIZER)
    checkpoint = Checkpoint(Path("a"), config, _TOKENIZER, arrays, {})
    write_hugging_face(checkpoint, place, overwrite=True)


def seeds() -> dict[str, bytes]:
    """The export, and the same in types of two bytes."""
    place = folder("safetensors_files")
    _export(place / "seed")
    plain = (place / "seed" / _FILE).read_bytes()
    return {
        "exported": plain,
        "float16": _as_halves(plain, "F16"),
        "bfloat16": _as_halves(plain, "BF16"),
    }


def _as_halves(data: bytes, dtype: str) -> bytes:
    """The same tensors, of zeros, in a type of two bytes."""
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    metadata = header.pop(METADATA)
    tensors = {name: (dtype, tuple(entry["shape"])) for name, entry in header.items()}
    size = sum(2 * math.prod(shape) for _, shape in tensors.values())
    return make_header(metadata, tensors) + bytes(size)


def mutated(data: bytes, rng: random.Random, mutate: Mutate) -> bytes:
    """Mostly with corrected lengths and offsets."""
    end = 8 + int.from_bytes(data[:8], "little")
    if rng.random() < 0.1 or end > len(data):
        return mutate(data)
    header, body, way = data[8:end], data[end:], rng.random()
    if way < 0.1:
        return _joined(header, mutate(body))
    if way < 0.35:
        return _joined(mutate(header), body)
    if way < 0.4:
        return _joined(noise(header or b"{}", rng), body)
    try:
        values = json.loads(header)
    except (ValueError, RecursionError):
        return _joined(mutate(header), body)
    for _ in range(rng.randrange(1, 4)):
        values = rng.choice((mutated_json, replaced))(values, rng)
    if rng.random() < 0.5 and isinstance(values, dict):
        return _joined(*with_offsets(values, body))
    return _joined(json.dumps(values).encode(), body)


def _joined(header: bytes, body: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header + body
