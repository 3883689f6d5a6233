"""How a model is trained: `TrainConfig`, which checks itself, and the presets."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from mygpt.config import SHAPES, require_choice, require_int, require_number
from mygpt.errors import InputError
from mygpt.randomness import check_seed

DataOrder = Literal["shuffled", "tutorial"]
Schedule = Literal["cosine", "constant"]


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides a training run beside the model's shape and the text.

    Attributes:
        steps: how many updates to make, or
        tokens: how many tokens to read (rounded up to whole steps), or
        minutes: how long to train; one of the three is given.
        batch_size: B, windows a step.
        seq_len: T, tokens a window.
        lr: the highest learning rate.
        schedule: "cosine" warms up and falls to `min_lr_ratio`; "constant" is the tutorial's.
        warmup_ratio: share of the run in which the rate rises.
        min_lr_ratio: the last rate as a share of the highest.
        weight_decay: AdamW's decoupled decay (Loshchilov & Hutter, 2019).
        decay_all: decay every parameter (torch's default) instead of the matrices alone.
        beta1: AdamW's decay of the mean gradient.
        beta2: AdamW's decay of the squared gradient.
        grad_clip: largest norm of the gradient; 0 is off.
        data_order: "shuffled" shows every window once an epoch; "tutorial" draws windows from
            torch's global generator, as chapter 14 does.
        val_fraction: share of the text, from its end, that is kept for validation.
        seed: decides the first weights, the order of the data and the dropout.
        print_every: steps between reports and log records.
        eval_every: steps between validation passes.
        sample_tokens: length of the sample shown after a validation pass; 0 is off.
        save_every: steps between saves, beside those by the clock; 0 is off.
        save_seconds: seconds between saves.

    Raises:
        InputError: for a value outside its range.
    """

    batch_size: int
    seq_len: int
    lr: float
    steps: int | None = None
    tokens: int | None = None
    minutes: float | None = None
    schedule: Schedule = "cosine"
    warmup_ratio: float = 0.02
    min_lr_ratio: float = 0.05
    weight_decay: float = 0.1
    decay_all: bool = False
    beta1: float = 0.9
    beta2: float = 0.99
    grad_clip: float = 1.0
    data_order: DataOrder = "shuffled"
    val_fraction: float = 0.1
    seed: int = 0
    print_every: int = 100
    eval_every: int = 500
    sample_tokens: int = 120
    save_every: int = 0
    save_seconds: float = 60.0

    def __post_init__(self) -> None:
        budgets = [n for n in ("steps", "tokens", "minutes") if getattr(self, n) is not None]
        if len(budgets) != 1:
            raise InputError(
                f"a run's length is one of --steps, --tokens, --minutes: {len(budgets)} were given"
            )
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if value is not None:
                require_number(name, value)
            if value is not None and not value >= least:
                raise InputError(f"{name}={value} must be at least {least}")
            if value is not None and name in _WHOLE:
                require_int(name, value, least=least)
        require_choice("schedule", self.schedule, ("cosine", "constant"))
        require_choice("data_order", self.data_order, ("shuffled", "tutorial"))
        for name in ("lr", "minutes", "weight_decay", "grad_clip", "save_seconds"):
            if getattr(self, name) is not None and not math.isfinite(getattr(self, name)):
                raise InputError(f"{name}={getattr(self, name)} must be a finite number")
        if self.lr <= 0 or self.minutes == 0:
            name = "lr" if self.lr <= 0 else "minutes"
            raise InputError(f"{name}={getattr(self, name)} must be above 0")
        for name in ("warmup_ratio", "min_lr_ratio", "val_fraction", "beta1", "beta2"):
            require_number(name, getattr(self, name))
            if not 0.0 <= getattr(self, name) < 1.0:
                raise InputError(f"{name}={getattr(self, name)} must be at least 0 and below 1")
        check_seed(self.seed)

    @property
    def total_steps(self) -> int | None:
        """How many steps the run has; None when the clock decides."""
        if self.tokens is not None:
            return math.ceil(self.tokens / (self.batch_size * self.seq_len))
        return self.steps

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain JSON values."""
        return asdict(self)


_LEAST = {
    "steps": 0,
    "tokens": 1,
    "minutes": 0,
    "batch_size": 1,
    "seq_len": 1,
    "lr": 0,
    "weight_decay": 0,
    "grad_clip": 0,
    "print_every": 1,
    "eval_every": 1,
    "sample_tokens": 0,
    "save_every": 0,
    "save_seconds": 0,
}

_WHOLE = (
    "steps",
    "tokens",
    "batch_size",
    "seq_len",
    "print_every",
    "eval_every",
    "sample_tokens",
    "save_every",
)

# Beside a preset's shape (mygpt.config.SHAPES): how it is trained where nothing else is said.
_RECIPES: dict[str, dict[str, Any]] = {
    "tutorial": {
        "steps": 2000,
        "batch_size": 16,
        "lr": 1e-3,
        "schedule": "constant",
        "weight_decay": 0.01,
        "decay_all": True,
        "beta2": 0.999,
        "grad_clip": 0.0,
        "data_order": "tutorial",
        "val_fraction": 0.0,
        "print_every": 500,
    },
    "nano": {"minutes": 5.0, "batch_size": 16, "lr": 4e-3, "print_every": 200},
    "small": {"minutes": 5.0, "batch_size": 16, "lr": 3e-3},
    "medium": {"minutes": 60.0, "batch_size": 16, "lr": 1e-3, "print_every": 10, "eval_every": 100},
    "large": {"minutes": 600.0, "batch_size": 8, "lr": 6e-4, "print_every": 10, "eval_every": 200},
}

PRESETS = tuple(_RECIPES)
DEFAULT_PRESET = "small"
SHAPE_OPTIONS = ("embed_dim", "num_heads", "num_layers", "max_seq_len", "dropout")
TRAIN_OPTIONS = tuple(f.name for f in fields(TrainConfig))


def preset_options(preset: str, overrides: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """A preset's (shape, training) options with the user's own in their place.

    Of the window and the training length of a window, one that is given alone decides both.

    Raises:
        InputError: for an unknown preset or option.
    """
    if preset not in PRESETS:
        raise InputError(f"preset={preset!r} is not known: choose {', '.join(PRESETS)}")
    unknown = sorted(set(overrides) - set(SHAPE_OPTIONS) - set(TRAIN_OPTIONS))
    if unknown:
        raise InputError(
            f"unknown option {', '.join(unknown)}: there are "
            f"{', '.join(sorted({*SHAPE_OPTIONS, *TRAIN_OPTIONS}))}"
        )
    shape, recipe = dict(SHAPES[preset]), dict(_RECIPES[preset])
    if {"steps", "tokens", "minutes"} & set(overrides):
        for name in ("steps", "tokens", "minutes"):
            recipe.pop(name, None)
    shape |= {name: overrides[name] for name in SHAPE_OPTIONS if name in overrides}
    recipe |= {name: overrides[name] for name in TRAIN_OPTIONS if name in overrides}
    if "seq_len" in overrides and "max_seq_len" not in overrides:
        shape["max_seq_len"] = max(shape["max_seq_len"], recipe["seq_len"])
    recipe.setdefault("seq_len", shape["max_seq_len"])
    if recipe["seq_len"] > shape["max_seq_len"]:
        raise InputError(
            f"seq_len={recipe['seq_len']} exceeds max_seq_len={shape['max_seq_len']}: "
            "a window cannot be longer than the model's"
        )
    return shape, recipe
