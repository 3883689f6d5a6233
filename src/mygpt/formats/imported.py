"""The result of an importer: a model of another program, in mygpt's names and shapes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from mygpt.checkpoint.container import Arrays
from mygpt.core.config import GPTConfig
from mygpt.tokenization import Tokenizer


@dataclass(frozen=True)
class Imported:
    """A model of another program.

    Attributes:
        config: its configuration.
        arrays: its parameters, float32, by the names of `GPTConfig.parameter_shapes`.
        tokenizer: its tokenizer.
        notes: lines for the user: what was dropped or assumed.
        origin: its source, as JSON values, for the checkpoint's provenance.
    """

    config: GPTConfig
    arrays: Arrays
    tokenizer: Tokenizer
    notes: list[str] = field(default_factory=list)
    origin: dict[str, Any] = field(default_factory=dict)
