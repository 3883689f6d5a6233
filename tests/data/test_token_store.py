"""Reading token stores: parts and windows, and damaged files."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mygpt.data import TokenStore, is_store
from mygpt.errors import CheckpointError, DamagedError
from mygpt.tokenization import (
    ByteTokenizer,
)
from store_samples import (
    OURS,
    TEXTS,
    build_with,
    lines_of,
)

# --- reading -------------------------------------------------------------------------------


def test_parts_slices_and_windows_are_those_of_the_array(store: TokenStore) -> None:
    """Across shards too, compared with the ids in memory."""
    row = store.tokens[:].astype(np.int64)
    assert len(store.shards) > 3
    inside = store.tokens.part(37, len(row) - 5).part(3, 1000)
    mine = row[40:1037]
    assert len(inside) == 997
    np.testing.assert_array_equal(inside[:], mine)
    np.testing.assert_array_equal(inside[-10:], mine[-10:])
    assert len(inside[5:2]) == 0
    starts = np.random.default_rng(0).integers(0, len(mine) - 200, size=50)
    for length in (1, 7, 200):
        wanted = mine[starts[:, None] + np.arange(length)]
        found = inside.cut(starts, length)
        np.testing.assert_array_equal(found, wanted)
        assert found.dtype == np.int64
    wide = store.tokens.cut(np.array([0, 3]), len(row) - 3)  # over every shard
    np.testing.assert_array_equal(wide, [row[:-3], row[3:]])


def test_windows_and_parts_outside_the_store_are_refused(store: TokenStore) -> None:
    with pytest.raises(IndexError):
        store.tokens.cut(np.array([len(store.tokens) - 3]), 4)
    with pytest.raises(IndexError):
        store.tokens.part(0, 5).cut(np.array([-1]), 2)
    with pytest.raises(IndexError):
        store.tokens.part(3, 2)
    with pytest.raises(TypeError):
        store.tokens[::2]


def test_the_digest_depends_on_the_content_only(store: TokenStore, tmp_path: Path) -> None:
    """The file does not matter; another text, order or tokenizer gives another digest."""
    found = {}
    for name, texts, tokenizer in (
        ("same", TEXTS, OURS),
        ("order", TEXTS[::-1], OURS),
        ("byte", TEXTS, ByteTokenizer()),
    ):
        file = lines_of(tmp_path / f"{name}.jsonl", texts)
        out = tmp_path / name
        made = build_with([file], out, tokenizer=tokenizer, shard_tokens=500)
        found[name] = made.sha256
    assert found["same"] == store.sha256
    assert len(set(found.values())) == 3


# --- damage --------------------------------------------------------------------------------


def test_a_flipped_bit_is_reported_with_its_file(small: Path) -> None:
    path = small / "shards" / "000001.tokens"
    data = bytearray(path.read_bytes())
    data[20] ^= 1
    path.write_bytes(data)
    TokenStore.open(small)
    with pytest.raises(DamagedError, match=r"000001\.tokens is damaged: its SHA-256 is not"):
        TokenStore.open(small, check=True)


def test_an_id_outside_the_vocabulary_is_reported_as_damage(small: Path) -> None:
    path = small / "shards" / "000000.tokens"
    data = bytearray(path.read_bytes())
    data[1] = 0xFF
    path.write_bytes(data)
    store = TokenStore.open(small)
    with pytest.raises(DamagedError, match="outside the vocabulary of 400"):
        store.tokens.cut(np.array([0]), 4)
    with pytest.raises(DamagedError, match="outside the vocabulary"):
        store.tokens[:4]


@pytest.mark.parametrize("name", ["000000.tokens", "000001.documents"])
def test_truncated_and_missing_shards_are_refused(small: Path, name: str) -> None:
    path = small / "shards" / name
    if path.stat().st_size == 0:
        path.write_bytes(b"x")
    else:
        os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(DamagedError, match="bytes, but the index says"):
        TokenStore.open(small)
    path.unlink()
    with pytest.raises(DamagedError, match="does not exist"):
        TokenStore.open(small)


WRONG: list[tuple[str, Any, str]] = [
    ("version", 2, "upgrade mygpt"),
    ("format", "another", "not a token store"),
    ("dtype", "float64", "neither uint16 nor int32"),
    ("tokens", 5, "not the sum"),
    ("name", 5, "must be a string"),
    ("finished", 1, "must be true or false"),
    ("finished", False, "not finished"),
    ("tokenizer", "../x", "must be a SHA-256"),
    ("tokenizer", "0" * 64, "is not the one in the index"),
    ("sources", [5], "must be a list of objects"),
    ("shards", {}, "must be a list of objects"),
    ("shard_tokens", True, "must be an integer"),
]


@pytest.mark.parametrize(("field", "value", "message"), WRONG)
def test_an_invalid_index_is_refused(small: Path, field: str, value: Any, message: str) -> None:
    path = small / "index.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {field: value}))
    with pytest.raises(CheckpointError, match=message):
        TokenStore.open(small)
    del content[field]
    path.write_text(json.dumps(content))
    with pytest.raises(CheckpointError):
        TokenStore.open(small)


@pytest.mark.parametrize("value", [-1, 2**70, 1.5, None, "9", True])
def test_a_shard_with_invalid_counts_is_refused(small: Path, value: Any) -> None:
    path = small / "index.json"
    content = json.loads(path.read_text())
    content["shards"][0]["tokens"] = value
    path.write_text(json.dumps(content))
    with pytest.raises(DamagedError):
        TokenStore.open(small)


@pytest.mark.parametrize("data", [b"", b"[]", b"[" * 100_000, b"\xff", b"{}"])
def test_a_file_that_is_not_an_index_is_refused(small: Path, data: bytes) -> None:
    (small / "index.json").write_bytes(data)
    with pytest.raises(CheckpointError):
        TokenStore.open(small)
    assert not is_store(small)


def test_is_store_recognises_stores(small: Path, tmp_path: Path) -> None:
    assert is_store(small)
    assert not is_store(tmp_path)
    assert not is_store(tmp_path / "x.jsonl")
    assert not is_store(tmp_path / "nowhere")
    assert not is_store("a\0b")
    os.mkfifo(tmp_path / "index.json")  # reading it would wait for ever
    assert not is_store(tmp_path)
