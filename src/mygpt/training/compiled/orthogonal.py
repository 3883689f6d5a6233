"""Muon's step as machine code: momentum, made nearly orthogonal by a Newton-Schulz iteration.

The twin of `mygpt.training.muon`. Threads take matrices in turn.
Letters: A rows, B columns, A at most B once turned.
"""

from __future__ import annotations

import math

from mygpt.engines.cpu.arithmetic import f32
from mygpt.engines.cpu.matmul import DEPTH_BLOCK, multiply
from mygpt.engines.cpu.simd import FLOATS, WHOLE, floats, ints, kernel, skip
from mygpt.training.compiled import layout as at
from mygpt.training.compiled.arithmetic import dot

_ONE = f32(1)
# The polynomial of Jordan et al., "Muon" (2024).
_LINEAR, _CUBIC, _FIFTH = f32(3.4445), f32(-4.7750), f32(2.0315)


@kernel(FLOATS, FLOATS, FLOATS, WHOLE, WHOLE, WHOLE)
def _product(y, x, w, rows, depth, columns):
    """y (rows, columns) = x (rows, depth) w (depth, columns), all of them as they lie."""
    for first in range(0, columns, at.PANEL):
        vectors = min(at.PANEL, columns - first) // at.LANES
        for k in range(0, depth, DEPTH_BLOCK):
            for row in range(0, rows, at.ROWS):
                multiply(
                    skip(y, row * columns + first), columns, skip(x, row * depth + k), depth,
                    skip(w, k * columns + first), columns, min(DEPTH_BLOCK, depth - k),
                    min(at.ROWS, rows - row), vectors, k,
                )  # fmt: skip


@kernel(FLOATS, FLOATS, WHOLE, WHOLE)
def _turn(out, x, rows, columns):
    for row in range(rows):
        own = skip(x, row * columns)
        for column in range(columns):
            out[column * rows + row] = own[column]


@kernel(FLOATS, FLOATS, FLOATS, FLOATS, WHOLE, WHOLE, WHOLE)
def _orthogonalize(x, turned, square, other, a, b, iterations):
    """x (A, B) becomes nearly orthogonal; A is at most B."""
    norm = f32(math.sqrt(dot(x, x, a * b))) + f32(1e-7)
    factor = _ONE / norm
    for i in range(a * b):
        x[i] *= factor
    for _ in range(iterations):
        _turn(turned, x, a, b)
        _product(square, x, turned, a, b, a)
        _product(other, square, square, a, a, a)
        for i in range(a * a):
            other[i] = _CUBIC * square[i] + _FIFTH * other[i]
        for i in range(a):
            other[i * a + i] += _LINEAR
        _product(turned, other, x, a, a, b)
        for i in range(a * b):
            x[i] = turned[i]


@kernel(WHOLE, WHOLE, returns=WHOLE)
def update_matrices(job_address, part):
    """Momentum and step of every matrix that is this part's."""
    job = ints(job_address)
    reals = floats(job[at.REALS])
    room = skip(floats(job[at.MUON_ROOM]), part * job[at.MUON_ROOM_SIZE])
    momentum = reals[at.MOMENTUM]
    for number in range(part, job[at.MUON_COUNT], job[at.THREADS]):
        entry = skip(ints(job[at.MUON_TABLE]), number * at.MUON_SIZE)
        weight, memory = floats(entry[at.MUON_WEIGHT]), floats(entry[at.MUON_MEMORY])
        gradient = floats(entry[at.MUON_GRADIENT])
        rows, columns = entry[at.MUON_ROWS], entry[at.MUON_COLUMNS]
        a, b, count = min(rows, columns), max(rows, columns), rows * columns
        x, turned = room, skip(room, count)
        square, other = skip(turned, count), skip(turned, count + a * a)
        out = turned if rows > columns else x
        for i in range(count):
            memory[i] = momentum * memory[i] + (_ONE - momentum) * gradient[i]
            out[i] = momentum * memory[i] + (_ONE - momentum) * gradient[i]
        if rows > columns:
            _turn(x, turned, rows, columns)
        _orthogonalize(x, turned, square, other, a, b, job[at.MUON_ITERATIONS])
        if rows > columns:
            _turn(turned, x, a, b)
        step = reals[at.MUON_RATE] * f32(math.sqrt(max(_ONE, f32(rows) / f32(columns))))
        keep = _ONE - reals[at.MUON_RATE] * reals[at.MUON_DECAY]
        out = turned if rows > columns else x
        for i in range(count):
            weight[i] = weight[i] * keep - step * out[i]
    return 0
