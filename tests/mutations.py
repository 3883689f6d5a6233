"""Changes of JSON values and of safetensors headers, for tests with hostile files."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import math
import random
from typing import Any

from mygpt.checkpoint.safetensors import METADATA, SIZES


def forged(header: bytes, body: bytes) -> bytes:
    """A file with this header and the correct digest, as a forger would write it."""
    place = header.find(b'"sha256":"') + 10
    data = len(header).to_bytes(8, "little") + header + body
    if place < 10:
        return data
    zeroed = data[: place + 8] + b"0" * 64 + data[place + 72 :]
    return data[: place + 8] + hashlib.sha256(zeroed).hexdigest().encode() + data[place + 72 :]


STRANGE: list[Any] = [
    None, True, False, 0, -1, 1, 10**6, 10**8, 2**31 - 1, 2**31, 2**63, 2**64, 10**30, -(10**30),
    0.5, 1e308, "", "x",
    "../../etc/passwd", "/etc/passwd", "\u202e", "\x00", "NaN", [], {}, [[]],
    [0], [-1], [2**62] * 2, [2**31, 2**31, 0], [0, 2**64],
    {"a": 1}, "9" * 5000, float("nan"), float("inf"), ["x"] * 1000, {"kind": "char", "chars": []},
]  # fmt: skip


def mutated_json(value: Any, rng: random.Random) -> Any:
    """The same JSON value with one entry changed, removed, duplicated or nested."""
    if isinstance(value, dict) and value and rng.random() < 0.85:
        key = rng.choice(list(value))
        changed = dict(value)
        what = rng.random()
        if what < 0.15:
            del changed[key]
        elif what < 0.25:
            changed[f"{key}{rng.choice(['', '2', '/x'])}more"] = changed[key]
        elif what < 0.4:
            changed[key] = rng.choice(STRANGE)
        else:
            changed[key] = mutated_json(changed[key], rng)
        return changed
    if isinstance(value, list) and value and rng.random() < 0.7:
        changed_list, place = list(value), rng.randrange(len(value))
        inside = isinstance(value[place], (dict, list)) and rng.random() < 0.8
        changed_list[place] = mutated_json(value[place], rng) if inside else rng.choice(STRANGE)
        return changed_list
    if isinstance(value, str) and value[:1] == "{" and rng.random() < 0.9:
        with contextlib.suppress(ValueError):  # a part: JSON inside JSON
            return json.dumps(mutated_json(json.loads(value), rng), separators=(",", ":"))
    return rng.choice(STRANGE)


def replaced(value: Any, rng: random.Random) -> Any:
    """The same JSON value with one place replaced, each with the same probability.

    The new value is a strange one, or that of another place.
    """
    root = [copy.deepcopy(value)]
    places: list[tuple[Any, Any]] = []
    waiting: list[Any] = [root]
    while waiting:
        holder = waiting.pop()
        keys = list(holder) if isinstance(holder, dict) else range(len(holder))
        places += [(holder, key) for key in keys]
        waiting += [holder[key] for key in keys if isinstance(holder[key], (dict, list))]
    (holder, key), (other, place) = rng.choice(places), rng.choice(places)
    strange = rng.random() < 0.7
    holder[key] = rng.choice(STRANGE) if strange else copy.deepcopy(other[place])
    return root[0]


def with_offsets(values: dict[str, Any], body: bytes) -> tuple[bytes, bytes]:
    """A safetensors header whose offsets follow from types and shapes, and a body for it."""
    reached, most = 0, 2**14
    for name, entry in values.items():
        if name == METADATA or not isinstance(entry, dict):
            continue
        shape, dtype = entry.get("shape"), entry.get("dtype")
        if not isinstance(shape, list) or any(type(n) is not int or n < 0 for n in shape):
            continue
        size = math.prod(shape) * (SIZES.get(dtype, 1) if isinstance(dtype, str) else 1)
        if size < most:
            entry["data_offsets"] = [reached, reached + size]
            reached += size
    header = json.dumps(values, separators=(",", ":")).encode()
    return header, body[:reached].ljust(reached, b"\0")


def noise(header: bytes, rng: random.Random) -> bytes:
    """The header's bytes with some changed, removed or inserted."""
    data = bytearray(header)
    for _ in range(rng.randrange(1, 6)):
        place = rng.randrange(len(data))
        what = rng.randrange(3)
        if what == 0:
            data[place] = rng.randrange(256)
        elif what == 1:
            del data[place : place + rng.randrange(1, 40)]
        else:
            data[place:place] = rng.choice([b"[" * 5000, b'"', b"{", b"9" * 400, b"\\u0000"])
        if not data:
            data = bytearray(b"{}")
    return bytes(data)
