"""A model's parameters packed for the decoding kernels: matrices in panels, float32 or int8.

Letters: C embedding, H heads, G key/value heads, D head size, N outputs, V vocabulary.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mygpt.core.config import GPTConfig, positions_for
from mygpt.cpu.common.build import load_library
from mygpt.cpu.common.int4_format import GROUP, INPUT_WORDS, TRIED, VALUES, words_of
from mygpt.cpu.common.layout import PANEL, Arena, padded, shape_of
from mygpt.cpu.common.workers import run_on_threads, usable_cores
from mygpt.cpu.decode import layout as at
from mygpt.engine import rotary_angles

FORMATS = {"float32": at.IN_FLOAT32, "int8": at.IN_INT8, "int4": at.IN_INT4}

Arrays = Mapping[str, NDArray[Any]]
Floats = NDArray[np.float32]


class PackedModel:
    """A model ready for the kernels.

    Args:
        config: its shape.
        arrays: its parameters by name, as `GPT.state_dict` has them; also "rotary_cos" and
            "rotary_sin", (L, D) or fewer rows, where a model has tables of its own.
        weights: the format of matrices, one of `FORMATS`. int8: with one float32 scale an output
            (the largest weight becomes 127). int4: with a bfloat16 scale for each 32 inputs of an
            output (see `mygpt.cpu.common.int4_format`); embedding and head are int8 then.

    Attributes:
        job: the model's part of a job (see `layout`); zeros elsewhere.
        weight_bytes: bytes of all matrices, read once for every token.
    """

    def __init__(self, config: GPTConfig, arrays: Arrays, *, weights: str = "float32") -> None:
        self.config = config
        self.format = FORMATS[weights]
        self.weight_bytes = 0
        self._arrays = arrays
        width = 4 if self.format == at.IN_FLOAT32 else 1
        # An eighth more than the parameters, for columns that fill whole vectors and gaps.
        self._arena = Arena(config.num_parameters() * width * 9 // 8 + 2**16)
        self._alive: list[NDArray[Any]] = []  # what else the job's addresses point to
        self._unpacked: list[tuple[NDArray[Any], NDArray[Any]]] = []  # matrices and their panels
        self.job = np.zeros(at.JOB_SIZE, np.int64)
        self._lock = threading.Lock()
        self._describe_shape()
        self._pack_ends()
        table = np.stack([self._layer(n) for n in range(config.num_layers)])
        self.job[at.LAYER_TABLE] = self._keep(table)
        self._pack_matrices()
        del self._arrays

    def _describe_shape(self) -> None:
        config, job = self.config, self.job
        wide = padded(config.head_size)
        for name, size in shape_of(config).items():
            job[getattr(at, name)] = size
        for place, value in {
            at.WINDOW: config.max_seq_len,
            at.INPUT_WORDS: self._input_words(),
            at.WIDTH_STRIDE: padded(config.embed_dim),
            at.QUERY_STRIDE: padded(config.num_heads * config.head_size),
            at.KEY_VALUE_STRIDE: padded(2 * config.kv_heads * config.head_size),
            at.ATTENDED_STRIDE: config.num_heads * wide,
            at.HIDDEN_STRIDE: padded(config.mlp_hidden),
            at.VOCAB_STRIDE: padded(config.vocab_size),
            at.HEAD_STRIDE: wide,
        }.items():
            job[place] = value
        scale = config.head_size**-0.5
        job[at.REALS] = self._keep(np.array([config.eps, scale], np.float32))

    def _keep(self, array: NDArray[Any]) -> int:
        """The address of an array that lives as long as this model does."""
        array = np.ascontiguousarray(array)
        self._alive.append(array)
        return array.ctypes.data

    def _vector(self, name: str) -> int:
        """The address of a named parameter as float32, padded to whole vectors; 0 for none."""
        if name not in self._arrays:
            return 0
        values = np.asarray(self._arrays[name], np.float32).ravel()
        return self._place(values)

    def _place(self, values: NDArray[Any]) -> int:
        """The address of a copy, padded to whole vectors."""
        copy = self._arena.take(padded(values.size))
        copy[: values.size] = values
        return copy.ctypes.data

    def _pack_ends(self) -> None:
        """Embeddings, the last norm and the head."""
        config, job = self.config, self.job
        # Embedding and head are the smaller part of a large model, and of most influence.
        ends = min(self.format, at.IN_INT8)
        embedding = self._matrix(self._arrays["token_embedding.weight"], "", ends)
        job[at.EMBEDDING] = job[at.HEAD_MATRIX] = self._keep(np.array(embedding, np.int64))
        if not config.tied:
            head = self._matrix(self._arrays["head.weight"], "", ends)
            job[at.HEAD_MATRIX] = self._keep(np.array(head, np.int64))
        job[at.POSITIONS] = self._vector("position_embedding.weight")
        job[at.FINAL_WEIGHT] = self._vector("final_norm.weight")
        job[at.FINAL_BIAS] = self._vector("final_norm.bias")
        if config.position == "rotary":
            cosines, sines = rotary_angles(config, positions_for(config.max_seq_len))
            self._rotary = (
                np.ascontiguousarray(self._arrays.get("rotary_cos", cosines)),
                np.ascontiguousarray(self._arrays.get("rotary_sin", sines)),
            )
            self.place_rotary(job, 1)

    def place_rotary(self, job: NDArray[np.int64], positions: int) -> None:
        """Put the addresses of rotary tables for so many positions into a job.

        The tables of a long window grow with what is read.
        """
        if self.config.position != "rotary":
            return
        with self._lock:
            held = len(self._rotary[0])
            if positions > held:
                made = rotary_angles(self.config, positions_for(self.config.max_seq_len, positions))
                both = zip(self._rotary, made, strict=True)
                self._alive += self._rotary  # other jobs have their addresses
                cosines, sines = (np.concatenate([old, new[held:]]) for old, new in both)
                self._rotary = cosines, sines
            job[at.COSINES], job[at.SINES] = (table.ctypes.data for table in self._rotary)

    def _layer(self, number: int) -> NDArray[np.int64]:
        """One row of the layer table."""
        config, name = self.config, f"blocks.{number}."
        row = np.zeros(at.LAYER_SIZE, np.int64)
        row[at.NORM_1] = self._vector(name + "attention_norm.weight")
        row[at.NORM_1_BIAS] = self._vector(name + "attention_norm.bias")
        row[at.NORM_2] = self._vector(name + "mlp_norm.weight")
        row[at.NORM_2_BIAS] = self._vector(name + "mlp_norm.bias")
        row[at.QUERY_NORM] = self._vector(name + "attention.query_norm.weight")
        row[at.KEY_NORM] = self._vector(name + "attention.key_norm.weight")
        heads, d, hidden = config.num_heads, config.head_size, config.mlp_hidden
        fused, inner = name + "attention.query_key_value", name + "mlp.input"
        # The product reads ATTENDED, whose heads are padded to whole vectors (HEAD_STRIDE): zero
        # columns are put at the same places. query_key_value is split into queries and the rest,
        # mlp.input into gate and up: each is used at a time of its own.
        output = np.zeros((config.embed_dim, heads, padded(d)), np.float32)
        output[:, :, :d] = self._arrays[name + "attention.output.weight"].reshape(-1, heads, d)
        for place, weight, bias, rows in (
            (at.W_QUERY, self._arrays[fused + ".weight"], fused, slice(0, heads * d)),
            (at.W_KEY_VALUE, self._arrays[fused + ".weight"], fused, slice(heads * d, None)),
            (
                at.W_OUTPUT,
                output.reshape(config.embed_dim, -1),
                name + "attention.output",
                slice(None),
            ),
            (at.W_GATE, self._arrays[inner + ".weight"], inner, slice(0, hidden)),
            (at.W_UP, self._arrays[inner + ".weight"], inner, slice(hidden, None)),
            (at.W_DOWN, self._arrays[name + "mlp.output.weight"], name + "mlp.output", slice(None)),
        ):
            if place != at.W_UP or config.mlp == "swiglu":
                row[place : place + at.MATRIX_SIZE] = self._matrix(
                    weight[rows], bias, self.format, rows
                )
        return row

    def _input_words(self) -> int:
        """Words of the longest row of inputs of weights of 4 bits; 0 without such weights."""
        config = self.config
        attended = config.num_heads * padded(config.head_size)
        longest = max(config.embed_dim, attended, padded(config.mlp_hidden))
        return -(-longest // GROUP) * INPUT_WORDS if self.format == at.IN_INT4 else 0

    def _matrix(
        self, weight: NDArray[Any], name: str, kind: int, rows: slice = slice(None)
    ) -> list[int]:
        """The description of a packed matrix (see `layout`); `name` is where its bias is."""
        weight = np.asarray(weight, np.float32)  # (N, C)
        outputs, depth = weight.shape
        scales = 0
        if kind == at.IN_INT8:
            weight, steps = quantize(weight)
            scales = self._place(steps)
        bias = self._arrays.get(f"{name}.bias")
        bias_address = 0 if bias is None else self._place(bias[rows])
        if kind == at.IN_INT4:
            panels = self._arena.take(words_of(padded(outputs), depth), np.uint32)
            _pack_int4(panels, np.ascontiguousarray(weight))
        else:
            panels = self._arena.take(padded(outputs) * depth, weight.dtype, zeroed=False)
            panels[outputs // PANEL * PANEL * depth :] = 0  # of the last panel all columns are read
        if kind == at.IN_INT8:
            fill_panels(panels, weight)
        elif kind == at.IN_FLOAT32:
            self._unpacked.append((weight, panels))
        self.weight_bytes += panels.nbytes
        return [panels.ctypes.data, scales, bias_address, depth, padded(outputs), kind]

    def _pack_matrices(self) -> None:
        """Pack all float32 matrices with one call of the kernel `pack_matrices`."""
        matrices = [(np.ascontiguousarray(weight), panels) for weight, panels in self._unpacked]
        table = np.array(
            [(w.ctypes.data, panels.ctypes.data, *w.shape) for w, panels in matrices], np.int64
        )
        load_library()["pack_matrices"](table.ctypes.data, len(table))
        self._unpacked.clear()


def _pack_int4(panels: NDArray[np.uint32], weight: NDArray[np.float32]) -> None:
    """Pack a matrix (N, C) into panels of zeros, in 4 bits."""
    threads = usable_cores()
    buffer = np.empty(threads * 4 * GROUP, np.float32)
    job = np.array(
        [
            weight.ctypes.data, panels.ctypes.data, *weight.shape, buffer.ctypes.data,
            VALUES.ctypes.data, TRIED.ctypes.data, len(TRIED), threads,
        ],
        np.int64,
    )  # fmt: skip
    run_on_threads(load_library()["quantize_int4"], job.ctypes.data, threads)


def quantize(weight: NDArray[np.float32]) -> tuple[NDArray[np.int8], Floats]:
    """A matrix (N, C) as int8 from -127 to 127, and the scale of each row (N,).

    A row's largest absolute value becomes 127; the scale of a row of zeros is 1/127. A row with
    NaN or infinity has such a scale, so that its products are not finite either.
    """
    # w ~ q * scale with scale = max |w| / 127: an error of at most scale / 2 in each weight. On a
    # model of 812,672 parameters: 2.37989 bits per character, in float32 2.37991 (lab-notes.md).
    largest = np.abs(weight).max(axis=1)
    steps = np.where(largest == 0, 1, largest).astype(np.float32) / np.float32(127)
    with np.errstate(invalid="ignore"):
        return np.rint(weight / steps[:, None]).astype(np.int8), steps


def fill_panels(packed: NDArray[Any], weight: NDArray[Any]) -> None:
    """Pack a matrix (N, C) into panels, each (C, PANEL), the last one narrower.

    As the kernel `pack_matrices` does, for any number format.
    """
    outputs, depth = weight.shape
    whole = outputs // PANEL
    panels = packed[: whole * PANEL * depth].reshape(whole, depth, PANEL)
    panels[:] = weight[: whole * PANEL].reshape(whole, PANEL, depth).transpose(0, 2, 1)
    if outputs > whole * PANEL:
        tail = packed[whole * PANEL * depth :].reshape(depth, -1)
        tail[:, : outputs - whole * PANEL] = weight[whole * PANEL :].T
