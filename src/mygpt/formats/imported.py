"""What an importer hands over: a model of somebody else's, in our names and shapes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from mygpt.container import Arrays
from mygpt.core.config import GPTConfig
from mygpt.tokenization import Tokenizer


@dataclass(frozen=True)
class Imported:
    """A model from elsewhere.

    Attributes:
        config: its shape.
        arrays: its parameters under our names, float32 (see `GPTConfig.parameter_shapes`).
        tokenizer: its tokenizer.
        notes: lines that the user should read: what was left out, or assumed.
        origin: where it is from, as plain JSON values, for the checkpoint's provenance.
    """

    config: GPTConfig
    arrays: Arrays
    tokenizer: Tokenizer
    notes: list[str] = field(default_factory=list)
    origin: dict[str, Any] = field(default_factory=dict)
