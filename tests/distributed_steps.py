"""The work of every process in training/test_distributed.py: steps in several groups, and runs.

A module of its own, so that the ranks do not import pytest. The steps are those of training: `fill`
distributes the model, each process takes its share of a batch, `make_gradients` computes and
`Optimizer` updates.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed.fsdp  # before the ranks are forked: each would import it

import mygpt
import mygpt.cpu.train.step  # likewise
from mygpt import training
from mygpt.cli import main
from mygpt.core.config import GPTConfig
from mygpt.core.data import ShuffledWindows
from mygpt.core.model import GPT
from mygpt.training import corpus
from mygpt.training.config import TrainConfig
from mygpt.training.distributed.process_group import ProcessGroup
from mygpt.training.distributed.sharding import fill, gathered
from mygpt.training.events import Note
from mygpt.training.gradients import make_gradients
from mygpt.training.initial_model import empty_model
from mygpt.training.optimizer import Optimizer
from ranks import join_group

LENGTH = 160  # steps of the runs that torchrun starts
WAYS = ("ddp", "fsdp", "compiled")
TIME, VOCAB = 12, 11
_MODERN: dict[str, Any] = {
    "norm": "rms",
    "position": "rotary",
    "mlp": "swiglu",
    "mlp_bias": False,
    "qk_norm": True,
    "max_seq_len": TIME,
}
WORDS = (1, 2, 3, 0), (4, 5, 0), (6, 7, 2, 8, 0), (9, 10, 0), (3, 6, 0)  # 0 separates them
_ORDER = np.random.default_rng(5).integers(len(WORDS), size=800)
TOKENS = np.array([token for word in _ORDER for token in WORDS[word]], np.uint16)
SHAPES = {
    "gpt2": GPTConfig(
        VOCAB, 32, 2, 2, max_seq_len=TIME, mlp="gelu_tanh", attention_bias=True, tied=True
    ),
    "grouped": GPTConfig(VOCAB, 32, 4, 2, num_kv_heads=2, head_dim=16, mlp_dim=48, **_MODERN),
    "small": GPTConfig(VOCAB, 32, 2, 1, **_MODERN),
    "untied": GPTConfig(VOCAB, 32, 2, 1, tied=False, **_MODERN),
}


@dataclass(frozen=True)
class Case:
    """One way to train one model.

    Attributes:
        shape: of `SHAPES`.
        way: "ddp", "fsdp" or "compiled".
        options: of `TrainConfig`.
    """

    shape: str
    way: str
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        options = " ".join(f"{name}={value}" for name, value in self.options.items())
        return f"{self.shape} {self.way} {options}".strip()

    @property
    def config(self) -> TrainConfig:
        engine = "compiled" if self.way == "compiled" else "torch"
        common = {"batch_size": 8, "seq_len": TIME, "lr": 1e-3, "steps": 100, "engine": engine}
        return TrainConfig(**{**common, "shard": self.way == "fsdp", **self.options})


UNEVEN = {"batch_size": 6}  # rows, for 4 processes
FIRST_STEPS = [
    *(Case("gpt2", way) for way in WAYS),
    *(Case(shape, way, UNEVEN) for shape in ("gpt2", "grouped", "untied") for way in WAYS),
    # The compiled step has neither; both are the same for every shape.
    *(Case("grouped", way, {**UNEVEN, "micro_batch": 1}) for way in WAYS[:2]),
    *(Case("grouped", way, {**UNEVEN, "checkpoint_activations": True}) for way in WAYS[:2]),
]
THREE_STEPS = [
    Case("grouped", "fsdp", {"batch_size": 6, "weight_decay": 0.3}),
    Case("untied", "fsdp"),
    Case("untied", "compiled", {"batch_size": 6}),
    Case("grouped", "fsdp", {"optimizer": "muon", "lr": 0.02, "weight_decay": 0.1}),
    Case("untied", "compiled", {"optimizer": "muon", "lr": 0.02, "weight_decay": 0.1}),
]
HUNDRED_STEPS = [Case("small", way, {"batch_size": 16}) for way in WAYS]


def random_model(shape: GPTConfig) -> GPT:
    """A model with random weights, also of norms and biases, so that each affects the loss."""
    torch.manual_seed(3)
    model = GPT.from_config(shape)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return model


class Learner:
    """A model with its gradients and optimizer, in one process of a group."""

    def __init__(self, case: Case, group: ProcessGroup) -> None:
        shape = SHAPES[case.shape]
        self.config, self.group = case.config, group
        self.model = empty_model(shape, self.config, torch.device("cpu"), group)
        fill(self.model, random_model(shape) if group.is_main else None, group)
        self.model.train()
        self.gradients = make_gradients(self.model, self.config, group)
        self.optimizer = Optimizer(self.model, self.config, self.gradients.step, group)
        self.windows = ShuffledWindows(TOKENS, TIME, 0)

    def gradients_of(self, number: int, max_norm: float = 0.0) -> tuple[float, torch.Tensor]:
        """Compute a batch's gradients and clip them; its loss and their norm."""
        share = (self.group.rank, self.group.size)
        batch = torch.from_numpy(self.windows.batch(number, self.config.batch_size, share))
        self.gradients.expect_rows(self.config.batch_size)
        loss = self.gradients(batch[:, :-1], batch[:, 1:])
        return float(loss), self.gradients.clip(max_norm)

    def step(self, number: int) -> float:
        """Update the weights; the batch's loss before."""
        loss, _ = self.gradients_of(number, self.config.grad_clip)
        self.optimizer.step(self.config.lr)
        return loss

    def weights(self) -> dict[str, np.ndarray]:
        """All weights, gathered, by name."""
        return {n: gathered(p.detach()).numpy().copy() for n, p in self.model.named_parameters()}

    def gathered_gradients(self) -> dict[str, np.ndarray]:
        """All gradients, gathered, by name."""
        named = {n: p.grad for n, p in self.model.named_parameters()}
        return {n: gathered(g).numpy().copy() for n, g in named.items() if g is not None}


def take_steps() -> dict[str, Any]:
    """The work of every process of the three groups; tests check the result."""
    group = ProcessGroup(*join_group())
    return {
        "group": group,
        "first step": {str(case): first_step(case, group) for case in FIRST_STEPS},
        "weights": {str(case): weights_after(3, case, group) for case in THREE_STEPS},
        "losses": {str(case): losses_of(100, case, group) for case in HUNDRED_STEPS},
    }


def first_step(case: Case, group: ProcessGroup) -> dict[str, Any]:
    learner = Learner(case, group)
    with learner.gradients:
        loss, norm = learner.gradients_of(0)
        return {"loss": loss, "norm": float(norm), "gradients": learner.gathered_gradients()}


def weights_after(steps: int, case: Case, group: ProcessGroup) -> dict[str, np.ndarray]:
    learner = Learner(case, group)
    with learner.gradients:
        for number in range(steps):
            learner.step(number)
    return learner.weights()


def losses_of(steps: int, case: Case, group: ProcessGroup) -> list[float]:
    learner = Learner(case, group)
    with learner.gradients:
        return [learner.step(number) for number in range(steps)]


def begin_and_fail(folder: Path, text: Path) -> dict[str, Any]:
    """2 processes train a run, try what must be refused, and train a sharded model."""
    refused = {"nothing": train(text, output=folder / "undisturbed", **LIKE_TORCHRUN)[0]}
    for name, arguments in {
        "there already": [str(text), "-o", str(folder / "undisturbed")],
        "tutorial": [str(text), "--preset", "tutorial"],
        "too few": [str(text), "--preset", "nano", "--batch-size", "1"],
        "stdin": ["-"],
        "what cannot change": ["--resume", str(folder / "undisturbed"), "--lr", "1"],
    }.items():
        os.dup2(os.open(text, os.O_RDONLY), 0)
        if "--resume" not in arguments:
            arguments += ["--steps", "3"]
            arguments += ["-o", str(folder / "refused")] * ("-o" not in arguments)
        refused[name] = output_of("train", *arguments)
    return {
        "refused": refused,
        "another text": another_text(folder / "refused", text),
        "automatic": automatic(folder / "automatic" / "run", text),
        "sharded": train(text, output=folder / "sharded", **SHARDED)[0],
        "worse": train(text, output=folder / "worse", **WORSE)[0],
        "apart": apart(folder / "apart" / os.environ["RANK"], text),
    }


def output_of(*arguments: str) -> tuple[object, str, str]:
    """The command's exit code, stdout and stderr."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err), suppress_exit() as codes:
        main(list(arguments))
    return codes[0], out.getvalue(), err.getvalue()


@contextmanager
def suppress_exit() -> Iterator[list[object]]:
    codes: list[object] = []
    try:
        yield codes
    except SystemExit as end:
        codes.append(end.code)


TINY: dict[str, Any] = {
    "preset": "nano", "embed_dim": 16, "num_heads": 2, "num_layers": 2, "max_seq_len": 16,
    "batch_size": 6, "print_every": 1, "eval_every": 10,
    "sample_tokens": 0, "steps": 20, "lr": 1e-3,
}  # fmt: skip
LIKE_TORCHRUN = {
    **TINY, "num_heads": 1, "num_layers": 1, "steps": LENGTH, "save_every": 20, "eval_every": 50,
}  # fmt: skip
SHARDED = {**TINY, "schedule": "constant", "shard": True, "save_every": 5}
WORSE = {
    **SHARDED, "lr": 9.0, "grad_clip": 0.0, "eval_every": 2, "sample_tokens": 8, "steps": 10,
}  # fmt: skip


def train(*arguments: Any, **options: Any) -> tuple[str | None, list[str]]:
    """The error that `mygpt.train` raised, as text, and its notes."""
    return outcome(mygpt.train, *arguments, **options)


def resume(*arguments: Any, **options: Any) -> tuple[str | None, list[str]]:
    return outcome(training.resume, *arguments, **options)


def outcome(action: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    notes: list[str] = []

    def listener(event: object) -> None:
        if isinstance(event, Note):
            notes.append(str(event))

    try:
        action(*arguments, listener=listener, **options)
    except Exception as error:
        return f"{type(error).__name__}: {error}", notes
    return None, notes


def another_text(output: Path, text: Path) -> str | None:
    """The second process reads another text than the first one."""
    read = corpus.read_source
    if os.environ["RANK"] == "1":
        other = text.with_name("other.txt")
        corpus.read_source = lambda settings, *a, **k: read(
            {**settings, "files": [str(other)]}, *a, **k
        )
    try:
        return train(text, output=output, **TINY)[0]
    finally:
        corpus.read_source = read


def apart(here: Path, text: Path) -> str | None:
    """The processes share no disk: each has another run folder."""
    before = Path.cwd()
    here.mkdir(parents=True)
    os.chdir(here)
    try:
        return train(text, output="run", **SHARDED)[0]
    finally:
        os.chdir(before)


def automatic(output: Path, text: Path) -> dict[str, Any]:
    """A run with `resume="auto"`: started, started again, and with other options."""
    options = {**TINY, "output": output, "resume": "auto"}
    found = {name: train(text, **options) for name in ("begun", "again")}
    found["other options"] = train(text, **{**options, "lr": 0.5})
    apart = output.parent / os.environ["RANK"]  # as if each were on another machine
    apart.mkdir()
    if os.environ["RANK"] == "1":
        (apart / "auto").symlink_to(output)
    before = Path.cwd()
    os.chdir(apart)
    try:
        found["elsewhere"] = train(text, **{**options, "output": "auto"})
    finally:
        os.chdir(before)
    return found


def end_runs(folder: Path) -> list[Any]:
    """2 processes resume runs of 1 or 2 processes."""
    return [
        resume(folder / "sharded", steps=28),
        resume(folder / "begun", steps=LENGTH + 40),
        resume(folder / "killed"),
    ]
