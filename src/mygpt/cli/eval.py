"""`mygpt eval`: a model's loss on a text, compared with n-gram models and compressors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mygpt.cli.terminal import say, to_json
from mygpt.errors import InputError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from mygpt.checkpoint.model_file import Checkpoint
    from mygpt.evaluation.baselines import Baselines
    from mygpt.evaluation.losses import Evaluation
    from mygpt.text import Document, RecordOptions
    from mygpt.text.documents import TextSize

_PROTOCOLS = ("full", "nanogpt", "both")


def eval(
    checkpoint: Annotated[Path, typer.Argument(help="A run's folder or a checkpoint file.")],
    file: Annotated[Path, typer.Argument(help="The text to evaluate on; - is standard input.")],
    last: Annotated[
        float | None,
        typer.Option(
            help="Evaluate only on this fraction of the text, taken from its end as training does: "
            "0.1 is the validation split of `mygpt train`.",
            show_default=False,
        ),
    ] = None,
    protocol: Annotated[
        str,
        typer.Option(
            help="full: each token once, in consecutive windows. nanogpt: 200 random batches of "
            "64 windows of 256 tokens, noisy and slow. both: the two of them."
        ),
    ] = "full",
    window: Annotated[
        int | None,
        typer.Option(
            help="Window length in tokens. Default: the model's context window (for nanogpt at "
            "most 256).",
            show_default=False,
        ),
    ] = None,
    stride: Annotated[
        int | None,
        typer.Option(
            help="Distance in tokens from one window to the next. Windows then overlap, and each "
            "prediction has a context of at least window minus stride tokens; slower. Default: "
            "the window length, so that windows do not overlap.",
            show_default=False,
        ),
    ] = None,
    train: Annotated[
        Path | None,
        typer.Option(
            help="The text that the n-gram models are trained on. Default: the part that --last "
            "does not select.",
            show_default=False,
        ),
    ] = None,
    encoding: Annotated[
        str | None,
        typer.Option(help="The texts' encoding. Default: UTF-8.", show_default=False),
    ] = None,
    field: Annotated[
        str | None,
        typer.Option(
            help="The field that contains the text in *.jsonl, *.json, *.csv, *.tsv and *.parquet "
            "records. Default: the one used in the model's training.",
            show_default=False,
        ),
    ] = None,
    split_documents: Annotated[
        bool | None,
        typer.Option(
            "--split-documents/--no-split-documents",
            help="Whether <|endoftext|> in a file separates documents or is ordinary text. "
            "Default: as in the model's training.",
            show_default=False,
        ),
    ] = None,
    unknown: Annotated[
        str,
        typer.Option(
            help="What to do with characters that the model's tokenizer does not know. error: "
            "refuse the text (if the tokenizer has an unknown token, only above a tenth of the "
            "text). keep: encode them as the unknown token. drop: remove them from the text."
        ),
    ] = "error",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")] = "auto",
    json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Measure a model's loss on a text, and compare it with n-gram models and compressors.

    Example: mygpt eval runs/poems poems.txt --last 0.1 --protocol both
    """
    from mygpt.checkpoint.model_file import read_checkpoint, resolve

    if protocol not in _PROTOCOLS:
        raise InputError(f"protocol={protocol!r} is not known: choose {', '.join(_PROTOCOLS)}")
    found = read_checkpoint(resolve(checkpoint))
    if window is not None and not 1 <= window <= found.config.max_seq_len:
        raise InputError(
            f"window={window} does not fit the model: choose 1 to {found.config.max_seq_len}"
        )
    if stride is not None and protocol == "nanogpt":
        raise InputError("--stride is for --protocol full: nanoGPT's protocol uses random windows")
    split = _was_split(found) if split_documents is None else split_documents
    if field == "":
        raise InputError("--field is empty: name the field that contains the text, or omit it")
    how = {"encoding": encoding, "split": split, "records": _records(found, field)}
    text = _read_text(found, file, last, train, how, unknown=unknown)
    results = _evaluate(found, text, protocol, window, stride, device)
    baselines = _baselines(found, text)
    if json:
        _print_json(found, text, results, baselines)
    else:
        for line in _lines(found, text, results, baselines):
            say(line)


@dataclass(frozen=True)
class _Text:
    """The evaluated text, and the text that the n-gram models are trained on.

    Attributes:
        name: the evaluated text's name, as it is shown.
        documents: the evaluated text.
        tokens: its ids.
        train_documents: the n-gram models' training text; may be empty.
        train_tokens: its ids.
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


def _was_split(found: Checkpoint) -> bool:
    """Whether the model's training text was split at `SEPARATOR`; True for imported models."""
    corpus = found.provenance.get("corpus")
    return bool(corpus.get("split_documents", False)) if isinstance(corpus, dict) else True


def _records(found: Checkpoint, field: str | None) -> RecordOptions | None:
    """How files of records are read: as the model's own were, but for a field that is named."""
    from mygpt.text import RecordOptions

    corpus = found.provenance.get("corpus")
    own = corpus.get("field") if isinstance(corpus, dict) else ""
    if field is None and not isinstance(own, str):
        return None
    return RecordOptions(
        field or own or None, lines_may_be_plain=True, refuse_unused=field is not None
    )


def _read_text(
    found: Checkpoint,
    file: Path,
    last: float | None,
    train: Path | None,
    how: dict[str, Any],
    *,
    unknown: str,
) -> _Text:
    from mygpt.data import (
        drop_unknown,
        encode_documents,
        is_store,
        predicted_size,
        unknown_in,
    )
    from mygpt.text import read_corpus, split_documents
    from mygpt.tokenization.unknown import (
        CORPUS_POLICIES,
        adding_remedy,
        check_policy,
        dropped_note,
    )

    check_policy(unknown, (*CORPUS_POLICIES, "drop"))

    for place in (file, train):
        if place is not None and is_store(place):
            raise InputError(f"{place} is a token store: name the text that it was made from")
    if last is not None and not 0 < last <= 1:
        raise InputError(f"last={last} must be a fraction of the text: above 0, at most 1")
    options: dict[str, Any] = {**how, "allow_bytes": found.tokenizer.kind == "byte"}
    corpus = read_corpus([str(file)], **options)
    documents, warning = corpus.documents, _overlap_warning(found, corpus.sha256, last)
    train_documents: list[Document] = []
    if last is not None and last < 1:
        train_documents, documents = split_documents(documents, last)
    continued = bool(train_documents)
    if train is not None:
        train_documents = read_corpus([str(train)], **options).documents
    notes = list(corpus.notes)
    if unknown == "drop":
        documents, left = drop_unknown(documents, found.tokenizer)
        train_documents, _ = drop_unknown(train_documents, found.tokenizer)
        notes += [dropped_note(left)] * bool(left)
    with adding_remedy("--unknown drop leaves them out"):
        tokens = encode_documents(documents, found.tokenizer, continued=continued)
        train_tokens = encode_documents(train_documents, found.tokenizer)
    if len(tokens) < 2:
        raise InputError(f"the text has {len(tokens)} token: at least 2 are needed")
    name = str(file) if last is None else f"the last {last:g} of {file}"
    before = unknown_in(train_documents, train_tokens, found.tokenizer) if continued else None
    unknown_text = unknown_in(documents, tokens, found.tokenizer, before)  # of the whole file
    notes += unknown_text.notes(str(file), unknown)
    size = predicted_size(documents, tokens, found.tokenizer, continued=continued)
    return _Text(name, documents, tokens, train_documents, train_tokens, warning, notes, size)


def _overlap_warning(found: Checkpoint, sha256: str, last: float | None) -> str:
    """A warning if the model was trained on text that it is evaluated on; else empty."""
    origin = found.provenance
    corpus, training = origin.get("corpus"), origin.get("training")
    same = isinstance(corpus, dict) and corpus.get("sha256") == sha256
    if not same or not isinstance(training, dict):
        return ""
    kept = training.get("val_fraction")
    if not isinstance(kept, (int, float)) or (last is not None and last <= kept):
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


def _baselines(found: Checkpoint, text: _Text) -> Baselines:
    from mygpt.evaluation.baselines import measure_baselines

    return measure_baselines(
        text.train_tokens,
        text.tokens,
        found.config.vocab_size,
        train_documents=text.train_documents,
        test_documents=text.documents,
        predicted=text.size,
    )


def _lines(
    found: Checkpoint, text: _Text, results: dict[str, Evaluation], baselines: Baselines
) -> list[str]:
    """The results as lines of text."""
    characters = "" if baselines.num_chars is None else f"{baselines.num_chars:,} characters, "
    lines = [
        f"{found.path} on {text.name}: {baselines.tokens:,} tokens, {characters}"
        f"{baselines.num_bytes:,} bytes"
    ]
    for protocol, result in results.items():
        per_char = result.bits_per_char
        in_characters = "" if per_char is None else f"{per_char:.4f} bits per character, "
        lines += [
            f"{_described(protocol, result)}:",
            f"  loss {result.loss:.4f} nats per token (standard error"
            f"{' of the random windows' * (protocol == 'nanogpt')} {_error(result)}), "
            f"perplexity {result.perplexity:.3f}",
            f"  {in_characters}{result.bits_per_byte:.4f} bits per byte",
        ]
    rows = [(row.bits_per_byte, row.name, row.loss) for row in baselines.rows()]
    rows += [
        (result.bits_per_byte, "this model" + f", {name}" * (len(results) > 1), result.loss)
        for name, result in results.items()
    ]
    lines.append("the same text, from worst to best (bits per byte; nats per token):")
    for bits, name, loss in sorted(rows, key=lambda row: -row[0]):
        lines.append(f"  {name:<20}{bits:8.4f}" + ("" if loss is None else f"  {loss:8.4f}"))
    lines += [f"note: {note}" for note in [*text.notes, *[text.warning] * bool(text.warning)]]
    if baselines.unigram is None:
        lines.append("add --train FILE or --last to compare with trained n-gram models too")
    if baselines.bounds:
        lines.append(f"note: the text is long: {baselines.bounds}")
    return lines


def _described(protocol: str, result: Evaluation) -> str:
    from mygpt.evaluation.losses import (
        NANOGPT_BATCH_SIZE,
        NANOGPT_BATCHES,
        NANOGPT_SEED,
        NANOGPT_WINDOW,
    )

    if protocol == "full":
        apart = f", {result.stride} apart" * (result.stride != result.seq_len)
        return f"full pass, {result.tokens:,} tokens in windows of {result.seq_len}{apart}"
    shorter = f" (not {NANOGPT_WINDOW})" * (result.seq_len != NANOGPT_WINDOW)
    return (
        f"nanoGPT's protocol, {NANOGPT_BATCHES} x {NANOGPT_BATCH_SIZE} random windows of "
        f"{result.seq_len}{shorter}, seed {NANOGPT_SEED}; noisy"
    )


def _error(result: Evaluation) -> str:
    return "unknown" if math.isnan(result.standard_error) else f"{result.standard_error:.4f}"


def _print_json(
    found: Checkpoint, text: _Text, results: dict[str, Evaluation], baselines: Baselines
) -> None:
    values = {
        "checkpoint": str(found.path),
        "text": text.name,
        "warning": text.warning,
        "notes": text.notes,
        "results": {name: _plain(result) for name, result in results.items()},
        "baselines": {
            **asdict(baselines),
            "rows": [asdict(row) for row in baselines.rows()],
        },
    }
    say(to_json(values, indent=2))


def _plain(result: Evaluation) -> dict[str, Any]:
    """A result as JSON values; NaN and infinity, which JSON lacks, become None."""
    values = {**asdict(result), "perplexity": result.perplexity}
    return {
        name: None if value is None or not math.isfinite(value) else value
        for name, value in values.items()
    }
