"""`mygpt eval`: a model's loss on a text, compared with n-gram models and compressors."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mygpt.cli import options
from mygpt.cli.terminal import at_words, say, to_json
from mygpt.errors import InputError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from mygpt.checkpoint.model_file import Checkpoint
    from mygpt.evaluation.ablation import Part
    from mygpt.evaluation.baselines import Baselines
    from mygpt.evaluation.losses import Evaluation
    from mygpt.text import Document
    from mygpt.text.documents import TextSize

_TEXT, _WINDOWS = "Text", "Windows"  # panels of the help page
_PROTOCOLS = ("full", "nanogpt", "both")


def eval(
    checkpoint: Annotated[Path, typer.Argument(help="A run's folder or a checkpoint file.")],
    file: Annotated[Path, typer.Argument(help="The text to evaluate on; - is standard input.")],
    last: Annotated[
        float | None,
        options.option(
            "Evaluate only on this fraction of the text, taken from its end as training does: 0.1 "
            "is the validation split of `mygpt train`."
        ),
    ] = None,
    protocol: Annotated[
        str,
        options.choice(
            "full: each token once, in consecutive windows. nanogpt: 200 random batches of "
            "64 windows of 256 tokens, noisy and slow. both: the two of them."
        ),
    ] = "full",
    window: Annotated[
        int | None,
        options.option(
            "Window length in tokens. Default: the model's context window (for nanogpt at most "
            "256).",
            panel=_WINDOWS,
        ),
    ] = None,
    stride: Annotated[
        int | None,
        options.option(
            "Distance in tokens from one window to the next. Windows then overlap, and each "
            "prediction has a context of at least window minus stride tokens; slower. Default: "
            "the window length, so that windows do not overlap.",
            panel=_WINDOWS,
        ),
    ] = None,
    train: Annotated[
        Path | None,
        options.option(
            "The text that the n-gram models are trained on. Default: the part that --last does "
            "not select."
        ),
    ] = None,
    encoding: Annotated[
        str | None,
        options.option("The texts' encoding. Default: UTF-8.", panel=_TEXT, metavar="NAME"),
    ] = None,
    field: Annotated[
        str | None,
        options.option(
            "The field that contains the text in *.jsonl, *.json, *.csv, *.tsv and *.parquet "
            "records. Default: the one used in the model's training.",
            panel=_TEXT,
            metavar="NAME",
        ),
    ] = None,
    split_documents: Annotated[
        bool | None,
        options.option(
            "Whether <|endoftext|> in a file separates documents or is ordinary text. Default: as "
            "in the model's training.",
            "--split-documents/--no-split-documents",
            panel=_TEXT,
        ),
    ] = None,
    unknown: Annotated[
        str,
        options.choice(
            "What to do with characters that the model's tokenizer does not know. error: "
            "refuse the text (if the tokenizer has an unknown token, only above a tenth of the "
            "text). keep: encode them as the unknown token. drop: remove them from the text.",
            _TEXT,
        ),
    ] = "error",
    ablate: Annotated[
        list[str] | None,
        options.option(
            "Switch a part of the model off: 1.3 is head 3 of block 1, counted from 1 as on the "
            "pages; attention1, mlp1 and block1 are the attention, the MLP and both of block 1. "
            "May be repeated.",
            metavar="PART",
        ),
    ] = None,
    device: options.Device = "auto",
    json: options.Json = False,
) -> None:
    """Measure a model's loss on a text, and compare it with n-gram models and compressors.

    Example: mygpt eval runs/poems poems.txt --last 0.1 --protocol both

    Without two parts: mygpt eval runs/poems poems.txt --last 0.1 --ablate 1.3 --ablate mlp1
    """
    from mygpt.checkpoint.model_file import read_checkpoint, resolve
    from mygpt.evaluation.ablation import Part, ablated
    from mygpt.evaluation.baselines import measure_baselines

    if protocol not in _PROTOCOLS:
        raise InputError(f"protocol={protocol!r} is not known: choose {', '.join(_PROTOCOLS)}")
    found = read_checkpoint(resolve(checkpoint))
    parts = [Part.parse(name, found.config) for name in ablate or []]
    if window is not None and not 1 <= window <= found.config.max_seq_len:
        raise InputError(
            f"window={window} does not fit the model: choose 1 to {found.config.max_seq_len}"
        )
    if stride is not None and protocol == "nanogpt":
        raise InputError("--stride is for --protocol full: nanoGPT's protocol uses random windows")
    if last is not None and not 0 < last <= 1:
        raise InputError(f"last={last} must be a fraction of the text: above 0, at most 1")
    how = _how_to_read(found, (file, train), encoding, field, split_documents)
    text = _read_text(found, file, last, train, unknown, how)
    results = _evaluate(ablated(found, parts), text, protocol, window, stride, device)
    baselines = measure_baselines(
        text.train_tokens,
        text.tokens,
        found.config.vocab_size,
        train_documents=text.train_documents,
        test_documents=text.documents,
        predicted=text.size,
    )
    if json:
        _print_json(found, parts, text, results, baselines)
    else:
        for line in _lines(found, parts, text, results, baselines):
            say(at_words(line, sys.stdout))


@dataclass(frozen=True)
class _Text:
    """The evaluated text, and the text that the n-gram models are trained on (may be empty).

    Attributes:
        warning: a warning if the model was trained on the evaluated text; else empty.
        notes: remarks on how the text was read, one line each.
        size: bytes and characters of the predicted text, which is all but its first token.
    """

    name: str
    documents: Sequence[Document]
    tokens: NDArray[Any]
    train_documents: Sequence[Document]
    train_tokens: NDArray[Any]
    warning: str
    notes: list[str]
    size: TextSize


def _how_to_read(
    found: Checkpoint,
    files: tuple[Path | None, ...],
    encoding: str | None,
    field: str | None,
    split: bool | None,
) -> dict[str, Any]:
    """The arguments of `read_corpus`: as for the model's own text, except what is given here."""
    from mygpt.data import is_store
    from mygpt.text import RecordOptions

    if field == "":
        raise InputError("--field is empty: name the field that contains the text, or omit it")
    for file in files:
        if file is not None and is_store(file):
            raise InputError(f"{file} is a token store: name the text that it was made from")
    corpus = found.provenance.get("corpus")
    if not isinstance(corpus, dict):  # an imported model
        corpus = {"field": "", "split_documents": True}
    own, records = corpus.get("field"), None
    if field is not None or isinstance(own, str):
        records = RecordOptions(
            field or own or None, lines_may_be_plain=True, refuse_unused=field is not None
        )
    return {
        "encoding": encoding,
        "split": bool(corpus.get("split_documents", False)) if split is None else split,
        "records": records,
        "allow_bytes": found.tokenizer.kind == "byte",
    }


def _read_text(
    found: Checkpoint,
    file: Path,
    last: float | None,
    train: Path | None,
    unknown: str,
    how: dict[str, Any],
) -> _Text:
    from mygpt.data import drop_unknown, encode_documents, predicted_size, unknown_in
    from mygpt.text import read_corpus, split_documents
    from mygpt.tokenization.unknown import (
        CORPUS_POLICIES,
        adding_remedy,
        check_policy,
        dropped_note,
    )

    check_policy(unknown, (*CORPUS_POLICIES, "drop"))
    tokenizer = found.tokenizer
    corpus = read_corpus([str(file)], **how)
    documents, warning = corpus.documents, _overlap_warning(found, corpus.sha256, last)
    train_documents: list[Document] = []
    if last is not None and last < 1:
        train_documents, documents = split_documents(documents, last)
    continued = bool(train_documents)
    if train is not None:
        train_documents = read_corpus([str(train)], **how).documents
    notes = list(corpus.notes)
    if unknown == "drop":
        documents, left = drop_unknown(documents, tokenizer)
        train_documents, _ = drop_unknown(train_documents, tokenizer)
        notes += [dropped_note(left)] * bool(left)
    with adding_remedy("--unknown drop removes them"):
        tokens = encode_documents(documents, tokenizer, continued=continued)
        train_tokens = encode_documents(train_documents, tokenizer)
    if len(tokens) < 2:
        raise InputError(f"the text has {len(tokens)} token: at least 2 are needed")
    name = str(file) if last is None else f"the last {last:g} of {file}"
    before = unknown_in(train_documents, train_tokens, tokenizer) if continued else None
    unknown_text = unknown_in(documents, tokens, tokenizer, before)  # of the whole file
    notes += unknown_text.notes(str(file), unknown)
    size = predicted_size(documents, tokens, tokenizer, continued=continued)
    return _Text(name, documents, tokens, train_documents, train_tokens, warning, notes, size)


def _overlap_warning(found: Checkpoint, sha256: str, last: float | None) -> str:
    """A warning if the model was trained on text that it is evaluated on; else empty."""
    corpus, training = (found.provenance.get(name) for name in ("corpus", "training"))
    if not isinstance(corpus, dict) or not isinstance(training, dict):
        return ""
    kept = training.get("val_fraction")
    if corpus.get("sha256") != sha256 or not isinstance(kept, (int, float)):
        return ""
    if last is not None and last <= kept:
        return ""
    advice = f"--last {kept:g} selects its validation split" if kept else "on all of it"
    return f"the model was trained on this text: {advice}"


def _evaluate(
    found: Checkpoint,
    text: _Text,
    protocol: str,
    window: int | None,
    stride: int | None,
    device: str,
) -> dict[str, Evaluation]:
    """The results by protocol."""
    from mygpt.evaluation.losses import evaluate, evaluate_nanogpt
    from mygpt.machine import choose_device
    from mygpt.training.gradients import cpu_token_losses

    model = found.build_model().to(choose_device(device)).eval()
    score = cpu_token_losses(model)
    results = {}
    if protocol != "nanogpt":
        seq_len = window or found.config.max_seq_len
        results["full"] = evaluate(
            model, text.tokens, seq_len, text.size, stride=stride, token_losses=score
        )
    if protocol != "full":
        results["nanogpt"] = evaluate_nanogpt(
            model, text.tokens, text.size, seq_len=window, token_losses=score
        )
    return results


def _lines(
    found: Checkpoint,
    parts: list[Part],
    text: _Text,
    results: dict[str, Evaluation],
    baselines: Baselines,
) -> list[str]:
    """The results as lines of text."""
    characters = "" if baselines.num_chars is None else f"{baselines.num_chars:,} characters, "
    lines = [
        f"{found.path} on {text.name}: {baselines.tokens:,} tokens, {characters}"
        f"{baselines.num_bytes:,} bytes"
    ]
    if parts:
        lines.append(f"ablated: {', '.join(map(str, parts))}")
    rows = [(row.bits_per_byte, row.name, row.loss) for row in baselines.rows()]
    for protocol, result in results.items():
        per_char = result.bits_per_char
        in_characters = "" if per_char is None else f"{per_char:.4f} bits per character, "
        error = result.standard_error
        lines += [
            f"{_described(protocol, result)}:",
            f"  loss {result.loss:.4f} nats per token (standard error"
            f"{' of the random windows' * (protocol == 'nanogpt')} "
            f"{'unknown' if math.isnan(error) else f'{error:.4f}'}), "
            f"perplexity {result.perplexity:.3f}",
            f"  {in_characters}{result.bits_per_byte:.4f} bits per byte",
        ]
        name = "this model" + f", {protocol}" * (len(results) > 1)
        rows.append((result.bits_per_byte, name, result.loss))
    lines.append("the same text, from worst to best (bits per byte; nats per token):")
    for bits, name, loss in sorted(rows, key=lambda row: -row[0]):
        lines.append(f"  {name:<20}{bits:8.4f}" + ("" if loss is None else f"  {loss:8.4f}"))
    lines += [f"note: {note}" for note in (*text.notes, text.warning) if note]
    if baselines.unigram is None:
        lines.append("add --train FILE or --last to compare with trained n-gram models too")
    if baselines.bounds:
        lines.append(f"note: the text is long: {baselines.bounds}")
    return lines


def _described(protocol: str, result: Evaluation) -> str:
    from mygpt.evaluation import losses

    if protocol == "full":
        apart = f", {result.stride} apart" * (result.stride != result.seq_len)
        return f"full pass, {result.tokens:,} tokens in windows of {result.seq_len}{apart}"
    usual = losses.NANOGPT_WINDOW
    shorter = f" (not {usual})" * (result.seq_len != usual)
    return (
        f"nanoGPT's protocol, {losses.NANOGPT_BATCHES} x {losses.NANOGPT_BATCH_SIZE} random "
        f"windows of {result.seq_len}{shorter}, seed {losses.NANOGPT_SEED}; noisy"
    )


def _print_json(
    found: Checkpoint,
    parts: list[Part],
    text: _Text,
    results: dict[str, Evaluation],
    baselines: Baselines,
) -> None:
    values = {
        "checkpoint": str(found.path),
        "ablated": [str(part) for part in parts],
        "text": text.name,
        "warning": text.warning,
        "notes": text.notes,
        "results": {name: _plain(result) for name, result in results.items()},
        "baselines": {**asdict(baselines), "rows": [asdict(row) for row in baselines.rows()]},
    }
    say(to_json(values, indent=2))


def _plain(result: Evaluation) -> dict[str, Any]:
    """A result as JSON values; NaN and infinity, which JSON lacks, become None."""
    values = {**asdict(result), "perplexity": result.perplexity}
    unknown = {name for name, value in values.items() if value and not math.isfinite(value)}
    return values | dict.fromkeys(unknown)
