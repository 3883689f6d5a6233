"""How much memory training needs, estimated before it is allocated.

Linux allocates memory that it does not have, and kills the process once it is used. So the need
is estimated first, from the shape alone. docs/lab-notes.md compares estimates and measurements.
Letters: B batch, T time, L window.
"""

from __future__ import annotations

import math
import re
import traceback
from dataclasses import replace

import torch

from mygpt.core.config import GPTConfig, positions_for
from mygpt.core.model import GPT
from mygpt.cpu.train.layout import FLOAT32, TILES, step_bytes
from mygpt.errors import OutOfMemoryError, is_out_of_memory
from mygpt.evaluation.losses import rows_at_once
from mygpt.machine import bytes_text, free_memory_bytes
from mygpt.scaling.estimates import FLOAT, USABLE, activations
from mygpt.training.config import TrainConfig
from mygpt.training.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from mygpt.training.gradients import ParallelGradients

# The first steps load code of the math libraries, the end loads the decoder: 22 to 25 MB, measured
# with a model of a few parameters.
_LIBRARIES_BYTES = 40_000_000
# Python's objects for a block, and for each thread those of its gradients and graph: measured 140
# to 165 kB with one thread, 46 to 86 more with two.
_BLOCK_BYTES = 90_000
# Heap size for a step's tensors, as a multiple of their size: freed tensors leave gaps that small
# tensors fragment; RMSNorm and rotary embeddings free more tensors, of more sizes. Measured after
# up to 60 steps: 1.04 to 1.52 with one of them, 1.10 to 1.23 with neither.
_HEAP_MODERN, _HEAP = 1.55, 1.3
# Tensors of at least this size glibc maps separately, and unmaps when freed: measured 0.97 to 1.00.
_OWN_MEMORY_BYTES, _OWN_MEMORY = 2**25, 1.05
_HEAP_COMPILED = 1.1
_HEAP_ON_DEVICE = 1.2  # torch's own heap there; not measured yet
# In the messages of torch on CPU, CUDA and MPS, and in those of NumPy.
_ASKED = re.compile(r"(?:[Tt]ried|[Uu]nable) to allocate ([\d.]+) (bytes|[KMGT]i?B)\b")


def free_memory(
    device: torch.device, group: ProcessGroup = SINGLE_PROCESS, config: TrainConfig | None = None
) -> int | None:
    """Bytes that training on `device` can still allocate; None if the system does not report it.

    Args:
        device: of the model.
        group: the processes that train it: those of one machine share its memory.
        config: if it shards the model, the result is what all processes can allocate together.
    """
    processes = group.size if config is not None and group.shards_model(config.shard) else 1
    if device.type != "cuda":
        free = free_memory_bytes()
        return None if free is None else processes * free // group.local_size
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return processes * (torch.cuda.mem_get_info(device)[0] + kept)  # torch reuses what it keeps


def model_bytes(config: GPTConfig, *, threads: int = 1) -> int:
    """The memory of training that does not depend on the batch: a bound from the shape alone.

    Weights, AdamW's two means, gradients for each of the `threads` that share a batch, Python's
    objects and libraries. Saving makes no copy on a CPU.
    """
    numbers = config.num_parameters()
    # The gradient of tied weights is the sum of two: of the embedding and of the head.
    gradients = numbers + (config.vocab_size * config.embed_dim if config.tied else 0)
    tables = _window_floats(config) if config.position == "rotary" else 0
    objects = _BLOCK_BYTES * config.num_layers * (1 + threads)
    return FLOAT * (3 * numbers + threads * gradients + tables) + objects + _LIBRARIES_BYTES


def _window_floats(config: GPTConfig) -> int:
    """Floats that grow with L: learned positions in training, or rotary tables when built."""
    if config.position == "learned":
        return config.max_seq_len * 4 * config.embed_dim
    return positions_for(config.max_seq_len) * 5 * config.head_size


class _Need:
    """The memory of training in addition to the weights, as a function of B."""

    def __init__(self, model: GPT, config: TrainConfig) -> None:
        self.model, self.config, shape = model, config, model.config
        # The decoder that writes samples has a copy of the weights, padded, and is kept.
        samples = config.sample_tokens and (config.total_steps or math.inf) >= config.eval_every
        self.packed = 9 * FLOAT * shape.num_parameters() // 8 if samples else 0
        self.on_cpu = next(model.parameters()).device.type == "cpu"
        token = activations(
            shape,
            checkpointing=config.checkpoint_activations,
            scores=config.seq_len if self.on_cpu else 0,
        )
        # Of a row: what exists before the head's backward pass, and what is added in it. The batch
        # is int64 and copied, and the residual stream has gradients.
        passing = FLOAT * (4 * shape.embed_dim + 8) + token.block_working
        self.blocks = config.seq_len * (token.blocks + passing)
        added = max(0, token.head_working - token.block_working)
        self.head = config.seq_len * (token.head + added)

    def bytes(self, batch_size: int) -> int:
        """The bytes for so many windows at once."""
        if self.config.engine == "compiled":
            return self._compiled_bytes(batch_size)
        shape = self.model.config
        threads = ParallelGradients.suitable_threads(self.model, batch_size)
        others = model_bytes(shape, threads=threads) - FLOAT * shape.num_parameters()
        if batch_size < self.config.batch_size:  # a piece's gradients, and the sum so far
            others += FLOAT * shape.num_parameters()
        step = self._taken(batch_size, -(-batch_size // threads), self.blocks, self.head)
        # Validation keeps no activations, but its batches are large.
        rows = rows_at_once(self.config.seq_len, shape.vocab_size)
        fused = (shape.num_heads + 2 * shape.kv_heads) * shape.head_size
        blocks = 4 * max(fused, shape.mlp_hidden) + 6 * shape.embed_dim
        head = max(0, 2 * shape.vocab_size - blocks)
        token = FLOAT * self.config.seq_len
        validation = self._taken(rows, rows, token * blocks, token * head)
        # The heap may not shrink between them; a new copy for the decoder is made before the old
        # one is freed.
        heap, own = step[0] + validation[0], max(step[1], validation[1])
        return math.ceil(others + heap + own + 2 * self.packed)

    def _compiled_bytes(self, batch_size: int) -> int:
        """The machine code's workspace, from the shape; gradients are views into it."""
        shape, threads = self.model.config, min(torch.get_num_threads(), batch_size)
        optimizer = 2 * FLOAT * shape.num_parameters()
        gradients = threads * FLOAT * shape.num_parameters()
        longest = self.config.longest_window  # the window of validation
        validation = longest, rows_at_once(longest, shape.vocab_size)
        first = self.config.seq_len, batch_size
        windows = [first, *self.config.windows[1:], validation]
        products = TILES if self.config.dtype == "bfloat16" else FLOAT32
        step = max(step_bytes(shape, b, t, threads, products) for t, b in windows)
        loaded = FLOAT * shape.num_parameters()  # the best model, loaded at the end
        taken = optimizer + gradients + step + loaded + 2 * self.packed
        return _LIBRARIES_BYTES + math.ceil(_HEAP_COMPILED * taken)

    def _taken(self, rows: int, share: int, blocks: int, head: int) -> tuple[float, float]:
        """Bytes of heap and of separately mapped tensors, for rows that threads share."""
        shape, taken = self.model.config, [0.0, 0.0]
        if not self.on_cpu:
            return _HEAP_ON_DEVICE * rows * (blocks + head), 0.0
        plain = shape.norm == "layer" and shape.position == "learned"
        for size, width in ((blocks, shape.embed_dim), (head, shape.vocab_size)):
            own = FLOAT * share * self.config.seq_len * width >= _OWN_MEMORY_BYTES
            taken[own] += rows * size * (_OWN_MEMORY if own else _HEAP if plain else _HEAP_MODERN)
        return taken[0], taken[1]

    def fitting(self, free_bytes: int, *, at_most: int) -> int:
        """The largest that fits: `at_most`, else a power of two below it, else 0."""
        sizes = (at_most, *(2**n for n in reversed(range((at_most - 1).bit_length()))))
        return next((n for n in sizes if self.bytes(n) <= USABLE * free_bytes), 0)


def needed_bytes(model: GPT, config: TrainConfig) -> int:
    """A bound of the memory of training in addition to the weights."""
    return _Need(model, config).bytes(config.piece)


def fitting_piece(model: GPT, config: TrainConfig, free_bytes: int | None) -> int:
    """How many windows fit at once: as many as asked for, else a power of two below, else 0."""
    if free_bytes is None:
        return config.piece
    return _Need(model, config).fitting(free_bytes, at_most=config.piece)


def check_model_fits(config: GPTConfig, free_bytes: int | None) -> None:
    """Raise for a shape that cannot be trained here, before anything of its size is allocated.

    Raises:
        OutOfMemoryError: when `free_bytes` (None checks nothing) are too few.
    """
    need = model_bytes(config)
    if free_bytes is None or need <= USABLE * free_bytes:
        return
    window = FLOAT * _window_floats(config) > need / 2
    raise OutOfMemoryError(
        f"a model of {config.num_parameters():,} parameters needs about {bytes_text(need)} to be "
        f"trained and {bytes_text(free_bytes)} are free (a tenth stays free): choose a smaller "
        f"{'--max-seq-len' if window else '--embed-dim or --num-layers'}"
    )


def check_batch_fits(
    model: GPT,
    config: TrainConfig,
    free_bytes: int | None,
    *,
    fixed: bool = False,
    group: ProcessGroup = SINGLE_PROCESS,
) -> None:
    """Raise for a batch that does not fit, before the first one is read.

    Args:
        model: with its weights.
        config: with its batch size.
        free_bytes: None checks nothing.
        fixed: the batch size cannot change any more, so that no other is advised.
        group: the processes that share a batch. A sharded model is not estimated.

    Raises:
        OutOfMemoryError: when `free_bytes` are too few; it names what fits.
    """
    if free_bytes is None or group.shards_model(config.shard):
        return
    if not group.is_single:
        config = _own_part(config, group)
    fits = fitting_piece(model, config, free_bytes)
    if fits < config.piece:
        smaller = f"{_remedy(fits)}{', or --batch-size auto' if fits else ''}"
        raise OutOfMemoryError(
            f"batch_size={config.batch_size} with windows of {config.seq_len} needs about "
            f"{bytes_text(needed_bytes(model, config))} and {bytes_text(free_bytes)} are free (a "
            f"tenth stays free): {'end other programs' if fixed else smaller}"
        )


def _own_part(config: TrainConfig, group: ProcessGroup) -> TrainConfig:
    """The recipe with the number of rows of one process."""
    stages = tuple((share, t, group.rows_per_process(b)) for share, t, b in config.stages)
    return replace(config, batch_size=group.rows_per_process(config.batch_size), stages=stages)


def out_of_memory(error: BaseException, model: GPT, config: TrainConfig) -> OutOfMemoryError | None:
    """The error to raise for `error`, raised in a step, if it is about memory; else None.

    It names the size asked for and the batch size that fits now; the traceback's frames are
    cleared, since they hold tensors.
    """
    if not is_out_of_memory(error):
        return None
    traceback.clear_frames(error.__traceback__)
    free = free_memory(next(model.parameters()).device)
    fits = config.piece // 2  # this size did not fit, whatever is reported as free
    if fits and free is not None:
        fits = _Need(model, config).fitting(free, at_most=fits)
    asked = ""
    if found := _ASKED.search(str(error)):
        asked = (
            f" ({bytes_text(float(found[1]) * 1024 ** 'bKMGT'.index(found[2][0]))} more asked for)"
        )
    return OutOfMemoryError(
        f"out of memory in a step with batch_size={config.batch_size} and windows of "
        f"{config.seq_len}{asked}: {_remedy(fits)}"
    )


def _remedy(fits: int) -> str:
    if fits:
        return f"choose --batch-size {fits}"
    return "not one window fits: choose a smaller --seq-len, --embed-dim or --num-layers"
