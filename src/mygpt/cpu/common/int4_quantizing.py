"""Packing a matrix into weights of 4 bits (see `int4_format`)."""

from __future__ import annotations

import numpy as np

from mygpt.cpu.common.arithmetic import padded, part_start
from mygpt.cpu.common.int4_format import GROUP, LINES
from mygpt.cpu.common.layout import PANEL
from mygpt.cpu.common.simd import (
    FLOATS,
    INT64,
    UINT32,
    bits_of_float,
    float_of_bits,
    floats,
    ints,
    kernel,
    skip,
    words,
)

_16, _UPPER, _HALF_UP = np.uint32(16), np.uint32(0xFFFF0000), np.uint32(0x8000)


@kernel(FLOATS, FLOATS, FLOATS, FLOATS, INT64)
def _nearest(found, index, w, values, factor_bits):
    """found (GROUP,) = the number of `values` nearest to w times a factor; `index` its place."""
    factor = float_of_bits(np.int32(factor_bits))
    for i in range(GROUP):
        found[i] = values[0]
        index[i] = np.float32(0)
    for place in range(15):
        border = (values[place] + values[place + 1]) * np.float32(0.5)
        step = values[place + 1] - values[place]
        for i in range(GROUP):
            above = w[i] * factor > border
            found[i] += step if above else np.float32(0)
            index[i] += np.float32(1) if above else np.float32(0)


@kernel(FLOATS, FLOATS, FLOATS, FLOATS, FLOATS, FLOATS, INT64, returns=UINT32)
def _quantize_group(best, found, index, w, values, tried, tries):
    """best (GROUP,) = the place of each weight's number; returns the bits of the scale.

    Weights of 0 do not count: most of them only fill a row or a head up.
    """
    largest = np.float32(0)
    total = np.float32(0)
    for i in range(GROUP):
        largest = max(largest, abs(w[i]))
        total += w[i]
        best[i] = np.float32(7)
    if total - total != np.float32(0):
        return np.uint32(bits_of_float(total - total))  # NaN: the products are to be so too
    if largest == np.float32(0):
        return np.uint32(0)
    least, scale_of_best = np.float32(np.inf), np.uint32(bits_of_float(largest))
    for n in range(tries):
        bits = np.uint32(bits_of_float(largest / values[15] * tried[n]))
        bits = np.uint32(np.uint32(bits + _HALF_UP) & _UPPER)
        scale = float_of_bits(np.int32(bits))
        factor = np.float32(1) / scale
        _nearest(found, index, w, values, np.int64(bits_of_float(factor)))
        error = np.float32(0)
        for i in range(GROUP):
            away = w[i] - scale * found[i] if w[i] != np.float32(0) else np.float32(0)
            error += away * away
        if error < least:
            least, scale_of_best = error, bits
            for i in range(GROUP):
                best[i] = index[i]
    return scale_of_best


@kernel(INT64, INT64, returns=INT64)
def quantize_int4(job_address, thread):
    """Pack this thread's panels of a matrix (N, C).

    The job: addresses of the matrix and of the panels, N, C, the addresses of 4 GROUP float32 for
    each thread, of `VALUES` and of `TRIED`, the length of `TRIED`, and the number of threads.
    """
    job = ints(job_address)
    rows, panels, outputs, depth = floats(job[0]), words(job[1]), job[2], job[3]
    buffer = skip(floats(job[4]), 4 * GROUP * thread)
    values, tried, tries = floats(job[5]), floats(job[6]), job[7]
    own, best, found, index = (
        buffer,
        skip(buffer, GROUP),
        skip(buffer, 2 * GROUP),
        skip(buffer, 3 * GROUP),
    )
    groups = (depth + GROUP - 1) // GROUP
    count = (outputs + PANEL - 1) // PANEL
    begin = part_start(count, thread, job[8]) * PANEL
    end = min(part_start(count, thread + 1, job[8]) * PANEL, outputs)
    for n in range(begin, end):
        first = n // PANEL * PANEL
        width = min(PANEL, padded(outputs) - first)
        panel = skip(panels, groups * (LINES * first + first // 2))
        for group in range(groups):
            for i in range(GROUP):
                k = group * GROUP + i
                own[i] = rows[n * depth + k] if k < depth else np.float32(0)
            scale = _quantize_group(best, found, index, own, values, tried, tries)
            block = skip(panel, group * (LINES * width + width // 2))
            for line in range(LINES):
                word = np.uint32(0)
                for i in range(8):
                    four = np.uint32(np.int64(best[8 * line + i]))
                    shift = np.uint32(4 * (i // 2) + 16 * (i % 2))
                    word = np.uint32(word | np.uint32(four << shift))
                block[line * width + n - first] = word
            place = LINES * width + (n - first) // 2
            half = np.uint32(scale >> _16)
            if (n - first) % 2:
                half = np.uint32(scale & _UPPER)
            block[place] = np.uint32(block[place] | half)
    return 0
