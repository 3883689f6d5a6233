"""Several runs compared: losses, settings that differ, and samples of one prompt and seed."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mygpt.decode.writer import Writer, table_beside
from mygpt.errors import InputError, MygptError
from mygpt.evaluation.ngram import ngram_losses
from mygpt.tokenization.unknown import dropped_note, without_unknown
from mygpt.training.history import History
from mygpt.training.run import RunFolder
from mygpt.training.state import State
from mygpt.views.page import shown_path
from mygpt.views.report import thin
from mygpt.views.run import (
    Run,
    Standing,
    facts_of,
    later_windows,
    notes_of,
    progress_of,
    read_run,
    require_run,
    standing_of,
    tokens_of,
    versions_of,
)  # fmt: skip

MOST_RUNS = 8  # as many as the chart has distinguishable lines for
_MOST_POINTS = 400  # of each curve
# How the text was read and the run was set up; the names of its files are not compared.
_SETTINGS = ("val_file", "encoding", "field", "split_documents", "unknown", "preset", "threads")
# `vocab_size` is the tokenizer's, and `reserve_s` is measured; stages are shown in words.
_NOT_COMPARED = ("vocab_size", "reserve_s", "stages")
NATS, BITS = "nats per token", "bits per byte"


@dataclass(frozen=True)
class Asked:
    """How each model's sample is generated; the fields are those of `Writer.complete`."""

    prompt: str
    max_new_tokens: int
    seed: int
    temperature: float


@dataclass(frozen=True)
class _Compared:
    """What remains of a run after it was read: not its weights, nor its text."""

    values: dict[str, Any]  # the figures, the curve and the sample
    settings: dict[str, Any]  # by name
    tokenizer: dict[str, Any]  # its state
    validated: tuple[Any, ...]  # equal for runs that are validated on the same text; () for none


def compare_runs(paths: Sequence[str | Path], asked: Asked) -> dict[str, Any]:
    """The comparison of two to eight runs, as plain JSON values without NaN.

    The runs are read one after the other, so that the memory is that of one.

    Args:
        paths: each run's folder, or one of its files.
        asked: how the samples are generated.

    Raises:
        InputError: for another number of runs, a run that is named twice, or a path without a
            run or without its log.
    """
    folders = _distinct(paths)
    for folder in folders:  # before the first of them takes time
        require_run(folder)
    names = _names(folders)
    found = [
        _compared(read_run(folder), name, asked)
        for folder, name in zip(folders, names, strict=True)
    ]
    same_tokens = all(one.tokenizer == found[0].tokenizer for one in found)
    remarks = []
    if not same_tokens:
        remarks.append(
            f"the tokenizers differ: {BITS} can be compared between these runs, {NATS} cannot"
        )
    validated = [one.validated for one in found if one.validated]
    if any(one != validated[0] for one in validated):
        remarks.append(
            "the validation texts differ, or how much of them is used: losses cannot be compared"
        )
    return {
        "unit": NATS if same_tokens else BITS,
        "remarks": remarks,
        "runs": [one.values for one in found],
        "differences": _differences([one.settings for one in found]),
        "asked": asdict(asked),
    }


def _distinct(paths: Sequence[str | Path]) -> list[RunFolder]:
    """The runs' folders, which are of a number that can be compared, and different."""
    if not 2 <= len(paths) <= MOST_RUNS:
        one = " (`mygpt report RUN` shows a single one)" * (len(paths) < 2)
        raise InputError(f"compare needs 2 to {MOST_RUNS} runs, not {len(paths)}{one}")
    folders: dict[str, RunFolder] = {}
    for path in paths:
        folder = RunFolder.of(path)
        place = os.path.realpath(folder.folder)
        if place in folders:
            raise InputError(f"{path} is the same run as {folders[place].name}: name it once")
        folders[place] = folder
    return list(folders.values())


def _names(folders: Sequence[RunFolder]) -> list[str]:
    """The runs' names, numbered where two are the same without their folders."""
    shown = [shown_path(folder.name) for folder in folders]
    counts = Counter(shown)
    return [f"{name} ({n})" if counts[name] > 1 else name for n, name in enumerate(shown, 1)]


def _compared(run: Run, name: str, asked: Asked) -> _Compared:
    standing, state, best = standing_of(run), run.state, run.history.best
    sample = _sample(run, asked)
    values = {
        "name": name,
        "standing": standing.kind,
        "progress": progress_of(standing),
        "parameters": state.config.num_parameters(),
        "tokenizer": {"kind": state.tokenizer.kind, "vocab_size": state.tokenizer.vocab_size},
        "steps": standing.step,
        "tokens": standing.tokens,
        "seconds": standing.elapsed_s,
        "best": None
        if best is None
        else {"step": best.step, **_losses(best.val_loss, best.bits_per_byte)},
        "fivegram": _fivegram(run),
        "validations": _validations(run.history, standing),
        "sample": sample,
        "notes": notes_of(run),
    }
    tokenizer = state.tokenizer.to_state()
    validated = () if best is None else _validated(state, tokenizer)
    return _Compared(values, _settings(run, standing), tokenizer, validated)


def _validated(state: State, tokenizer: dict[str, Any]) -> tuple[Any, ...]:
    """What decides the validation text of a run."""
    corpus, training = state.provenance["corpus"], state.training
    named = state.settings["val_file"] is not None  # its digest is a part of the text's
    fraction = None if named else training.val_fraction
    # The first so many tokens are not the same text with another tokenizer.
    first = (training.val_tokens, tokenizer) if training.val_tokens else ()
    return (corpus["sha256"], corpus.get("documents"), fraction, *first)


def _fivegram(run: Run) -> dict[str, float | None] | None:
    """The loss of a 5-gram model on the validation text; None without a validation text."""
    if run.source is None:
        return None
    train_tokens, judged = tokens_of(run.source, run.state)
    if judged is None:
        return None
    (loss,) = ngram_losses(train_tokens, judged.tokens, run.state.config.vocab_size, (5,))
    return _losses(loss, judged.size.bits_per_byte(loss))


def _losses(loss: float, bits_per_byte: float) -> dict[str, float | None]:
    return {"loss": loss, "bits_per_byte": _finite(bits_per_byte)}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _validations(history: History, standing: Standing) -> list[dict[str, Any]]:
    """The validation losses by step, tokens and seconds.

    The log has the tokens of reports; between two of them they are interpolated.
    """
    known = [(report.step, report.tokens) for report in history.reports if report.tokens]
    known = [(0, 0), *known]
    if standing.step > known[-1][0]:
        known.append((standing.step, standing.tokens))
    steps, tokens = zip(*known, strict=True)
    points = []
    for seen in history.validations:
        reached = seen.step <= steps[-1]
        count = round(float(np.interp(seen.step, steps, tokens))) if reached else None
        point = {"step": seen.step, "tokens": count, "seconds": _finite(seen.elapsed_s)}
        points.append({**point, **_losses(seen.val_loss, seen.bits_per_byte)})
    return thin(points, _MOST_POINTS, lambda point: point["loss"])


def _sample(run: Run, asked: Asked) -> dict[str, Any] | None:
    """A sample of the best model, or None and a note on why there is none."""
    model = run.model
    if model is None:
        if not run.notes:
            run.notes.append("no model is saved yet, so there is no sample")
        return None
    prompt, left = without_unknown(model.tokenizer, asked.prompt)
    if left:
        run.notes.append(dropped_note(left, kept="removed from its prompt"))
    try:
        writer = Writer(
            model, model.tokenizer, model.provenance, drafts_from=table_beside(model.path)
        )
        how = {**asdict(asked), "prompt": prompt}
        text = writer.complete(**how)[0].text
    except MygptError as error:
        run.notes.append(f"the model cannot generate text: {error}")
        return None
    step = model.provenance.get("step")
    return {"step": step if isinstance(step, int) else None, "prompt": prompt, "text": text}


def _settings(run: Run, standing: Standing) -> dict[str, Any]:
    """What decides a run, by name: its text, its tokenizer, its shape and its training."""
    state, settings = run.state, run.state.settings
    facts = dict(facts_of(run, standing, 0))
    initial = settings.get("from")
    shape, training = state.config.to_dict(), state.training.to_dict()
    values = {
        "text": facts["text"],
        "sha256": "+".join(part[:12] for part in state.provenance["corpus"]["sha256"].split("+")),
        "tokenizer": facts["tokenizer"],
        "from": None if initial is None else shown_path(initial["path"]),
        **{name: settings.get(name) for name in _SETTINGS},
        **shape,
        **training,
        "later_windows": later_windows(state.training),
        "made with": versions_of(state.provenance),
    }
    if values["val_file"] is not None:
        values["val_file"] = shown_path(values["val_file"])
    return {name: value for name, value in values.items() if name not in _NOT_COMPARED}


def _differences(settings: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The settings that are not the same in all runs, with their values in the runs' order."""
    found = []
    for name in settings[0]:
        values = [one[name] for one in settings]
        if any(value != values[0] for value in values):
            found.append({"name": name, "values": values})
    return found
