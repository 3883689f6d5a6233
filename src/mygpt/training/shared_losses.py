"""Validation by several processes: each scores its windows, and all know all losses.

Letters: B batch, T time.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mygpt.evaluation import TokenLosses
from mygpt.training.process_group import ProcessGroup


def shared_losses(
    group: ProcessGroup,
    score: TokenLosses,
    inputs: NDArray[np.integer],
    targets: NDArray[np.integer],
) -> NDArray[np.floating]:
    """Each target's loss, (B, T), the rows shared between the processes; all ask for the same."""
    if group.is_single:
        return score(inputs, targets)
    first, end = (len(inputs) * (group.rank + n) // group.size for n in (0, 1))
    own = slice(first, end) if end > first else slice(0, 1)  # sharded weights need all to come
    found = score(inputs[own], targets[own])[: end - first]
    return np.concatenate(group.gather(found))
