"""Which tokens of a growing text the model reads: the crop of section 15.7, and its alternatives.

Letters: T length of the text, L the context window (`max_seq_len`).
"""

from __future__ import annotations

from typing import Literal

Overflow = Literal["crop", "refill", "stop"]
OVERFLOW_POLICIES: tuple[Overflow, ...] = ("crop", "refill", "stop")


class Window:
    """The first token the model reads, of a text that grows.

    As long as T <= L the model reads the whole text. After that:

        "crop"    the last L tokens at each step, as the chapter does. Keys and values depend on
                  the tokens that were dropped, and learned positions change: so a KV cache is of
                  no use, and L tokens are read for each new one.
        "refill"  the first token stays until the window is full; then the newer half of the
                  window becomes its beginning. L / 2 tokens are read once in L / 2 steps.
        "stop"    nothing: the caller ends generation at T = L.
    """

    def __init__(self, max_seq_len: int, overflow: Overflow) -> None:
        self.max_seq_len = max_seq_len
        self.overflow = overflow
        self._start: int | None = None

    def start(self, length: int) -> int:
        """Index of the first token to read of a text of `length` tokens; lengths never shrink."""
        crop = max(0, length - self.max_seq_len)
        if self._start is None or self.overflow == "crop":
            self._start = crop
        elif length - self._start > self.max_seq_len:
            self._start = length - max(1, self.max_seq_len // 2)
        return self._start
