"""What is done to mygpt to see that nothing is lost.

Each torture is a function `(count, folder) -> Figure` that does a thing `count` times in an
empty folder and counts how often it went well. `make test` runs each with a small count
(`tests/torture/test_torture.py`), `make torture` with the full one (`python -m torture`).
What they show is what survives the death of a process; the loss of power they cannot show.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Figure:
    """How often something went well, of how many times; and what went wrong, if anything."""

    what: str
    passed: int = 0
    of: int = 0
    note: str = ""
    failures: list[str] = field(default_factory=list)

    def count(self, ok: bool, failure: str) -> None:
        """Count one trial; `failure` says what went wrong where it is not `ok`."""
        self.of += 1
        self.passed += bool(ok)
        if not ok:
            self.failures.append(failure)

    @property
    def good(self) -> bool:
        """Whether every trial went well."""
        return self.of > 0 and self.passed == self.of

    def __str__(self) -> str:
        note = f" ({self.note})" if self.note else ""
        wrong = "".join(f"\n    {failure}" for failure in self.failures[:5])
        return f"{self.passed:,} of {self.of:,}  {self.what}{note}{wrong}"
