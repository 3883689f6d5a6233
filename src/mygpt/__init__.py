"""mygpt trains a GPT on a text file and writes from it.

Names are handed on when they are first used, so that importing this package loads neither
torch nor NumPy.
"""

from __future__ import annotations

TYPE_CHECKING = False  # importing `typing` takes longer than all that is imported here
if TYPE_CHECKING:
    from typing import Any

    from mygpt.api.generation import generate, stream
    from mygpt.api.listeners import CsvListener, TensorBoardListener, WandbListener
    from mygpt.api.training import replay, resume, train
    from mygpt.api.writer import Writer, load
    from mygpt.checkpoint.model_file import load_checkpoint, save_checkpoint
    from mygpt.cli import main
    from mygpt.core.config import GPTConfig, SamplingConfig
    from mygpt.core.model import GPT
    from mygpt.core.tutorial import VOCAB, get_batch, set_seed, to_ids
    from mygpt.errors import MygptError
    from mygpt.tokenization import BPETokenizer, ByteTokenizer, CharTokenizer

__version__ = "0.1.0"

__all__ = [
    "GPT",
    "GPTConfig",
    "SamplingConfig",
    "generate",
    "stream",
    "load",
    "train",
    "resume",
    "replay",
    "Writer",
    "CsvListener",
    "TensorBoardListener",
    "WandbListener",
    "get_batch",
    "set_seed",
    "VOCAB",
    "to_ids",
    "CharTokenizer",
    "ByteTokenizer",
    "BPETokenizer",
    "save_checkpoint",
    "load_checkpoint",
    "MygptError",
    "main",
]

_HOMES = {
    "api.generation": ("generate", "stream"),
    "api.listeners": ("CsvListener", "TensorBoardListener", "WandbListener"),
    "api.training": ("replay", "resume", "train"),
    "api.writer": ("Writer", "load"),
    "checkpoint.model_file": ("load_checkpoint", "save_checkpoint"),
    "cli": ("main",),
    "core.config": ("GPTConfig", "SamplingConfig"),
    "errors": ("MygptError",),
    "core.model": ("GPT",),
    "tokenization": ("BPETokenizer", "ByteTokenizer", "CharTokenizer"),
    "core.tutorial": ("VOCAB", "get_batch", "set_seed", "to_ids"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'mygpt' has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(f"mygpt.{_HOME_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
