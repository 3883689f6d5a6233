"""The options of `mygpt.train`, `resume` and `replay`, as types.

Each has the names and types of what takes it: the parameters of `mygpt.training`, the fields of
`TrainConfig`, and those of `GPTConfig` that a run may choose. Defaults are there, not here.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, TypedDict

from mygpt.training.config import DataOrder, DtypeName, Engine, OptimizerName, Schedule, Stage


class LengthOptions(TypedDict, total=False):
    """What may change when a run is resumed: its length, reports and saves, and how it computes."""

    steps: int | None
    tokens: int | None
    minutes: float | None
    print_every: int | None
    eval_every: int | None
    sample_tokens: int | None
    save_every: int | None
    save_seconds: float | None
    dtype: DtypeName | None
    compile: bool | None
    checkpoint_activations: bool | None
    shard: bool | None


class RecipeOptions(LengthOptions, total=False):
    """The model's shape, the text's reading and the recipe. None is the preset's choice."""

    preset: str
    tokenizer: str
    encoding: str | None
    field: str | None
    split_documents: bool | None
    unknown: str
    init_from: str | Path | None
    embed_dim: int | None
    num_heads: int | None
    num_layers: int | None
    max_seq_len: int | None
    dropout: float | None
    batch_size: int | Literal["auto"] | None
    micro_batch: int | None
    seq_len: int | None
    stages: Sequence[Stage] | None
    lr: float | None
    schedule: Schedule | None
    warmup_ratio: float | None
    min_lr_ratio: float | None
    optimizer: OptimizerName | None
    weight_decay: float | None
    decay_all: bool | None
    beta1: float | None
    beta2: float | None
    grad_clip: float | None
    ngram_smoothing: float | None
    data_order: DataOrder | None
    val_fraction: float | None
    val_tokens: int | None
    eval_shares: Sequence[float] | None
    patience: int | None
    seed: int | None
    engine: Engine | None
    reserve_s: float | None


class SessionOptions(TypedDict, total=False):
    """What every session of a run has."""

    val_file: str | Path | None
    device: str


class TrainOptions(SessionOptions, RecipeOptions, total=False):
    """The options of `mygpt.train`."""

    output: str | Path | None
    overwrite: bool
    resume: str | None
    began: float | None
    command: str


class ResumeOptions(SessionOptions, RecipeOptions, total=False):
    """The options of `mygpt.resume`. Those that cannot change must have the run's own value."""

    began: float | None


class ReplayOptions(SessionOptions, total=False):
    """The options of `mygpt.replay`."""

    files: Sequence[str | Path]
    overwrite: bool
    command: str
