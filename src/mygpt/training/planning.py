"""From a budget to a run's shape and recipe: what was asked for, and for the rest the rule.

Letters: N tokens to learn from, V vocabulary.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mygpt.config import GPTConfig
from mygpt.ngrams import count_ngrams
from mygpt.training.config import (
    AUTO,
    DEFAULT_MINUTES,
    SHAPE_OPTIONS,
    TRAIN_OPTIONS,
    preset_options,
)
from mygpt.training.measuring import training_flops_per_s
from mygpt.training.recipe import (
    HEAD_SIZE,
    TOKENS_PER_STEP,
    Budget,
    Recipe,
    choose,
    flops_per_token,
)

# What `minutes` keeps for after the last step: saving and the end of the process, validating, and
# the simpler models that the loss is shown beside.
_ENDING_S = 1.2
_BASELINES_S, _BASELINES_S_PER_TOKEN = 4.0, 1.6e-6
_REPORT_S = 1.0  # from one report to the next
_DEVICE_FLOPS_PER_S = 1e13  # a guess for accelerators, which are not measured yet
_ADAMW_RATE = 3e-3
MOST_ROWS = 2**17  # of an n-gram table


@dataclass(frozen=True)
class Planned:
    """A run's options, and what is to be said of them.

    Attributes:
        shape: of the model.
        training: options of `TrainConfig`.
        recipe: what the rule chose; None for a named preset.
        ngrams: the keys of the model's n-gram tables.
    """

    shape: dict[str, Any]
    training: dict[str, Any]
    recipe: Recipe | None
    ngrams: list[NDArray[np.int64]]


def plan_run(
    preset: str,
    options: dict[str, Any],
    *,
    train_tokens: NDArray[np.integer],
    val_tokens: int,
    vocab_size: int,
    device: torch.device,
    began: float,
    exportable: bool,
) -> Planned:
    """Shape and training options of a new run.

    Args:
        preset: a name, or "auto".
        options: what the user asked for.
        train_tokens: 1-D ids to learn from.
        val_tokens: how many there are to validate on.
        vocab_size: V.
        device: where it will train.
        began: when the command began, as `time.monotonic` counts: `minutes` are the whole
            command's.
        exportable: leave out what other programs do not know.
    """
    shape, training = preset_options(preset, options)
    if preset != AUTO:
        return Planned(shape, training, None, [])
    if not {"steps", "tokens", "minutes"} & set(options):
        for name in ("steps", "tokens"):
            training.pop(name, None)
        training["minutes"] = DEFAULT_MINUTES
    lengths = {name: training.get(name) for name in ("steps", "tokens", "minutes")}
    budget = _budget(lengths, device, began)
    recipe = choose(len(train_tokens), val_tokens, vocab_size, budget, exportable=exportable)
    if recipe.bounded:
        lengths = {"steps": None, "tokens": math.ceil(recipe.tokens), "minutes": None}
        options = {name: value for name, value in options.items() if name != "minutes"}
    shape = recipe.shape | {n: options[n] for n in SHAPE_OPTIONS if n in options}
    training = recipe.training | lengths | {n: options[n] for n in TRAIN_OPTIONS if n in options}
    _reconcile(shape, training, options)
    if lengths["minutes"] is not None:
        training.setdefault("print_every", _report_every(recipe, budget))
    keys: list[NDArray[np.int64]] = []
    if recipe.orders > 1:
        keys = count_ngrams(
            train_tokens, vocab_size, recipe.orders, min_count=recipe.least_count,
            max_rows=MOST_ROWS,
        )  # fmt: skip
        shape["ngram_rows"] = tuple(len(key) + 1 for key in keys)
    if lengths["minutes"] is not None:
        spent_s = time.monotonic() - began
        ending_s = _ending_s(GPTConfig(vocab_size, **shape), budget, len(train_tokens), val_tokens)
        # At most half of a very short run: something is to be trained.
        training.setdefault("reserve_s", min(spent_s + ending_s, 30.0 * lengths["minutes"]))
    return Planned(shape, training, recipe, keys)


def _reconcile(shape: dict[str, Any], training: dict[str, Any], options: dict[str, Any]) -> None:
    """What follows from the options that the user gave in the rule's place."""
    if {"embed_dim", "num_heads"} & set(options):
        shape["num_heads"] = options.get("num_heads", _heads(shape["embed_dim"]))
        shape.pop("head_dim")
    if options.get("optimizer") == "adamw":  # the rule's rate is Muon's
        training["lr"] = options.get("lr", _ADAMW_RATE)
    own_window = {"seq_len", "max_seq_len", "batch_size"} & set(options)
    if own_window or training.get("data_order") == "tutorial":
        training["stages"] = options.get("stages", ())
        if "seq_len" not in options:
            training["seq_len"] = shape["max_seq_len"]
    if "max_seq_len" not in options:
        windows = [training["seq_len"], *(seq_len for _, seq_len, _ in training["stages"])]
        shape["max_seq_len"] = max(shape["max_seq_len"], *windows)


def _heads(width: int) -> int:
    """As many heads of `HEAD_SIZE` or more as share a width, each an even number."""
    return next((n for n in range(width // HEAD_SIZE, 1, -1) if width % (2 * n) == 0), 1)


def _report_every(recipe: Recipe, budget: Budget) -> int:
    """Steps between reports, about a second apart."""
    tokens_a_step = recipe.training["batch_size"] * recipe.training["seq_len"]
    steps_per_s = recipe.tokens / tokens_a_step / max(1.0, budget.seconds)
    return max(1, round(steps_per_s * _REPORT_S))


def _budget(lengths: dict[str, Any], device: torch.device, began: float) -> Budget:
    """What is left of the time, or the tokens, and how fast this machine trains."""
    if lengths["minutes"] is None:  # nothing is measured: the same command is the same run
        return Budget(tokens=float(lengths["tokens"] or lengths["steps"] * TOKENS_PER_STEP))
    flops_per_s = _DEVICE_FLOPS_PER_S
    if device.type == "cpu":
        flops_per_s = training_flops_per_s(torch.get_num_threads())
    left_s = 60.0 * lengths["minutes"] - (time.monotonic() - began) - 2 * _ENDING_S
    return Budget(seconds=max(0.1, left_s), flops_per_s=flops_per_s)


def _ending_s(config: GPTConfig, budget: Budget, train_tokens: int, val_tokens: int) -> float:
    """Seconds from the last step to the command's end."""
    validation = val_tokens * flops_per_token(config, config.max_seq_len) / 3  # forward alone
    corpus = train_tokens + val_tokens
    baselines_s = min(_BASELINES_S, corpus * _BASELINES_S_PER_TOKEN) if val_tokens else 0.0
    return _ENDING_S + validation / budget.flops_per_s + baselines_s
