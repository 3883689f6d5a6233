"""What every process does in training/test_distributed.py: steps in a few groups at once, and runs.

Here and not there, so that the ranks import it without pytest. The steps go the way that
training goes: the model is shared out by `fill`, the batch by its share, gradients by
`make_gradients`, updates by `Optimizer`.
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
import mygpt.training.compiled.step  # likewise
from mygpt import training
from mygpt.cli import main
from mygpt.core.config import GPTConfig
from mygpt.core.data import ShuffledWindows
from mygpt.core.model import GPT
from mygpt.training import shared_start
from mygpt.training.config import TrainConfig
from mygpt.training.events import Note
from mygpt.training.gradients import make_gradients
from mygpt.training.initial_model import empty_model
from mygpt.training.optimizer import Optimizer
from mygpt.training.process_group import ProcessGroup
from mygpt.training.sharding import fill, gathered

COUNTS = (1, 2, 4)
LENGTH = 160  # steps of the runs that torchrun begins
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
WORDS = (1, 2, 3, 0), (4, 5, 0), (6, 7, 2, 8, 0), (9, 10, 0), (3, 6, 0)  # 0 parts them
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
        told = " ".join(f"{name}={value}" for name, value in self.options.items())
        return f"{self.shape} {self.way} {told}".strip()

    @property
    def config(self) -> TrainConfig:
        engine = "compiled" if self.way == "compiled" else "torch"
        common = {"batch_size": 8, "seq_len": TIME, "lr": 1e-3, "steps": 100, "engine": engine}
        return TrainConfig(**{**common, "shard": self.way == "fsdp", **self.options})


UNEVEN = {"batch_size": 6}  # among 4
FIRST_STEPS = [
    *(Case("gpt2", way) for way in WAYS),
    *(Case(shape, way, UNEVEN) for shape in ("gpt2", "grouped", "untied") for way in WAYS),
    # The kernels have neither; they are the same for every shape.
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


def drawn(shape: GPTConfig) -> GPT:
    """A model whose every number, norms' and biases' too, is its own and counts."""
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
        fill(self.model, drawn(shape) if group.is_main else None, group)
        self.model.train()
        self.gradients = make_gradients(self.model, self.config, group)
        compiled = getattr(self.gradients, "step", None)
        self.optimizer = Optimizer(self.model, self.config, compiled, group)
        self.windows = ShuffledWindows(TOKENS, TIME, 0)

    def learn(self, number: int, max_norm: float = 0.0) -> tuple[float, torch.Tensor]:
        """Gradients of a batch, clipped; its loss and their norm."""
        share = (self.group.rank, self.group.size)
        batch = torch.from_numpy(self.windows.batch(number, self.config.batch_size, share))
        self.gradients.expect_rows(self.config.batch_size)
        loss = self.gradients(batch[:, :-1], batch[:, 1:])
        return float(loss), self.gradients.clip(max_norm)

    def step(self, number: int) -> float:
        """A batch's loss; the weights are updated."""
        loss, _ = self.learn(number, self.config.grad_clip)
        self.optimizer.step(self.config.lr)
        return loss

    def weights(self) -> dict[str, np.ndarray]:
        """All of them, put together, by name."""
        return {n: gathered(p.detach()).numpy().copy() for n, p in self.model.named_parameters()}

    def whole_gradients(self) -> dict[str, np.ndarray]:
        """Likewise, of the gradients."""
        named = {n: p.grad for n, p in self.model.named_parameters()}
        return {n: gathered(g).numpy().copy() for n, g in named.items() if g is not None}


def join_group() -> ProcessGroup:
    """Worlds of 1, 2 and 4 at once: a process's own one, and its number there."""
    distributed, rank = torch.distributed, int(os.environ["RANK"])
    count = next(count for count in COUNTS if rank < 2 * count - 1)
    address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = distributed.PrefixStore(f"{count}", distributed.TCPStore(*address, is_master=False))
    group = ProcessGroup(rank - (count - 1), count)
    distributed.init_process_group("gloo", store=store, rank=group.rank, world_size=count)
    return group


def live() -> dict[str, Any]:
    """What every process of the three groups does; tests look at what it returns."""
    group = join_group()
    return {
        "group": group,
        "first step": {str(case): first_step(case, group) for case in FIRST_STEPS},
        "weights": {str(case): weights_after(3, case, group) for case in THREE_STEPS},
        "losses": {str(case): losses_of(100, case, group) for case in HUNDRED_STEPS},
    }


def first_step(case: Case, group: ProcessGroup) -> dict[str, Any]:
    learner = Learner(case, group)
    with learner.gradients:
        loss, norm = learner.learn(0)
        return {"loss": loss, "norm": float(norm), "gradients": learner.whole_gradients()}


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


def silent(event: object) -> None:
    """A listener for those who look at the files."""


def begin_and_fail(folder: Path, text: Path) -> dict[str, Any]:
    """2 processes make a run, are refused what is wrong one after the other, and share a model."""
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
        refused[name] = said_by("train", *arguments)
    return {
        "refused": refused,
        "another text": another_text(folder / "refused", text),
        "jobs": jobs(folder / "of-a-job", text),
        "sharded": train(text, output=folder / "sharded", **SHARDED)[0],
        "worse": train(text, output=folder / "worse", **WORSE)[0],
        "apart": apart(folder / "apart" / os.environ["RANK"], text),
    }


def said_by(*arguments: str) -> tuple[object, str, str]:
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
    """What `mygpt.train` raised, as words, and the notes that were heard."""
    return heard(mygpt.train, *arguments, **options)


def go_on(*arguments: Any, **options: Any) -> tuple[str | None, list[str]]:
    return heard(training.resume, *arguments, **options)


def heard(action: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
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
    """The second process reads something else in the first one's place."""
    read = shared_start.read_source
    if os.environ["RANK"] == "1":
        other = text.with_name("other.txt")
        shared_start.read_source = lambda settings, *a, **k: read(
            {**settings, "files": [str(other)]}, *a, **k
        )
    try:
        return train(text, output=output, **TINY)[0]
    finally:
        shared_start.read_source = read


def apart(here: Path, text: Path) -> str | None:
    """Each process has a disk of its own: the run's folder is another for each."""
    before = Path.cwd()
    here.mkdir(parents=True)
    os.chdir(here)
    try:
        return train(text, output="run", **SHARDED)[0]
    finally:
        os.chdir(before)


def jobs(output: Path, text: Path) -> dict[str, Any]:
    """A run under torchrun's name for the job: begun, begun again by it, and by another."""
    found = {}
    for name, job in (("begun", "one"), ("again", "one"), ("another", "two")):
        os.environ["TORCHELASTIC_RUN_ID"] = job
        found[name] = train(text, output=output, **TINY)
    os.environ["TORCHELASTIC_RUN_ID"] = "one"
    found["another command"] = train(text, output=output, command="another", **TINY)
    os.environ["LOCAL_RANK"] = "0"  # as if each were on a machine of its own
    here = output if os.environ["RANK"] == "1" else output.with_name("nowhere")
    found["elsewhere"] = train(text, output=here, **TINY)
    os.environ["LOCAL_RANK"] = os.environ["RANK"]
    del os.environ["TORCHELASTIC_RUN_ID"]
    return found


def end_runs(folder: Path) -> list[Any]:
    """2 processes go on with what 1 or 2 have left."""
    return [
        go_on(folder / "sharded", steps=28),
        go_on(folder / "begun", steps=LENGTH + 40),
        go_on(folder / "killed"),
    ]
