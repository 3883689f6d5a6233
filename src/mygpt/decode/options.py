"""The options of generating, as types: of `mygpt.generate` on ids, and of `Writer` on texts.

Their defaults are those of `SamplingConfig` and of the functions that take them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, TypedDict

import numpy as np

from mygpt.core.window import Overflow

Seed = int | np.integer[Any]


class DrawOptions(TypedDict, total=False):
    """Options of `mygpt.generate` and `mygpt.stream` after the chapter's own."""

    top_p: float | None
    min_p: float | None
    repetition_penalty: float | None
    seed: Seed | None
    overflow: Overflow


class TextOptions(DrawOptions, total=False):
    """Options of `Writer.generate`, `stream`, `complete` and `samples`."""

    temperature: float
    top_k: int | None
    stop: list[str] | tuple[str, ...] | None
    logprobs: int | None
    unknown: Literal["error", "drop"]


class EngineOptions(TypedDict, total=False):
    """What runs a model: options of `Writer`."""

    device: str
    dtype: str
    engine: str
    compile: bool
    speculate: bool


class LoadOptions(EngineOptions, total=False):
    """Options of `mygpt.load`."""

    drafts_from: str | Path | None
