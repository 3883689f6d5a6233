"""A run described in text: its progress, its settings, and the commands to continue with."""

from __future__ import annotations

import math
import os
import shlex
from pathlib import Path
from typing import Any

from mygpt.training.checkpointing import State
from mygpt.training.events import clock
from mygpt.views.history import medians
from mygpt.views.run import Run, Standing

Lines = list[tuple[str, str]]  # name and value


def progress_of(standing: Standing) -> str:
    """The run's progress in one sentence."""
    did = f"{standing.step:,} steps in {clock(standing.elapsed_s)}"
    if standing.kind == "done":
        return f"Done: {did}" + ", ended early" * standing.ended_early
    fraction = f"{standing.share:.0%} of the run at its last save"
    if standing.kind == "training":
        return f"In progress: {did} so far, {fraction}"
    return f"Interrupted after {did}, {fraction}"


def facts_of(run: Run, standing: Standing, num_train_tokens: int) -> Lines:
    """The most important facts about a run, as pairs of name and text.

    Args:
        run: the run.
        standing: its progress.
        num_train_tokens: the number of tokens in the training split; 0 if it is unknown.
    """
    state, best = run.state, run.history.best
    corpus = state.provenance["corpus"]
    epochs = f", {standing.tokens / num_train_tokens:.1f} epochs" if num_train_tokens else ""
    facts = [
        ("text", f"{corpus.get('name', '?')}, {corpus.get('bytes', 0):,} bytes"),
        ("tokenizer", f"{state.tokenizer.kind}, vocabulary {state.tokenizer.vocab_size:,}"),
        ("model", f"{state.config.num_parameters():,} parameters"),
        ("trained on", f"{standing.tokens:,} tokens{epochs}"),
    ]
    if speeds := medians(run.history.speeds(), 1):
        facts.append(("speed", f"{speeds[-1][1]:,.0f} tokens/s"))
    if best is not None:
        bits = "" if math.isnan(best.bits_per_byte) else f", {best.bits_per_byte:.3f} bits per byte"
        facts.append(("best", f"{best.val_loss:.4f} nats per token at step {best.step:,}{bits}"))
    return facts


def settings_of(state: State) -> Lines:
    """The model's shape and the training settings, as pairs of name and text."""
    shape, config = state.config, state.training
    windows = [f"{config.batch_size} windows of {config.seq_len} tokens"]
    windows += [f"after {share:.0%}: {batch} of {time}" for share, time, batch in config.stages]
    block = "the tutorial's" if shape.is_tutorial_block else f"{shape.norm} norm, {shape.mlp}"
    return [
        ("length", _length(state)),
        (
            "shape",
            f"{shape.num_layers} layers of {shape.num_heads} heads, width {shape.embed_dim}, "
            f"context window {shape.max_seq_len}",
        ),
        ("block", f"{block}, {shape.position} positions"),
        ("each step", ", ".join(windows)),
        (
            "optimizer",
            f"{config.optimizer}, peak learning rate {config.lr:g}, {config.schedule} schedule",
        ),
        ("regularization", f"weight decay {config.weight_decay:g}, dropout {shape.dropout:g}"),
        ("seed", f"{config.seed}"),
        ("made with", _versions(state.provenance)),
    ]


def _length(state: State) -> str:
    config = state.training
    if config.minutes is not None:
        return f"{config.minutes:g} minute{'s' * (config.minutes != 1)}"
    if config.tokens is not None:
        return f"{config.tokens:,} tokens"
    return f"{config.steps or 0:,} steps"


def _versions(provenance: dict[str, Any]) -> str:
    named = ((name, provenance.get(name)) for name in ("mygpt", "torch", "python"))
    versions = [f"{name} {version}" for name, version in named if version]
    return ", ".join([*versions, str(provenance.get("platform", ""))]).removesuffix(", ")


def commands_of(run: Run, standing: Standing) -> Lines:
    """The command that started the run and commands to continue with, each with its purpose."""
    name = shlex.quote(shown_path(run.folder.name))
    begun = _without_folders(str(run.state.provenance.get("command", "")))
    commands = [("This run was started with", begun)]
    if standing.kind == "done":
        commands.append(("Reproduce it step by step", f"mygpt reproduce {name}"))
    else:
        commands.append(("Resume it", f"mygpt train --resume {name}"))
    commands.append(("Generate text", f"mygpt generate --checkpoint {name}"))
    return commands


def shown_path(path: str | Path) -> str:
    """A path as pages show it: without this machine's folders, since pages may be published.

    It is relative to the current folder if it is inside it, else only its last part.
    """
    if not os.path.isabs(path):
        return str(path)
    inside = os.path.relpath(path)
    return os.path.basename(path) if inside.startswith(os.pardir) else inside


def _without_folders(command: str) -> str:
    """A command line with every absolute path replaced by its `shown_path`."""
    try:
        words = shlex.split(command)
    except ValueError:  # not a command line: older versions stored other text here
        return command
    shown = []
    for word in words:
        name, equals, value = word.partition("=")
        shown.append(f"{name}={shown_path(value)}" if equals else shown_path(name))
    # A manipulated state may contain several commands; quoting makes them one.
    return shlex.join(shown) if shown != words or words[:1] == ["mygpt"] else command


def notes_of(run: Run) -> list[str]:
    """Notes on what the report cannot show and why, without this machine's folders."""
    settings = run.state.settings
    named = [*settings["files"], settings["val_file"], run.folder.folder, run.folder.file]
    paths = {str(path) for path in named if path is not None and os.path.isabs(path)}
    notes = list(run.notes)
    for path in sorted(paths, key=len, reverse=True):
        notes = [note.replace(path, shown_path(path)) for note in notes]
    return notes
