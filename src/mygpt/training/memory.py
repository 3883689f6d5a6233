"""How much memory a training needs, reckoned before it is taken.

Linux hands out memory that it does not have, and ends the process without a word once that is
used. So the need is reckoned first: what the model takes from its shape alone, what a row of
the batch adds from a forward pass over a few tokens. docs/lab-notes.md has the reckoned beside
the measured.
Letters: B batch, T time, C embedding, H heads, G key/value heads, D head size, L window,
M MLP width, V vocabulary.
"""

from __future__ import annotations

import contextlib
import math
import re
import traceback
from collections.abc import Iterator

import torch

from mygpt.config import GPTConfig
from mygpt.errors import OutOfMemoryError
from mygpt.evaluation import _TOKENS_PER_BATCH
from mygpt.machine import free_memory_bytes
from mygpt.model import GPT
from mygpt.training.config import TrainConfig
from mygpt.training.gradients import Gradients

_FLOAT = 4  # bytes of a float32, in which everything is trained
# Fused AdamW brings torch's compiler with it, the first steps code of the math libraries, the
# end the engine that writes: 130 to 170 MB, measured with a model of a few numbers.
_LIBRARIES_BYTES = 170 * 2**20
# A block's modules, parameters and moments as Python sees them, and again for each thread its
# gradients and the graph of a step: 142 and 46 kB measured for the tutorial's block, 140 and 87
# for the modern one.
_BLOCK_BYTES = 90_000
_HEAP = 1.5
_SHARE = 0.9  # of what is free: the rest is for other programs, and for our error
_MEASURED_TOKENS = (16, 32, 64)

# What torch says on a CPU, on CUDA, on MPS, and NumPy.
_SAYS_MEMORY = re.compile(r"out of memory|allocate memory|not enough memory|ALLOC_FAILED")
_ASKED = re.compile(r"(?:[Tt]ried|[Uu]nable) to allocate ([\d.]+) (bytes|[KMGT]i?B)\b")


def free_memory(device: torch.device) -> int | None:
    """Bytes that training on `device` can still take; None where the system does not tell."""
    if device.type != "cuda":
        return free_memory_bytes()
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + kept  # what torch keeps for itself is free to it


def model_bytes(config: GPTConfig, *, threads: int = 1) -> int:
    """What training a model takes whatever the batch: a bound from its shape alone, at once.

    Weights, AdamW's two means, gradients for each of `threads` (they share a batch), and what
    Python and the libraries need. Saving copies nothing on a CPU.
    """
    numbers = config.num_parameters()
    # The gradient of a tied embedding is the sum of two, from either end of the model.
    gradients = numbers + (config.vocab_size * config.embed_dim if config.tied else 0)
    tables = _window_floats(config) if config.position == "rotary" else 0
    objects = _BLOCK_BYTES * config.num_layers * (1 + threads)
    floats = 3 * numbers + threads * gradients + tables
    return _FLOAT * floats + objects + _LIBRARIES_BYTES


def _window_floats(config: GPTConfig) -> int:
    """Floats that grow with L: learned positions in training, or rotary tables being made."""
    return config.max_seq_len * (
        4 * config.embed_dim if config.position == "learned" else 5 * config.head_size
    )


def row_bytes(model: GPT, seq_len: int) -> int:
    """What one row of the batch, T tokens, adds to a training step.

    What a forward pass keeps for the way back is measured, on one row of a few tokens; it is a
    polynomial of T (of degree 2, since attention with dropout keeps its scores), so that three
    lengths tell it for all. Model, gradients and random generators stay as they were.
    """
    if seq_len <= _MEASURED_TOKENS[-1]:
        kept = _kept_bytes(model, seq_len)
    else:
        a, b, c = _MEASURED_TOKENS
        at_a, at_b, at_c = (_kept_bytes(model, length) for length in _MEASURED_TOKENS)
        slope, next_slope = (at_b - at_a) / (b - a), (at_c - at_b) / (c - b)
        bend = (next_slope - slope) / (c - a)  # Newton's divided differences
        kept = math.ceil(at_a + (seq_len - a) * (slope + (seq_len - b) * bend))
    return kept + _FLOAT * seq_len * _passing_floats(model.config, seq_len)


def _kept_bytes(model: GPT, seq_len: int) -> int:
    """Bytes of all tensors that a forward pass over one row keeps for the backward pass."""
    known = {tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> None:
        # Held here, so that no other takes its place; not by the graph, which would hold itself.
        if tensor.untyped_storage().data_ptr() not in known:
            kept[tensor.untyped_storage().data_ptr()] = tensor.detach()

    device = next(model.parameters()).device
    ids = torch.zeros(1, seq_len, dtype=torch.int64, device=device)
    training = model.training
    with _generators_kept(device), torch.autograd.graph.saved_tensors_hooks(keep, lambda _: _):
        model.train()(ids, ids)
    model.train(training)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@contextlib.contextmanager
def _generators_kept(device: torch.device) -> Iterator[None]:
    """Dropout draws from torch's global generator: inside, it is given back what it had."""
    generators = [torch, *([getattr(torch, device.type)] if device.type != "cpu" else [])]
    states = [generator.get_rng_state() for generator in generators]
    try:
        yield
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_rng_state(state)


def _passing_floats(config: GPTConfig, seq_len: int) -> int:
    """Floats a token that live for a moment only: the most that are alive at once.

    At the way back's start the logits, their gradient and that of their logarithms; within a
    block the gradients of its widest tensors, while those are still there.
    """
    fused, hidden = _widths(config)
    scores = config.num_heads * seq_len if config.dropout else 0
    widest = max(3 * config.vocab_size, 2 * hidden, 2 * fused, 2 * scores)
    return widest + 4 * config.embed_dim + 8  # and the batch itself, int64 and copied


def _validation_bytes(config: GPTConfig, seq_len: int) -> int:
    """What a validation pass takes: nothing is kept, but its batches are large."""
    fused, hidden = _widths(config)
    widest = max(2 * config.vocab_size, 4 * hidden, 3 * fused) + 4 * config.embed_dim
    return _FLOAT * widest * max(_TOKENS_PER_BATCH, seq_len)


def _widths(config: GPTConfig) -> tuple[int, int]:
    """(H + 2G) * D of queries, keys and values together, and M."""
    return (config.num_heads + 2 * config.kv_heads) * config.head_size, config.mlp_hidden


class _Need:
    """What a training takes beside the weights, which are there, as a function of B."""

    def __init__(self, model: GPT, config: TrainConfig) -> None:
        self.model = model
        self.row = row_bytes(model, config.seq_len)
        self.weights = _FLOAT * model.config.num_parameters()
        self.validation = _validation_bytes(model.config, config.seq_len)
        # Samples are written by an engine with a copy of the weights, padded; it lives on.
        samples = config.sample_tokens and (config.total_steps or math.inf) >= config.eval_every
        self.packed = 9 * self.weights // 8 if samples else 0

    def bytes(self, batch_size: int) -> int:
        threads = Gradients.suitable_threads(self.model, batch_size)
        others = model_bytes(self.model.config, threads=threads) - self.weights + self.packed
        rows = _HEAP * batch_size * self.row
        # One comes after the other, yet the heap may give nothing back between them. A new copy
        # for samples is made while the old one is there.
        return others + math.ceil(rows) + self.validation + self.packed

    def fitting(self, free_bytes: int, *, at_most: int) -> int:
        """The largest that fits: `at_most`, else a power of two below it, else 0."""
        powers = (2**n for n in reversed(range((at_most - 1).bit_length())))
        sizes = (size for size in (at_most, *powers) if size)
        return next((n for n in sizes if self.bytes(n) <= _SHARE * free_bytes), 0)


def needed_bytes(model: GPT, config: TrainConfig) -> int:
    """What training takes beside the weights, which are there: a bound."""
    return _Need(model, config).bytes(config.batch_size)


def fitting_batch_size(model: GPT, config: TrainConfig, free_bytes: int | None) -> int:
    """The largest batch size that fits: the asked one, else a power of two below it, else 0."""
    if free_bytes is None:
        return config.batch_size
    return _Need(model, config).fitting(free_bytes, at_most=config.batch_size)


def check_model_fits(config: GPTConfig, free_bytes: int | None) -> None:
    """Refuse a shape that cannot be trained here, before anything of its size is made.

    Raises:
        OutOfMemoryError: when `free_bytes` (None checks nothing) are too few.
    """
    need = model_bytes(config)
    if free_bytes is None or need <= _SHARE * free_bytes:
        return
    window = _FLOAT * _window_floats(config) > need // 2
    raise OutOfMemoryError(
        f"a model of {config.num_parameters():,} parameters needs about {_amount(need)} to be "
        f"trained and {_amount(free_bytes)} are free (a tenth stays free): choose a smaller "
        f"{'--max-seq-len' if window else '--embed-dim or --num-layers'}"
    )


def check_batch_fits(model: GPT, config: TrainConfig, free_bytes: int | None) -> None:
    """Refuse a batch that does not fit, before the first one is read.

    Raises:
        OutOfMemoryError: when `free_bytes` (None checks nothing) are too few; it names what fits.
    """
    if free_bytes is None:
        return
    need = _Need(model, config)
    fits = need.fitting(free_bytes, at_most=config.batch_size)
    if fits < config.batch_size:
        raise OutOfMemoryError(
            f"batch_size={config.batch_size} with windows of {config.seq_len} needs about "
            f"{_amount(need.bytes(config.batch_size))} and {_amount(free_bytes)} are free (a "
            f"tenth stays free): {_remedy(fits)}{', or auto' if fits else ''}"
        )


def out_of_memory(error: BaseException, model: GPT, config: TrainConfig) -> OutOfMemoryError | None:
    """The error to show for `error`, raised in a step, where memory was the matter; else None.

    It says how much was asked for and what batch size fits in what is free now. What the frames
    of `error` hold is let go for that.
    """
    if not isinstance(error, MemoryError) and not _SAYS_MEMORY.search(str(error)):
        return None
    traceback.clear_frames(error.__traceback__)
    free = free_memory(next(model.parameters()).device)
    fits = config.batch_size // 2  # this one did not fit, whatever is said to be free
    if fits and free is not None:
        with contextlib.suppress(MemoryError, RuntimeError):  # it takes a little itself
            fits = _Need(model, config).fitting(free, at_most=fits)
    found = _ASKED.search(str(error))
    asked = f" ({_asked_for(*found.groups())} more asked for)" if found else ""
    return OutOfMemoryError(
        f"out of memory in a step with batch_size={config.batch_size} and windows of "
        f"{config.seq_len}{asked}: {_remedy(fits)}"
    )


def _asked_for(count: str, unit: str) -> str:
    return _amount(int(count)) if unit == "bytes" else f"{count} {unit}"


def _remedy(fits: int) -> str:
    if fits:
        return f"choose --batch-size {fits}"
    return "not one window fits: choose a smaller --seq-len, --embed-dim or --num-layers"


def _amount(count: int) -> str:
    if count < 2**20:
        return f"{count:,} bytes"
    return f"{count / 2**30:,.1f} GiB" if count >= 2**30 else f"{count / 2**20:,.0f} MiB"
