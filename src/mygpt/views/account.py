"""A run in words: how far it has come, what it is made of, and what to type next."""

from __future__ import annotations

import math
import os
import shlex
from pathlib import Path
from typing import Any

from mygpt.training.events import clock
from mygpt.training.state import State
from mygpt.views.history import medians
from mygpt.views.run import Run, Standing

Lines = list[tuple[str, str]]  # name and value


def progress_of(standing: Standing) -> str:
    """How far it has come."""
    did = f"{standing.step:,} steps in {clock(standing.elapsed_s)}"
    if standing.kind == "done":
        return f"Done: {did}" + ", ended early" * standing.ended_early
    share = f"{standing.share:.0%} of the run by its last save"
    if standing.kind == "training":
        return f"Training now: {did} so far, {share}"
    return f"Interrupted after {did}, {share}"


def facts_of(run: Run, standing: Standing, learned: int) -> Lines:
    """What a person wants to know first.

    Args:
        run: the run.
        standing: how far it has come.
        learned: tokens of the text that it learns from; 0 where that is not known.
    """
    state, best = run.state, run.history.best
    corpus = state.provenance["corpus"]
    times = f", the text {standing.tokens / learned:.1f} times" if learned else ""
    facts = [
        ("text", f"{corpus.get('name', '?')}, {corpus.get('bytes', 0):,} bytes"),
        ("tokens", f"{state.tokenizer.kind}, vocabulary {state.tokenizer.vocab_size:,}"),
        ("model", f"{state.config.num_parameters():,} parameters"),
        ("read", f"{standing.tokens:,} tokens{times}"),
    ]
    if speeds := medians(run.history.speeds(), 1):
        facts.append(("speed", f"{speeds[-1][1]:,.0f} tokens/s"))
    if best is not None:
        bits = "" if math.isnan(best.bits_per_byte) else f", {best.bits_per_byte:.3f} bits per byte"
        facts.append(("best", f"{best.val_loss:.4f} nats per token at step {best.step:,}{bits}"))
    return facts


def plan_of(state: State) -> Lines:
    """How it is trained."""
    shape, config = state.config, state.training
    windows = [f"{config.batch_size} windows of {config.seq_len} tokens"]
    windows += [f"from {share:.0%} on {batch} of {time}" for share, time, batch in config.stages]
    block = "the tutorial's" if shape.is_tutorial_block else f"{shape.norm} norm, {shape.mlp}"
    return [
        ("length", _length(state)),
        (
            "shape",
            f"{shape.num_layers} layers of {shape.num_heads} heads, width {shape.embed_dim}, "
            f"window {shape.max_seq_len}",
        ),
        ("block", f"{block}, {shape.position} positions"),
        ("each step", ", ".join(windows)),
        ("optimizer", f"{config.optimizer}, highest rate {config.lr:g}, {config.schedule}"),
        ("against memorising", f"weight decay {config.weight_decay:g}, dropout {shape.dropout:g}"),
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
    told = [f"{name} {version}" for name, version in named if version]
    return ", ".join([*told, str(provenance.get("platform", ""))]).removesuffix(", ")


def commands_of(run: Run, standing: Standing) -> Lines:
    """What was typed, and what to type next; each with what it is for."""
    name = shlex.quote(shown_path(run.folder.name))
    begun = _without_folders(str(run.state.provenance.get("command", "")))
    commands = [("This run was begun with", begun)]
    if standing.kind == "done":
        commands.append(("Make it again, step for step", f"mygpt reproduce {name}"))
    else:
        commands.append(("Go on", f"mygpt train --resume {name}"))
    commands.append(("Write with it", f"mygpt generate --checkpoint {name}"))
    return commands


def shown_path(path: str | Path) -> str:
    """A path as a page shows it that may be sent to others: no folders of this machine.

    Relative to the current folder where it is inside that, else its last part.
    """
    if not os.path.isabs(path):
        return str(path)
    inside = os.path.relpath(path)
    return os.path.basename(path) if inside.startswith(os.pardir) else inside


def _without_folders(command: str) -> str:
    """A command line with `shown_path` of every absolute path in it."""
    try:
        words = shlex.split(command)
    except ValueError:  # no command line: an older version kept words of its own
        return command
    shown = []
    for word in words:
        name, equals, value = word.partition("=")
        shown.append(f"{name}={shown_path(value)}" if equals else shown_path(name))
    # Of a hostile state all that would be more than one command is quoted.
    return shlex.join(shown) if shown != words or words[:1] == ["mygpt"] else command


def notes_of(run: Run) -> list[str]:
    """What had to be left out, and why, without folders of this machine."""
    settings = run.state.settings
    named = [*settings["files"], settings["val_file"], run.folder.folder, run.folder.file]
    paths = {str(path) for path in named if path is not None and os.path.isabs(path)}
    notes = list(run.notes)
    for path in sorted(paths, key=len, reverse=True):
        notes = [note.replace(path, shown_path(path)) for note in notes]
    return notes
