"""A new run before its model exists: text, tokens, shape and recipe, and whether all that fits."""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from mygpt.checkpoint.container import check_storable
from mygpt.checkpoint.parameter_shapes import parameter_shapes
from mygpt.core.config import GPTConfig
from mygpt.data.store_cache import large_sources
from mygpt.data.token_store import Tokens, TokenStore
from mygpt.errors import InputError
from mygpt.file_access import require_path
from mygpt.text import READING_VERSION, name_of
from mygpt.tokenization import Tokenizer, end_notes, from_state
from mygpt.tokenization.unknown import CORPUS_POLICIES, check_policy
from mygpt.training.config import DEFAULT_PRESET, TrainConfig, preset_options
from mygpt.training.corpus import (
    OF_THE_MODEL,
    Source,
    TrainingText,
    choose_tokenizer,
    read_again,
    read_source,
    undecoded,
)
from mygpt.training.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from mygpt.training.events import Listener
from mygpt.training.gradients import suitable_engine
from mygpt.training.hardware import check_format
from mygpt.training.initial_model import read_initial, require_elsewhere, require_unchanged_model
from mygpt.training.lifecycle import Start
from mygpt.training.memory import check_model_fits, free_memory
from mygpt.training.ngram_targets import check_smoothing
from mygpt.training.planning import Planned, Planner, fit_window
from mygpt.training.recorded_files import (
    file_sizes,
    named,
    records_of,
    resolved,
    splits,
    stores_among,
)
from mygpt.training.run import RunFolder


@dataclass(frozen=True)
class Request:
    """A new run as the arguments of `train` describe it."""

    files: list[str]
    options: dict[str, Any]  # those of the model's shape and the recipe
    output: str | Path | None = None
    overwrite: bool = False
    preset: str = DEFAULT_PRESET
    tokenizer: str = "auto"
    val_file: str | Path | None = None
    encoding: str | None = None
    field: str | None = None
    split_documents: bool | None = None
    unknown: str = "error"
    init_from: str | Path | None = None

    @classmethod
    def of(cls, files: object, **arguments: Any) -> Request:
        """The request of some arguments of `train`; those that are None are not given."""
        given = {name: value for name, value in arguments.items() if value is not None}
        own = {each.name: given.pop(each.name) for each in fields(cls) if each.name in given}
        return cls(named(files), given, **own)

    @property
    def asked(self) -> dict[str, Any]:
        """What decides the model and its training, where it is not the default; as JSON."""
        names = ("preset", "tokenizer", "encoding", "field", "split_documents", "unknown")
        plain = Request([], {})
        found = {n: getattr(self, n) for n in (*names, "init_from")}
        found = {n: value for n, value in found.items() if value != getattr(plain, n)}
        asked: dict[str, Any] = json.loads(json.dumps({**found, **self.options}, default=str))
        return asked

    @property
    def run(self) -> RunFolder:
        """The run's folder: after the text if none is named."""
        if self.output is not None:
            require_path("output", self.output)
            return RunFolder.at(self.output)
        stores = stores_among(self.files)
        name = TokenStore.open(stores[0]).name if stores else name_of(self.files)
        return RunFolder.at(Path("runs") / name)


@dataclass(frozen=True)
class Prepared:
    """A new run whose model does not exist yet."""

    start: Start  # what the run begins with
    text: TrainingText  # to train on
    expected_tokens: float = 0.0  # with which the loss is estimated; 0 where it cannot be

    def to_send(self) -> tuple[Start, dict[str, Any], str]:
        """What the other processes need, without the arrays."""
        start = replace(self.start, initial=None, notes=[])
        return start, self.text.tokenizer.to_state(), self.text.source.sha256


def prepare(
    request: Request,
    *,
    group: ProcessGroup = SINGLE_PROCESS,
    device: str = "auto",
    began: float | None = None,
    listener: Listener | None = None,
    command: str = "",
) -> Prepared:
    """Prepare what the arguments of `train` ask for: text, tokens, shape and recipe.

    Nothing is written except a large text's store in the cache, about which `listener` is notified.
    Of several processes, process 0 prepares the run, and all read the text.

    Raises:
        InputError: for wrong input, or if the processes' texts differ.
        OutOfMemoryError: for a model that does not fit.
        PeerError: if another process failed.
    """
    began = time.monotonic() if began is None else began
    where = group.choose_device(device)
    if group.is_single:
        return _Preparation(request, group, where, began).done(listener, command)
    ready = group.run_on_main(
        lambda: _Preparation(request, group, where, began).done(listener, command)
    )
    prepared_s = time.monotonic()
    sent = group.broadcast(None if ready is None else ready.to_send())
    assert sent is not None
    found = group.each_machine_first(lambda: ready or _received(*sent, where))
    # The other processes took time to begin, too.
    config = found.start.config.with_reserve(time.monotonic() - prepared_s)
    run = replace(found.start.run, group=group)
    return replace(found, start=replace(found.start, run=run, config=group.broadcast(config)))


def _received(
    start: Start, tokenizer: dict[str, Any], sha256: str, device: torch.device
) -> Prepared:
    """What process 0 has prepared, with the text read here."""
    problem = (
        "is another text here than in process 0 (its SHA-256 differs): copy the same files to "
        "every machine, to the same place"
    )
    known = from_state(tokenizer)
    text = read_again(start.settings, start.config, known, sha256=sha256, problem=problem)
    return Prepared(replace(start, device=device), text)


class _Preparation:
    """A new run while it is prepared; arguments as for `prepare`.

    Attributes:
        options: the user's options of the model's shape and the recipe.
        config: the recipe as far as the user and the preset decide it.
        initial: the checkpoint that the run begins with, or None.
        notes: one line each for the user.
    """

    def __init__(
        self, request: Request, group: ProcessGroup, device: torch.device, began: float
    ) -> None:
        if not group.is_single and "-" in request.files:
            raise InputError(
                f"standard input cannot be read by {group.size} processes: name a file"
            )
        self.request, self.group, self.device = request, group, device
        self.options = dict(request.options)
        if self.options.get("batch_size") == "auto":
            del self.options["batch_size"]
        self.in_pieces = request.init_from is not None or len(self.options) < len(request.options)
        self.config = TrainConfig(**preset_options(request.preset, self.options)[1])
        check_policy(request.unknown, CORPUS_POLICIES)
        self.initial = None
        if request.init_from is not None:
            require_unchanged_model(request.preset, request.tokenizer, self.options)
            self.initial = read_initial(request.init_from)
        self.run = request.run
        self.run.check_free(overwrite=request.overwrite)  # before a long text is read
        if self.initial is not None:
            require_elsewhere(self.run, self.initial)
        self.known = None if self.initial is None else self.initial.checkpoint.tokenizer
        self.stores = stores_among(request.files)
        self.planner = Planner(request.preset, self.options, device, began, group.size)
        self.notes: list[str] = []

    def done(self, listener: Listener | None, command: str) -> Prepared:
        """The prepared run; arguments as for `prepare`."""
        settings = self._settings()
        source = self._read(settings, listener)
        text = TrainingText.encoded(source, self._tokenizer(source))
        self._note_unknown(text)
        known = None if self.initial is None else self.initial.checkpoint.config
        planned = self.planner.plan(
            text.train_tokens,
            len(text.val_tokens),
            text.tokenizer.vocab_size,
            known,
            text.val_tokens,
        )
        self.notes += fit_window(
            planned.shape if known is None else {},  # a model that exists keeps its window
            planned.training,
            len(text.train_tokens),
            asked="seq_len" in self.options,
        )
        if source.val_documents and len(text.val_tokens) < 2:
            self.notes.append(
                "the text is too short to keep a part of it for validation: none is kept"
            )
        shape, config = self._settled(planned, text.train_tokens, text.tokenizer.vocab_size)
        _check_state(shape, text.tokenizer, settings)
        self.notes += [] if planned.recipe is None else planned.recipe.lines()
        config, notes = self.planner.with_steps_in_time(shape, config)
        self.notes += [*notes, *_time_notes(planned, config, len(text.val_tokens))]
        start = Start(
            self.run, shape, config, self.device, settings,
            provenance_of(source, command, settings, self.group.size), self.notes,
            initial=self.initial, overwrite=self.request.overwrite, in_pieces=self.in_pieces,
        )  # fmt: skip
        estimated = planned.recipe is not None and self.initial is None
        return Prepared(start, text, planned.recipe.tokens if planned.recipe and estimated else 0.0)

    def _settings(self) -> dict[str, Any]:
        """What resuming needs to read the text again."""
        request = self.request
        if request.val_file is not None:
            require_path("val_file", request.val_file)
        if request.field == "":
            raise InputError("field is empty: name the field that contains the text, or omit it")
        tutorial = self.config.data_order == "tutorial"  # its text is a file's as it is
        split = request.split_documents
        settings = {
            "files": [resolved(name) for name in request.files],
            "val_file": None if request.val_file is None else resolved(str(request.val_file)),
            "encoding": request.encoding,
            "reading": READING_VERSION,
            "split_documents": not tutorial if split is None else split,
            "preset": request.preset,
            "from": None if self.initial is None else self.initial.settings,
            "threads": torch.get_num_threads(),
            "asked": request.asked,
        }
        if request.field is not None or not tutorial:
            settings["field"] = request.field or ""  # no name is what `RecordOptions` makes of it
        if request.unknown != "error":
            settings["unknown"] = request.unknown
        settings["seen"] = file_sizes(settings)
        if self.stores:
            _require_as_stored(self.stores[0], request, self.config.data_order, self.known)
        elif not tutorial:
            settings["stored_as"] = self._stored_as(settings)
        return settings

    def _stored_as(self, settings: Mapping[str, Any]) -> str | None:
        """The tokenizer's name if the text is so large that it is put into a store; else None."""
        tokenizer = self.request.tokenizer
        sources = large_sources(self.request.files, settings["encoding"], records_of(settings))
        if not sources:
            return None
        if self.known is not None:
            return OF_THE_MODEL
        if tokenizer == "auto":
            return self.planner.tokenizer(sum(source.num_bytes for source in sources))
        return os.path.realpath(tokenizer) if os.path.exists(tokenizer) else tokenizer

    def _read(self, settings: Mapping[str, Any], listener: Listener | None) -> Source:
        val_file = self.request.val_file
        as_named = {
            **settings,
            "files": self.request.files,
            "val_file": None if val_file is None else str(val_file),
        }
        if self.known is None:
            bytes_do = self.request.tokenizer in ("auto", "byte")
        else:
            bytes_do = self.known.kind == "byte"
        began = time.monotonic()
        source = read_source(
            as_named, self.config.val_fraction, allow_bytes=bytes_do, known=self.known,
            notify=listener,
        )  # fmt: skip
        if settings.get("stored_as") is not None:  # done once, so it is none of the minutes
            self.planner.began += time.monotonic() - began
        self.notes += source.notes
        return source

    def _tokenizer(self, source: Source) -> Tokenizer:
        """That of the initial model or of the store, the user's choice, or the default rule's."""
        name = self.request.tokenizer
        if source.store is not None:
            chosen = source.store.tokenizer
        else:
            if name == "auto":
                self.notes += undecoded(source, self.request.encoding)
            chosen = self.known or self._chosen(name, source)
        if self.known is None:
            from_a_file = not self.stores and os.path.exists(name)
            self.notes += end_notes(chosen) if from_a_file else []
        elif self.known.end_of_text is None and source.num_documents > 1:
            self.notes += end_notes(self.known)
        return chosen

    def _chosen(self, name: str, source: Source) -> Tokenizer:
        if name == "auto" and source.is_text:
            name = self.planner.tokenizer(sum(map(len, source.train_documents)))
        end_of_text = self.config.data_order != "tutorial"  # whose text has no such token
        return choose_tokenizer(name, source, end_of_text=end_of_text)

    def _note_unknown(self, text: TrainingText) -> None:
        """Note what the tokenizer does not know; for a store that was decided when it was made."""
        for name, part in text.unknown.items():
            decided = self.stores and (name == text.source.name or not text.source.val_documents)
            self.notes += part.notes(name, "keep" if decided else self.request.unknown)

    def _settled(
        self, planned: Planned, tokens: Tokens, vocab_size: int
    ) -> tuple[GPTConfig, TrainConfig]:
        """The model's shape and recipe; raises for those that are impossible or do not fit."""
        shape = GPTConfig(vocab_size, **planned.shape)
        whole = not self.group.shards_model(planned.training.get("shard", False))
        engine = suitable_engine(shape, self.device) if whole else "torch"
        config = TrainConfig(**{**planned.training, "engine": engine})
        check_format(config, self.device)
        if config.ngram_smoothing:
            check_smoothing(tokens, vocab_size, config.data_order)
        check_model_fits(shape, free_memory(self.device, self.group, config))
        if config.longest_window > shape.max_seq_len:
            if not config.stages:
                raise InputError(
                    f"seq_len={config.seq_len} is longer than the model's window: choose at most "
                    f"{shape.max_seq_len}"
                )
            raise InputError(
                f"stages={config.stages} have windows of {config.longest_window}: choose "
                f"max_seq_len={config.longest_window}, not {shape.max_seq_len}"
            )
        return shape, config


def _require_as_stored(
    store: str, request: Request, data_order: str, known: Tokenizer | None
) -> None:
    """Raise `InputError` for options that a store has already decided, or that it excludes."""
    asked = ["--tokenizer"] * (request.tokenizer != "auto")
    asked += ["--encoding"] * (request.encoding is not None)
    asked += ["--[no-]split-documents"] * (request.split_documents is not None)
    asked += ["--field"] * (request.field is not None)
    if asked:
        raise InputError(
            f"{store} is a token store, whose text is already read: remove {', '.join(asked)}"
        )
    if data_order == "tutorial":
        raise InputError(
            f"{store} is a token store, and the tutorial's order of data needs all tokens in "
            "memory: choose another preset, --preset nano say, or name the text itself"
        )
    if known is not None and known.to_state() != TokenStore.open(store).tokenizer.to_state():
        raise InputError(
            f"{store} was tokenized in another way than the model that --from names: tokenize "
            "the text with that model's tokenizer (mygpt tokenize FILES --tokenizer RUN --out ...)"
        )


def _check_state(shape: GPTConfig, tokenizer: Tokenizer, settings: dict[str, Any]) -> None:
    """Raise `InputError` if the run's state could not be read again, before training begins."""
    parts = {
        "config": shape.to_dict(),
        "tokenizer": tokenizer.to_state(),
        "settings": settings,
    }
    prefixes = ("model", *(f"optimizer/{what}" for what in ("step", "average", "square")))
    shapes = parameter_shapes(shape).items()
    check_storable(parts, {f"{p}/{name}": size for p in prefixes for name, size in shapes})


def _time_notes(planned: Planned, config: TrainConfig, val_tokens: int) -> list[str]:
    """Notes on the time for beginning, validating and ending."""
    notes = []
    asked_s = 60.0 * (config.minutes or 0.0)
    if planned.late_s > 0.05 * asked_s:
        needed_s = planned.late_s + config.reserve_s
        notes.append(
            f"beginning, validating and ending take about {needed_s:.0f} s, and --minutes leaves "
            f"{asked_s:.0f} s: the command ends late"
        )
    if config.val_tokens:
        notes.append(
            f"validated on the first {config.val_tokens:,} of the {val_tokens:,} validation "
            "tokens, so that it takes little of the time"
        )
    return notes


def provenance_of(
    source: Source, command: str, settings: Mapping[str, Any], processes: int = 1
) -> dict[str, Any]:
    """The origin of a model: versions, machine, command, text, and the initial model."""
    from mygpt import __version__

    origin = settings.get("from")
    began_from = {} if origin is None else {"from": origin}
    distributed = {} if processes == 1 else {"processes": processes}
    return {
        **began_from,
        **distributed,
        "mygpt": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": f"{sys.platform} {platform.machine()}",
        "command": command,
        "preset": settings["preset"],
        "corpus": {
            "name": source.name,
            "documents": source.num_documents,
            "bytes": source.num_bytes,
            "sha256": source.sha256,
            "split_documents": splits(settings),
            **({} if settings.get("field") is None else {"field": settings["field"]}),
        },
    }
