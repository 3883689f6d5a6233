"""What the panel "Inside" shows of a pass, as plain values."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from mygpt.evaluation.inside_values import largest


@given(arrays(np.float32, st.integers(1, 30), elements=st.integers(-3, 3)), st.integers(1, 9))
def test_the_largest_are_the_first_ones_of_a_stable_sort(values, count):
    expected = sorted(range(len(values)), key=lambda i: (-values[i], i))[:count]
    assert largest(values, count) == expected
