"""Muon's step as machine code: momentum, orthogonalised by a Newton-Schulz iteration.

It does what `cpu/train/muon.py` does in torch, which is its reference implementation. Each thread
takes every n-th matrix.
Letters: A rows, B columns of a matrix that is transposed where needed so that A <= B.
"""

from __future__ import annotations

import math

from mygpt.cpu.common.arithmetic import dot, f32
from mygpt.cpu.common.matmul import product, transpose
from mygpt.cpu.common.simd import FLOATS, INT64, floats, ints, kernel, skip
from mygpt.cpu.train import layout as at

_ONE = f32(1)
# Coefficients of Jordan et al., "Muon: an optimizer for hidden layers in neural networks", 2024.
# They are tuned there for a steep slope at 0 (3.4445), so that small singular values grow fast;
# the price is that values end near 1, not at 1.
_LINEAR, _CUBIC, _FIFTH = f32(3.4445), f32(-4.7750), f32(2.0315)


# One iteration maps X to a X + b (X X^T) X + c (X X^T)**2 X. With the singular value decomposition
# X = U S V^T that is U (a S + b S**3 + c S**5) V^T: the singular vectors stay, and each singular
# value s becomes p(s) = a s + b s**3 + c s**5. Divided by its Frobenius norm first, a matrix has
# all s <= 1, where p brings them towards 1. The result is near U V^T, the orthogonal matrix that is
# closest to X.
# Computed as (a I + b Q + c Q Q) X with Q = X X^T: 2 A A B + A A A multiply-adds, which is why the
# shorter side is A.
@kernel(FLOATS, FLOATS, FLOATS, FLOATS, INT64, INT64, INT64)
def _orthogonalize(x, transposed, square, other, a, b, iterations):
    """x (A, B), A <= B, is replaced by a nearly orthogonal matrix; the others are buffers."""
    norm = f32(math.sqrt(dot(x, x, a * b))) + f32(1e-7)  # of a zero matrix: 0 / 1e-7
    factor = _ONE / norm
    for i in range(a * b):
        x[i] *= factor
    for _ in range(iterations):
        # The matrices are not packed: packing is for weights, which many rows are multiplied by.
        transpose(transposed, a, x, b, a, b)
        product(square, a, x, b, transposed, a, a, b, a)  # Q = X X^T
        product(other, a, square, a, square, a, a, a, a)  # Q Q
        for i in range(a * a):
            other[i] = _CUBIC * square[i] + _FIFTH * other[i]
        for i in range(a):
            other[i * a + i] += _LINEAR
        product(transposed, b, other, a, x, b, a, a, b)
        for i in range(a * b):
            x[i] = transposed[i]


# A step of Muon on a weight W with its gradient G and momentum M (m = MOMENTUM):
#
#     M <- m M + (1 - m) G
#     U  = orthogonalised (m M + (1 - m) G)     Nesterov's look-ahead: M once more towards G
#     W <- (1 - rate decay) W - rate sqrt(max(1, rows / columns)) U
#
# The root keeps the size of an update's effect on activations the same for tall matrices (Jordan et
# al., 2024). Buffers of a thread, with count = rows * columns and a = min(rows, columns):
#
#     | x (count) | transposed (count) | square (a, a) | other (a, a) |
@kernel(INT64, INT64, returns=INT64)
def update_matrices(job_address, part):
    """Momentum and update of every matrix of part number `part`."""
    job = ints(job_address)
    reals = floats(job[at.REALS])
    buffers = skip(floats(job[at.MUON_WORKSPACE]), part * job[at.MUON_WORKSPACE_SIZE])
    momentum = reals[at.MOMENTUM]
    for number in range(part, job[at.MUON_COUNT], job[at.THREADS]):
        entry = skip(ints(job[at.MUON_TABLE]), number * at.MUON_SIZE)
        weight, memory = floats(entry[at.MUON_WEIGHT]), floats(entry[at.MUON_MOMENTUM])
        gradient = floats(entry[at.MUON_GRADIENT])
        rows, columns = entry[at.MUON_ROWS], entry[at.MUON_COLUMNS]
        a, b, count = min(rows, columns), max(rows, columns), rows * columns
        x, transposed = buffers, skip(buffers, count)
        square, other = skip(transposed, count), skip(transposed, count + a * a)
        # A tall matrix is written to the second buffer, then transposed into x; afterwards back.
        out = transposed if rows > columns else x
        for i in range(count):
            memory[i] = momentum * memory[i] + (_ONE - momentum) * gradient[i]
            out[i] = momentum * memory[i] + (_ONE - momentum) * gradient[i]
        if rows > columns:
            transpose(x, rows, transposed, columns, rows, columns)
        _orthogonalize(x, transposed, square, other, a, b, job[at.MUON_ITERATIONS])
        if rows > columns:
            transpose(transposed, a, x, b, a, b)
        step = reals[at.MUON_RATE] * f32(math.sqrt(max(_ONE, f32(rows) / f32(columns))))
        keep = _ONE - reals[at.MUON_RATE] * reals[at.MUON_DECAY]
        out = transposed if rows > columns else x
        for i in range(count):
            weight[i] = weight[i] * keep - step * out[i]
    return 0
