"""A run's report as one page: losses, baselines, speed, samples, and how to reproduce it.

The map of the validation text's losses is in loss_map.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

from mygpt.checkpoint.durable import remove_abandoned, write_durably
from mygpt.decode.writer import Writer
from mygpt.errors import MygptError
from mygpt.evaluation.baselines import Baselines, Row
from mygpt.evaluation.copied import COPIED_CHARS, measure_novelty
from mygpt.evaluation.ngram import uniform_loss
from mygpt.text import Document
from mygpt.training.config import report_s
from mygpt.training.events import Finished
from mygpt.training.history import History, Sample
from mygpt.training.progress import Progress
from mygpt.training.run import RunFolder
from mygpt.training.snapshots import read_snapshots
from mygpt.views.explain import about, explain, page_data
from mygpt.views.formation import ablation_costs, formation_data
from mygpt.views.loss_map import loss_map
from mygpt.views.page import make_page, require_free, shown_path
from mygpt.views.run import (
    Run,
    baselines_of,
    commands_of,
    diagnosis_of,
    facts_of,
    notes_of,
    progress_of,
    read_run,
    settings_of,
    standing_of,
)  # fmt: skip
from mygpt.views.training_place import LONGEST_PASSAGE, training_place

P = TypeVar("P")

_MOST_POINTS, _MOST_RATES, _MOST_SAMPLES, _MOST_TROUBLES = 1200, 300, 12, 20
_LONGEST_SAMPLE = 2000  # characters
_MOST_PASSAGES = 8
_READ_CHARS = 160  # length of the passage whose token probabilities are shown
# Tokens that the best model generates for a report; fewer for a large model, which is slow.
_WRITTEN, _WRITTEN_BY_LARGE, _LARGE = 400, 100, 20_000_000


def write_report(
    path: str | Path,
    out: Path | None = None,
    *,
    overwrite: bool = False,
    finished: Finished | None = None,
    shown: Callable[[dict[str, Any]], None] | None = None,
) -> Path:
    """Write a run's report and return its path.

    Args:
        path: the run's folder, or its checkpoint file.
        out: the page to write; None replaces report.html in the run's folder.
        overwrite: replace `out` if it exists.
        finished: training's last event; its results are then used and not computed again.
        shown: called with the page's data before the page is written.

    Raises:
        InputError: if there is no run or no log, or `out` exists.
        StorageError: if there is no space or no permission to write.
    """
    folder = RunFolder.of(path)
    require_free(out, overwrite=overwrite)
    data = report_data(read_run(folder, finished))
    if shown is not None:
        shown(data)
    page = make_page("pages/report.js", data, title="mygpt report")
    target = out or folder.report_path
    if out is None:
        remove_abandoned(target)  # temporary files of killed reports, which take no lock
    write_durably(target, [page.encode()], inside=out is None)
    return target


def report_data(run: Run) -> dict[str, Any]:
    """The page's data as plain JSON values."""
    standing = standing_of(run)
    baselines, num_train_tokens = baselines_of(run)
    own = _written(run)
    if baselines is None:
        lines = [("uniform", uniform_loss(run.state.config.vocab_size))]
    else:
        lines = [(row.name, row.loss) for row in baselines.rows() if row.loss is not None]
    log = log_data(run.history, lines, own, run.state.progress)
    documents = [] if run.source is None else run.source.train_documents
    # The time at the end of a timed run is part of its minutes.
    budget_s = report_s(None if run.finished is None else run.finished.elapsed_s)
    return {
        "name": shown_path(run.folder.name),
        "standing": standing.kind,
        "progress": progress_of(standing),
        "verdict": diagnosis_of(run, standing, baselines, num_train_tokens),
        "facts": facts_of(run, standing, num_train_tokens),
        **log,
        "places": [training_place(one["text"], documents) for one in log["passages"]],
        "dropout": run.state.config.dropout,
        "table": _table(run.history, baselines),
        "bounds": "" if baselines is None else baselines.bounds,
        "written": own,
        "reading": _reading(run, own),
        "loss_map": loss_map(run, budget_s / 2),
        **_formation(run, budget_s / 2),
        "plan": settings_of(run.state),
        "commands": commands_of(run, standing),
        "notes": notes_of(run),
    }


def _formation(run: Run, budget_s: float) -> dict[str, Any]:
    """What snapshots show of the training, and the best model's loss without each head."""
    snapshots, why = read_snapshots(run.folder.snapshots_path)
    if why and not snapshots:
        run.notes.append(f"there is no snapshot of the training: {why}")
    formation = formation_data(snapshots)
    costs = None if formation is None else ablation_costs(run, formation["formed"], budget_s)
    return {"formation": formation, "costs": costs}


def log_data(
    history: History,
    baselines: Sequence[tuple[str, float]],
    own: dict[str, Any] | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """The part of the page's data that comes from the log.

    Args:
        history: the log.
        baselines: names and losses of simpler models, nats per token.
        own: the best model's sample; its copied passages are listed too.
        progress: the run's; its loss ends the training curve if it is newer than the log.
    """
    samples = [_sample(one) for one in spread(history.samples, _MOST_SAMPLES)]
    return {
        "curves": _curves(history, baselines, progress),
        "rate": _rate(history),
        "speed": [[step, round(speed, 1)] for step, speed in medians(history.speeds(), 150)],
        "samples": samples,
        "passages": _passages(history.samples, own),
        "copied_chars": COPIED_CHARS,
        "troubles": [[t.step, t.text] for t in spread(history.troubles, _MOST_TROUBLES)],
    }


def _rate(history: History) -> list[tuple[int, float]]:
    rates = [(seen.step, seen.lr) for seen in history.reports if not math.isnan(seen.lr)]
    return thin(rates, _MOST_RATES, lambda rate: rate[1])


def _curves(
    history: History, baselines: Sequence[tuple[str, float]], progress: Progress | None
) -> dict[str, Any]:
    """Losses in nats per token, as [step, seconds, loss], and the baselines' losses."""
    seconds = [
        (r.step, None if math.isnan(r.elapsed_s) else r.elapsed_s, r.loss) for r in history.reports
    ]
    # The loss of the last step, with which the terminal ends, is in the log only if it was due.
    if progress is not None and seconds and not progress.skipped:
        is_newer = progress.step > seconds[-1][0]
        if is_newer and math.isfinite(progress.loss):
            seconds.append((progress.step, progress.elapsed_s, progress.loss))
    validation = [
        (v.step, None if math.isnan(v.elapsed_s) else v.elapsed_s, v.val_loss)
        for v in history.validations
    ]
    return {
        "training": thin(seconds, _MOST_POINTS, lambda point: point[2]),
        "validation": thin(validation, _MOST_POINTS, lambda point: point[2]),
        "baselines": [{"name": name, "loss": round(loss, 4)} for name, loss in baselines],
    }


def _table(history: History, baselines: Baselines | None) -> list[tuple[str, float, float | None]]:
    """Name, bits per byte and nats per token of the model and the baselines, worst first."""
    if baselines is None or history.best is None:
        return []
    loss = history.best.val_loss
    rows = [Row("this model", baselines.bits_per_byte(loss), loss), *baselines.rows()]
    rows.sort(key=lambda row: -row.bits_per_byte)
    return [(row.name, row.bits_per_byte, row.loss) for row in rows]


def _sample(sample: Sample) -> dict[str, Any]:
    text = sample.text[:_LONGEST_SAMPLE]
    copied = [(start, min(end, len(text))) for start, end in sample.copied if start < len(text)]
    return {"step": sample.step, "text": text, "copied": copied}


def _written(run: Run) -> dict[str, Any] | None:
    """A sample of the best model, with the passages that it copied."""
    model = run.model
    if model is None:
        return None
    large = model.config.num_parameters() > _LARGE
    try:
        writer = Writer(model, model.tokenizer, device="cpu")
        text = writer.complete(
            "", _WRITTEN_BY_LARGE if large else _WRITTEN, seed=0, overflow="refill"
        )[0].text[:_LONGEST_SAMPLE]
    except MygptError as error:
        run.notes.append(f"the model cannot generate text: {error}")
        return None
    written: dict[str, Any] = {"text": text, "copied": [], "step": model.provenance.get("step")}
    if run.source is not None:
        novelty = measure_novelty(text, run.source.train_documents)
        written["copied"] = [(passage.start, passage.end) for passage in novelty.passages]
        written["from"] = [passage.document for passage in novelty.passages]
        written["novelty"] = str(novelty)
    return written


def _passages(samples: Sequence[Sample], own: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The longest copied passages of all samples without duplicates, longest first."""
    copies: list[tuple[str, int | None, str]] = [
        (sample.text[start:end], sample.step, "")
        for sample in samples
        for start, end in sample.copied
    ]
    if own is not None:
        copies += [
            (own["text"][start:end], None, document)
            for (start, end), document in zip(own["copied"], own.get("from", ()), strict=True)
        ]
    once = {copy[0]: copy for copy in copies}
    longest = sorted(once.values(), key=lambda copy: -len(copy[0]))[:_MOST_PASSAGES]
    return [
        {
            "length": len(text),
            "text": text[:LONGEST_PASSAGE],
            "step": step,
            "document": document,
        }
        for text, step, document in longest
    ]


def _reading(run: Run, own: dict[str, Any] | None) -> dict[str, Any] | None:
    """Token probabilities and attention of the best model on a passage of the text."""
    if run.model is None or own is None:
        return None
    most = min(_READ_CHARS, run.model.config.max_seq_len)  # so that it fits in the window
    text, name = own["text"][:most], "its own sample"
    if run.source is not None:
        kept = bool(run.source.val_documents)
        text = _passage(run.source.val_documents if kept else run.source.train_documents, most)
        name = "the validation text" if kept else "the training text"
    try:
        seen = explain(run.model, text, max_new_tokens=0)
    except MygptError as error:
        run.notes.append(f"the model cannot read the text: {error}")
        return None
    return {"from": name, **page_data(seen, about(run.model, name="", command=""))}


def _passage(documents: Sequence[Document], most: int) -> str:
    """`most` characters of the first document, from the start of a line if one is near."""
    if not documents:
        return ""
    first = documents[0]
    part = first.whole[first.start : first.start + min(len(first), _READ_CHARS + most)]
    text = part if isinstance(part, str) else part.decode("utf-8", "replace")
    line = text.find("\n", 0, _READ_CHARS) + 1
    return text[line : line + most]


def thin(points: Sequence[P], most: int, value: Callable[[P], float]) -> list[P]:
    """At most `most` points: the first, the last, and the minimum and maximum of equal intervals.

    So no peak and no dip is lost, however many points there are.
    """
    if len(points) <= most:
        return list(points)
    intervals = max(1, most // 2 - 1)
    kept = {0, len(points) - 1}
    for n in range(intervals):
        own = range(n * len(points) // intervals, (n + 1) * len(points) // intervals)
        kept.add(min(own, key=lambda place: value(points[place])))
        kept.add(max(own, key=lambda place: value(points[place])))
    return [points[place] for place in sorted(kept)]


def medians(points: Sequence[tuple[int, float]], most: int) -> list[tuple[int, float]]:
    """At most `most` points: the last step and the median value of equal intervals."""
    if len(points) <= most:
        return list(points)
    bounds = [n * len(points) // most for n in range(most + 1)]
    return [
        (points[end - 1][0], median(value for _, value in points[begin:end]))
        for begin, end in pairwise(bounds)
    ]


def spread(points: Sequence[P], most: int) -> list[P]:
    """At most `most` of the points, evenly spaced from the first to the last."""
    if len(points) <= most:
        return list(points)
    return [points[n * (len(points) - 1) // (most - 1)] for n in range(most)]
