"""The memory of training is estimated in advance: it suffices, and what does not fit is refused."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch

from mygpt import GPT, GPTConfig
from mygpt.errors import OutOfMemoryError
from mygpt.machine import bytes_text
from mygpt.scaling.estimates import activations
from mygpt.training import memory
from mygpt.training.config import TrainConfig
from mygpt.training.memory import (
    check_batch_fits,
    check_model_fits,
    fitting_piece,
    model_bytes,
    needed_bytes,
    out_of_memory,
)
from shapes import CONFIGS, MODERN, TUTORIAL

GIB = 2**30
WIDE = replace(MODERN, max_seq_len=300)


def recipe(batch_size: int, seq_len: int, **options: Any) -> TrainConfig:
    return TrainConfig(batch_size=batch_size, seq_len=seq_len, lr=1e-3, steps=3, **options)


def kept_bytes(model: GPT, seq_len: int) -> int:
    """The reference: run one complete row and sum the storages that the graph keeps, each once."""
    held: list[torch.UntypedStorage] = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        held.append(tensor.untyped_storage())
        return tensor

    ids = torch.randint(0, model.config.vocab_size, (1, seq_len))
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        _, loss = model.train()(ids, ids)
    own = {
        tensor.untyped_storage().data_ptr() for tensor in model.state_dict(keep_vars=True).values()
    }
    own |= {tensor.untyped_storage().data_ptr() for tensor in model.buffers()}
    sizes = {storage.data_ptr(): storage.nbytes() for storage in held}
    assert loss is not None
    loss.backward()
    return sum(size for place, size in sizes.items() if place not in own)


@pytest.mark.parametrize("dropout", [0.0, 0.25])
@pytest.mark.parametrize("name", [*CONFIGS, "grouped"])
@pytest.mark.parametrize("seq_len", [1, 64, 203])
def test_the_estimate_for_a_row_is_what_the_graph_keeps(name, dropout, seq_len) -> None:
    """To the byte (the loss has four), with dropout attention's scores included."""
    shape = CONFIGS.get(name, replace(TUTORIAL, num_heads=4, num_kv_heads=2))
    model = GPT.from_config(replace(shape, max_seq_len=300, dropout=dropout))
    token = activations(model.config, scores=seq_len)
    assert seq_len * (token.blocks + token.head) + 4 == kept_bytes(model, seq_len)


@pytest.mark.parametrize(
    ("shape", "remedy"),
    [
        ({"embed_dim": 10**8, "num_heads": 1, "num_layers": 10**6}, "--embed-dim or --num-layers"),
        # A million blocks of 30 parameters each: most of the memory is Python's objects.
        ({"embed_dim": 1, "num_heads": 1, "num_layers": 10**6}, "--embed-dim or --num-layers"),
        ({"embed_dim": 32, "num_heads": 1, "num_layers": 1, "max_seq_len": 2**31}, "--max-seq-len"),
        ({"embed_dim": 2**31, "num_heads": 2**31, "num_layers": 2**31}, "--embed-dim"),
    ],
)
def test_huge_shapes_are_refused_at_once(shape: dict[str, Any], remedy: str) -> None:
    config = GPTConfig(vocab_size=256, **shape)
    began = time.perf_counter()
    with pytest.raises(OutOfMemoryError, match=remedy) as refused:
        check_model_fits(config, 64 * GIB)
    assert time.perf_counter() - began < 0.1
    assert refused.value.exit_code == 4
    assert f"{config.num_parameters():,} parameters" in str(refused.value)
    assert "68.7 GB are free" in str(refused.value)
    assert "\n" not in str(refused.value)
    check_model_fits(config, None)  # if the free memory is unknown, nothing is refused


def test_what_fits_is_not_refused() -> None:
    """Rotary tables grow with the windows read, so an imported model trains on short windows."""
    check_model_fits(GPTConfig(256, 32, 1, 1, max_seq_len=2**31, position="rotary"), 64 * GIB)
    config = GPTConfig(256, 768, 12, 12, 1024)
    need = model_bytes(config)
    assert 16 * config.num_parameters() < need < 20 * config.num_parameters()
    check_model_fits(config, math.ceil(need / 0.89))
    with pytest.raises(OutOfMemoryError):
        check_model_fits(config, math.ceil(need / 0.91))


def test_what_adds_to_the_memory_of_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each thread has gradients of its own; samples need a copy of the weights. Validation counts
    if it needs the most: its batches are of 8192 tokens, or of 2**25 logits: here 13 windows of
    300, with logits and logarithms."""
    model, config = GPT(256, 64, 4, 4), recipe(16, 64, eval_every=3)
    weights = 4 * model.config.num_parameters()
    without = needed_bytes(model, replace(config, sample_tokens=0))
    assert needed_bytes(model, replace(config, eval_every=4)) == without, "none is ever written"
    assert needed_bytes(model, config) - without >= weights
    needed = []
    for threads in (1, 4):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        needed.append(needed_bytes(model, recipe(16, 64)))
    assert needed[1] - needed[0] >= 3 * weights
    model = GPT.from_config(replace(WIDE, vocab_size=8000))
    assert needed_bytes(model, recipe(1, 300)) > 2 * 4 * 13 * 300 * 8000


def test_large_tensors_do_not_fragment_the_heap() -> None:
    """A tensor of 32 MiB or more has its own memory mapping."""
    model, most = GPT.from_config(WIDE), 2**25 // (4 * 300 * WIDE.embed_dim)
    assert needed_bytes(model, recipe(most + 1, 300)) < needed_bytes(model, recipe(most, 300))
    model = GPT.from_config(replace(WIDE, vocab_size=50_000))
    fewer, more = (needed_bytes(model, recipe(rows, 300)) for rows in (80, 90))
    token = activations(model.config)
    row = 300 * (token.blocks + token.head + max(token.block_working, token.head_working))
    assert 0.95 < (more - fewer) / (10 * row) < 1.1


@pytest.mark.parametrize("asked", [1, 2, 48, 64, 1000, 2**31])
def test_the_batch_size_that_fits_is_the_largest_power_of_two(asked: int) -> None:
    """Or the requested one; the named size fits by the same estimate, and twice that does not."""
    model = GPT.from_config(WIDE)
    config = recipe(asked, 300)
    smallest = needed_bytes(model, replace(config, batch_size=1))
    seen = set()
    for free in (smallest, smallest * 5 // 4, 2 * smallest, GIB, 3 * GIB, 2**44, 2**60):
        size = fitting_piece(model, config, free)
        seen.add(size)
        assert size in (0, asked) or (size < asked and size.bit_count() == 1)
        if size:
            assert needed_bytes(model, replace(config, batch_size=size)) <= 0.9 * free
        if size < asked:
            double = min(2 * size, asked) or 1
            assert needed_bytes(model, replace(config, batch_size=double)) > 0.9 * free
    assert {0, asked} <= seen
    assert fitting_piece(model, config, None) == asked


def test_a_batch_that_does_not_fit_is_refused_with_one_that_does() -> None:
    model = GPT.from_config(WIDE)
    config = recipe(2**20, 300)
    size = fitting_piece(model, config, 2 * GIB)
    with pytest.raises(OutOfMemoryError) as refused:
        check_batch_fits(model, config, 2 * GIB)
    need = bytes_text(needed_bytes(model, config))
    assert str(refused.value) == (
        f"batch_size=1048576 with windows of 300 needs about {need} and 2.1 GB are free "
        f"(a tenth stays free): choose --batch-size {size}, or --batch-size auto"
    )
    check_batch_fits(model, replace(config, batch_size=size), 2 * GIB)
    check_batch_fits(model, config, None)
    with pytest.raises(OutOfMemoryError, match="not one window fits: choose a smaller --seq-len"):
        check_batch_fits(model, config, 40 * 2**20)


@pytest.mark.parametrize(
    ("error", "asked"),
    [
        (
            RuntimeError(
                "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate "
                "memory: you tried to allocate 6871947674 bytes. Error code 12 (Cannot allocate "
                "memory)"
            ),
            " (6.8 GB more asked for)",
        ),
        (
            torch.OutOfMemoryError(
                "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of "
                "7.79 GiB of which 1.10 GiB is free."
            ),
            " (2.1 GB more asked for)",
        ),
        (
            RuntimeError(
                "MPS backend out of memory (MPS allocated: 17.95 GB, other allocations: 384.00 KB, "
                "max allowed: 18.13 GB). Tried to allocate 256.00 MB on private pool."
            ),
            " (268.4 MB more asked for)",
        ),
        (
            MemoryError("Unable to allocate 8.00 TiB for an array with shape (1099511627776,)"),
            " (8.7 TB more asked for)",
        ),
        (MemoryError(), ""),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(h)`"), ""),
    ],
)
def test_an_allocation_error_in_a_step_names_batch_and_window(error, asked, monkeypatch) -> None:
    model = GPT.from_config(WIDE)
    config = recipe(4096, 300)
    for free, size in [(None, 2048), (2**50, 2048), (GIB, 0)]:
        monkeypatch.setattr(memory, "free_memory_bytes", lambda free=free: free)
        size = size or fitting_piece(model, config, GIB)
        assert 0 < size < 4096, "never the one that has just failed"
        found = out_of_memory(error, model, config)
        assert isinstance(found, OutOfMemoryError)
        assert str(found) == (
            f"out of memory in a step with batch_size=4096 and windows of 300{asked}: "
            f"choose --batch-size {size}"
        )
    found = out_of_memory(error, model, replace(config, batch_size=1))
    assert "not one window fits" in str(found)


@pytest.mark.parametrize(
    "error",
    [RuntimeError("shapes cannot be multiplied"), ValueError("memory"), KeyboardInterrupt()],
)
def test_other_errors_are_not_changed(error: BaseException) -> None:
    assert out_of_memory(error, GPT.from_config(WIDE), recipe(4, 30)) is None


def test_the_memory_of_the_failed_step_is_freed_first() -> None:
    """The error's traceback refers to the step's activations, which once counted as not free."""
    held: list[weakref.ref[torch.Tensor]] = []

    def step() -> None:
        activations = torch.zeros(9)
        held.append(weakref.ref(activations))
        raise MemoryError

    try:
        step()
    except MemoryError as error:
        assert held[0]() is not None
        out_of_memory(error, GPT.from_config(WIDE), recipe(4, 30))
        assert held[0]() is None


def printed_by(program: str) -> str:
    command = [sys.executable, "-c", program]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


_UNDER_A_LIMIT = """
import resource, sys, torch
from mygpt import GPT
from mygpt.training.config import TrainConfig
from mygpt.training.gradients import ParallelGradients
from mygpt.training.memory import out_of_memory
torch.set_num_threads(1)
model = GPT(256, 64, 4, 4, 256)
config = TrainConfig(batch_size=2048, seq_len=256, lr=1e-3, steps=1)
size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + 2**29, size + 2**29))
ids = torch.zeros(config.batch_size, config.seq_len, dtype=torch.int64)
try:
    with ParallelGradients(model, 1) as gradients:
        gradients(ids, ids)
except Exception as error:
    print(type(error).__name__, out_of_memory(error, model, config))
"""


@pytest.mark.processes
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits as Linux has them")
def test_a_real_allocation_failure_is_reported() -> None:
    printed = printed_by(_UNDER_A_LIMIT)
    # (2048, 256, 64) floats are 128 MiB, and four of them do not fit.
    assert "out of memory in a step with batch_size=2048 and windows of 256 (" in printed
    assert " MB more asked for): choose --batch-size 1024\n" in printed


_MEASURED = """
import json, re, tempfile, torch
import mygpt
from mygpt.training import lifecycle, memory
torch.set_num_threads(2)
def status(key):
    return 1024 * int(re.search(key + r":\\s+(\\d+)", open("/proc/self/status").read())[1])
figures = {}
build = lifecycle.initial_model
def building(config, recipe, *others, **more):
    figures["before"] = status("VmRSS")
    model = build(config, recipe, *others, **more)
    figures["needed"] = memory.needed_bytes(model, recipe) + 4 * config.num_parameters()
    return model
lifecycle.initial_model = building
options = {"batch_size": 128, "steps": 3, "report": False}
with tempfile.TemporaryDirectory() as folder:
    text = folder + "/text.txt"
    open(text, "w").write("the quick brown fox jumps over the lazy dog. " * 400)
    mygpt.train(text, output=folder + "/run", preset="nano", listener=lambda event: None, **options)
print(json.dumps({**figures, "peak": status("VmHWM")}))
"""


@pytest.mark.processes
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the peak from /proc")
def test_training_needs_at_most_the_estimated_memory() -> None:
    """And at least half of it: docs/lab-notes.md compares them for many shapes."""
    figures = json.loads(printed_by(_MEASURED))
    taken = figures["peak"] - figures["before"]
    assert 0.5 * figures["needed"] < taken <= figures["needed"]
