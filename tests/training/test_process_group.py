"""The process group of a training: ranks, collective operations, errors; and devices."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import mygpt
from mygpt.core.config import GPTConfig
from mygpt.core.model import GPT
from mygpt.errors import InputError, StorageError
from mygpt.training import hardware
from mygpt.training.config import TrainConfig
from mygpt.training.distributed.process_group import (
    SINGLE_PROCESS,
    ProcessGroup,
    from_environment,
    joined,
    restart_advice,
)
from mygpt.training.distributed.sharding import gathered, like, local, own_rows, put_rows
from mygpt.training.gradients import ParallelGradients, shared_losses
from mygpt.training.hardware import compute_dtype, described, products_in
from ranks import run_ranks
from training_runs import fit, refusal

CPU = torch.device("cpu")
PLACE = {"RANK": "2", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Sets the environment of a process that torchrun has started, with changes."""

    def start(**changes: str | None) -> None:
        for name, text in {**PLACE, **changes}.items():
            if text is None:
                monkeypatch.delenv(name, raising=False)
            else:
                monkeypatch.setenv(name, text)

    return start


def test_ranks_are_read_from_torchruns_environment(started: Callable[..., None]) -> None:
    started()
    assert from_environment() == ProcessGroup(2, 4, 1, 2)
    started(LOCAL_RANK=None, LOCAL_WORLD_SIZE=None)
    assert from_environment() == ProcessGroup(2, 4, 0, 1)
    started(WORLD_SIZE=None)
    assert from_environment() is SINGLE_PROCESS
    assert SINGLE_PROCESS.is_single
    assert SINGLE_PROCESS.is_main


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"RANK": "-1"}, "RANK='-1' in the environment is not a number"),
        ({"RANK": "two"}, "RANK='two' in the environment is not a number"),
        ({"WORLD_SIZE": "²"}, "WORLD_SIZE='²' in the environment is not a number"),
        ({"LOCAL_RANK": ""}, "LOCAL_RANK='' in the environment is not a number"),
        ({"RANK": "4"}, "RANK=4 in the environment is not below WORLD_SIZE=4"),
        ({"WORLD_SIZE": "0"}, "RANK=2 in the environment is not below WORLD_SIZE=0"),
    ],
)
def test_impossible_environment_variables_are_refused(started, changes, said) -> None:
    started(**changes)
    assert refusal(from_environment) == f"{said}: use torchrun"


@pytest.mark.parametrize(
    ("restarts", "resumes", "said"),
    [
        ("0", False, ""),
        ("3", False, "resumes this run only with --resume auto"),
        ("3", True, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 on every machine"),
    ],
)
def test_a_run_that_torchrun_may_restart_gets_a_note(started, restarts, resumes, said) -> None:
    started(
        TORCHELASTIC_MAX_RESTARTS=restarts,
        GROUP_WORLD_SIZE="2",
        TORCHELASTIC_USE_AGENT_STORE="True",
    )
    lines = restart_advice(resumes=resumes)
    assert len(lines) == bool(said)
    assert said in " ".join(lines)


def test_operations_of_a_single_process_return_its_values() -> None:
    with joined() as group:
        assert group is SINGLE_PROCESS
    assert SINGLE_PROCESS.broadcast([1]) == [1]
    assert SINGLE_PROCESS.gather("a") == ["a"]
    assert SINGLE_PROCESS.run_on_all(lambda: 3) == SINGLE_PROCESS.run_on_main(lambda: 3) == 3
    assert SINGLE_PROCESS.main_clock(2.5) == 2.5
    assert (SINGLE_PROCESS.any_signal(None), SINGLE_PROCESS.any_signal(15)) == (None, 15)
    part = torch.tensor(0.5)
    assert SINGLE_PROCESS.sum_loss(part) is part
    with pytest.raises(StorageError, match="full"):
        SINGLE_PROCESS.run_on_all(lambda: fail(StorageError("full")))


def fail(error: Exception) -> int:
    raise error


def caught(action: Callable[[], Any]) -> tuple[str, str, int]:
    """What was raised: its type, words and exit code."""
    try:
        action()
    except Exception as error:
        return type(error).__name__, str(error), getattr(error, "exit_code", 1)
    return "", "", 0


def agree() -> dict[str, Any]:
    """What each of 3 processes does; the last one leaves before the end."""
    group = from_environment()
    rank = group.rank

    def fail_in(*ranks: int, error: Exception | None = None) -> tuple[str, str, int]:
        def action() -> int:
            return fail(error or StorageError(f"full in {rank}")) if rank in ranks else rank

        return caught(lambda: group.run_on_all(action))

    arrays = {"a/b": np.arange(6.0).reshape(2, 3), "none": np.empty((0, 4), np.int16)}
    arrays["scalar"] = np.array(7, np.uint8)
    tensor = torch.full((2,), float(rank))
    group.all_reduce(tensor)
    bytes_ = np.full((2, 2), rank + 1, np.float64)
    group.broadcast_bytes(bytes_)
    found = {
        "share": group.broadcast({"from": rank}),
        "gather": group.gather(rank * 10),
        "exchange": group.all_gather(rank + 0.1).tolist(),
        "sum of a loss": group.sum_loss(torch.tensor(0.1 * (rank + 1))),
        "add": tensor.tolist(),
        "bytes": bytes_.tolist(),
        "arrays": group.broadcast_arrays(arrays if group.is_main else None),
        "clock": group.main_clock(100.0 + rank),
        "no signal": group.any_signal(None),
        "signal": group.any_signal(int(signal.SIGTERM) if rank == 2 else None),
        "together": group.run_on_all(lambda: rank),
        "main alone": group.run_on_main(lambda: rank),
        "one fails": fail_in(1),
        "two fail": fail_in(1, 2),
        "a bug": fail_in(1, error=ZeroDivisionError("by zero")),
        "main fails": caught(lambda: group.run_on_main(lambda: fail(InputError("no")))),
        "still together": group.gather(rank),
        "messages": errors_of_joined(group),
        "scores": scores(group),
        "rows": rows(group),
    }
    if rank == 2:  # without a word
        torch.distributed.destroy_process_group()
        return found
    found["left"] = caught(lambda: (group.gather(rank), group.gather(rank)))
    torch.distributed.destroy_process_group()
    return found


def errors_of_joined(group: ProcessGroup) -> Any:
    """The error raised in a training, and the one reported to torchrun."""
    path = Path(os.environ["MYGPT_MESSAGES"]) / f"{group.rank}"
    os.environ["TORCHELASTIC_ERROR_FILE"] = str(path)

    def train() -> None:
        with joined() as here:
            here.run_on_all(lambda: fail(InputError("wrong")) if here.rank == 1 else None)

    return (*caught(train), path.exists() and path.read_text())


def scores(group: ProcessGroup) -> list[list[float]]:
    """Losses whose rows are shared: of more rows than processes, and of fewer."""
    seen: list[int] = []

    def score(inputs: Any, targets: Any) -> Any:
        seen.append(len(inputs))
        return inputs + 0.5 * targets

    found = []
    for count in (1, 2, 3, 7):
        ids = np.arange(count)[:, None]
        found.append(shared_losses(group, score, ids, ids).ravel().tolist())
    assert min(seen) > 0, "all ranks must take part in gathering weights"
    return found


def rows(group: ProcessGroup) -> dict[str, Any]:
    """Seven rows among 3 processes, and fewer than there are processes."""
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = torch.distributed.init_device_mesh("cpu", (group.size,))
    found = {}
    for count in (7, 4, 2):
        values = torch.arange(2.0 * count).reshape(count, 2)
        tensor = distribute_tensor(values, mesh, [Shard(0)])
        here = local(tensor)
        assert torch.equal(here, own_rows(tensor, values, group))
        other = like(tensor, (count, 3))
        assert len(local(other)) == len(here)
        put_rows(other, np.arange(3.0 * count, dtype=np.float32).reshape(count, 3), group)
        assert torch.equal(gathered(other), torch.arange(3.0 * count).reshape(count, 3))
        found[str(count)] = len(here)
    return found


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_ranks(3, agree, MYGPT_MESSAGES=str(tmp_path_factory.mktemp("messages")))


Three = list[dict[str, Any]]


@pytest.mark.processes
@pytest.mark.parametrize(
    ("what", "wanted"),
    [
        ("share", {"from": 0}),
        ("gather", [0, 10, 20]),
        ("exchange", [0.1, 1.1, 2.1]),
        ("add", [3.0, 3.0]),
        ("bytes", [[1.0, 1.0], [1.0, 1.0]]),
        ("clock", 100.0),
        ("no signal", None),
        ("signal", signal.SIGTERM),
        ("still together", [0, 1, 2]),
        ("scores", [[1.5 * n for n in range(count)] for count in (1, 2, 3, 7)]),
    ],
)
def test_all_ranks_receive_the_same_values(three: Three, what: str, wanted: Any) -> None:
    """Process 0's value, clock and bytes; the numbers of all; a signal of any."""
    assert [found[what] for found in three] == [wanted] * 3


@pytest.mark.processes
def test_losses_and_arrays_are_broadcast_unchanged(three: Three) -> None:
    losses = [found["sum of a loss"] for found in three]
    assert all(loss.dtype == torch.float32 and torch.equal(loss, losses[0]) for loss in losses)
    assert float(losses[0]) == pytest.approx(0.6)
    for found in three:
        arrays = found["arrays"]
        assert list(arrays) == ["a/b", "none", "scalar"]
        assert arrays["a/b"].tolist() == [[0, 1, 2], [3, 4, 5]]
        assert (arrays["none"].shape, arrays["none"].dtype) == ((0, 4), np.int16)
        assert (arrays["scalar"].shape, arrays["scalar"].dtype) == ((), np.uint8)
        assert arrays["scalar"] == 7


@pytest.mark.processes
def test_run_on_all_succeeds_or_fails_on_all_ranks(three: Three) -> None:
    """The first rank that failed prints the error; the others end with the same code, silently.

    So does a rank that lost the others: the rank that ended has printed the reason.
    """
    assert [found["together"] for found in three] == [0, 1, 2]
    assert [found["main alone"] for found in three] == [0, None, None]
    for what, error, rank in (
        ("one fails", ("StorageError", "full in 1", 3), 1),
        ("two fail", ("StorageError", "full in 1", 3), 1),
        ("a bug", ("ZeroDivisionError", "by zero", 1), 1),
        ("main fails", ("InputError", "no", 2), 0),
    ):
        wanted = [("PeerError", "", error[2])] * 3
        wanted[rank] = error
        assert [found[what] for found in three] == wanted, what
    assert [found["left"] for found in three[:2]] == [("PeerError", "", 1)] * 2


@pytest.mark.processes
def test_an_error_names_its_rank_and_is_reported_to_torchrun(three: Three) -> None:
    main, who, other = (found["messages"] for found in three)
    assert main == other == ("PeerError", "", 2, False)
    assert who[0] == "InputError"
    assert who[1].startswith("process 1 of 3 on ")
    assert who[1].endswith(": wrong")
    assert "InputError: wrong" in who[3]


@pytest.mark.processes
def test_rows_are_distributed_as_by_torch(three: Three) -> None:
    """Also where the last processes get none."""
    parts = [found["rows"] for found in three]
    assert [part["7"] for part in parts] == [3, 3, 1]
    assert [part["4"] for part in parts] == [2, 2, 0]
    assert [part["2"] for part in parts] == [1, 1, 0]


# What a device computes in.

SHAPE = GPTConfig(11, 12, 2, 2, max_seq_len=8)  # which the kernels do not take


def config_of(**options: Any) -> TrainConfig:
    return TrainConfig(**{"batch_size": 4, "seq_len": 8, "lr": 1e-3, "steps": 3, **options})


def model_and_batch() -> tuple[GPT, torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    ids = torch.randint(0, 11, (4, 9))
    return GPT.from_config(SHAPE), ids[:, :-1], ids[:, 1:]


def gradients_of(model: GPT, batch: Any, **options: Any) -> dict[str, torch.Tensor]:
    with ParallelGradients(model, 1, config=config_of(**options)) as gradients:
        gradients(*batch)
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def test_what_a_device_computes_in() -> None:
    for name, dtype in (("auto", "float32"), ("float32", "float32"), ("bfloat16", "bfloat16")):
        assert compute_dtype(name, CPU) == getattr(torch, dtype)
    assert compute_dtype("tf32", torch.device("cuda")) == torch.float32
    said = refusal(compute_dtype, "tf32", CPU)
    assert "dtype=tf32 is for CUDA devices, not cpu: use float32" in said


@pytest.mark.parametrize(
    ("options", "group", "said"),
    [
        ({}, SINGLE_PROCESS, "float32, no torch.compile"),
        ({"dtype": "bfloat16"}, SINGLE_PROCESS, "bfloat16 by autocast, no torch.compile"),
        ({"compile": True}, SINGLE_PROCESS, "float32, torch.compile"),
        (
            {"checkpoint_activations": True},
            ProcessGroup(0, 2),
            "float32, no torch.compile, activations recomputed, 2 processes (DDP, gloo)",
        ),
        (
            {"dtype": "bfloat16", "shard": True},
            ProcessGroup(0, 4),
            "bfloat16, no torch.compile, 4 processes (FSDP, gloo)",
        ),
        ({"engine": "compiled"}, ProcessGroup(0, 2),
         "float32, mygpt's kernels for CPUs, 2 processes (DDP, gloo)"),
    ],
)  # fmt: skip
def test_every_choice_of_a_device_is_reported(options, group, said) -> None:
    config = config_of(**options)
    found = described(config, CPU, group, uses_torch_compile=config.compile)
    assert found == f"cpu (1 thread), {said}"


def test_bfloat16_learns_what_float32_does(tmp_path: Path) -> None:
    """Products in bfloat16, weights in float32: within 2% after 60 steps, and not the same."""
    text = tmp_path / "fox.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 40)
    losses: dict[str, list[float]] = {}
    for name in ("float32", "bfloat16"):
        options = {"embed_dim": 20, "batch_size": 8, "steps": 60, "eval_every": 60, "dtype": name}
        events = fit(str(text), tmp_path / name, **options)
        losses[name] = [e.loss for e in events if isinstance(e, mygpt.training.events.StepDone)]
        assert any(name in e.device for e in events if hasattr(e, "device"))
    assert losses["bfloat16"][-1] < 0.8 * losses["bfloat16"][0]
    assert losses["bfloat16"][-1] == pytest.approx(losses["float32"][-1], rel=0.02)
    assert losses["bfloat16"] != losses["float32"]
    known = mygpt.load(tmp_path / "bfloat16")
    assert {p.dtype for p in known.model.parameters()} == {torch.float32}


def test_training_continues_without_torch_compile_if_it_fails(monkeypatch) -> None:
    """One note with the first line of torch's error, and the same gradients. The trial, also one
    that succeeds, leaves no gradients."""
    monkeypatch.setattr(torch, "compile", lambda model: model)
    model = model_and_batch()[0]
    assert hardware.compile_with_torch(model, (4, 8)) == (model, None)
    assert all(p.grad is None for p in model.parameters())

    def refuse(model: GPT) -> Any:
        raise RuntimeError("no C++ compiler\nand many lines more")

    monkeypatch.setattr(torch, "compile", refuse)
    model, *batch = model_and_batch()
    found = ParallelGradients(model, 1, config=config_of(compile=True))
    assert found.note == "torch.compile failed (no C++ compiler): training without it"
    assert all(p.grad is None for p in model.parameters())
    plain = gradients_of(model_and_batch()[0], batch)
    for name, gradient in gradients_of(model, batch, compile=True).items():
        assert torch.equal(gradient, plain[name]), name


def test_the_precision_of_products_is_restored() -> None:
    """Also after an error: the calling program may have chosen another."""
    torch.set_float32_matmul_precision("medium")
    try:
        with products_in("tf32"):
            assert torch.get_float32_matmul_precision() == "high"
        with products_in("auto"):
            assert torch.get_float32_matmul_precision() == "highest"
        with pytest.raises(ZeroDivisionError), products_in("auto"):
            fail(ZeroDivisionError())
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_recomputing_blocks_changes_no_name_and_no_value() -> None:
    model, *batch = model_and_batch()
    reference = model_and_batch()[0]
    runs: list[int] = []
    model.blocks[0].attention_norm.register_forward_hook(lambda *_: runs.append(1))
    wanted = gradients_of(reference, batch)
    found = gradients_of(model, batch, checkpoint_activations=True)
    assert len(runs) == 2, "once in the forward pass, once in the backward pass"
    assert list(model.state_dict()) == list(reference.state_dict())
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), reference.parameters(), strict=True)
    )
    assert found.keys() == wanted.keys()
    for name, gradient in found.items():
        assert torch.equal(gradient, wanted[name]), name


def meet_twice() -> list[list[int]]:
    """One process still connects for the first time when the other does for the second."""
    found = []
    for number in range(2):
        with joined("cpu") as group:
            found.append(group.gather(number))
            if group.is_main and not number:
                time.sleep(1)
    return found


@pytest.mark.processes
def test_a_program_may_train_twice() -> None:
    """The second connection used the first one's port, which was still open."""
    assert run_ranks(2, meet_twice, group=False) == [[[0, 0], [1, 1]]] * 2
