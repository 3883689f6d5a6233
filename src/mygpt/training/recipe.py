"""The default recipe: shape, windows, batches and regularisation from corpus, speed and budget.

One rule, fitted to sweeps that docs/lab-notes.md lists: the time and the machine's measured
speed give the floating-point operations that can be spent; these give the width; width and
speed give the number of tokens; the number of epochs decides the regularisation.
Letters: C embedding, N training tokens, T time.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from mygpt.core.config import GPTConfig
from mygpt.core.model import GPT
from mygpt.scaling.estimates import flops_per_token
from mygpt.scaling.presets import MODERN
from mygpt.training.config import SHAPE_OPTIONS, TRAIN_OPTIONS, Stage, stage_widths, tokens_per_step
from mygpt.training.ngram_targets import MOST_TOKENS, MOST_VOCABULARY

Stages = tuple[Stage, ...]

HEAD_SIZE = 32


@dataclass(frozen=True)
class Size:
    """A model size that is best from so many operations on."""

    width: int  # C
    layers: int  # blocks
    least_flops: float  # of the whole run


SIZES = (
    Size(64, 4, 0.0), Size(96, 4, 5.5e12), Size(128, 4, 4e13), Size(160, 4, 6e13),
    Size(192, 5, 1e14), Size(192, 6, 2e14), Size(256, 6, 8e14),
)  # fmt: skip
TOKENS_PER_STEP = 2048
_MOST_PER_STEP = 2**16  # tokens, if longer windows are asked for and no batch size
# Of the expected loss, to either side; of a text that repeats itself the loss depends on how much
# of it is copied.
_SPREAD, _REPETITIVE_LOSS, _REPETITIVE_MERGES, _REPETITIVE_SPREAD = 0.07, 0.8, 1.1, 0.5
MOST_EXPECTED_VOCABULARY = 2048  # of larger ones the loss was not fitted
# After more, a model only memorises the text; one that repeats itself it still learns to copy, but
# not in merges, without dropout (docs/lab-notes.md).
MOST_EPOCHS, _MOST_EPOCHS_REPETITIVE, _MOST_EPOCHS_REPETITIVE_MERGES = 40.0, 80.0, 16.0
_MOST_EVALUATIONS = 20
# Stages: from this fraction of the run on, tokens per window, and windows per step.
_STAGES = ((0.0, 64, 32), (0.5, 128, 16), (0.8, 256, 8))
_NARROW = 64  # up to this width there is only the first stage
_RATE, _ADAMW_RATE, _DECAY = 0.02, 3e-3, 0.1
# A run of fewer steps than this gets a higher rate for Muon, by the root, up to twice.
_USUAL_STEPS = 1000
# Of training targets an n-gram model predicts at most this fraction (see `ngram_targets`). A text
# that repeats itself in long passages is copied, which smoothed targets hinder: it gets neither
# them nor dropout.
_SMOOTHING, _REPETITIVE = 0.8, 0.42
_COUNTING_S_PER_TOKEN, _MOST_COUNTING = 8e-7, 0.04  # counting n-grams, a fraction of the time
# A wider model than this memorises the text sooner, and is not better.
_MOST_PARAMETERS_PER_TOKEN = 5.0
_SHORT = 30_000  # tokens: a text so short needs more dropout
# Smoothed targets make up for dropout up to 20 epochs, but not of merges, which larger vocabularies
# are: they are fewer than characters, and memorised sooner, by new models above the least width
# after 6 epochs (docs/lab-notes.md).
_SMALL_VOCABULARY = 257  # of bytes
_LEAST_VALIDATED = 2**17
_APART = 5  # steps between validations, at least
# For an existing model: AdamW's rate times the width to the power of 1.5, the longest windows, the
# least number of steps, and the least number of validation tokens.
_RATE_AGAIN, _LONGEST_AGAIN, _STEPS_AGAIN, _LEAST_VALIDATED_AGAIN = 2.0, 512, 100, 2**13


def shape_of(width: int, layers: int, window: int) -> dict[str, Any]:
    """The modern block at a width."""
    return {
        "embed_dim": width,
        "num_heads": width // HEAD_SIZE,
        "head_dim": HEAD_SIZE,
        "num_layers": layers,
        "max_seq_len": window,
        **MODERN,
        "tied": False,
    }


def mean_flops_per_token(config: GPTConfig, stages: Stages) -> float:
    """Operations per token over a run's stages, whose shares are shares of the time."""
    rates = [1.0 / flops_per_token(config, seq_len).total for _, seq_len, _ in stages]
    return 1.0 / sum(w * rate for w, rate in zip(stage_widths(stages), rates, strict=True))


@torch.no_grad()
def draw_weights(model: GPT) -> None:
    """First weights for Muon, in place, from torch's global generator.

    The embedding is N(0, 0.5); matrices that read the stream N(0, 0.7 / sqrt(C)); what writes to
    it and the head begin at zero, so that every block begins as nothing.
    """
    for name, parameter in model.named_parameters():
        if parameter.ndim != 2:
            continue
        if name == "token_embedding.weight":
            parameter.normal_(0.0, 0.5)
        elif "output" in name or name.startswith("head"):
            parameter.zero_()
        else:
            parameter.normal_(0.0, 0.7 / math.sqrt(parameter.shape[1]))


@dataclass(frozen=True)
class Budget:
    """How long a run may be: steps, or tokens, or seconds of training and this machine's speed."""

    steps: int | None = None  # to make, or
    tokens: float | None = None  # to read; both None where the clock decides
    seconds: float = 0.0  # of training alone
    flops_per_s: float = 0.0  # what a training step reaches here

    @property
    def by_clock(self) -> bool:
        """Whether the time decides how much is read."""
        return self.steps is None and self.tokens is None

    def tokens_for(self, config: GPTConfig, stages: Stages) -> float:
        """How many tokens a model of this shape will read."""
        if self.steps is not None:
            return self.steps * tokens_per_step(stages)
        if self.tokens is not None:
            return self.tokens
        return self.seconds * self.flops_per_s / mean_flops_per_token(config, stages)


@dataclass(frozen=True)
class Recipe:
    """What the rule chose."""

    shape: dict[str, Any]  # of the model, as `GPTConfig` takes it
    training: dict[str, Any]  # options of `TrainConfig`, but for the length
    tokens: float  # about how many will be read
    epochs: float  # how often that is the whole corpus
    bounded: bool  # whether the text is too short for the time

    def lines(self) -> list[str]:
        """The recipe on one line, for the user."""
        shape, stages = self.shape, [self.training["seq_len"]]
        stages += [seq_len for _, seq_len, _ in self.training["stages"]]
        products = ", bfloat16 products" if self.training.get("dtype") == "bfloat16" else ""
        dropout = f", dropout {shape['dropout']:g}" if shape["dropout"] else ""
        if self.training.get("ngram_smoothing"):
            dropout += ", targets smoothed by n-grams"
        short = "; ends then, since more time would only memorise the text" if self.bounded else ""
        return [
            f"recipe: {shape['num_layers']} layers of width {shape['embed_dim']}, windows of "
            f"{', then '.join(map(str, stages))}, about {self.tokens:,.0f} tokens "
            f"({self.epochs:.1f} times the text){products}{dropout}{short}"
        ]


def choose(
    num_tokens: int,
    val_tokens: int,
    vocab_size: int,
    budget: Budget,
    *,
    repeated: float | None = None,
    asked: Mapping[str, Any] | None = None,
) -> Recipe:
    """The recipe for N training tokens and a budget.

    Args:
        num_tokens: N.
        val_tokens: the number of validation tokens.
        vocab_size: V.
        budget: how long the run may be.
        repeated: the fraction of the validation text that is in passages of the training text;
            None where that is not known.
        asked: the user's options of `GPTConfig` and `TrainConfig`, which replace the rule's.
    """
    asked = asked or {}
    for size in reversed(SIZES):
        shape, windows = _shape_and_windows(size, asked)
        first = windows["seq_len"]
        if "batch_size" not in asked and first * windows["batch_size"] > _MOST_PER_STEP:
            first = min(first, num_tokens)  # no window is longer than the text
            windows["batch_size"] = min(windows["batch_size"], _MOST_PER_STEP // first or 1)
        stages = ((0.0, first, windows["batch_size"]), *windows["stages"])
        config = GPTConfig(vocab_size, **shape)
        tokens = budget.tokens_for(config, stages)
        fits = config.num_parameters() <= _MOST_PARAMETERS_PER_TOKEN * num_tokens
        if fits and tokens * mean_flops_per_token(config, stages) >= size.least_flops:
            break
    training: dict[str, Any] = {
        **windows,
        "optimizer": "muon",
        "lr": _ADAMW_RATE if asked.get("optimizer") == "adamw" else _muon_rate(tokens, stages),
        "grad_clip": 0.0,
    }
    most_epochs = MOST_EPOCHS
    if repeated is not None and repeated > _REPETITIVE:
        shape.setdefault("dropout", 0.0)
        merges = vocab_size > _SMALL_VOCABULARY
        most_epochs = _MOST_EPOCHS_REPETITIVE_MERGES if merges else _MOST_EPOCHS_REPETITIVE
    elif repeated is not None and _smoothable(num_tokens, vocab_size, budget):
        training["ngram_smoothing"] = _SMOOTHING
    tokens, bounded = _bounded(tokens, num_tokens, budget, most_epochs)
    if shape.get("dropout") is None:
        smoothed = bool(asked.get("ngram_smoothing", training.get("ngram_smoothing")))
        shape["dropout"] = _dropout(tokens, num_tokens, vocab_size, smoothed, shape)
    training |= _usual(tokens, val_tokens, _LEAST_VALIDATED, asked)
    return Recipe(shape, training, tokens, tokens / num_tokens, bounded)


def _smoothable(num_tokens: int, vocab_size: int, budget: Budget) -> bool:
    """Whether an n-gram model can smooth the targets, and counting it takes little of the time."""
    counting_s = _COUNTING_S_PER_TOKEN * num_tokens
    in_time = not budget.by_clock or counting_s <= _MOST_COUNTING * budget.seconds
    return in_time and num_tokens <= MOST_TOKENS and vocab_size <= MOST_VOCABULARY


def continuing(
    config: GPTConfig,
    num_tokens: int,
    val_tokens: int,
    budget: Budget,
    *,
    asked: Mapping[str, Any],
) -> Recipe:
    """The recipe for continuing with an existing model on a text of N tokens.

    AdamW at a rate that falls with the model's width, from the best measured on small models to
    the usual one for GPT-2's sizes; windows as long as the model's, up to a bound, and batches
    that leave time for enough steps.

    Args:
        config: the model's shape.
        num_tokens: N.
        val_tokens: the number of validation tokens.
        budget: how long the run may be.
        asked: the user's options of `TrainConfig`, which replace the rule's.
    """
    seq_len = asked.get("seq_len", min(config.max_seq_len, _LONGEST_AGAIN))
    tokens = budget.tokens_for(config, ((0.0, seq_len, TOKENS_PER_STEP // seq_len or 1),))
    step = min(TOKENS_PER_STEP, tokens / _STEPS_AGAIN)
    batch_size = asked.get("batch_size", max(1, round(step / seq_len)))
    tokens = budget.tokens_for(config, ((0.0, seq_len, batch_size),))
    training: dict[str, Any] = {
        "seq_len": seq_len,
        "batch_size": batch_size,
        "optimizer": "adamw",
        "lr": _RATE if asked.get("optimizer") == "muon" else _RATE_AGAIN / config.embed_dim**1.5,
        "warmup_ratio": 0.05,
        "grad_clip": 1.0,
    }
    tokens, bounded = _bounded(tokens, num_tokens, budget, MOST_EPOCHS)
    shape = {**config.to_dict(), "dropout": asked.get("dropout")}
    if shape["dropout"] is None:
        shape["dropout"] = _usual_dropout(tokens / num_tokens)
    del shape["vocab_size"]
    training |= _usual(tokens, val_tokens, _LEAST_VALIDATED_AGAIN, asked)
    return Recipe(shape, training, tokens, tokens / num_tokens, bounded)


def _bounded(
    tokens: float, num_tokens: int, budget: Budget, most_epochs: float
) -> tuple[float, bool]:
    """How many tokens are read where there is time for so many, and whether the text bounds it."""
    most = most_epochs * num_tokens
    # Well above, so that what is only a little above still ends by the clock.
    bounded = budget.by_clock and tokens > 1.5 * most
    return (most if bounded else tokens), bounded


def _usual(
    tokens: float, val_tokens: int, least_validated: int, asked: Mapping[str, Any]
) -> dict[str, Any]:
    """Options that follow from the number of tokens to read, and those that were asked for."""
    validated = min(val_tokens, most_validated(tokens, least_validated))
    return {
        "schedule": "linear",
        "min_lr_ratio": 0.0,
        "weight_decay": _DECAY,
        "eval_every": 0,
        "eval_shares": _eval_shares(tokens, validated),
        "val_tokens": validated if validated < val_tokens else 0,
        "patience": 3,
    } | {name: value for name, value in asked.items() if name in TRAIN_OPTIONS}


def _shape_and_windows(
    size: Size, asked: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """A model's shape and its windows, each with what was asked for in the rule's place."""
    (_, seq_len, batch_size), *later = _STAGES if size.width > _NARROW else _STAGES[:1]
    stages = tuple(later)
    shape = shape_of(size.width, size.layers, max(t for _, t, _ in [(0, seq_len, 0), *stages]))
    shape |= {name: asked[name] for name in SHAPE_OPTIONS if name in asked}
    if "embed_dim" in asked or "num_heads" in asked:
        shape["num_heads"] = asked.get("num_heads", _heads(shape["embed_dim"]))
        shape.pop("head_dim")
    windows: dict[str, Any] = {"seq_len": seq_len, "batch_size": batch_size, "stages": stages}
    own = {name: asked[name] for name in windows if name in asked}
    tutorial = asked.get("data_order") == "tutorial"
    if tutorial or {"seq_len", "max_seq_len", "batch_size"} & set(asked):
        windows |= {"stages": (), "seq_len": shape["max_seq_len"]}
    windows |= own
    if "max_seq_len" not in asked:
        longest = max(windows["seq_len"], *(t for _, t, _ in windows["stages"]), 0)
        shape["max_seq_len"] = max(shape["max_seq_len"], longest)
    return shape, windows


def _heads(width: int) -> int:
    """The most heads of an even size of at least `HEAD_SIZE` that divide a width."""
    return next((n for n in range(width // HEAD_SIZE, 1, -1) if width % (2 * n) == 0), 1)


def most_validated(tokens: float, least: int = _LEAST_VALIDATED) -> int:
    """The most validation tokens for a run of so many tokens: a pass takes 1.5% of the time.

    Validating a token costs a third of training on it.
    """
    return max(least, int(0.015 * 3 * min(tokens, 1e15)))


def expected_loss(
    fivegram: float, tokens: float, repeated: float, *, merges: bool = False
) -> tuple[float, float, float]:
    """An estimate of a run's final validation loss: middle, lower and upper end.

    The loss of a 5-gram model measures how hard the text is; a run's loss relative to it falls
    with the number of tokens. Fitted to runs of 0.8 to 8 million characters, and of 0.7 to 6
    million merges, of eleven texts, roughly to those that repeat themselves (docs/lab-notes.md).

    Args:
        fivegram: the 5-gram model's loss, nats per token.
        tokens: the number of tokens that the run is estimated to read.
        repeated: the fraction of the validation text that is in passages of the training text.
        merges: tokens are merges of a small vocabulary, not characters or bytes. The 5-gram model
            knows a repeated passage of them sooner than a network does.
    """
    if repeated > _REPETITIVE:
        middle = (_REPETITIVE_MERGES if merges else _REPETITIVE_LOSS) * fivegram
        return middle, middle * (1.0 - _REPETITIVE_SPREAD), middle * (1.0 + _REPETITIVE_SPREAD)
    per_root = 0.12 + 1.8 * repeated if merges else 0.10
    middle = fivegram * (0.89 + per_root * math.sqrt(1e6 / max(1.0, tokens)))
    return middle, middle * (1.0 - _SPREAD), middle * (1.0 + _SPREAD)


def _muon_rate(tokens: float, stages: Stages) -> float:
    """Muon's rate: 0.02, in runs of few steps up to 0.04."""
    steps = tokens / tokens_per_step(stages)
    return _RATE * min(2.0, max(1.0, math.sqrt(_USUAL_STEPS / max(1.0, steps))))


def _eval_shares(tokens: float, val_tokens: int) -> tuple[float, ...]:
    """The fractions of the run at which to validate, rarer towards its end; 5% of the time."""
    count = int(min(0.05 * tokens * 3 / max(1, val_tokens), tokens / TOKENS_PER_STEP / _APART))
    count = max(1, min(_MOST_EVALUATIONS, count))
    return tuple((number / count) ** 1.5 for number in range(1, count))


def _dropout(
    tokens: float, num_tokens: int, vocab_size: int, smoothed: bool, shape: Mapping[str, Any]
) -> float:
    """The dropout of a new model that reads so many tokens of N."""
    epochs = tokens / num_tokens
    if smoothed and vocab_size <= _SMALL_VOCABULARY:
        return 0.0 if epochs < 20 else 0.1 if num_tokens >= _SHORT else 0.2
    if shape["embed_dim"] > _NARROW and vocab_size > _SMALL_VOCABULARY and epochs >= 6:
        return max(0.1, _usual_dropout(epochs))
    return _usual_dropout(epochs)


def _usual_dropout(epochs: float) -> float:
    return 0.0 if epochs < 12 else 0.1 if epochs < 25 else 0.2
