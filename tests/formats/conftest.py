"""A stand-in for tokenizers, and a folder, for the tests of Hugging Face folders."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from hugging_face_samples import characters, checkpoint_of
from mygpt.formats.hugging_face import write_hugging_face
from shapes import LLAMA


@pytest.fixture
def tokenizers(monkeypatch):
    """A stand-in for the tokenizers' own module."""

    def write(tokenizer, folder, max_seq_len):
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer.to_state()))

    module = SimpleNamespace(
        read_tokenizer=lambda folder, vocab_size: (characters(vocab_size), ["a note"]),
        fit_tokenizer=lambda tokenizer, vocab_size: (tokenizer, []),
        write_tokenizer=write,
    )
    monkeypatch.setitem(sys.modules, "mygpt.formats.tokenizers", module)
    return module


@pytest.fixture
def folder(tmp_path, tokenizers) -> Path:
    """The grouped Llama, exported."""
    write_hugging_face(checkpoint_of(LLAMA), tmp_path / "llama")
    return tmp_path / "llama"
