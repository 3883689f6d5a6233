"""Weights of 4 bits: their numbers, and their layout in memory.

A weight is a number of a table of 16 (`VALUES`) times the scale of its group: GROUP inputs that
follow each other, of one output. The table is finer near 0, where most weights are: u (1 + 0.008
u**2) for u = -7.5, -6.5, ..., 7.5, enlarged so that the largest is 127, and rounded to integers,
which a signed byte and a bfloat16 both hold exactly. For normally distributed weights its mean
squared error is 0.64 of that of 16 equal steps up to the largest weight (docs/lab-notes.md).
Letters: C inputs, N outputs, W width of a panel.
"""

from __future__ import annotations

import numpy as np

from mygpt.cpu.common.layout import HAS_PAIRS

GROUP = 32  # inputs that share a scale
LINES = GROUP // 8  # lines of a group: a word holds 8 weights of one output
_u = np.arange(16) - 7.5
_LARGEST = 127 / (7.5 * (1 + 0.008 * 7.5**2))
FACTORS = 0.008 * _LARGEST, _LARGEST  # of u**3 and of u
VALUES = np.rint(_u * (FACTORS[0] * _u**2 + FACTORS[1])).astype(np.float32)
# Scales that are tried for a group, as fractions of the one with which its largest weight is exact.
TRIED = np.array([1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 1.05], np.float32)

# A weight (N, C) in panels of PANEL outputs, as in `matmul`; a panel is groups, one after another:
#
#     line 0 of group 0   | word of n = 0 | word of n = 1 | ... | n = W - 1 |   k = 0 ... 7
#     line 1              | ...                                             |   k = 8 ... 15
#     line 2, line 3      | ...                                             |   k = 16 ... 31
#     scales of group 0   | bfloat16 of n = 0 | n = 1 | ...                 |   W / 2 words
#     line 0 of group 1   | ...
#
# A word has the weights k, k + 2, k + 4, k + 6 in its lower half, from the lowest bits on, and the
# others in its upper half. Shifted to the right by 4 j, the lowest bits of both halves are the pair
# k + 2 j, k + 2 j + 1:
#
#     bits     31      27      23      19      15      11       7       3     0
#              | k + 7 | k + 5 | k + 3 | k + 1 | k + 6 | k + 4 | k + 2 | k   |
#
# vpermw looks both up at once: it uses the lowest 5 bits of each half, so the table is there twice.
# Without bfloat16, vpshufb looks up the lower 4 bits of all bytes at once, then the upper 4; shifts
# by 8 bits, with the sign, make pairs of integers of 16 bits of the bytes.

# Words of a group's inputs: two bfloat16 a word, or two integers of 16 bits and a float32, their
# scale, at the end.
INPUT_WORDS = GROUP // 2 if HAS_PAIRS else GROUP // 2 + 1


def words_of(outputs: int, inputs: int) -> int:
    """Words of a packed matrix with N outputs, a whole number of vectors, and C inputs."""
    groups = -(-inputs // GROUP)
    return groups * (LINES * outputs + outputs // 2)
