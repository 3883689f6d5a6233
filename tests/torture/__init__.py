"""Torture tests: kills, faults, damage, signals and hostile input, many times at random.

Each is a function `(count, folder) -> Tally` that repeats one trial `count` times in an empty
folder and counts the passes. `make test` runs each with a small count
(`tests/torture/test_torture.py`), `make torture` with the full one (`python -m torture`).
They show what survives the death of a process, not what survives a loss of power.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Tally:
    """How many trials passed, of how many, and what failed."""

    what: str
    passed: int = 0
    of: int = 0
    note: str = ""
    failures: list[str] = field(default_factory=list)

    def count(self, ok: bool, failure: str) -> None:
        """Count one trial; `failure` describes it if it is not `ok`."""
        self.of += 1
        self.passed += bool(ok)
        if not ok:
            self.failures.append(failure)

    @property
    def good(self) -> bool:
        """Whether every trial passed."""
        return self.of > 0 and self.passed == self.of

    def __str__(self) -> str:
        note = f" ({self.note})" if self.note else ""
        wrong = "".join(f"\n    {failure}" for failure in self.failures[:5])
        return f"{self.passed:,} of {self.of:,}  {self.what}{note}{wrong}"
