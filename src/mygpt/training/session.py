"""`train`: from a text file to a trained model in one call."""

from __future__ import annotations

import platform
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec

import numpy as np
import torch
from numpy.typing import NDArray

from mygpt.baselines import uniform_loss, unigram_loss
from mygpt.config import GPTConfig
from mygpt.errors import CheckpointError, InputError
from mygpt.generation.writer import Writer, load
from mygpt.machine import choose_device
from mygpt.model import GPT
from mygpt.tokenization import from_state
from mygpt.training.config import DEFAULT_PRESET, TrainConfig, preset_options
from mygpt.training.events import Finished, Listener, Note, Started
from mygpt.training.interrupt import StopOnSignal
from mygpt.training.loop import Trainer
from mygpt.training.run import RunFolder
from mygpt.training.source import Source, choose_tokenizer, fit_window, read_source
from mygpt.tutorial import set_seed

P = ParamSpec("P")

# What may change when a run goes on.
RESUMABLE = (
    "steps",
    "tokens",
    "minutes",
    "print_every",
    "eval_every",
    "sample_tokens",
    "save_every",
    "save_seconds",
)
# The tutorial seeds the model with 0 and the data with 42.
_DATA_SEED = 42


def _keeps_random_state(function: Callable[P, Writer]) -> Callable[P, Writer]:
    """The caller's torch generator is after the call as it was before."""

    @wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> Writer:
        with torch.random.fork_rng(devices=[]):
            return function(*args, **kwargs)

    return wrapped


@_keeps_random_state
def train(
    files: str | Path | Sequence[str | Path] | None = None,
    *,
    output: str | Path | None = None,
    overwrite: bool = False,
    preset: str = DEFAULT_PRESET,
    tokenizer: str = "auto",
    val_file: str | Path | None = None,
    encoding: str | None = None,
    device: str = "auto",
    listener: Listener = print,
    command: str = "mygpt.train(...)",
    **options: Any,
) -> Writer:
    """Train a GPT on text and return a `Writer` of the best model.

    Args:
        files: text files, folders, glob patterns or "-"; nothing is the built-in corpus.
        output: the run's folder, or a checkpoint file; None is `runs/<name of the text>`.
        overwrite: start anew where a run lies already.
        preset: a named shape and recipe.
        tokenizer: "auto", "char", "byte", or the path of a character tokenizer's JSON.
        val_file: text to validate on; None keeps the last tenth of `files`.
        encoding: of the files; None is UTF-8 or what a byte-order mark says.
        device: "auto", "cpu", "cuda" or "mps".
        listener: is told every event; `print` shows plain lines.
        command: what the checkpoint says it came from.
        options: any field of `TrainConfig` (`steps`, `minutes`, `lr`, ...) and `embed_dim`,
            `num_heads`, `num_layers`, `max_seq_len`, `dropout`.

    Raises:
        InputError: for wrong input; nothing was written then.
        StorageError: when there is no space.
        DivergedError: when the loss is no longer a number.
    """
    names = [str(f) for f in ([files] if isinstance(files, (str, Path)) else files or ())]
    if files is not None and not names:
        raise InputError(
            "files is an empty list: name a text, or leave it out for the built-in one"
        )
    if output is not None and not str(output):
        raise InputError("output is empty: name a folder, or a file such as ckpt.pt")
    options = {name: value for name, value in options.items() if value is not None}
    shape, recipe = preset_options(preset, options)
    config = TrainConfig(**recipe)  # refuses wrong options before anything is read
    where = choose_device(device)
    settings = {
        "files": [_resolved(name) for name in names],
        "val_file": None if val_file is None else _resolved(str(val_file)),
        "encoding": encoding,
        "preset": preset,
    }
    bytes_do = tokenizer in ("auto", "byte")
    as_named = {**settings, "files": names, "val_file": None if val_file is None else str(val_file)}
    source = read_source(as_named, config.val_fraction, allow_bytes=bytes_do)
    run = RunFolder.at(output or Path("runs") / source.corpus.name)
    run.check_free(overwrite=overwrite)
    reserve = config.data_order != "tutorial"
    chosen = choose_tokenizer(tokenizer, source.documents, end_of_text=reserve)
    train_tokens, val_tokens = source.encode(chosen)
    notes = list(source.corpus.notes)
    undecoded = [doc.name for doc in source.documents if isinstance(doc.text, bytes)]
    if undecoded and tokenizer == "auto":
        notes.append(
            f"{undecoded[0]} is not text in UTF-8, so its bytes are learned "
            "(name its encoding with --encoding, latin-1 perhaps, to learn characters)"
        )
    notes += fit_window(shape, recipe, len(train_tokens), asked="seq_len" in options)
    if source.held and len(val_tokens) < 2:
        notes.append("the text is too short to keep some of it for validation: there is none")
    config = TrainConfig(**recipe)
    trainer = Trainer(
        _new_model(GPTConfig(vocab_size=chosen.vocab_size, **shape), config.seed, where),
        chosen,
        config,
        train_tokens=train_tokens,
        val_tokens=val_tokens,
        run=run,
        provenance=_provenance(source, preset, command),
        settings=settings,
        listener=listener,
    )
    for note in notes:
        listener(Note(note))
    trainer.begin(_for_people(trainer, source))
    return _sit(trainer, source.corpus.name, train_tokens)


def _resolved(name: str) -> str:
    return name if name == "-" else str(Path(name).resolve())


def _new_model(config: GPTConfig, seed: int, device: torch.device) -> GPT:
    """Fresh weights, and the generators seeded for the data: the tutorial's order of seeding."""
    set_seed(seed)
    model = GPT.from_config(config).to(device)
    set_seed((seed + _DATA_SEED) % 2**64)
    return model


def _for_people(trainer: Trainer, source: Source) -> dict[str, Any]:
    """What config.toml shows."""
    return {
        **trainer.settings,
        "corpus_sha256": source.sha256,
        "tokenizer": trainer.tokenizer.kind,
        "model": trainer.model.config.to_dict(),
        "training": trainer.config.to_dict(),
    }


@_keeps_random_state
def resume(
    output: str | Path,
    files: Sequence[str | Path] = (),
    *,
    val_file: str | Path | None = None,
    device: str = "auto",
    listener: Listener = print,
    **options: Any,
) -> Writer:
    """Go on with a run as if it had never stopped.

    Args:
        output: the run's folder, or the checkpoint file it was given as `output`.
        files: where the text lies now; nothing takes it from where it was.
        val_file: where the validation file lies now, likewise.
        device: "auto", "cpu", "cuda" or "mps".
        listener: is told every event.
        options: a new length (`steps`, `tokens` or `minutes`, counted from the run's start)
            and how often to report, validate and save.

    Raises:
        CheckpointError: when there is no run, or its state is damaged.
        InputError: when the text is not the same any more, or an option cannot change.
    """
    run = RunFolder.at(output)
    arrays, parts = run.load_state()
    options = {name: value for name, value in options.items() if value is not None}
    fixed = sorted(set(options) - set(RESUMABLE))
    if fixed:
        raise InputError(
            f"{', '.join(fixed)} cannot change when a run goes on: start a new one with another "
            "--output"
        )
    config = _lengthened(parts["training"], options)
    settings, provenance = parts["settings"], parts["provenance"]
    provenance = {**provenance, "sittings": provenance.get("sittings", 1) + 1}
    chosen = from_state(parts["tokenizer"])
    if val_file is not None:
        settings = {**settings, "val_file": _resolved(str(val_file))}
    if files:
        settings = {**settings, "files": [_resolved(str(name)) for name in files]}
    source = read_source(settings, config.val_fraction, allow_bytes=chosen.kind == "byte")
    if source.sha256 != provenance["corpus"]["sha256"]:
        raise InputError(
            f"the text of {run.folder} has changed since the run began (its SHA-256 is another): "
            "put it back, or start a new run with another --output"
        )
    train_tokens, val_tokens = source.encode(chosen)
    trainer = Trainer(
        GPT.unfilled(GPTConfig.from_dict(parts["config"])).to(choose_device(device)),
        chosen,
        config,
        train_tokens=train_tokens,
        val_tokens=val_tokens,
        run=run,
        provenance=provenance,
        settings=settings,
        listener=listener,
    )
    trainer.restore(arrays, parts["course"])
    if trainer.finished:
        listener(
            Note(
                f"{run.name} is finished: to go on, give --steps, --tokens or --minutes counted "
                "from its start, more than it had"
            )
        )
    return _sit(trainer, source.corpus.name, train_tokens)


def _lengthened(training: dict[str, Any], options: dict[str, Any]) -> TrainConfig:
    try:
        config = TrainConfig(**training)
    except TypeError as error:
        raise CheckpointError(f"the run's state is of another version: {error}") from None
    if {"steps", "tokens", "minutes"} & set(options):
        options = {"steps": None, "tokens": None, "minutes": None, **options}
    return replace(config, **options)


def _sit(trainer: Trainer, corpus: str, train_tokens: NDArray[np.integer]) -> Writer:
    """One sitting: announce, train, announce the end; return the best model's writer."""
    config, course, vocab_size = trainer.config, trainer.course, trainer.tokenizer.vocab_size
    judged = trainer.val_tokens if len(trainer.val_tokens) else train_tokens
    uniform, unigram = uniform_loss(vocab_size), unigram_loss(train_tokens, judged, vocab_size)
    trainer.tell(
        Started(
            run=trainer.run.folder,
            step=course.step,
            parameters=trainer.model.config.num_parameters(),
            corpus=corpus,
            train_tokens=len(train_tokens),
            val_tokens=len(trainer.val_tokens),
            tokenizer=trainer.tokenizer.kind,
            vocab_size=vocab_size,
            seq_len=config.seq_len,
            uniform=uniform,
            unigram=unigram,
            device=str(trainer.device),
            total_steps=config.total_steps,
            budget_s=None if config.minutes is None else 60.0 * config.minutes,
        )
    )
    with StopOnSignal() as interrupt:
        trainer.fit(should_stop=lambda: interrupt.received is not None)
    validated = course.best_step > 0
    trainer.tell(
        Finished(
            run=trainer.run.name,
            checkpoint=trainer.run.checkpoint_path,
            step=course.step,
            loss=course.loss,
            best_val_loss=course.best_val_loss if validated else None,
            best_step=course.best_step,
            uniform=uniform,
            unigram=unigram,
            elapsed_s=course.elapsed_s,
            signal=None if trainer.finished else interrupt.received,
        )
    )
    return load(trainer.run.checkpoint_path, device=str(trainer.device))


def _provenance(source: Source, preset: str, command: str) -> dict[str, Any]:
    from mygpt import __version__

    return {
        "mygpt": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": f"{sys.platform} {platform.machine()}",
        "command": command,
        "preset": preset,
        "corpus": {
            "name": source.corpus.name,
            "documents": len(source.corpus.documents),
            "bytes": source.corpus.num_bytes,
            "sha256": source.sha256,
        },
    }
