"""Sizes of vectors, tiles and panels, kinds of layers, and memory that is aligned to vectors."""

from __future__ import annotations

from typing import Any

import llvmlite.binding as llvm
import numpy as np
from numpy.typing import NDArray

from mygpt.core.config import GPTConfig

# float32 numbers of a vector: 16 fill a register of AVX-512 (32 registers), 8 one of AVX2
# (16 registers) or two of NEON (32 registers of half the size).
_FEATURES = llvm.get_host_cpu_features()
LANES = 16 if _FEATURES.get("avx512f") else 8
# A tile's ROWS x VECTORS sums stay in registers, beside what a step of the inner dimension needs:
# 6 x 4 sums, the 4 vectors of weights, and one number of x at a time: 29 of 32 registers; or
# 3 x 4 sums, the 3 numbers of x, and one vector of weights at a time: 16 of 16.
VECTORS = 4
ROWS = 6 if LANES == 16 else 3
KEEPS_X = LANES == 8  # the second of these
# A tall tile has up to so many rows, in groups of at most ROWS. Each group takes TURN steps of the
# inner dimension, then the next group.
TALL_ROWS = 6 if LANES == 16 else 9
TURN = 64
# Products with weights of 8 and 4 bits ask for memory so many bytes ahead. Without that a core of
# Zen 3 reads 9 GB/s of int8, with it 11 to 14, and 20 from its cache. With AVX-512 int8 is at 95%
# of what memory delivers, without.
BYTES_AHEAD = 2048 if LANES == 8 else 0
PANEL = VECTORS * LANES  # outputs of a packed matrix that follow each other in memory
# Instructions for products of bfloat16: vdpbf16ps on vectors (Zen 4, Cooper Lake and later), and
# tdpbf16ps on the tile registers of AMX (Sapphire Rapids and later).
HAS_PAIRS = bool(_FEATURES.get("avx512bf16")) and LANES == 16
# Looking up a byte for each byte of a vector, in a table of 16 (vpshufb).
HAS_SHUFFLE = bool(_FEATURES.get("avx512bw" if LANES == 16 else "avx2"))
HAS_TILES = bool(_FEATURES.get("amx-tile") and _FEATURES.get("amx-bf16")) and LANES == 16
# How products are computed: in float32, or of bfloat16 by vectors or by AMX's tile registers.
FLOAT32, PAIRWISE, TILES = range(3)
LINES = 16  # of a tile register: 64 bytes each, 16 words of two bfloat16 or 16 float32

# Kinds of norms and of MLPs, by their names in `GPTConfig`.
LAYER_NORM, RMS_NORM = 0, 1
GELU, GELU_TANH, SWIGLU = 0, 1, 2
_NORMS = {"layer": LAYER_NORM, "rms": RMS_NORM}
_MLPS = {"gelu": GELU, "gelu_tanh": GELU_TANH, "swiglu": SWIGLU}


def shape_of(config: GPTConfig) -> dict[str, int]:
    """The fields of a job that decoding and training have in common."""
    return {
        "LAYERS": config.num_layers,
        "WIDTH": config.embed_dim,
        "HEADS": config.num_heads,
        "GROUPS": config.kv_heads,
        "HEAD": config.head_size,
        "VOCAB": config.vocab_size,
        "NORM": _NORMS[config.norm],
        "ROTARY": config.position == "rotary",
        "MLP": _MLPS[config.mlp],
        "QK_NORM": config.qk_norm,
    }


_LINE = 64  # bytes of a cache line, and of a vector of AVX-512: aligned, it is within one line


def padded(count: int) -> int:
    """`count` rounded up to whole vectors."""
    return -(-count // LANES) * LANES


class Arena:
    """Memory for many arrays in one piece, each beginning at a cache line.

    One piece, because NumPy asks for large pages (2 MiB instead of 4 KiB) only for large arrays.
    The processor caches few translations of addresses: a model of 10.7 million parameters decoded
    329 tokens/s with an array for each matrix, 512 with one piece (docs/lab-notes.md).
    """

    # | array 0 ... | gap < 64 bytes | array 1 ... | gap | array 2 ... |        free        |
    #                                                                ^ _used

    def __init__(self, size: int) -> None:
        self._pieces = [np.empty(size, np.int8)]
        self._used = 0

    def take(self, count: int, dtype: Any = np.float32, *, zeroed: bool = True) -> NDArray[Any]:
        """An array of `count` numbers, set to 0 unless that is not needed."""
        size = count * np.dtype(dtype).itemsize
        piece = self._pieces[-1]
        start = self._used + -(piece.ctypes.data + self._used) % _LINE
        if start + size > piece.size:
            # The estimate was too small: a further piece, so that earlier arrays keep their place.
            self._pieces.append(np.empty(max(size + _LINE, piece.size // 4), np.int8))
            self._used = 0
            return self.take(count, dtype, zeroed=zeroed)
        self._used = start + size
        array: NDArray[Any] = piece[start : self._used].view(dtype)
        if zeroed:
            array.fill(0)
        return array
