"""Token stores for the tests of this folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from mygpt.data import TokenStore
from store_samples import OURS, build_with, lines_of


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    """A store of many small shards, which tests only read."""
    folder = tmp_path_factory.mktemp("stores")
    file = lines_of(folder / "texts.jsonl")
    return build_with([file], folder / "store", tokenizer=OURS, shard_tokens=500)


@pytest.fixture
def small(tmp_path: Path) -> Path:
    out = tmp_path / "store"
    build_with([lines_of(tmp_path / "x.jsonl")], out, tokenizer=OURS, shard_tokens=500)
    return out
