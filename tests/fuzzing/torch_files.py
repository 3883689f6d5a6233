"""Files of `torch.save`: zip files and older ones, and pickles of vocabularies."""

from __future__ import annotations

import contextlib
import io
import pickle
import random
import zipfile
from typing import Any

import torch

from fuzzing import Mutate, Refused, folder, refusals
from fuzzing.container import model
from mutations import mutated_json
from mygpt.formats.state_dicts import read_state_dict
from mygpt.formats.torch_files import read_plain_pickle
from mygpt.tokenization import CharTokenizer

_DATE = (1980, 1, 1, 0, 0, 0)
_TENSORS = [
    torch.tensor(1.0), torch.zeros(3), torch.zeros(0, 3), torch.zeros(1).expand(2**31, 2**31),
    torch.zeros(0, 2**31, 2**31), torch.zeros(2, 2, dtype=torch.complex64), torch.ones(4, 8),
    torch.zeros(2, 2, dtype=torch.int64), torch.eye(2).to_sparse(), torch.zeros(2, device="meta"),
]  # fmt: skip


def accepts(data: bytes) -> bool:
    """Read a model, and the same bytes as the pickle of a vocabulary."""
    path = folder("torch_files") / "model.pt"
    path.unlink(missing_ok=True)  # a tensor of the input before may still be mapped to its file
    path.write_bytes(data)
    read = False
    for each in (read_plain_pickle, read_state_dict):
        try:
            with refusals():
                each(path)
            read = True
        except Refused:
            continue
    return read


def seeds() -> dict[str, bytes]:
    """State dicts with and without a configuration, as torch writes them now and before 1.6."""
    config, arrays = model(CharTokenizer("ab"), embed_dim=2, mlp_dim=1)
    state = {name: torch.from_numpy(array) for name, array in arrays.items()}
    whole = {"model": state, "config": config.to_dict(), "chars": ["a", "b"]}
    vocabulary = {"vocab_size": 2, "stoi": {"a": 0, "b": 1}, "itos": {0: "a", 1: "b"}}
    return {
        "state-dict": _saved({"model": state, "num_heads": 1, "chars": "ab"}),
        "checkpoint": _saved(whole),
        "before-1.6": _saved(whole, new=False),
        "vocabulary": pickle.dumps(vocabulary, protocol=4),
    }


def _saved(content: object, *, new: bool = True) -> bytes:
    """The bytes of `torch.save`, without the padding of records to 64 bytes."""
    stream = io.BytesIO()
    torch.save(content, stream, _use_new_zipfile_serialization=new)
    if not new:
        return stream.getvalue()
    with zipfile.ZipFile(stream) as archive:
        return _zipped({record.filename: archive.read(record) for record in archive.infolist()})


def _zipped(records: dict[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, data in records.items():
            archive.writestr(zipfile.ZipInfo(name, _DATE), data)
    return stream.getvalue()


def _changed(content: Any, rng: random.Random) -> Any:
    """The same content with some values changed, and tensors in the place of others."""
    if rng.random() < 0.5:
        return mutated_json(content, rng)
    content = dict(content)
    places = [content, *(value for value in content.values() if isinstance(value, dict))]
    place = rng.choice(places)
    place[rng.choice(list(place))] = rng.choice(_TENSORS)
    return content


def mutated(data: bytes, rng: random.Random, mutate: Mutate) -> bytes:
    """The content, saved again; or one record of a zip file, with its checksum."""
    if rng.random() < 0.4:
        with contextlib.suppress(Exception):
            content = torch.load(io.BytesIO(data), weights_only=True)
            return _saved(_changed(content, rng), new=data.startswith(b"PK"))
    if rng.random() < 0.15 or not data.startswith(b"PK"):
        return mutate(data)
    with contextlib.suppress(Exception), zipfile.ZipFile(io.BytesIO(data)) as archive:
        records = {record.filename: archive.read(record) for record in archive.infolist()}
        pickles = [name for name in records if name.endswith(".pkl")]
        name = rng.choice(pickles if pickles and rng.random() < 0.8 else list(records))
        if rng.random() < 0.1:
            records[name + rng.choice(["2", "/x", ".pkl"])] = records.pop(name)
        else:
            records[name] = mutate(records[name])
        return _zipped(records)
    return mutate(data)
