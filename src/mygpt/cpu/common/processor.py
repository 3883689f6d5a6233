"""How this processor multiplies matrices of bfloat16, and the use of AMX's tile registers."""

from __future__ import annotations

import ctypes
import functools
import sys

import numpy as np
from numpy.typing import NDArray

from mygpt.cpu.common.layout import FLOAT32, HAS_PAIRS, HAS_TILES, LINES, PAIRWISE, TILES

# The system call arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA): Linux's
# Documentation/arch/x86/xstate.rst.
_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA = 158, 0x1023, 18


@functools.cache
def bfloat16_products() -> int:
    """How products of bfloat16 are computed: TILES, PAIRWISE, or FLOAT32 where they are not.

    AMX is several times as fast as float32 (figures above `amx._emit_sums`). vdpbf16ps is twice as
    fast on AMD's Zen 4, and half as fast on Intel's processors without AMX, so whether it is used
    by default is decided by a measurement (`mygpt.training.planning`).
    """
    if tiles_permitted():
        return TILES
    return PAIRWISE if HAS_PAIRS else FLOAT32


@functools.cache
def tiles_permitted() -> bool:
    """Whether the processor has tile registers, and Linux lets this process use them.

    A process requests them once; its threads and children have them too. Without it, the first
    instruction that uses one would end the process.
    """
    if not HAS_TILES or not sys.platform.startswith("linux"):
        return False
    return ctypes.CDLL(None).syscall(_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA) == 0


def tile_shapes() -> NDArray[np.uint8]:
    """The operand of ldtilecfg: all eight registers have 16 lines of 64 bytes."""
    #     byte 0: palette 1 | 16 ... 31: bytes of each line, 16 bits a register | 48 ... 55: lines
    shapes = np.zeros(64, np.uint8)
    shapes[0] = 1
    shapes[16:32].view(np.uint16)[:] = 64
    shapes[48:56] = LINES
    return shapes
