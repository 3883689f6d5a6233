"""How a model is trained: `TrainConfig`, which checks itself, and the presets."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from itertools import pairwise
from typing import Any, Literal, get_args

from mygpt.core.random import check_seed
from mygpt.errors import InputError, make_plain, require_choice, require_int, require_number
from mygpt.options import require_known
from mygpt.scaling.presets import SHAPES

DataOrder = Literal["shuffled", "tutorial"]
Schedule = Literal["cosine", "linear", "constant"]
Engine = Literal["torch", "compiled"]
OptimizerName = Literal["adamw", "muon"]
DtypeName = Literal["auto", "float32", "tf32", "bfloat16"]
# From this fraction of the run on: tokens per window, windows per step.
Stage = tuple[float, int, int]


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides a training run, except the model's shape and the text.

    Raises:
        InputError: for a value outside its range.
    """

    batch_size: int  # B, windows per step, in the first stage
    seq_len: int  # T, tokens per window, in the first stage
    lr: float  # the highest learning rate: AdamW's, or Muon's (see `mygpt.training.optimizer`)
    steps: int | None = None  # how many updates to make, or
    tokens: int | None = None  # on how many tokens to train (rounded up to whole steps), or
    minutes: float | None = None  # how long to train; exactly one of the three is given
    stages: tuple[Stage, ...] = ()  # later windows and batches, each (fraction of the run, T, B)
    reserve_s: float = 0.0  # seconds of `minutes` that are kept for what comes after the last step
    # Windows per forward pass; their gradients are accumulated to a batch's. 0 is the whole
    # batch.
    micro_batch: int = 0
    # What computes the gradients: "torch", or "compiled": machine code by Numba on a CPU.
    engine: Engine = "torch"
    # The number format of matrix products (weights are always float32): "float32"; "tf32", in
    # which CUDA rounds factors to 10 bits; "bfloat16"; "auto" is bfloat16 on a CUDA device
    # that supports it, else float32. On a CPU `mygpt.training.planning` may choose bfloat16.
    dtype: DtypeName = "auto"
    compile: bool = False  # use `torch.compile`, if it works on the device
    # Recompute each block in the backward pass (Chen et al., 2016): less memory, more time.
    checkpoint_activations: bool = False
    # With several processes, shard weights, gradients and optimizer (FSDP) instead of
    # replicating them (DDP).
    shard: bool = False
    # "adamw", or "muon" for the blocks' matrices and AdamW for the rest.
    optimizer: OptimizerName = "adamw"
    # "cosine" and "linear" warm up and fall to `min_lr_ratio`; "constant" is the tutorial's.
    schedule: Schedule = "cosine"
    warmup_ratio: float = 0.02  # fraction of the run in which the rate rises
    min_lr_ratio: float = 0.05  # the last rate as a fraction of the highest
    # Label smoothing by an n-gram model (see `mygpt.training.ngram_targets`): the fraction of each
    # training target that its prediction is at most; 0 is off.
    ngram_smoothing: float = 0.0
    weight_decay: float = 0.1  # AdamW's decoupled decay (Loshchilov & Hutter, 2019)
    decay_all: bool = False  # decay every parameter (torch's default) instead of the matrices alone
    beta1: float = 0.9  # AdamW's decay of the mean gradient
    beta2: float = 0.99  # AdamW's decay of the squared gradient
    grad_clip: float = 1.0  # largest norm of the gradient; 0 is off
    # "shuffled" shows every window once an epoch; "tutorial" draws windows from torch's
    # global generator, as chapter 14 does.
    data_order: DataOrder = "shuffled"
    val_fraction: float = 0.1  # fraction of the text, from its end, that is kept for validation
    val_tokens: int = 0  # validate on the first so many of its tokens; 0 is all
    seed: int = 0  # decides the initial weights, the order of the data and the dropout
    print_every: int = 100  # steps between reports and log records
    eval_every: int = 500  # steps between validation passes; 0 is at `eval_shares`
    # Fractions of the run at which to validate; the end is always one.
    eval_shares: tuple[float, ...] = ()
    patience: int = 0  # validations in a row far above the best after which the run ends; 0 is off
    sample_tokens: int = 120  # length of the sample shown after a validation pass; 0 is off
    save_every: int = 0  # steps between saves, in addition to those by the clock; 0 is off
    save_seconds: float = 60.0  # seconds between saves

    def __post_init__(self) -> None:
        given = dict(vars(self))
        for name in LENGTHS:
            if given[name] is None:
                del given[name]
        lengths = len(LENGTHS & set(given))
        if lengths != 1:
            raise InputError(
                f"a run's length is one of --steps, --tokens, --minutes: {lengths} were given"
            )
        for name in LENGTHS.union(_WHOLE, _ABOVE_ZERO, _FROM_ZERO, _FRACTIONS) & set(given):
            require_number(name, given[name])
        for name in _WHOLE.keys() & set(given):
            require_int(name, given[name], least=_WHOLE[name])
        for name, choices in _CHOICES.items():
            require_choice(name, getattr(self, name), choices)
        for name in _SWITCHES:
            if not isinstance(getattr(self, name), bool):
                raise InputError(f"{name}={getattr(self, name)!r:.40} must be true or false")
        for names, least, end, limits in (
            (_ABOVE_ZERO, math.ulp(0.0), math.inf, "above 0 and finite"),
            (_FROM_ZERO, 0.0, math.inf, "at least 0 and finite"),
            (_FRACTIONS, 0.0, 1.0, "at least 0 and below 1"),
        ):
            for name in names:
                if name in given and not least <= given[name] < end:
                    raise InputError(f"{name}={given[name]} must be {limits}")
        check_seed(self.seed)
        make_plain(self)
        self._check_stages()
        self._check_eval_shares()

    def _check_stages(self) -> None:
        """Stages as tuples, in order; the tutorial's data order has none."""
        try:
            stages = tuple((share, seq_len, batch) for share, seq_len, batch in self.stages)
        except (TypeError, ValueError):
            raise InputError(
                f"stages={self.stages!r:.80} must be a list of (share of the run, tokens a window, "
                "windows a step)"
            ) from None
        for share, seq_len, batch_size in stages:
            require_number("a stage's share", share)
            require_int("a stage's seq_len", seq_len, least=1)
            require_int("a stage's batch_size", batch_size, least=1)
        stages = tuple((float(share), int(t), int(b)) for share, t, b in stages)
        object.__setattr__(self, "stages", stages)  # JSON gives lists
        if not all(width > 0 for width in stage_widths(((0.0, 0, 0), *stages))):
            raise InputError(f"stages={stages}: their shares must rise between 0 and 1")
        if stages and self.data_order == "tutorial":
            raise InputError("stages need data_order='shuffled'")

    def _check_eval_shares(self) -> None:
        if not isinstance(self.eval_shares, (tuple, list)):
            raise InputError(f"eval_shares={self.eval_shares!r:.80} must be a list of numbers")
        for share in self.eval_shares:
            require_number("eval_shares", share)
            if not 0.0 <= share <= 1.0:
                raise InputError(f"eval_shares={self.eval_shares!r:.80} must be between 0 and 1")
        object.__setattr__(self, "eval_shares", tuple(map(float, self.eval_shares)))

    def stage(self, done: float) -> int:
        """The number of the stage when a fraction `done` of the run is done; 0 is the first."""
        return sum(done >= share for share, _, _ in self.stages)

    @property
    def windows(self) -> list[tuple[int, int]]:
        """(T, B) of each stage."""
        return [(self.seq_len, self.batch_size), *((t, b) for _, t, b in self.stages)]

    def window(self, stage: int) -> tuple[int, int]:
        """(T, B) of a stage."""
        return self.windows[stage]

    @property
    def piece(self) -> int:
        """Windows that go through the model at once; the CPU kernels take a few by themselves."""
        if self.engine == "compiled":
            return self.batch_size
        return min(self.batch_size, self.micro_batch or self.batch_size)

    def fraction_done(self, step: int, elapsed_s: float) -> float:
        """How much of the run is done, in [0, 1], after `step` steps and `elapsed_s` seconds."""
        if self.minutes is not None:
            return min(1.0, elapsed_s / max(1e-3, 60.0 * self.minutes - self.reserve_s))
        total_steps = self.total_steps or 0
        return step / total_steps if step < total_steps else 1.0

    def learning_rate(self, done: float) -> float:
        """The learning rate when a fraction `done` of the run is done.

        It rises linearly from a tenth of `lr`, then falls to `min_lr_ratio` of it by `schedule`;
        cosine: Loshchilov & Hutter, 2017 (arXiv:1608.03983).
        """
        if self.schedule == "constant":
            return self.lr
        if done < self.warmup_ratio:
            return self.lr * (0.1 + 0.9 * done / self.warmup_ratio)
        fallen = (done - self.warmup_ratio) / (1.0 - self.warmup_ratio)  # from 0 to 1
        linear = self.schedule == "linear"
        height = 1.0 - fallen if linear else 0.5 * (1.0 + math.cos(math.pi * fallen))
        return self.lr * (self.min_lr_ratio + (1.0 - self.min_lr_ratio) * height)

    @property
    def longest_window(self) -> int:
        """The largest T of all stages."""
        return max(seq_len for seq_len, _ in self.windows)

    @property
    def total_steps(self) -> int | None:
        """The number of steps of the run; None for a timed run."""
        if self.tokens is None:
            return self.steps
        stages = ((0.0, self.seq_len, self.batch_size), *self.stages)
        return math.ceil(self.tokens / tokens_per_step(stages))

    def with_reserve(self, seconds: float) -> TrainConfig:
        """The same with so many more seconds of `minutes` kept, up to half of them."""
        if self.minutes is None:
            return self
        return replace(self, reserve_s=min(self.reserve_s + seconds, 30.0 * self.minutes))

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain JSON values."""
        return asdict(self)


def report_s(training_s: float | None) -> float:
    """Seconds that a run's report may take for what it computes with the model.

    At the end of a training, 2% of its time, at most 20 s. `mygpt report`, which no training waits
    for (None), takes up to 20 s.
    """
    return 20.0 if training_s is None else min(20.0, 0.02 * training_s)


def compressors_s(minutes: float | None) -> float:
    """Seconds that zstd and PPMd may take at a run's end: 3% of its time; any without a limit."""
    return math.inf if minutes is None else 0.03 * 60.0 * minutes


# The ranges of the fields, by the least value of whole numbers.
LENGTHS = {"steps", "tokens", "minutes"}
_WHOLE = {
    "steps": 0, "tokens": 1, "batch_size": 1, "seq_len": 1, "print_every": 1, "eval_every": 0,
    "patience": 0, "sample_tokens": 0, "val_tokens": 0, "micro_batch": 0, "save_every": 0,
}  # fmt: skip
_ABOVE_ZERO = ("lr", "minutes")
_FROM_ZERO = ("weight_decay", "grad_clip", "reserve_s", "save_seconds")
_FRACTIONS = (
    "warmup_ratio", "min_lr_ratio", "val_fraction", "beta1", "beta2", "ngram_smoothing",
)  # fmt: skip
_SWITCHES = ("compile", "checkpoint_activations", "shard", "decay_all")
_CHOICES = {
    "schedule": get_args(Schedule),
    "engine": get_args(Engine),
    "optimizer": get_args(OptimizerName),
    "data_order": get_args(DataOrder),
    "dtype": get_args(DtypeName),
}


def stage_widths(stages: Sequence[Stage]) -> list[float]:
    """The fraction of the run that each stage is, the first included."""
    return [end - start for start, end in pairwise([*(share for share, _, _ in stages), 1.0])]


def tokens_per_step(stages: Sequence[Stage]) -> float:
    """The mean over the steps of a run with these stages, the first included."""
    sizes = [seq_len * batch_size for _, seq_len, batch_size in stages]
    return sum(width * size for width, size in zip(stage_widths(stages), sizes, strict=True))


# How a preset is trained; its shape is in mygpt.scaling.presets.
_RECIPES: dict[str, dict[str, Any]] = {
    "tutorial": {
        "steps": 2000, "batch_size": 16, "lr": 1e-3, "schedule": "constant", "weight_decay": 0.01,
        "decay_all": True, "beta2": 0.999, "grad_clip": 0.0, "data_order": "tutorial",
        "val_fraction": 0.0, "print_every": 500,
    },
    "nano": {"minutes": 5.0, "batch_size": 16, "lr": 4e-3, "print_every": 200},
    "small": {"minutes": 5.0, "batch_size": 16, "lr": 3e-3},
    "medium": {"minutes": 60.0, "batch_size": 16, "lr": 1e-3, "print_every": 10, "eval_every": 100},
    "large": {"minutes": 600.0, "batch_size": 8, "lr": 6e-4, "print_every": 10, "eval_every": 200},
}  # fmt: skip

# Further: chosen from the corpus, the budget and the machine (mygpt.training.recipe).
AUTO = "auto"
PRESETS = (AUTO, *_RECIPES)
DEFAULT_PRESET = AUTO
DEFAULT_MINUTES = 5.0
SHAPE_OPTIONS = ("embed_dim", "num_heads", "num_layers", "max_seq_len", "dropout")
TRAIN_OPTIONS = tuple(f.name for f in fields(TrainConfig))


def preset_options(preset: str, overrides: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """A preset's (shape, training) options with the user's own in their place.

    Those of "auto" are checked here against a preset's; `mygpt.training.planning` chooses them.

    Of the window and the training length of a window, one that is given alone decides both.

    Raises:
        InputError: for an unknown preset or option.
    """
    if preset not in PRESETS:
        raise InputError(f"preset={preset!r} is not known: choose {', '.join(PRESETS)}")
    require_known(overrides, {*SHAPE_OPTIONS, *TRAIN_OPTIONS})
    named = "small" if preset == AUTO else preset  # where the choice is made later
    shape, recipe = dict(SHAPES[named]), dict(_RECIPES[named])
    if LENGTHS & set(overrides):
        recipe = {name: value for name, value in recipe.items() if name not in LENGTHS}
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
