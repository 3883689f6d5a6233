"""Looks at whole texts with the model's own forward pass: a prompt's log-probabilities, attention.

It runs in a thread of its own, one look at a time, beside the one that decodes.
Letters: H heads, N layers, T time, V vocabulary.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mygpt.core.window import Window
from mygpt.generation.completion import Completion, Row
from mygpt.generation.writer import Writer
from mygpt.server.offload import Offload
from mygpt.server.problems import ApiError
from mygpt.server.samples import Entry


class Reader:
    """Looks, in the order in which they are asked for.

    Args:
        writer: the model and its tokenizer.
        max_waiting: how many looks may wait.
    """

    def __init__(self, writer: Writer, max_waiting: int) -> None:
        self.writer = writer
        self._offload = Offload("mygpt-read", max_waiting)
        self._over = threading.Event()  # of the look that the thread is at

    async def run(self, look: Callable[..., Any], *args: Any) -> Any:
        """What `look` returns; `ApiError` 429 when too many wait.

        Cancelled, it ends a look that has begun as soon as that asks `_go_on`.
        """
        over = threading.Event()

        def begin() -> Any:
            self._over = over
            return look(*args)

        try:
            return await self._offload.run(begin)
        finally:
            over.set()

    def _go_on(self) -> None:
        if self._over.is_set():
            raise ApiError(499, "the client has gone")

    def close(self) -> None:
        """Take no more looks."""
        self._offload.close()

    def score(self, ids: Sequence[int], given: int, top: int, refill: bool) -> list[Entry]:
        """Each token's log-probability after those before it.

        Args:
            ids: the text, at least one token.
            given: how many tokens at its beginning are none of the text's.
            top: how many alternatives to tell.
            refill: past the window, whether to go on from its newer half (see `Window`).

        Raises:
            ApiError: for a text that is longer than the window where nothing may be forgotten.
        """
        window = self.writer.config.max_seq_len
        if len(ids) > window + 1 and not refill:
            raise ApiError(
                400,
                f"log-probabilities of a prompt of {len(ids)} tokens need more than the window of "
                f"{window}: shorten it, or choose overflow=refill",
                param="prompt",
                code="invalid_value",
            )
        visible = Window(window, "refill")
        told = [self._entry(ids[0], None, top)]
        for start, group in groupby(range(1, len(ids)), key=visible.start):
            self._go_on()
            places = list(group)
            logits = self.writer.read(ids[start : places[-1]], shown=1).logits  # (T, V)
            for place in places:
                self._go_on()
                told.append(self._entry(ids[place], logits[place - start - 1], top))
        offset, decoder = 0, self.writer.tokenizer.decoder()
        for token, entry in zip(ids[given:], told[given:], strict=True):
            entry.offset = offset
            offset += len(decoder.push(token))
        return told

    def _entry(self, token: int, logits: NDArray[np.float32] | None, top: int) -> Entry:
        if logits is None:  # the text's first token comes after nothing
            return Entry(self.writer.tokenizer.token_text(token), None, None, 0)
        row = Row(self.writer.tokenizer, Completion(""), (), top)
        row.push(token, logits)
        assert row.completion.logprobs is not None
        return Entry.of(row.completion.logprobs[0], 0)

    def attention(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """What each position looks at, in each layer and head, (N, H, T, T); T within the window.

        Row t of a head holds the shares, which add up to 1, of positions 0 to t.
        """
        return self.writer.read(ids).weights
