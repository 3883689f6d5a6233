"""How many drafts pay: measured, while a text is decoded.

A pass that checks n drafts takes longer than one without, and gives more tokens: 1, and one more
for each draft that is right and follows right ones. Both are measured while the text is generated:
what a pass takes, for all texts of a model together; what is right, for each decoding. The number
with the most tokens in a second is used; often that is none. It has no influence on the text.

A pass may have fewer drafts than it is allowed: near the end of the text or of the window, or where
nothing is known to copy. So the kernel counts passes by the drafts that they checked.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mygpt.cpu.decode import layout as at

MOST_ROWS = 4  # texts that are decoded at once: with more, a pass is bound by its arithmetic
# Numbers of drafts that are tried. With 2 or 5 a pass has one or two full groups of rows (AVX2), or
# with 5 one full tile (AVX-512).
NUMBERS = (0, 1, 2, 3, 5, at.MOST_DRAFTS_A_PASS)
_ALL_NUMBERS = tuple(range(at.MOST_DRAFTS_A_PASS + 1))
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
_TRIED = 16  # passes that try a number of drafts for the first time, in one run or several
# A run's time tells what a pass takes with the number of drafts that so many of its passes checked.
_MOST = 0.5
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
        self._shown = {False: Shown(), True: Shown()}  # by `greedy`

    def begin(self, job: NDArray[np.int64], *, greedy: bool = False) -> Speculation:
        """Let a job's texts have drafts.

        Args:
            job: of the kernels.
            greedy: whether all texts are drawn greedily. Such a text repeats itself, so that more
                drafts are right.
        """
        job[at.NGRAMS] = 0 if self._table is None else self._table.ctypes.data
        return Speculation(self._costs, self._shown[greedy], self._always)


class Shown:
    """In how many passes draft 0, 1, ... was allowed, was checked, and was right.

    Attributes:
        allowed, checked, right: (MOST_DRAFTS_A_PASS,) these three numbers.
        since_try: passes since another number of drafts than the best was tried.
        tries: how many such tries there were.
    """

    def __init__(self) -> None:
        self.since_try = self.tries = 0
        self.allowed, self.checked, self.right = np.zeros((3, at.MOST_DRAFTS_A_PASS))

    def add(self, drafts: int, counts: Counts) -> None:
        """Count passes that were allowed so many drafts; earlier ones count for less and less."""
        if self.allowed[0] > _REMEMBERED:
            for numbers in (self.allowed, self.checked, self.right):
                numbers *= 0.5
        self.allowed[:drafts] += counts.passes.sum()
        self.checked += counts.passes[:0:-1].cumsum()[::-1]  # draft j: passes with j + 1 or more
        self.right += counts.right

    def passed_on(self) -> Shown:
        """What a new text begins with."""
        other = Shown()
        scale = np.minimum(1.0, _PASSED_ON / np.maximum(1.0, self.allowed))
        for name in ("allowed", "checked", "right"):
            setattr(other, name, getattr(self, name) * scale)
        return other


class Counts(NamedTuple):
    """How well drafts did in some slots together.

    Attributes:
        passes: (MOST_DRAFTS_A_PASS + 1,) passes in which a slot had 0, 1, ... drafts checked.
        right: (MOST_DRAFTS_A_PASS,) how often draft 0, 1, ... of a pass was right.
    """

    passes: NDArray[np.int64]
    right: NDArray[np.int64]


def counts_of(slots: NDArray[np.int64]) -> Counts:
    """The counts of slots (B, SLOT_SIZE)."""
    return Counts(
        slots[:, at.PASSES : at.ACCEPTED].sum(axis=0),
        slots[:, at.ACCEPTED : at.SLOT_SIZE].sum(axis=0),
    )


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
        self._with_drafts = 0  # passes
        self._where, self._left = (False, 0), 0  # of a try: (crowded, rows), and passes to come
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
        where = (crowded, rows)
        if self._left > 0 and where == self._where:
            return self._left
        self._where, self._left, self.drafts = where, 0, 0
        costs = self._costs.setdefault(where, {})
        if rows > MOST_ROWS:
            return _AS_MANY_AS_FIT
        if 0 not in costs:
            return self._try(0, _TRIED)
        if costs[0] < _SHORTEST_S:
            return _AS_MANY_AS_FIT
        return self._choose_by(costs, self._speeds(costs))

    def _choose_by(self, costs: dict[int, float], speeds: dict[int, float]) -> int:
        """Choose the number with the best speed, or one to try; as `choose`."""
        best = max(costs.keys() & speeds.keys(), key=lambda n: speeds[n])
        if speeds[best] < _LEAST_GAIN * speeds[0]:
            best = 0
        promising = max(speeds, key=lambda n: speeds[n])
        if promising not in costs and speeds[promising] > _LEAST_GAIN * speeds[best]:
            return self._try(promising, _TRIED)
        shown = self._shown
        first, most = _APART_WITH if best else _APART_WITHOUT
        if shown.since_try > min(most, first << min(shown.tries, 8)):
            shown.since_try, shown.tries = 0, shown.tries + 1
            again = 0 if best else _FEW_DRAFTS[shown.tries % len(_FEW_DRAFTS)]
            return self._try(again, _TRIED_AGAIN)
        self.drafts = best
        return _TRIED if best and self._with_drafts < _FEW else _AS_MANY_AS_FIT

    def _try(self, drafts: int, passes: int) -> int:
        """Use so many drafts for some passes, in one run or several; returns how many."""
        self.drafts, self._left = drafts, passes
        return passes

    def _speeds(self, costs: dict[int, float]) -> dict[int, float]:
        """Tokens in a second with each number of drafts."""
        takes, own = _estimates(costs), self._own
        # Of the passes in which draft number n is allowed, this fraction checks it.
        shares = ((own.checked + _PASSES_AT_FIRST) / (own.allowed + _PASSES_AT_FIRST)).tolist()
        tokens, seconds, right_before = 1.0, takes[0], 1.0
        speeds = [tokens / seconds]
        for n, (allowed, right) in enumerate(
            zip(own.allowed.tolist(), own.right.tolist(), strict=True)
        ):
            seen = right + _PASSES_AT_FIRST * right_before * _RIGHT_AT_FIRST
            right_before = min(right_before, seen / (allowed + _PASSES_AT_FIRST))
            tokens += right_before
            seconds += shares[n] * (takes[n + 1] - takes[n])
            speeds.append(tokens / seconds)
        return {n: speeds[n] for n in NUMBERS}

    def record(self, crowded: bool, rows: int, counts: Counts, seconds: float) -> None:
        """Note what a run took, and how its drafts did.

        Args:
            crowded: as for `choose`.
            rows: likewise.
            counts: of the run, of all rows together.
            seconds: of the run; NaN where this is not the time of its passes.
        """
        for shown in (self._own, self._shown):
            shown.add(self.drafts, counts)
        passes = -(-int(counts.passes.sum()) // rows)
        self._shown.since_try += passes
        self._left -= passes
        if self.drafts:
            self._with_drafts += passes
        if passes and not math.isnan(seconds):
            costs = self._costs.setdefault((crowded, rows), {})
            _note(costs, counts.passes / counts.passes.sum(), seconds / passes)


def _note(costs: dict[int, float], shares: NDArray[np.float64], seconds: float) -> None:
    """Update what a pass takes with the number of drafts that most passes of a run checked.

    Args:
        costs: seconds by number of drafts.
        shares: (MOST_DRAFTS_A_PASS + 1,) of the run's passes, those with 0, 1, ... drafts.
        seconds: of the run's passes, the mean.
    """
    usual = int(shares.argmax())
    if shares[usual] < _MOST:
        return
    cost = seconds
    if costs:
        known = _estimates(costs)
        cost = seconds * known[usual] / float(shares @ known)
    before = costs.get(usual, cost)
    longer = before + _MIXED * (min(cost, _MOST_TIMES * before) - before)
    costs[usual] = min(cost, longer)


def _estimates(costs: dict[int, float]) -> list[float]:
    """The seconds of a pass with 0, 1, ... drafts: as measured, else between the neighbours.

    With more drafts it takes at least as long: where less was measured for more, that is so.
    """
    numbers = sorted(costs)
    known = np.minimum.accumulate([costs[n] for n in reversed(numbers)])[::-1]
    estimates: list[float] = np.interp(_ALL_NUMBERS, numbers, known).tolist()
    return estimates
