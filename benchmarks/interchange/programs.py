"""mygpt, transformers and llama.cpp with one interface: tokens, logits, greedy continuations."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from mygpt import __version__
from mygpt.checkpoint.model_file import Checkpoint
from mygpt.decode.writer import Writer


class Program(Protocol):
    """A model in one program."""

    name: str

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without added special tokens."""

    def logits(self, prompt: list[int], continuation: list[int]) -> NDArray[np.float32]:
        """The logits that predict each token of a continuation: (tokens, V)."""

    def continue_greedily(self, text: str, tokens: int) -> tuple[list[int], list[int]]:
        """The ids of a prompt, and of the program's continuation of at most `tokens`."""


@dataclass
class _Mygpt:
    found: Checkpoint

    def __post_init__(self) -> None:
        self.name = f"mygpt {__version__}"
        self.model = self.found.build_model().eval()
        self.writer = Writer(self.found, self.found.tokenizer, engine="cpu")

    def encode(self, text: str) -> list[int]:
        return self.writer.prompt_ids(text)

    def logits(self, prompt: list[int], continuation: list[int]) -> NDArray[np.float32]:
        ids = torch.tensor([prompt + continuation[:-1]])
        with torch.no_grad():
            logits, _ = self.model(ids)
        return logits[0, len(prompt) - 1 :].numpy()

    def continue_greedily(self, text: str, tokens: int) -> tuple[list[int], list[int]]:
        (written,) = self.writer.complete(text, tokens, temperature=0.0)
        return self.encode(text), written.token_ids


@dataclass
class _Transformers:
    folder: Path

    def __post_init__(self) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.name = f"transformers {version('transformers')}"
        self.tokenizer = AutoTokenizer.from_pretrained(self.folder)
        model: Any = AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32)
        self.model = model.eval()

    def encode(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def logits(self, prompt: list[int], continuation: list[int]) -> NDArray[np.float32]:
        with torch.no_grad():
            logits = self.model(torch.tensor([prompt + continuation[:-1]])).logits
        return logits[0, len(prompt) - 1 :].numpy()

    def continue_greedily(self, text: str, tokens: int) -> tuple[list[int], list[int]]:
        ids = self.encode(text)
        found = self.model.generate(
            torch.tensor([ids]),
            max_new_tokens=tokens,
            do_sample=False,
            top_k=None,
            temperature=None,
        )
        return ids, found[0, len(ids) :].tolist()


@dataclass
class _LlamaCpp:
    file: Path
    window: int

    def __post_init__(self) -> None:
        import llama_cpp

        self.name = f"llama.cpp (llama-cpp-python {version('llama-cpp-python')})"
        self.model = llama_cpp.Llama(
            str(self.file),
            n_ctx=self.window,
            logits_all=True,
            type_k=llama_cpp.GGML_TYPE_F32,
            type_v=llama_cpp.GGML_TYPE_F32,
            flash_attn=False,
            verbose=False,
        )

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self.model.tokenize(text.encode(), add_bos=False, special=False)
        return ids

    def logits(self, prompt: list[int], continuation: list[int]) -> NDArray[np.float32]:
        self.model.reset()
        self.model.eval(prompt + continuation[:-1])
        scores = self.model.scores[len(prompt) - 1 : self.model.n_tokens]
        return np.array(scores, np.float32)

    def continue_greedily(self, text: str, tokens: int) -> tuple[list[int], list[int]]:
        ids = self.encode(text)
        self.model.reset()
        found: Any = self.model.create_completion(ids, max_tokens=tokens, temperature=0.0)
        return ids, list(range(found["usage"]["completion_tokens"]))  # only their number is used


def by_mygpt(found: Checkpoint) -> Program:
    """The model in mygpt."""
    return _Mygpt(found)


def by_transformers(folder: Path) -> Program:
    """The exported folder in transformers, without code of mygpt."""
    return _Transformers(folder)


def by_llama_cpp(file: Path, window: int) -> Program:
    """The exported float32 file in llama.cpp, with a float32 KV cache."""
    return _LlamaCpp(file, window)
