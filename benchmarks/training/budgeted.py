"""Train one plain recipe for a budget of seconds, in a separate process.

Usage: python -m benchmarks.training.budgeted tutorial|nanogpt PATH RECORDS --seconds S
       [--began T] [--seed N] [--iterations N]
Writes a JSON object per line into RECORDS: {"seconds", "step", "tokens", "loss"} at marks of the
budget. Seconds count from the start of the process, importing torch included, without the time of
the evaluations at the marks, which are not a part of the recipe.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# Fractions of the budget after which a recipe is evaluated: at first in short intervals.
MARKS = (0.02, 0.04, 0.06, 0.08, *(n / 20 for n in range(2, 20)))


class NetClock:
    """Seconds since `began` (of time.monotonic), without those in which it was stopped."""

    def __init__(self, began: float) -> None:
        self._zero = began

    def seconds(self) -> float:
        return time.monotonic() - self._zero

    @contextmanager
    def stopped(self) -> Iterator[None]:
        stopped_at = time.monotonic()
        yield
        self._zero += time.monotonic() - stopped_at


def train(
    recipe: Any,
    clock: NetClock,
    budget_s: float,
    note: Callable[[float, int], None],
    *,
    most_steps: int | None = None,
) -> None:
    """Train until the budget is spent or `most_steps` are done.

    Args:
        recipe: a `Recipe`.
        clock: measures the seconds of the budget.
        budget_s: the budget.
        note: called with (seconds, steps done) at each mark and at the end, the clock stopped.
        most_steps: the largest number of steps; None is no limit.
    """
    marks = [share * budget_s for share in MARKS]
    steps = 0
    while (now := clock.seconds()) < budget_s and steps != most_steps:
        if steps and marks and now >= marks[0]:
            with clock.stopped():
                note(now, steps)
            marks = [mark for mark in marks if mark > now]
        recipe.step(now / budget_s)
        steps += 1
    with clock.stopped():
        note(now, steps)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe", choices=("tutorial", "nanogpt"))
    parser.add_argument("path", type=Path)
    parser.add_argument("records", type=Path)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--began", type=float, default=None, help="time.monotonic() of the start")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--iterations", type=int, default=None, help="of nanogpt, after which it ends"
    )
    options = parser.parse_args()
    clock = NetClock(time.monotonic() if options.began is None else options.began)

    from benchmarks.training.recipes import nanogpt, tutorial
    from benchmarks.training.scoring import Characters, recipe_loss

    text = Characters.of(options.path.read_text(encoding="utf-8"))
    recipe: tutorial.Recipe | nanogpt.Recipe
    if options.recipe == "tutorial":
        recipe = tutorial.Recipe(text.train, len(text.chars), seed=options.seed)
    else:
        recipe = nanogpt.Recipe(
            text.train, len(text.chars), iterations=options.iterations, seed=options.seed
        )
    with options.records.open("w", encoding="utf-8") as records:

        def note(seconds: float, steps: int) -> None:
            loss = recipe_loss(recipe.model, text.test)
            found = {"seconds": seconds, "step": steps, "tokens": steps * recipe.tokens_per_step}
            parameters = sum(p.numel() for p in recipe.model.parameters())
            record = {**found, "loss": loss, "parameters": parameters}
            print(json.dumps(record), file=records, flush=True)

        train(recipe, clock, options.seconds, note, most_steps=options.iterations)


if __name__ == "__main__":
    main()
