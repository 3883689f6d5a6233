"""How a model formed in its training, from its snapshots: the part of the report with a slider.

Letters: S snapshots, N blocks, H heads, K tokens shown, D dimensions of their embeddings.
"""

from __future__ import annotations

import contextlib
import shlex
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mygpt.checkpoint.model_file import Checkpoint
from mygpt.data import encode_documents, predicted_size
from mygpt.evaluation.ablation import Part, ablated
from mygpt.evaluation.head_scores import KINDS, THRESHOLD
from mygpt.evaluation.losses import TokenLosses, evaluate, model_token_losses
from mygpt.evaluation.snapshot import Snapshot, kind_of
from mygpt.training.gradients import cpu_token_losses
from mygpt.views.page import shown_path
from mygpt.views.run import Run

_MOST_SHOWN, _MOST_KINDS = 60, 8
_MOST_COSTS = 64  # heads that are switched off
_NAMES = list(KINDS.values())
_ARTICLES = dict(
    zip(_NAMES, ("a previous-token head", "a same-token head", "an induction head"), strict=True)
)


def formation_data(snapshots: Sequence[Snapshot]) -> dict[str, Any] | None:
    """The data of the section as plain JSON values; None for fewer than two snapshots."""
    if len(snapshots) < 2:
        return None
    last = snapshots[-1]
    # Others are of another model, in a file that was changed.
    alike = [one for one in snapshots if _shape(one) == _shape(last)]
    places = np.linspace(0, len(alike) - 1, min(len(alike), _MOST_SHOWN)).round().astype(int)
    shown = [alike[place] for place in places]
    relative = relative_scores(shown)
    kinds = sorted(last.kinds, key=lambda kind: -last.kinds[kind][1])[:_MOST_KINDS]
    positions, variance = _aligned(shown)
    return {
        "steps": [one.step for one in shown],
        "loss": [round(one.loss, 4) for one in shown],
        "kinds_of_heads": _NAMES,
        "threshold": THRESHOLD,
        "scores": np.round(relative, 3).tolist(),  # (S, kinds, N, H)
        "uniform": [round(last.uniform[kind] / last.largest[kind], 3) for kind in KINDS],
        "formed": formed(shown),
        "story": _story(shown),
        "lens": [np.round(one.lens, 4).tolist() for one in shown],
        "kinds": [[kind, last.kinds[kind][1]] for kind in kinds],
        "kind_losses": [[one.kinds[kind][0] for kind in kinds] for one in shown],
        "tokens": [[text, kind_of(text)] for text in last.tokens],
        "positions": np.round(positions, 3).tolist(),  # (S, K, 2)
        "variance": round(variance, 3),
        "samples": [one.sample for one in shown],
        "took_s": round(sum(one.took_s for one in snapshots), 2),
    }


def _shape(one: Snapshot) -> Any:
    return one.scores["induction"].shape, one.tokens, list(one.kinds)


def relative_scores(snapshots: Sequence[Snapshot]) -> NDArray[np.float32]:
    """Head scores where 1 is the largest possible: (S, kinds, N, H)."""
    return np.stack([np.stack([one.relative[kind] for kind in KINDS]) for one in snapshots])


def formed(snapshots: Sequence[Snapshot]) -> list[dict[str, Any]]:
    """The heads that have a name at the end, and when they got it, in this order.

    A head has formed at the first snapshot from which on its score is at least `THRESHOLD`.
    """
    relative = relative_scores(snapshots)
    found = []
    for block, head in np.ndindex(relative.shape[2:]):
        kind = int(relative[-1, :, block, head].argmax())
        scores = relative[:, kind, block, head]
        if scores[-1] < THRESHOLD:
            continue
        at = int(np.flatnonzero(scores < THRESHOLD)[-1]) + 1 if (scores < THRESHOLD).any() else 0
        found.append({
            "head": f"{block + 1}.{head + 1}",
            "kind": _NAMES[kind],
            "at": at,
            "score": round(float(scores[-1]), 3),
        })  # fmt: skip
    return sorted(found, key=lambda one: (one["at"], -one["score"]))


def _story(snapshots: Sequence[Snapshot]) -> list[dict[str, Any]]:
    """What happened in sentences, each with the index of its snapshot, or None."""
    relative, heads = relative_scores(snapshots), formed(snapshots)
    story: list[dict[str, Any]] = []
    first: dict[str, int] = {}  # by kind, where its first head formed
    for one in heads:
        kind, at = one["kind"], one["at"]
        if kind in first:
            continue
        first[kind] = at
        scores = relative[:, _NAMES.index(kind)].reshape(len(snapshots), -1)
        block, head = (int(number) - 1 for number in one["head"].split("."))
        own = scores[:, block * relative.shape[3] + head]
        others = sum(other["kind"] == kind for other in heads) - 1
        text = f"Head {one['head']} {_became(snapshots, at, _ARTICLES[kind], own)}"
        if kind == _NAMES[2] and _NAMES[0] in first and first[_NAMES[0]] < at:
            before, after = snapshots[first[_NAMES[0]]], snapshots[at]
            text += (
                f" That is {after.step - before.step:,} steps after the first previous-token head; "
                f"in between the loss fell from {before.loss:.3f} to {after.loss:.3f}."
            )
        if others:
            text += f" {others} more followed." if others > 1 else " One more followed."
        story.append({"at": at, "step": snapshots[at].step, "text": text})
    for number, name in enumerate(_NAMES):
        if name in first or number == 1:
            continue
        scores = relative[-1, number]
        block, head = divmod(int(scores.argmax()), scores.shape[1])
        text = (
            f"No head is {_ARTICLES[name]} after step {snapshots[-1].step:,}: the largest score is "
            f"{scores.max():.2f}, of head {block + 1}.{head + 1}."
        )
        story.append({"at": None, "step": None, "text": text})
    return story


def _became(snapshots: Sequence[Snapshot], at: int, kind: str, scores: NDArray[np.float32]) -> str:
    """How a head got its name, as the rest of a sentence."""
    if at == 0:
        return f"was {kind} at the first snapshot, with a score of {scores[0]:.2f}."
    before, after = snapshots[at - 1], snapshots[at]
    fell = "fell" if after.loss < before.loss else "rose"
    return (
        f"became {kind}: its score rose from {scores[at - 1]:.2f} at step {before.step:,} to "
        f"{scores[at]:.2f}, and the loss {fell} from {before.loss:.3f} to {after.loss:.3f}."
    )


def _aligned(snapshots: Sequence[Snapshot]) -> tuple[NDArray[np.float32], float]:
    """Tokens in a plane, (S, K, 2), and the fraction of the last embeddings' variance in it.

    The plane has the two main axes of the last snapshot. Each earlier one is rotated so that its
    tokens are nearest to those of the one after it (orthogonal Procrustes: Schoenemann, 1966), as
    main axes change places from one snapshot to the next.
    """
    rows = [snapshots[-1].embedding]  # (K, D)
    for one in snapshots[-2::-1]:
        left, _, right = np.linalg.svd(one.embedding.T @ rows[-1])
        rows.append((one.embedding @ (left @ right)).astype(np.float32))
    plane = np.stack(rows[::-1])[:, :, :2]
    variance = snapshots[-1].variance
    return plane, float(np.square(plane[-1]).sum() / variance) if variance > 0 else 0.0


class _TooSlowError(Exception):
    """The validation text takes too long for the report."""


def ablation_costs(
    run: Run, named: Sequence[dict[str, Any]], budget_s: float
) -> dict[str, Any] | None:
    """The validation loss of the best model without each head, as `mygpt eval --ablate` gives it.

    Args:
        run: its model is run; its text is read as `mygpt eval` reads it.
        named: from `formed`. The first head of each kind begins, then these, then all others, as
            long as there is time.
        budget_s: how many seconds it may take.

    Returns:
        None without a validation text. "loss" is None where that takes too long.
    """
    model, source = run.model, run.source
    if model is None or source is None or not source.val_documents:
        return None
    config = model.config
    first = {one["kind"]: one["head"] for one in reversed(named)}  # of each kind
    every = [f"{n + 1}.{h + 1}" for n, h in np.ndindex(config.num_layers, config.num_heads)]
    in_order = [*reversed(first.values()), *(one["head"] for one in named), *every]
    names = list(dict.fromkeys(in_order))
    tokens = encode_documents(source.val_documents, model.tokenizer, continued=source.continued)
    if len(tokens) < 2:
        return None
    size = predicted_size(source.val_documents, tokens, model.tokenizer, continued=source.continued)
    ends = time.monotonic() + budget_s

    def loss_of(changed: Checkpoint) -> float:
        built = changed.build_model().eval()
        score = cpu_token_losses(built) or partial(model_token_losses, built)
        limited = _limited(score, len(tokens), ends)
        return evaluate(built, tokens, config.max_seq_len, size, token_losses=limited).loss

    loss: float | None = None
    rows: list[tuple[str, float]] = []
    with contextlib.suppress(_TooSlowError):
        loss = loss_of(model)
        for name in names[:_MOST_COSTS]:
            without = loss_of(ablated(model, [Part.parse(name, config)]))
            rows.append((name, round(without, 5)))
    return {
        "step": model.provenance.get("step"),
        "loss": None if loss is None else round(loss, 5),
        "tokens": len(tokens) - 1,
        "rows": rows,
        "heads": len(names),
        "seconds": round(budget_s, 1),
        "command": _command(run, names[0]),
    }


def _limited(score: TokenLosses, tokens: int, ends: float) -> TokenLosses:
    """The same; it raises `_TooSlowError` if all tokens would take longer than until `ends`."""
    began, done = time.monotonic(), 0

    def limited(inputs: NDArray[np.integer], targets: NDArray[np.integer]) -> NDArray[np.floating]:
        nonlocal done
        now = time.monotonic()
        if done and began + (now - began) * tokens / done > ends:
            raise _TooSlowError
        done += inputs.size
        return score(inputs, targets)

    return limited


def _command(run: Run, head: str) -> str:
    """The command that measures the loss without a head; empty if it needs several files."""
    settings = run.state.settings
    own, files = settings["val_file"], settings["files"]
    if own is None and len(files) != 1:
        return ""
    name, text = (shlex.quote(shown_path(path)) for path in (run.folder.name, own or files[0]))
    last = "" if own else f" --last {run.state.training.val_fraction:g}"
    return f"mygpt eval {name} {text}{last} --ablate {head}"
