"""How many drafts pay: measured, while a text is decoded.

A pass that checks n drafts takes longer than one without, and gives more tokens: 1, and one more
for each draft that is right and follows right ones. Both are measured while the text is generated:
what a pass takes, for all texts of a model together; what is right, for each decoding. The number
with the most tokens in a second is used; often that is none. It has no influence on the text.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mygpt.cpu.common.layout import ROWS
from mygpt.cpu.decode import layout as at

MOST_ROWS = 4  # texts that are decoded at once: with more, a pass is bound by its arithmetic
# Numbers of drafts that are tried: a tile is computed for up to ROWS rows.
NUMBERS = sorted({0, 1, 2, 3, ROWS - 1, at.MOST_DRAFTS_A_PASS})
# Before anything is measured every draft counts as right with this probability, as if that had
# been seen in so many passes.
_RIGHT_AT_FIRST, _PASSES_AT_FIRST = 0.7, 3.0
_LEAST_GAIN = 1.03  # drafts must be so much faster
_REMEMBERED = 1000  # passes: then the earlier ones count for half
_PASSED_ON = 8  # passes that what earlier texts have shown counts for in a new one
_FEW = 32  # passes with drafts: before, runs are short, so that a wrong choice costs little
# Other programs make some measurements of a pass's time far too long, and none too short. So a
# shorter one is believed; of a longer one this fraction, and no more than so many times the known.
_MIXED, _MOST_TIMES = 0.3, 2.0
_TRIED = 16  # passes of a run that tries a number of drafts for the first time
# A pass that is shorter reads weights from the core's own cache, and each row costs it almost as
# much as the first: there is nothing to gain, and trying costs 4%.
_SHORTEST_S = 2e-5
# Later tries, since texts and loads change: passes of one, and passes from one to the next, first
# and at most. Where drafts are used a try is one without; that is cheap and can be frequent.
_TRIED_AGAIN, _APART_WITH, _APART_WITHOUT = 8, (64, 2048), (512, 8192)
_FEW_DRAFTS = (1, 2, 3)  # that are tried again where none are used
_AS_MANY_AS_FIT = 2**40

Costs = dict[tuple[bool, int], dict[int, float]]


class Drafts:
    """Where a model's drafts come from, and what its passes take.

    Args:
        table: counts of n-grams, as a kernel reads them (see `layout`), and what must stay alive
            meanwhile; None copies from the text itself alone.
        always: the number of drafts of every pass; None measures which is best.
    """

    def __init__(
        self, table: NDArray[np.int64] | None = None, *alive: object, always: int | None = None
    ) -> None:
        self._table, self._alive, self._always = table, alive, always
        self._costs: Costs = {}
        self._shown = Shown()

    def begin(self, job: NDArray[np.int64]) -> Speculation:
        """Let a job's texts have drafts."""
        job[at.NGRAMS] = 0 if self._table is None else self._table.ctypes.data
        return Speculation(self._costs, self._shown, self._always)


class Shown:
    """In how many passes draft 0, 1, ... could have been right, and in how many it was.

    Attributes:
        passes: (MOST_DRAFTS_A_PASS,) the first number.
        right: likewise the second.
        since_try: passes since another number of drafts than the best was tried.
        tries: how many such tries there were.
    """

    def __init__(self) -> None:
        self.since_try = self.tries = 0
        self.passes = np.zeros(at.MOST_DRAFTS_A_PASS)
        self.right = np.zeros(at.MOST_DRAFTS_A_PASS)

    def add(self, drafts: int, passes: int, right: NDArray[np.int64]) -> None:
        """Count passes with so many drafts; the earlier ones count for less and less."""
        if self.passes[0] > _REMEMBERED:
            self.passes *= 0.5
            self.right *= 0.5
        self.passes[:drafts] += passes
        self.right += right

    def passed_on(self) -> Shown:
        """What a new text begins with."""
        other = Shown()
        scale = np.minimum(1.0, _PASSED_ON / np.maximum(1.0, self.passes))
        other.passes, other.right = self.passes * scale, self.right * scale
        return other


class Counts(NamedTuple):
    """How well drafts did in some slots together."""

    passes: int  # of the model
    right: NDArray[np.int64]  # how often draft 0, 1, ... of a pass was right


def counts_of(slots: NDArray[np.int64]) -> Counts:
    """The counts of slots (B, SLOT_SIZE)."""
    right = slots[:, at.ACCEPTED : at.ACCEPTED + at.MOST_DRAFTS_A_PASS].sum(axis=0)
    return Counts(int(slots[:, at.PASSES].sum()), right)


class Speculation:
    """Chooses the number of drafts of each run of one decoding.

    Args:
        costs: seconds of a pass, by (crowded, rows) and then by the number of drafts. Shared by
            all decodings of a model, and updated.
        shown: how often drafts were right in all of them together; updated too.
        always: see `Drafts`.

    Attributes:
        drafts: the number for the next run.
    """

    def __init__(self, costs: Costs, shown: Shown, always: int | None = None) -> None:
        self._costs, self._always, self._shown = costs, always, shown
        self._own = shown.passed_on()
        self._tried_here = 0  # passes with drafts
        self.drafts = 0

    def choose(self, crowded: bool, rows: int) -> int:
        """Choose the number of drafts for the next run; returns how many passes it may have.

        Args:
            crowded: whether only one thread is used (see `Loop`).
            rows: texts that are decoded.
        """
        if self._always is not None:
            self.drafts = self._always
            return _AS_MANY_AS_FIT
        self.drafts = 0
        costs = self._costs.setdefault((crowded, rows), {})
        if rows > MOST_ROWS:
            return _AS_MANY_AS_FIT
        if 0 not in costs:
            return _TRIED
        if costs[0] < _SHORTEST_S:
            return _AS_MANY_AS_FIT
        tokens = self.expected_tokens()
        speeds = {n: tokens[n] / _estimate(costs, n) for n in NUMBERS}
        best = max(costs, key=lambda n: speeds[n])
        if speeds[best] < _LEAST_GAIN * speeds[0]:
            best = 0
        promising = max(NUMBERS, key=lambda n: speeds[n])
        if promising not in costs and speeds[promising] > _LEAST_GAIN * speeds[best]:
            self.drafts = promising
            return _TRIED
        shown = self._shown
        first, most = _APART_WITH if best else _APART_WITHOUT
        if shown.since_try > min(most, first << min(shown.tries, 8)):
            shown.since_try, shown.tries = 0, shown.tries + 1
            self.drafts = 0 if best else _FEW_DRAFTS[shown.tries % len(_FEW_DRAFTS)]
            return _TRIED_AGAIN
        self.drafts = best
        return _TRIED if best and self._tried_here < _FEW else _AS_MANY_AS_FIT

    def expected_tokens(self) -> list[float]:
        """How many tokens a pass gives with 0, 1, 2, ... drafts."""
        found, right_before = [1.0], 1.0
        for passes, right in zip(self._own.passes.tolist(), self._own.right.tolist(), strict=True):
            seen = right + _PASSES_AT_FIRST * right_before * _RIGHT_AT_FIRST
            right_before = min(right_before, seen / (passes + _PASSES_AT_FIRST))
            found.append(found[-1] + right_before)
        return found

    def record(
        self, crowded: bool, rows: int, passes: int, right: NDArray[np.int64], seconds: float
    ) -> None:
        """Note what a run took, and in how many passes draft 0, 1, ... was right.

        Args:
            crowded: as for `choose`.
            rows: likewise.
            passes: of the model.
            right: for each draft of a pass, of all rows together.
            seconds: of the run; NaN where its passes were too few to measure.
        """
        for shown in (self._own, self._shown):
            shown.add(self.drafts, passes * rows, right)
        self._shown.since_try += passes
        if self.drafts:
            self._tried_here += passes
        if passes and not math.isnan(seconds):
            costs, cost = self._costs.setdefault((crowded, rows), {}), seconds / passes
            known = costs.get(self.drafts, cost)
            longer = known + _MIXED * (min(cost, _MOST_TIMES * known) - known)
            costs[self.drafts] = min(cost, longer)


def _estimate(costs: dict[int, float], drafts: int) -> float:
    """The seconds of a pass with so many drafts: as measured, else between the neighbours.

    With more drafts it takes at least as long: where less was measured for more, that is so.
    """
    known = {n: min(cost for more, cost in costs.items() if more >= n) for n in costs}
    if drafts in known:
        return known[drafts]
    below = max(n for n in known if n < drafts)
    above = min((n for n in known if n > drafts), default=None)
    if above is None:
        return known[below]
    share = (drafts - below) / (above - below)
    return known[below] + share * (known[above] - known[below])
