"""Full forward passes over texts: log-probabilities of prompts, and attention weights.

They run in a thread of their own, one at a time, while another thread decodes.
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
from mygpt.decode.completion import Completion, Row
from mygpt.decode.writer import Writer
from mygpt.server.offload import Offload
from mygpt.server.problems import ApiError
from mygpt.server.samples import Entry


class Reader:
    """Runs forward passes in a thread, in the order of requests.

    Args:
        writer: the model and its tokenizer.
        max_waiting: how many calls may wait.
    """

    def __init__(self, writer: Writer, max_waiting: int) -> None:
        self.writer = writer
        self._offload = Offload("mygpt-read", max_waiting)
        self._cancelled = threading.Event()  # of the call that the thread is running

    async def run(self, function: Callable[..., Any], *args: Any) -> Any:
        """Call `function` in the thread and return its result; `ApiError` 429 if too many wait.

        If this is cancelled, a running function ends at its next `_check_cancelled`.
        """
        cancelled = threading.Event()

        def begin() -> Any:
            self._cancelled = cancelled
            return function(*args)

        try:
            return await self._offload.run(begin)
        finally:
            cancelled.set()

    def _check_cancelled(self) -> None:
        if self._cancelled.is_set():
            raise ApiError(499, "the client has disconnected")

    def close(self) -> None:
        """Take no more calls."""
        self._offload.close()

    def score(self, ids: Sequence[int], added: int, top: int, refill: bool) -> list[Entry]:
        """Each token's log-probability given the tokens before it.

        Args:
            ids: the text, at least one token.
            added: how many tokens at the beginning are not of the text.
            top: how many alternatives to return for each token.
            refill: past the window, whether to continue from its newer half (see `Window`).

        Raises:
            ApiError: if the text is longer than the window and `refill` is False.
        """
        window = self.writer.config.max_seq_len
        if len(ids) > window + 1 and not refill:
            raise ApiError(
                400,
                f"a prompt of {len(ids)} tokens is longer than the window of {window}, so it has "
                'no log-probabilities: shorten it, or send "overflow": "refill"',
                param="prompt",
                code="invalid_value",
            )
        visible = Window(window, "refill")
        entries = [self._entry(ids[0], None, top)]
        for start, group in groupby(range(1, len(ids)), key=visible.start):
            self._check_cancelled()
            positions = list(group)
            logits = self.writer.read(ids[start : positions[-1]], shown=1).logits  # (T, V)
            for position in positions:
                self._check_cancelled()
                entries.append(self._entry(ids[position], logits[position - start - 1], top))
        offset, decoder = 0, self.writer.tokenizer.decoder()
        for token, entry in zip(ids[added:], entries[added:], strict=True):
            entry.offset = offset
            offset += len(decoder.push(token))
        return entries

    def _entry(self, token: int, logits: NDArray[np.float32] | None, top: int) -> Entry:
        if logits is None:  # no tokens precede the text's first one
            return Entry(self.writer.tokenizer.token_text(token), None, None, 0)
        row = Row(self.writer.tokenizer, Completion(""), (), top)
        row.push(token, logits)
        assert row.completion.logprobs is not None
        return Entry.of(row.completion.logprobs[0], 0)

    def attention(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """The attention weights in each layer and head, (N, H, T, T); T is at most the window.

        Row t of a head has the weights of positions 0 to t, which sum to 1.
        """
        return self.writer.read(ids).weights
